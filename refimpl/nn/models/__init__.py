"""Models: a table of parameters and a forward pass of one line an operation. See `models.model`."""

from __future__ import annotations

from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import LOSS_MEANS, Model, Parameter

__all__ = ["LOSS_MEANS", "GPTConfig", "MLPConfig", "Model", "Parameter", "gpt_model", "mlp_model"]
