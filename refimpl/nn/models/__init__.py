"""Models: a table of parameters, and a forward pass with one line per operation.

    model.py      what a model is
    gpt.py        GPT-2
    llama.py      Llama, Mistral, Qwen
    mlp.py        a byte language model of a few layers
    registry.py   the models by name
"""

from __future__ import annotations

from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import LOSS_MEANS, Model, Parameter

__all__ = ["LOSS_MEANS", "GPTConfig", "LlamaConfig", "MLPConfig", "Model", "Parameter", "gpt_model", "llama_model", "mlp_model"]
