"""The objects of a training run that `step.train_step` takes, as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refimpl.nn.models.model import Model
from refimpl.numerics.arrays import Array
from refimpl.optim.loss_scale import LossScale
from refimpl.optim.optimizer import Optimizer, Rule
from refimpl.optim.state import State
from refimpl.precision.context import Monitor, Run
from refimpl.step import Batch, StepResult, train_step


@dataclass
class Training:
    """The model, states, optimizer, loss scale and policy of a run. Any of them can be replaced before the first step.

    grad_accum: micro-batches per step.
    """

    model: Model
    state: State
    optimizer: Optimizer
    loss_scale: LossScale
    run: Run
    max_norm: float
    grad_accum: int = 1

    def set_monitor(self, monitor: Monitor | None) -> None:
        """Call `monitor` at every rounding of a tensor from now on, in operations and of states. None: stop."""
        self.run.monitor = self.state.monitor = monitor

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """Make one training step."""
        return train_step(self.model, batches, self.state, self.optimizer, self.loss_scale, self.run, self.max_norm)


UpdateArguments = tuple[Array, Array | float, Array]  # 1/S, the clip coefficient, found_inf


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the innermost optimizer, without those that are wrapped around it."""
    while isinstance(optimizer, WrappedOptimizer):
        optimizer = optimizer.inner
    return optimizer


class WrappedOptimizer(Optimizer):
    """An optimizer around another one. `before` is called ahead of each update, and returns the inner update's arguments."""

    def __init__(self, inner: Optimizer, before: Callable[[State, Array, Array | float, Array], UpdateArguments]) -> None:
        self.inner, self.before, self.schedule = inner, before, inner.schedule

    @property
    def rule(self) -> Rule:  # type: ignore[override]
        """The update rule of the innermost optimizer."""
        return self.inner.rule

    def use(self, rule: Rule) -> None:
        self.inner.use(rule)

    def lr(self, state: State) -> Array:
        return self.inner.lr(state)

    def update(self, state: State, inverse_scale: Array, clip: Array | float, found_inf: Array) -> None:
        self.inner.update(state, *self.before(state, inverse_scale, clip, found_inf))
