"""A training of a few lines: a state, an optimizer, a loss scale, and `step.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.backends.base import Backend
from refimpl.nn.models.model import Model
from refimpl.optim.adamw import AdamW
from refimpl.optim.loss_scalers import make_loss_scale
from refimpl.optim.optimizer import Optimizer, Rule
from refimpl.optim.schedule import Schedule
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.step import Batch, StepResult, forward_backward, train_step


class Training:
    """One run: its state, its optimizer and its loss scale, on one of the backends."""

    def __init__(
        self, backend: Backend, model: Model, recipe: str, grad_accum: int = 1, lr: float = 3e-3, rule: Rule | None = None,
        steps: int = 200, loss_scale: str | None = None, rounded: bool = False, **more: float,
    ) -> None:  # fmt: skip
        """loss_scale and more: arguments of `make_loss_scale`. rounded: masters start from rounded weights."""
        row, rule = get_recipe(recipe), rule or AdamW()
        self.backend, self.model = backend, model
        self.run = Run(row.policy, backend)
        self.state = State(model, row.state_encodings(rule.moments, grad_accum), backend)
        self.state.load_weights(model.initial_weights(np.random.default_rng(0)), rounded)
        self.optimizer = Optimizer(rule, Schedule(lr, lr, 0, steps), backend.xp)
        self.loss_scale = make_loss_scale(loss_scale or row.loss_scale, xp=backend.xp, **more)

    def step(self, *batches: Batch, max_norm: float = 1.0) -> StepResult:
        there = [self.there(*batch) for batch in batches]
        return train_step(self.model, there, self.state, self.optimizer, self.loss_scale, self.run, max_norm)

    def forward_backward(self, *batches: Batch, S: float = 1.0) -> None:
        """Stage 2 alone, which leaves the gradients of S times the loss."""
        (scale,) = self.there(np.float32(S))
        forward_backward(self.model, [self.there(*batch) for batch in batches], self.state, scale, self.run)

    def there(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        return tuple(self.backend.from_host(x) for x in arrays)

    def host(self, kind: str) -> np.ndarray:
        """A copy of one of the buffers, as a NumPy array."""
        buffer = self.state.master if kind == "master" else self.state.buffers[kind]
        return self.backend.to_host(buffer).copy()

    def bits(self, *without: str) -> dict[str, bytes]:
        kept = {kind: self.host(kind).tobytes() for kind in self.state.buffers if kind not in without}
        return kept | {"t": self.backend.to_host(self.state.t).tobytes()}
