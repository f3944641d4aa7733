"""The parts of a training run, kept together: what `step.train_step` takes."""

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
    """One run's model, states, optimizer, loss scale and policy. Any of them can be replaced before the first step.

    grad_accum: micro-batches per step.
    """

    model: Model
    state: State
    optimizer: Optimizer
    loss_scale: LossScale
    run: Run
    max_norm: float
    grad_accum: int = 1

    def watch(self, monitor: Monitor | None) -> None:
        """Tell `monitor` of every rounding of tensors from now on: inside operations, and of the states (None: no longer)."""
        self.run.monitor = self.state.monitor = monitor

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One training step."""
        return train_step(self.model, batches, self.state, self.optimizer, self.loss_scale, self.run, self.max_norm)


UpdateArguments = tuple[Array, Array | float, Array]  # 1/S, the clip coefficient, found_inf


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that updates, without those that are wrapped around it."""
    while isinstance(optimizer, WrappedOptimizer):
        optimizer = optimizer.inner
    return optimizer


class WrappedOptimizer(Optimizer):
    """An optimizer between the step and another one: `before` sees each update, and may change what is handed on."""

    def __init__(self, inner: Optimizer, before: Callable[[State, Array, Array | float, Array], UpdateArguments]) -> None:
        self.inner, self.before, self.schedule = inner, before, inner.schedule

    @property
    def rule(self) -> Rule:  # type: ignore[override]
        """The rule that really updates."""
        return self.inner.rule

    def use(self, rule: Rule) -> None:
        self.inner.use(rule)

    def lr(self, state: State) -> Array:
        return self.inner.lr(state)

    def update(self, state: State, inverse_scale: Array, clip: Array | float, found_inf: Array) -> None:
        self.inner.update(state, *self.before(state, inverse_scale, clip, found_inf))
