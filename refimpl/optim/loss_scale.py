"""Loss scales: the factor S of the loss that keeps small gradients from underflowing in 16 bits.

`scaler_rules.SCALERS` is a table of the rules by which PyTorch and other projects adapt S. DynamicLossScale computes all of
them but Chainer's, which GradualLossScale does.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np

from refimpl.errors import UsageError, one_line
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.optim.scaler_rules import SCALERS, Scaler, chosen, find_scaler, words

_FP32 = FORMATS["fp32"]


class LossScale(Protocol):
    """The scale S and the rule by which it adapts. adapts: whether it changes after an overflow."""

    adapts: bool

    @property
    def scale(self) -> Array:
        """S in FP32, 0-d."""

    def update(self, found_inf: Array) -> None:
        """Adapt S after a step. found_inf: whether its gradients had an Inf or NaN."""

    def state_dict(self) -> dict[str, float | int]:
        """Return the state for a checkpoint. Waits for the device."""

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Load what `state_dict` returned. Errors: ValueError for anything that it cannot have returned."""


def _check_scale(name: str, scale: float) -> None:
    """Raise UsageError unless the scale is positive and finite when rounded to FP32."""
    if not _FP32.smallest_subnormal / 2 < scale <= _FP32.max:
        raise UsageError(f"{name} {scale}: it must be positive and finite in FP32")


class Saved:
    """A `state_dict` of a loss scale, checked number by number as it is read. Errors: ValueError, in one line."""

    def __init__(self, state: object, keys: Collection[str]) -> None:
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of a loss scale is {_shown(state)}: it must be a dictionary")
        if missing := [key for key in keys if key not in state]:
            raise ValueError(f"the state of a loss scale lacks {missing[0]}")
        if surplus := [key for key in state if key not in keys]:
            raise ValueError(f"the state of a loss scale has {_shown(surplus[0])}, which this one does not know")
        self.state = state

    def number(self, name: str, fits: Callable[[Any], bool], must: str, kind: Any = numbers.Real) -> float:
        """Return the number of that name. must: the condition `fits`, in words."""
        x: Any = self.state[name]
        if not isinstance(x, kind) or isinstance(x, bool) or not fits(x):
            raise ValueError(f"the state of a loss scale has {name} {_shown(x)}: it must be {must}")
        return float(x)

    def count(self, name: str, least: int, most: int = 2**31 - 1) -> int:
        """Return the integer of that name, from `least` to `most`."""
        return int(self.number(name, lambda x: least <= x <= most, f"a whole number from {least} to {most}", numbers.Integral))

    def scale(self, name: str, least: float, most: float, fmt: str) -> float:
        """Return the scale of that name, which must be exact in `fmt`."""
        with np.errstate(over="ignore"):
            must = f"a number of {fmt.upper()} from {least:g} to {most:g}"
            return self.number(name, lambda x: least <= x <= most and float(cast(np.float64(x), fmt)) == x, must)


def _shown(x: object) -> str:
    return one_line(repr(x), 100)


