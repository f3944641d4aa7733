"""The learning rate's schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update: linear warm-up to lr, then the curve `shape`, one of SCHEDULES.

        update t = 0, 1, ...:  lr (t + 1) / (warmup + 1)  while t < warmup;  then, with p = (t - warmup) / (steps - warmup),

        cosine     min_lr + (lr - min_lr) (1 + cos(pi p)) / 2
        linear     min_lr + (lr - min_lr) (1 - p)
        constant   lr; min_lr is not used

    The rate would reach min_lr at update `steps`, one after the last. A skipped step does not advance the schedule.
    Source: cosine: Loshchilov and Hutter 2017, arXiv 1608.03983, with warm-up as in nanoGPT.
    PyTorch: torch.optim.lr_scheduler: LinearLR (warm-up), then CosineAnnealingLR, LinearLR or ConstantLR.
    """

    lr: float
    min_lr: float
    warmup: int
    steps: int
    shape: str = "cosine"

    def __call__(self, t: int) -> float:
        if t < self.warmup:
            return self.lr * (t + 1) / (self.warmup + 1)
        if self.shape == "constant":
            return self.lr
        progress = min(1.0, (t - self.warmup) / max(1, self.steps - self.warmup))
        share = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr + share * (self.lr - self.min_lr)
