"""SGD, in PyTorch's order of operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.numerics.arrays import Array


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum, unless it is 0, and decoupled weight decay: an `optim.optimizer.Rule`.

        w = w (1 - lr wd);   m = momentum m + g;   w = w - lr m

    PyTorch: torch.optim.SGD with weight_decay=0.
    Differs from the source: torch.optim.SGD adds the decay to the gradient, g + wd w.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        return ("m",) if self.momentum else ()

    def scalars(self, lr: float, t: int) -> tuple[float, ...]:
        return 1 - lr * self.weight_decay, lr

    def decay(self, w: Array, g: Array, scalars: Array) -> None:
        w *= scalars[0]

    def update_block(self, w: Array, g: Array, moments: Sequence[Array], scalars: Array, xp: Any) -> None:
        """Compute the last two formulas. Each operation rounds."""
        _, lr = scalars
        if self.momentum:
            (m,) = moments
            m *= self.momentum
            m += g
            w -= lr * m
        else:
            w -= lr * g