class DynamicLossScale:
    """Back off when a gradient overflows, and grow after `growth_interval` good steps in a row. By default, PyTorch's rule:

        found_inf:  S = S * backoff_factor;  good_steps = 0
        else:       good_steps += 1;  at growth_interval:  S = S * growth_factor if that is finite;  good_steps = 0

    The fields of `scaler` change this rule:

        late              'always': growth at growth_interval + 1;  'first': the same, and after growing good_steps = 1
        floor, ceiling    S = max(S * backoff_factor, floor);  S = min(S * growth_factor, ceiling)
        unbounded         S may grow to infinity
        hysteresis        found_inf: left -= 1, and S stays while left > 0;  refill: left = hysteresis
        tolerance         found_inf: overflows += 1, and S stays while overflows / steps < tolerance, with `steps` the number
                          of steps since S changed, including this one;  overflows = 0 when S backs off
        stops             sets `exhausted`, at which training should stop;  'at the floor': at an overflow while S is at its
                          floor;  'to the floor': at an overflow that would make S <= floor, and S stays

    Products are computed in double precision and rounded once to the format in which the project stores S (`Scaler.fmt`).
    A setting of None means the project's own value: factors 2 and 1/2, or 1/growth_factor if the project has one factor.
    S and its counters are 0-d arrays of the backend and change by `where`, so that nothing waits for the device.

    Errors: UsageError for a growth factor <= 1, a backoff factor >= 1, an interval or a hysteresis below 1, a scale <= 0 or
    below the floor, a floor that is not a normal FP32 number, and a setting that the project does not have (`Scaler.knobs`).
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2, for the idea; `Scaler.source` for each project's constants
      and timing. Flax compares its count of good steps before incrementing it, hence 'always'; DeepSpeed does not count the
      first good step, hence 'first'.
    PyTorch: torch.amp.GradScaler.
    Differs from the source: `left` stops at 0; Megatron and Apex's kernel count below it and DeepSpeed stops at 1, which
      changes no scale. An init_scale above the ceiling is replaced by the ceiling, as in Apex amp; one below the floor is an
      error, as in Megatron. DeepSpeed and fairseq raise an exception when `exhausted` is set. fairseq saves the scale but no
      counters. jmp loses its floor under jit; here it holds. Factors that are not powers of two give other last bits than in
      projects that multiply in FP32 (Megatron) or divide (those with one factor); all but Chainer use 2 and 1/2 by default.
      The step decides what an overflow is: some projects test sums or norms of gradients, and Flax tests after dividing.
      CuPy's kernels flush subnormal FP32 numbers, so with CuPy an FP32 scale below 2^-126 is 0.
    """

    adapts = True

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float | None = None,
        backoff_factor: float | None = None,
        growth_interval: int = 2000,
        xp: Any = np,
        scaler: Scaler = SCALERS["torch"],
        hysteresis: int | None = None,
        scale_floor: float | None = None,
    ) -> None:
        given = {"growth_factor": growth_factor, "backoff_factor": backoff_factor, "scale_floor": scale_floor}
        scaler = chosen(scaler, {**given, "hysteresis": hysteresis})
        _check_scale("init scale", init_scale)
        if init_scale < scaler.floor:
            raise UsageError(f"init scale {init_scale}: it must be at least {scaler.floor:g}, the floor of {scaler.name}")
        if growth_interval < 1:
            raise UsageError(f"growth interval {growth_interval}: it must be at least 1")
        self.xp, self.scaler, self.growth_interval = xp, scaler, growth_interval
        self.growth_factor = 2.0 if growth_factor is None else growth_factor
        one_factor = "backoff_factor" not in scaler.knobs
        self.backoff_factor = (1 / self.growth_factor if one_factor else 0.5) if backoff_factor is None else backoff_factor
        self.hysteresis = scaler.hysteresis if hysteresis is None else hysteresis
        self._start(init_scale if scaler.gradual else min(init_scale, scaler.ceiling))
        self.growth_tracker = xp.asarray(np.int32(0))
        self.hysteresis_tracker = xp.asarray(np.int32(self.hysteresis))
        self.steps_since_change, self.overflows = xp.asarray(np.int32(0)), xp.asarray(np.int32(0))  # for the tolerance
        self.exhausted = xp.asarray(np.bool_(False))

    def _start(self, init_scale: float) -> None:
        """Set S to a number."""
        self.value = self.xp.asarray(np.float32(init_scale) if self.scaler.fmt == "fp32" else np.float64(init_scale))

    @property
    def scale(self) -> Array:
        """S in FP32, 0-d."""
        return cast(self.value, "fp32")

    def update(self, found_inf: Array) -> None:
        """Compute every outcome and choose one by `where`: only the device knows found_inf."""
        xp, scaler, exact = self.xp, self.scaler, widen(self.value, "fp64")
        smaller = cast(exact * self.backoff_factor, scaler.fmt)
        larger = cast(exact * self.growth_factor, scaler.fmt)
        good_steps = self.growth_tracker + 1
        grow = good_steps == self.growth_interval + bool(scaler.late)
        if scaler.floor and scaler.stops != "to the floor":
            smaller = xp.maximum(smaller, scaler.floor)
        if scaler.ceiling < math.inf:
            larger = xp.minimum(larger, scaler.ceiling)
        backs_off = found_inf
        if scaler.hysteresis > 1:
            backs_off = self._out_of_hysteresis(found_inf, grow)
        if scaler.tolerance:
            backs_off = self._too_often(found_inf, grow)
        if backs_off is not found_inf:  # an overflow may leave S unchanged
            smaller = xp.where(backs_off, smaller, self.value)
        if scaler.stops:
            smaller = self._stay_if_exhausted(smaller, found_inf, backs_off)
        grown = xp.where(grow if scaler.unbounded else grow & xp.isfinite(larger), larger, self.value)
        self.value = xp.where(found_inf, smaller, grown)
        restart = xp.zeros_like(good_steps)
        if scaler.late == "first":
            restart = xp.where(found_inf, restart, restart + 1)
        self.growth_tracker = xp.where(found_inf | grow, restart, good_steps)

    def _out_of_hysteresis(self, found_inf: Array, grow: Array) -> Array:
        """Count this overflow, or refill the count. Return whether S backs off: at an overflow with none left."""
        xp, left = self.xp, self.xp.maximum(self.hysteresis_tracker - 1, 0)
        full = xp.full_like(left, self.hysteresis)
        refilled = full if self.scaler.refill == "good step" else xp.where(grow, full, self.hysteresis_tracker)
        self.hysteresis_tracker = xp.where(found_inf, left, refilled)
        return found_inf & (left == 0)

    def _too_often(self, found_inf: Array, grow: Array) -> Array:
        """Count this step. Return whether S backs off: at an overflow when their share of the steps reaches the tolerance."""
        xp, steps, overflows = self.xp, self.steps_since_change + 1, self.overflows + found_inf
        backs_off = found_inf & (overflows / steps >= self.scaler.tolerance)
        self.steps_since_change = xp.where(backs_off | (grow & ~found_inf), 0, steps)
        self.overflows = xp.where(backs_off, 0, overflows)
        return backs_off

    def _stay_if_exhausted(self, smaller: Array, found_inf: Array, backs_off: Array) -> Array:
        """Set `exhausted` if the run should end. Return S after an overflow."""
        if self.scaler.stops == "at the floor":
            ends = backs_off & (self.value == self.scaler.floor)
        else:
            ends = found_inf & (smaller <= self.scaler.floor)
        self.exhausted = self.exhausted | ends
        return self.xp.where(ends, self.value, smaller)

    def state_dict(self) -> dict[str, float | int]:
        state: dict[str, float | int] = {
            "scale": float(self.value),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": int(self.growth_tracker),
        }
        if self.scaler.hysteresis > 1:
            state |= {"hysteresis": self.hysteresis, "_hysteresis_tracker": int(self.hysteresis_tracker)}
        if self.scaler.tolerance:
            state |= {"_steps_since_change": int(self.steps_since_change), "_overflows": int(self.overflows)}
        if self.scaler.stops:
            state["exhausted"] = int(self.exhausted)
        return state

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Load a state. All of it is checked before anything changes.

        Errors: ValueError for a missing or unknown key; for a scale that is 0, subnormal, not finite, not exact in its format,
        below the floor or above the ceiling; for a count that is negative, not an integer or too high.
        """
        new, scaler = Saved(state, self.state_dict().keys()), self.scaler
        scale = new.scale("scale", *self._range(), scaler.fmt)
        growth_factor = new.number("growth_factor", lambda x: 1 < x <= _FP32.max, "above 1")
        backoff_factor = new.number("backoff_factor", lambda x: 0 < x < 1, "between 0 and 1")
        growth_interval = new.count("growth_interval", 1)
        growth_tracker = new.count("_growth_tracker", 0, growth_interval - (not scaler.late))
        if scaler.hysteresis > 1:
            hysteresis = new.count("hysteresis", 1)
            hysteresis_tracker = new.count("_hysteresis_tracker", 0, hysteresis)
        if scaler.tolerance:
            steps = new.count("_steps_since_change", 0)
            overflows = new.count("_overflows", 0)
        exhausted = scaler.stops and new.count("exhausted", 0, 1)
        self._load_more(new)
        self._start(scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.growth_tracker = self.xp.asarray(np.int32(growth_tracker))
        if scaler.hysteresis > 1:
            self.hysteresis, self.hysteresis_tracker = hysteresis, self.xp.asarray(np.int32(hysteresis_tracker))
        if scaler.tolerance:
            self.steps_since_change, self.overflows = (self.xp.asarray(np.int32(x)) for x in (steps, overflows))
        self.exhausted = self.xp.asarray(np.bool_(exhausted))

    def _range(self) -> tuple[float, float]:
        """Return the smallest and the largest S that `load_state_dict` accepts."""
        scaler = self.scaler
        largest = sys.float_info.max if scaler.fmt == "fp64" and scaler.unbounded else _FP32.max
        return max(scaler.floor, _FP32.smallest_normal), largest if scaler.gradual else min(largest, scaler.ceiling)

    def _load_more(self, new: Saved) -> None:
        """Load the entries that only a subclass has."""


class GradualLossScale(DynamicLossScale):
    """Double in every step until the first overflow; after it, grow a little in every good step and halve in a bad one.

        found_inf:  S = S * backoff_factor
        else:       S = S * 2^(1/growth_interval),  and before any overflow  S * growth_factor
        always:     S = max(floor, min(ceiling, S))

    Source: Chainer 7, chainer/optimizer.py: Optimizer.loss_scaling, check_nan_in_grads, update_loss_scale.
    Differs from the source: Chainer always starts at 1; here that is the default, and a start below the floor is an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.overflowed = self.xp.asarray(np.bool_(False))

    def update(self, found_inf: Array) -> None:
        """Compute all three products, and choose one by `where`."""
        xp, S = self.xp, self.value
        self.overflowed = self.overflowed | found_inf
        grown = xp.where(self.overflowed, S * 2.0 ** (1 / self.growth_interval), S * self.growth_factor)
        S = xp.where(found_inf, S * self.backoff_factor, grown)
        self.value = xp.maximum(xp.minimum(S, self.scaler.ceiling), self.scaler.floor)

    def state_dict(self) -> dict[str, float | int]:
        return super().state_dict() | {"overflowed": int(self.overflowed)}

    def _load_more(self, new: Saved) -> None:
        self.overflowed = self.xp.asarray(np.bool_(new.count("overflowed", 0, 1)))


