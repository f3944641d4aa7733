"""Models: a table of parameters, and a forward pass with one line per operation.

    model.py   what a model is
    gpt.py     GPT-2
    mlp.py     a byte language model of a few layers
"""

from __future__ import annotations

from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import LOSS_MEANS, Model, Parameter

__all__ = ["LOSS_MEANS", "GPTConfig", "MLPConfig", "Model", "Parameter", "gpt_model", "mlp_model"]
