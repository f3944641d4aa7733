"""What `import refimpl` offers: the names that a training by hand needs."""

from __future__ import annotations

from refimpl.backends.choose import get_backend
from refimpl.errors import TrainingStopped, UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.llama import LlamaConfig, llama_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.numerics.casts import cast, widen
from refimpl.optim.adamw import AdamW
from refimpl.optim.loss_scalers import make_loss_scale
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import RECIPES, get_recipe
from refimpl.step import StepResult, forward_backward, train_step
from refimpl.training.data import sample_batch
from refimpl.training.setup import Training, make_training

__all__ = [
    "RECIPES", "SGD", "AdamW", "GPTConfig", "LlamaConfig", "MLPConfig", "Optimizer", "Run", "Schedule", "State", "StepResult",
    "Training", "TrainingStopped", "UsageError", "cast", "forward_backward", "get_backend", "get_recipe", "gpt_model",
    "llama_model", "make_loss_scale", "make_training", "mlp_model", "sample_batch", "train_step", "widen",
]  # fmt: skip