class StaticLossScale:
    """A constant scale; 1 means no loss scaling.

    A step that overflows is skipped as with a dynamic scale, but nothing makes the next overflow less likely.
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2 (constants from 8 to 32K).
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
        """Load a scale. Errors: ValueError for anything but a normal FP32 number."""
        scale = Saved(state, self.state_dict().keys()).scale("scale", _FP32.smallest_normal, _FP32.max, "fp32")
        self.scale = self.xp.asarray(np.float32(scale))


def make_loss_scale(
    kind: str,
    init_scale: float | None = None,
    growth_interval: int | None = None,
    xp: Any = np,
    hysteresis: int | None = None,
    growth_factor: float | None = None,
    backoff_factor: float | None = None,
    scale_floor: float | None = None,
) -> LossScale:
    """Return the loss scale for a name in SCALERS, 'dynamic' (PyTorch's), 'none', or a number.

    The settings apply to a scale that adapts; None means the project's own value. Errors: UsageError for any other name, and
    for a setting that the scale does not have.
    """
    scaler = find_scaler(kind)
    knobs: dict[str, Any] = {"growth_factor": growth_factor, "backoff_factor": backoff_factor, "scale_floor": scale_floor,
                             "hysteresis": hysteresis}  # fmt: skip
    if scaler is not None:
        start = scaler.init_scale if init_scale is None else init_scale
        interval = scaler.growth_interval if growth_interval is None else growth_interval
        make = GradualLossScale if scaler.gradual else DynamicLossScale
        return make(start, growth_interval=interval, xp=xp, scaler=scaler, **knobs)
    try:
        scale = 1.0 if kind == "none" else float(kind)
    except ValueError:
        names = f"{', '.join(SCALERS)}, dynamic, none, or a number"
        raise UsageError(f"loss scale {kind!r}: choose one of {names}") from None
    for name, value in knobs.items():
        if value is not None:
            raise UsageError(f"{words(name)} {value} with loss scale {kind}: only one that adapts can have it")
    return StaticLossScale(scale, xp=xp)
