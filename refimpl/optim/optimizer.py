"""The optimizer: an update rule, AdamW or SGD, on the flat buffers in blocks.

A block is decoded to FP32, updated, and encoded again, which rounds nothing if the states are FP32. No optimizer hides a copy
of the masters: it updates `state.master`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.optim.adamw import AdamW
from refimpl.optim.gradients import unscaled
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.state_encodings import changed_unless


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
        """Update w and the moments in place, all in one format, from the unscaled, clipped gradient g."""


FAST_PASSES: dict[type[Rule], str] = {AdamW: "adamw", SGD: "sgd"}
"""The rules of which a backend may have a faster version, and its name in `Backend.passes`. A subclass is another rule."""


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
        """Return the learning rate of the next update, 0-d. Errors, on the host: UsageError after the last of the schedule."""
        if state.backend.on_host and state.t >= (n := len(self.learning_rates)):
            raise UsageError(f"all {n} updates of the schedule have been made: give Schedule more steps")
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
        clip = clip if isinstance(clip, float) else widen(clip, state.math_format)
        fast = state.backend.passes.get(FAST_PASSES.get(type(self.rule), ""))
        if fast is not None and self._all_fp32(state):
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
        kinds = self._updated(state)
        with changed_unless(found_inf, {kind: state.parts(kind, block) for kind in kinds}, state.backend) as stored:
            # 1. Read masters and moments in FP32: where they are stored so, the buffers themselves, else decoded copies.
            w, *moments = (state.encodings[kind].read(stored[kind], state.math_format) for kind in kinds)

            # 2. Unscale the gradients, then clip them.
            g = unscaled(state, block, inverse_scale)
            g *= clip

            # 3. Decay the matrices.
            for start, stop in state.decayed:
                matrix = slice(max(start - block.start, 0), max(stop - block.start, 0))
                self.rule.decay(w[matrix], g[matrix], scalars)

            # 4. Update. Kahan summation has the rule update zeros, and adds what it makes of them to w.
            def update(values: Array) -> None:
                self.rule.update_block(values, g, moments, scalars, state.backend.xp)

            state.encodings[kinds[0]].change(stored[kinds[0]], w, update)

            # 5. Write: round to the stored formats. What was read from the buffers themselves is there already.
            for kind, values in zip(kinds, (w, *moments), strict=True):
                state.write(kind, block, stored[kind], values)
