"""Loss scales: the factor S of the loss that keeps small gradients from underflowing in 16 bits.

`DynamicLossScale` is PyTorch's rule. `loss_scalers.py` has the rules of other projects, and `make_loss_scale`, which returns a
loss scale for a name.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.optim.scale_checks import LARGEST, SMALLEST, SavedState, check_scale, check_settings


class LossScale(Protocol):
    """The scale S and the rule by which it adapts. adapts: whether it changes after an overflow."""

    adapts: bool

    @property
    def scale(self) -> Array:
        """S in FP32, 0-d."""

    def update(self, found_inf: Array) -> None:
        """Adapt S after a step. found_inf: whether its gradients had an Inf or NaN, a 0-d array."""

    def state_dict(self) -> dict[str, float | int]:
        """Return the state for a checkpoint. Waits for the device."""

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Load what `state_dict` returned. Errors: ValueError for anything that it cannot have returned."""


class DynamicLossScale:
    """PyTorch's rule: back off when a gradient overflows, and grow after `growth_interval` good steps in a row.

        if found_inf:
            S = fp32(S * backoff_factor)
            good_steps = 0
        else:
            good_steps = good_steps + 1
            if good_steps == growth_interval:
                if isfinite(fp32(S * growth_factor)):
                    S = fp32(S * growth_factor)
                good_steps = 0

    S has no floor: if every step overflows, it is halved down to 0. Products are computed in double precision and rounded once.

    Errors: UsageError for a scale that is not positive, a growth factor <= 1, a backoff factor >= 1, an interval below 1.
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2. PyTorch: torch.amp.GradScaler, with an equal state_dict.
    Differs from the source: CuPy's kernels flush subnormal numbers, so with CuPy an S below 2^-126 is 0.
    """

    adapts = True

    def __init__(
        self, init_scale: float = 65536.0, growth_factor: float = 2.0, backoff_factor: float = 0.5,
        growth_interval: int = 2000, xp: Any = np,
    ) -> None:  # fmt: skip
        check_settings(init_scale, growth_factor, backoff_factor, growth_interval)
        self.xp = xp
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self._scale, self.good_steps = xp.asarray(np.float32(init_scale)), xp.asarray(np.int32(0))

    @property
    def scale(self) -> Array:
        """S in FP32, 0-d."""
        return self._scale

    def update(self, found_inf: Array) -> None:
        """Adapt S after a step, by the rule above."""
        xp, S, exact = self.xp, self._scale, widen(self._scale, "fp64")
        smaller, larger = cast(exact * self.backoff_factor, "fp32"), cast(exact * self.growth_factor, "fp32")
        good_steps = self.good_steps + 1
        due = good_steps == self.growth_interval
        # An `if` would wait for the device, which alone knows found_inf. So both outcomes are computed, and `where` chooses.
        S_if_good = xp.where(due & xp.isfinite(larger), larger, S)
        self._scale = xp.where(found_inf, smaller, S_if_good)
        self.good_steps = xp.where(found_inf | due, 0, good_steps)

    def state_dict(self) -> dict[str, float | int]:
        """Return the state for a checkpoint, under PyTorch's names."""
        return {
            "scale": float(self._scale), "growth_factor": self.growth_factor, "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval, "_growth_tracker": int(self.good_steps),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Load a state. All of it is checked before anything changes. Errors: ValueError, as `SavedState` says."""
        saved = SavedState(state, self.state_dict().keys())
        scale = saved.scale("scale", SMALLEST, LARGEST, "fp32")
        growth_factor, backoff_factor, growth_interval = saved.settings()
        good_steps = saved.count("_growth_tracker", 0, growth_interval - 1)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self._scale, self.good_steps = self.xp.asarray(np.float32(scale)), self.xp.asarray(np.int32(good_steps))


class StaticLossScale:
    """A constant scale; 1 means no loss scaling.

    A step that overflows is skipped as with a dynamic scale, but nothing makes the next overflow less likely.
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2 (constants from 8 to 32K).
    """

    adapts = False

    def __init__(self, scale: float, xp: Any = np) -> None:
        check_scale("loss scale", scale)
        self.xp, self.scale = xp, xp.asarray(np.float32(scale))

    def update(self, found_inf: Array) -> None:
        pass

    def state_dict(self) -> dict[str, float | int]:
        return {"scale": float(self.scale)}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Load a scale. Errors: ValueError for anything but a normal FP32 number."""
        scale = SavedState(state, self.state_dict().keys()).scale("scale", SMALLEST, LARGEST, "fp32")
        self.scale = self.xp.asarray(np.float32(scale))
