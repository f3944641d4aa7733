"""The learning rate's schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refimpl.errors import UsageError, unknown

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update: linear warm-up to lr, then the curve `shape`, one of SCHEDULES.

        update t = 0, 1, ...:  lr (t + 1) / (warmup + 1)  while t < warmup;  then, with p = (t - warmup) / (steps - warmup),

        cosine     min_lr + (lr - min_lr) (1 + cos(pi p)) / 2
        linear     min_lr + (lr - min_lr) (1 - p)
        constant   lr; min_lr is not used

    The rate would reach min_lr at update `steps`, one after the last. A skipped step does not advance the schedule.
    Errors: UsageError for another shape, and for numbers out of range.
    Source: cosine: Loshchilov and Hutter 2017, arXiv 1608.03983, with warm-up as in nanoGPT.
    PyTorch: torch.optim.lr_scheduler: LinearLR (warm-up), then CosineAnnealingLR, LinearLR or ConstantLR.
    """

    lr: float
    min_lr: float
    warmup: int
    steps: int
    shape: str = "cosine"

    def __post_init__(self) -> None:
        if self.shape not in SCHEDULES:
            raise UsageError(unknown("schedule", self.shape, SCHEDULES))
        if self.steps < 1 or self.warmup < 0:
            raise UsageError(f"steps is {self.steps} and warmup {self.warmup}: they must be at least 1 and 0")
        if not (0 <= self.lr < math.inf and 0 <= self.min_lr < math.inf):
            raise UsageError(f"lr is {self.lr} and min_lr {self.min_lr}: both must be 0 or more and finite")

    def __call__(self, t: int) -> float:
        if t < self.warmup:
            return self.lr * (t + 1) / (self.warmup + 1)
        if self.shape == "constant":
            return self.lr
        progress = min(1.0, (t - self.warmup) / max(1, self.steps - self.warmup))
        share = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr + share * (self.lr - self.min_lr)
