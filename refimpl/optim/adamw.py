"""AdamW, in PyTorch's order of operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.numerics.arrays import Array


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay: an `optim.optimizer.Rule`.

        w  = w (1 - lr wd)                        for matrices only
        m  = m + (1 - beta1) (g - m)
        v  = v beta2 + (1 - beta2) g g
        w  = w - (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Bias corrections are computed in double precision. Source: Loshchilov and Hutter 2019, arXiv 1711.05101; Kingma and Ba
    2015, arXiv 1412.6980. PyTorch: torch.optim.AdamW, whose kernels fuse some of these products with their sums.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: tuple[str, ...] = ("m", "v")

    def scalars(self, lr: float, t: int) -> tuple[float, ...]:
        beta1, beta2 = self.betas
        return 1 - lr * self.weight_decay, lr / (1 - beta1**t), math.sqrt(1 - beta2**t)

    def decay(self, w: Array, g: Array, scalars: Array) -> None:
        w *= scalars[0]

    def update_block(self, w: Array, g: Array, moments: Sequence[Array], scalars: Array, xp: Any) -> None:
        """Compute the last three lines of the formula. Each operation rounds."""
        (m, v), (beta1, beta2), (_, step_size, root_correction) = moments, self.betas, scalars
        m += (1 - beta1) * (g - m)
        v *= beta2
        v += (1 - beta2) * g * g
        denominator = xp.sqrt(v) / root_correction + self.eps
        w -= step_size * m / denominator
