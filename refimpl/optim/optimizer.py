"""Optimizers: AdamW and SGD, in PyTorch's order of operations, on the flat buffers in blocks.

A block is decoded to FP32, updated, and encoded again, which rounds nothing if the states are FP32. No optimizer hides a copy
of the masters: it updates `state.master`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.optim.gradients import unscaled
from refimpl.optim.state import State
from refimpl.precision.state_encodings import replace_unless


class Rule(Protocol):
    """An update rule: the moments that it needs, the scalars of each update, and the update of one block."""

    @property
    def moments(self) -> tuple[str, ...]:
        """The kinds of state that the rule needs beside the weights."""

    def scalars(self, lr: float, t: int) -> tuple[float, ...]:
        """Return the scalars that update number t (from 1) needs, computed in double precision."""

    def decay(self, w: Array, g: Array, scalars: Array) -> None:
        """Apply weight decay to a slice of a block, in place, before its update. Called for the parameters that decay."""

    def update_block(self, w: Array, g: Array, moments: Sequence[Array], scalars: Array, xp: Any) -> None:
        """Update w and the moments in place, all in one format, from the unscaled, clipped gradient g, which is overwritten."""


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

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
        """Compute the last three lines of the formula, in the memory of `difference` and `g` once they have been read."""
        (m, v), (beta1, beta2) = moments, self.betas
        _, step_size, root_correction = scalars
        difference = g - m
        difference *= 1 - beta1
        m += difference
        v *= beta2
        square = difference  # the same memory
        xp.multiply(g, 1 - beta2, out=square)
        square *= g
        v += square
        denominator = xp.sqrt(v, out=square)
        denominator /= root_correction
        denominator += self.eps
        step = xp.multiply(m, step_size, out=g)
        step /= denominator
        w -= step


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum (unless it is 0) and decoupled weight decay, as in AdamW.

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
        """Compute the last two formulas; g becomes the step."""
        if moments:
            (m,) = moments
            m *= self.momentum
            m += g
            xp.multiply(m, scalars[1], out=g)
        else:
            g *= scalars[1]
        w -= g


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


class Optimizer:
    """An update rule with its schedule.

    The scalars of all updates are computed in advance, in double precision, as a table on the device. `state.t`, also on the
    device, is its index, so that no step waits for the device to learn the number of updates.
    """

    def __init__(self, rule: Rule, schedule: Schedule, xp: Any = np) -> None:
        self.schedule, self.xp = schedule, xp
        self.learning_rates = xp.asarray(np.array([schedule(t) for t in range(schedule.steps)]))
        self.use(rule)

    def use(self, rule: Rule) -> None:
        """Replace the update rule."""
        self.rule, schedule = rule, self.schedule
        self.scalars = self.xp.asarray(np.array([rule.scalars(schedule(t), t + 1) for t in range(schedule.steps)]))

    def lr(self, state: State) -> Array:
        """Return the learning rate of the next update, 0-d. Errors: IndexError after the last update of the schedule."""
        return self.learning_rates[state.t]

    def update(self, state: State, inverse_scale: Array, clip: Array | float, found_inf: Array) -> None:
        """Update masters and moments from the gradients of the scaled loss, or leave them unchanged if found_inf is set.

        Each block of gradients is widened, multiplied by 1/S and then by the clip coefficient. The update counter `t` does not
        advance in a skipped step.
        Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2. PyTorch: GradScaler.step(optimizer).
        """
        if state.backend.on_host and found_inf:  # reading found_inf costs nothing on the host; on a device it would wait
            return
        scalars = cast(self.scalars[state.t], state.math_format)
        fast = state.backend.passes.get(type(self.rule).__name__) if self._all_fp32(state) else None
        if fast is not None:
            fast(self.rule, state, inverse_scale, clip, scalars, found_inf)
        else:
            state.each_block(lambda block: self._update_block(state, block, inverse_scale, clip, scalars, found_inf))
        state.t = state.backend.xp.where(found_inf, state.t, state.t + 1)

    def _updated(self, state: State) -> list[str]:
        """Return the kinds of state that an update changes."""
        return [state.master_kind, *self.rule.moments]

    def _all_fp32(self, state: State) -> bool:
        """Return whether the updated states are plain FP32 and gradients are read from `grads`: what fast passes support."""
        return {state.stored[kind] for kind in self._updated(state)} == {"fp32"} and "main_grads" not in state.stored

    def _update_block(
        self, state: State, block: slice, inverse_scale: Array, clip: Array | float, scalars: Array, found_inf: Array
    ) -> None:
        fmt, xp = state.math_format, state.backend.xp
        buffers = {kind: state.buffer_slices(kind, block) for kind in self._updated(state)}
        new = buffers
        if not state.backend.on_host:  # found_inf is known to the device only: update a copy, then keep it or not
            new = {kind: {part: x.copy() for part, x in slices.items()} for kind, slices in buffers.items()}
        w, *moments = (state.encodings[kind].read(slices, fmt) for kind, slices in new.items())
        g = unscaled(state, block, inverse_scale)
        g *= clip if isinstance(clip, float) else widen(clip, fmt)
        for start, stop in state.layout.decayed:
            overlap = slice(max(start - block.start, 0), max(stop - block.start, 0))
            self.rule.decay(w[overlap], g[overlap], scalars)
        encoding = state.encodings[state.master_kind]
        encoding.change(new[state.master_kind], w, lambda x: self.rule.update_block(x, g, moments, scalars, xp))
        for (kind, slices), values in zip(new.items(), (w, *moments), strict=True):
            state.write(kind, slices, values, f"update.{kind}", block.start)
        if not state.backend.on_host:
            for kind, slices in buffers.items():
                replace_unless(found_inf, slices, new[kind], xp)
