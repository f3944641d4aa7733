"""The models by name: the class of the sizes, and the function that makes the model of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.nn.loss import IGNORE_INDEX
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import Model

Sizes = GPTConfig | LlamaConfig | MLPConfig

SIZES: Mapping[str, type[Sizes]] = {"gpt": GPTConfig, "llama": LlamaConfig, "mlp": MLPConfig}
"""Name of a model -> the class of its sizes."""


def make_model(name: str, sizes: Mapping[str, Any], ignore_index: int = IGNORE_INDEX, loss_mean: str = "tokens") -> Model:
    """Return the model of that name and these sizes, the fields of its class. Errors: UsageError for an unknown size."""
    config = SIZES[name](**sizes)
    if isinstance(config, GPTConfig):
        return gpt_model(config, ignore_index, loss_mean)
    if isinstance(config, LlamaConfig):
        return llama_model(config, ignore_index, loss_mean)
    return mlp_model(config, ignore_index, loss_mean)
