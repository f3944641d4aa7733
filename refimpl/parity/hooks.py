"""An optimizer around another one, by which a trace observes the updates of a run and a known mistake changes them."""

from __future__ import annotations

from collections.abc import Callable

from refimpl.numerics.arrays import Array
from refimpl.optim.optimizer import Optimizer, Rule
from refimpl.optim.state import State

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
