"""Loss scales: what the loss is multiplied by, so that small gradients survive in 16 bits.

The scale and its counter are 0-d arrays of the backend and change by `where`: nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from refimpl.cast import cast, widen
from refimpl.errors import UsageError
from refimpl.formats import FORMATS

Array = Any


class LossScale(Protocol):
    """S, and how it adapts. `adapts`: whether it changes after an overflow; a run whose scale cannot is given other advice."""

    adapts: bool

    @property
    def scale(self) -> Array:
        """S, 0-d."""

    def update(self, found_inf: Array) -> None:
        """Adapt after a step, given whether its gradients held an Inf or a NaN."""

    def state_dict(self) -> dict[str, float | int]:
        """What a checkpoint keeps; waits for the device."""

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """The way back."""


def _check_scale(name: str, scale: float) -> None:
    """A scale must still be positive and finite as an fp32 number."""
    fp32 = FORMATS["fp32"]
    if not fp32.smallest_subnormal / 2 < scale <= fp32.max:
        raise UsageError(f"{name} {scale}: it must be positive and finite in FP32")


class DynamicLossScale:
    """Back off at once when a gradient overflows, grow after `growth_interval` good steps in a row.

        found_inf:  S = fp32(S * backoff_factor);  tracker = 0
        else:       tracker += 1;  at growth_interval:  S = fp32(S * growth_factor) if that is finite;  tracker = 0

    Products are made in double precision and rounded once to fp32. There is no floor and no ceiling but fp32's.
    Errors: UsageError for a growth factor <= 1, a backoff factor >= 1, an interval below 1 or a scale <= 0.
    Source: Micikevicius et al. 2018 name the idea; constants and timing are PyTorch's. PyTorch: torch.amp.GradScaler.
    """

    adapts = True

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        xp: Any = np,
    ) -> None:
        _check_scale("init scale", init_scale)
        if not 1 < growth_factor < math.inf or not 0 < backoff_factor < 1:
            raise UsageError(f"growth factor {growth_factor} must be > 1 and backoff factor {backoff_factor} in (0, 1)")
        if growth_interval < 1:
            raise UsageError(f"growth interval {growth_interval}: it must be at least 1")
        self.xp = xp
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.scale = xp.asarray(np.float32(init_scale))
        self.growth_tracker = xp.asarray(np.int32(0))

    def update(self, found_inf: Array) -> None:
        """The two lines above, both computed and one chosen by `where`: only the device knows whether there was an Inf."""
        xp = self.xp
        exact = widen(self.scale, "fp64")
        smaller = cast(exact * self.backoff_factor, "fp32")
        larger = cast(exact * self.growth_factor, "fp32")
        good_steps = self.growth_tracker + 1
        grow = good_steps == self.growth_interval
        grown = xp.where(grow & xp.isfinite(larger), larger, self.scale)
        self.scale = xp.where(found_inf, smaller, grown)
        self.growth_tracker = xp.where(found_inf | grow, xp.zeros_like(good_steps), good_steps)

    def state_dict(self) -> dict[str, float | int]:
        return {
            "scale": float(self.scale),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": int(self.growth_tracker),
        }

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.scale = self.xp.asarray(np.float32(state["scale"]))
        self.growth_factor, self.backoff_factor = float(state["growth_factor"]), float(state["backoff_factor"])
        self.growth_interval = int(state["growth_interval"])
        self.growth_tracker = self.xp.asarray(np.int32(state["_growth_tracker"]))


class StaticLossScale:
    """A scale that never changes; 1 is no loss scale at all.

    An overflow under a static scale is skipped like any other, but nothing makes the next one less likely.
    Source: Micikevicius et al. 2018, section 3.2 (constants 8 to 32K).
    """

    def __init__(self, scale: float, xp: Any = np) -> None:
        _check_scale("loss scale", scale)
        self.xp = xp
        self.scale = xp.asarray(np.float32(scale))
        self.adapts = False

    def update(self, found_inf: Array) -> None:
        pass

    def state_dict(self) -> dict[str, float | int]:
        return {"scale": float(self.scale)}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.scale = self.xp.asarray(np.float32(state["scale"]))


def make_loss_scale(kind: str, init_scale: float = 65536.0, growth_interval: int = 2000, xp: Any = np) -> LossScale:
    """The loss scale for 'dynamic', 'none', or a number. Errors: UsageError for anything else."""
    if kind == "dynamic":
        return DynamicLossScale(init_scale, growth_interval=growth_interval, xp=xp)
    if kind == "none":
        return StaticLossScale(1.0, xp=xp)
    try:
        scale = float(kind)
    except ValueError:
        raise UsageError(f"loss scale {kind!r}: choose dynamic, none, or a number") from None
    return StaticLossScale(scale, xp=xp)
