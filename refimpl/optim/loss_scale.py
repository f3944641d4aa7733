"""Loss scales: what the loss is multiplied by, so that small gradients survive in 16 bits.

`scaler_rules.SCALERS` is a table of how PyTorch and others adapt theirs. One class computes them all, but for the one that
grows gradually.
The scale and its counters are 0-d arrays of the backend and change by `where`: nothing waits for the device.
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
    """S, and how it adapts. `adapts`: whether it changes after an overflow; a run whose scale cannot is given other advice."""

    adapts: bool

    @property
    def scale(self) -> Array:
        """S, 0-d."""

    def update(self, found_inf: Array) -> None:
        """Adapt after a step, given whether its gradients held an Inf or a NaN."""

    def explain(self, before: float, found_inf: bool) -> str:
        """What `update` has just made of the scale `before`, and what it waits for, in words; waits for the device."""

    def state_dict(self) -> dict[str, float | int]:
        """What a checkpoint keeps; waits for the device."""

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on from what `state_dict` returned. Errors: ValueError for anything that it cannot have returned."""


# ------------------------------------------------------------------------------------------------------- how they are computed


def _check_scale(name: str, scale: float) -> None:
    """A scale must still be positive and finite as an fp32 number."""
    if not _FP32.smallest_subnormal / 2 < scale <= _FP32.max:
        raise UsageError(f"{name} {scale}: it must be positive and finite in FP32")


class Saved:
    """A `state_dict` that is read back, number by number. Errors: ValueError where it cannot be one, in one line."""

    def __init__(self, state: object, keys: Collection[str]) -> None:
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of a loss scale is {_shown(state)}: it must be a dictionary")
        if missing := [key for key in keys if key not in state]:
            raise ValueError(f"the state of a loss scale lacks {missing[0]}")
        if surplus := [key for key in state if key not in keys]:
            raise ValueError(f"the state of a loss scale has {_shown(surplus[0])}, which this one does not know")
        self.state = state

    def number(self, name: str, fits: Callable[[Any], bool], must: str, kind: Any = numbers.Real) -> float:
        """The number of that name. `must` says in words what `fits` asks of it."""
        x: Any = self.state[name]
        if not isinstance(x, kind) or isinstance(x, bool) or not fits(x):
            raise ValueError(f"the state of a loss scale has {name} {_shown(x)}: it must be {must}")
        return float(x)

    def count(self, name: str, least: int, most: int = 2**31 - 1) -> int:
        """The whole number of that name."""
        return int(self.number(name, lambda x: least <= x <= most, f"a whole number from {least} to {most}", numbers.Integral))

    def scale(self, name: str, least: float, most: float, fmt: str) -> float:
        """The scale of that name: a number of the format that it is kept in."""
        with np.errstate(over="ignore"):
            must = f"a number of {fmt.upper()} from {least:g} to {most:g}"
            return self.number(name, lambda x: least <= x <= most and float(cast(np.float64(x), fmt)) == x, must)


def _shown(x: object) -> str:
    return one_line(repr(x), 100)


class DynamicLossScale:
    """Back off when a gradient overflows, grow after `growth_interval` good steps in a row; by default PyTorch's way.

        found_inf:  S = S * backoff_factor;  good_steps = 0
        else:       good_steps += 1;  at growth_interval:  S = S * growth_factor if that is finite;  good_steps = 0

    A `scaler` changes this:

        late              'always': growth at growth_interval + 1;  'first': the same, but then good_steps = 1
        floor, ceiling    S = max(S * backoff_factor, floor);  S = min(S * growth_factor, ceiling)
        unbounded         S grows also to what is not finite
        hysteresis        found_inf: left -= 1, and S stays while left > 0;  refill: left = hysteresis
        tolerance         found_inf: overflows += 1, and S stays while overflows / steps < tolerance, with the steps since S
                          changed, this one among them;  overflows = 0 where S backs off
        stops             sets `exhausted`, and whoever trains should stop; 'at the floor': where an overflow should take S down
                          from its floor;  'to the floor': where it would make S <= floor, and S stays

    Products are made in double precision and rounded once to the format that the project keeps S in. `scale` is S in FP32.
    A setting that is None is the project's own: factors 2 and 1/2, or 1/growth_factor where the project has one factor.

    Errors: UsageError for a growth factor <= 1, a backoff factor >= 1, an interval or a hysteresis below 1, a scale <= 0 or
    below the floor, a floor that is no normal FP32 number, and a setting that the project lets nobody choose (`Scaler.knobs`).
    Source: Micikevicius et al. 2018 name the idea; constants and timing are each project's (`Scaler.source`). Flax compares
      its count of good steps before it adds to it, hence 'always'; DeepSpeed does not count the first one, hence 'first'.
    PyTorch: torch.amp.GradScaler.
    Differs from the source: `left` ends at 0; Megatron and the kernel of Apex count on below it and DeepSpeed ends at 1, which
      changes no scale. An init_scale above the ceiling becomes it, as in Apex amp; one below the floor is refused, as in
      Megatron. DeepSpeed and fairseq raise an exception where `exhausted` is set. fairseq saves its scale and no counter. jmp
      loses its floor under jit, here it stays. Factors that are no powers of two give other last bits than the projects that
      multiply in FP32 (Megatron) or divide (those with one factor); all but Chainer's take 2 and 1/2.
      What counts as an overflow is for the step to say: some projects test sums or norms of gradients, and Flax tests after
      dividing. CuPy's kernels flush subnormal FP32 numbers: there an FP32 scale is 0 below 2^-126.
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
        """S becomes a number that the host knows."""
        self.value = self.xp.asarray(np.float32(init_scale) if self.scaler.kept == "fp32" else np.float64(init_scale))

    @property
    def scale(self) -> Array:
        """S, in FP32."""
        return cast(self.value, "fp32")

    def update(self, found_inf: Array) -> None:
        """Every outcome is computed and one chosen by `where`: only the device knows whether there was an Inf."""
        xp, scaler, exact = self.xp, self.scaler, widen(self.value, "fp64")
        smaller = cast(exact * self.backoff_factor, scaler.kept)
        larger = cast(exact * self.growth_factor, scaler.kept)
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
        if backs_off is not found_inf:  # an overflow may leave S as it is
            smaller = xp.where(backs_off, smaller, self.value)
        if scaler.stops:
            smaller = self._kept_where_it_stops(smaller, found_inf, backs_off)
        grown = xp.where(grow if scaler.unbounded else grow & xp.isfinite(larger), larger, self.value)
        self.value = xp.where(found_inf, smaller, grown)
        restart = xp.zeros_like(good_steps)
        if scaler.late == "first":
            restart = xp.where(found_inf, restart, restart + 1)
        self.growth_tracker = xp.where(found_inf | grow, restart, good_steps)

    def _out_of_hysteresis(self, found_inf: Array, grow: Array) -> Array:
        """Count this overflow, or refill; whether there is one, and none left to be borne."""
        xp, left = self.xp, self.xp.maximum(self.hysteresis_tracker - 1, 0)
        full = xp.full_like(left, self.hysteresis)
        refilled = full if self.scaler.refill == "good step" else xp.where(grow, full, self.hysteresis_tracker)
        self.hysteresis_tracker = xp.where(found_inf, left, refilled)
        return found_inf & (left == 0)

    def _too_often(self, found_inf: Array, grow: Array) -> Array:
        """Count this step; whether it overflows, and overflows make up the tolerated share of the steps since S changed."""
        xp, steps, overflows = self.xp, self.steps_since_change + 1, self.overflows + found_inf
        backs_off = found_inf & (overflows / steps >= self.scaler.tolerance)
        self.steps_since_change = xp.where(backs_off | (grow & ~found_inf), 0, steps)
        self.overflows = xp.where(backs_off, 0, overflows)
        return backs_off

    def _kept_where_it_stops(self, smaller: Array, found_inf: Array, backs_off: Array) -> Array:
        """Set `exhausted` where the run should end; what S becomes at an overflow."""
        if self.scaler.stops == "at the floor":
            ends = backs_off & (self.value == self.scaler.floor)
        else:
            ends = found_inf & (smaller <= self.scaler.floor)
        self.exhausted = self.exhausted | ends
        return self.xp.where(ends, self.value, smaller)

    def explain(self, before: float, found_inf: bool) -> str:
        """What `update` has just done with S, which was `before`, in words; waits for the device."""
        scaler, left = self.scaler, int(self.hysteresis_tracker)
        if math.isinf(self.scale):
            return "infinite in FP32"
        if not found_inf:
            return self._explain_growth(before)
        if scaler.stops == "at the floor" and bool(self.exhausted) and before <= scaler.floor:
            return f"an overflow at its floor, {scaler.floor:g}: ends the run"
        if scaler.stops == "to the floor" and bool(self.exhausted) and before * self.backoff_factor <= scaler.floor:
            return f"stays: {before:g} * {self.backoff_factor:g} is not above its floor, {scaler.floor:g}: ends the run"
        if scaler.hysteresis > 1 and left:
            return f"an overflow that is borne: backs off at {'the next one' if left == 1 else f'number {left} from here'}"
        if int(self.overflows):
            return f"an overflow that is borne: below {scaler.tolerance:.0%} of the steps since it changed"
        if before * self.backoff_factor < scaler.floor:
            return f"{'stays at' if before <= scaler.floor else 'backs off to'} {scaler.floor:g}, its floor"
        if before * self.backoff_factor > scaler.ceiling:
            return f"backs off to {scaler.ceiling:g}, its ceiling"
        return f"{before:g} * {self.backoff_factor:g}: backs off"

    def _explain_growth(self, before: float) -> str:
        scaler, after = self.scaler, float(self.scale)
        if after > before:
            to_the_end = before * self.growth_factor > scaler.ceiling
            return f"grows to {scaler.ceiling:g}, its ceiling" if to_the_end else f"{before:g} * {self.growth_factor:g}: grows"
        if not int(self.growth_tracker):  # it was time to grow
            at_ceiling = before >= scaler.ceiling
            return f"stays at {scaler.ceiling:g}, its ceiling" if at_ceiling else "stays: larger, it would be infinite in FP32"
        n = self.growth_interval - int(self.growth_tracker) + (scaler.late != "")
        return f"grows after {n} more good {'step' if n == 1 else 'steps in a row'}"

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
        """Go on from a state. It is checked whole before anything changes.

        Errors: ValueError for what `state_dict` does not return: a key too many or too few, a scale that is 0, subnormal,
        not finite, not of the format that it is kept in, below the floor or above the ceiling, a count that is negative,
        no whole number or higher than it can get.
        """
        new, scaler = Saved(state, self.state_dict().keys()), self.scaler
        scale = new.scale("scale", *self._range(), scaler.kept)
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
        """The least and the largest S that a run can go on with."""
        scaler = self.scaler
        largest = sys.float_info.max if scaler.kept == "fp64" and scaler.unbounded else _FP32.max
        return max(scaler.floor, _FP32.smallest_normal), largest if scaler.gradual else min(largest, scaler.ceiling)

    def _load_more(self, new: Saved) -> None:
        """Load what only a subclass keeps."""


class GradualLossScale(DynamicLossScale):
    """Double in every step until the first overflow; from then on grow by a little in every good step, and halve in a bad one.

        found_inf:  S = S * backoff_factor
        else:       S = S * 2^(1/growth_interval),  and before any overflow  S * growth_factor
        always:     S = max(floor, min(ceiling, S))

    Source: Chainer 7, chainer/optimizer.py: Optimizer.loss_scaling, check_nan_in_grads, update_loss_scale.
    Differs from the source: Chainer always starts at 1, here that is the default; a start below the floor is refused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.overflowed = self.xp.asarray(np.bool_(False))

    def update(self, found_inf: Array) -> None:
        """All three products, one of them chosen."""
        xp, S = self.xp, self.value
        self.overflowed = self.overflowed | found_inf
        grown = xp.where(self.overflowed, S * 2.0 ** (1 / self.growth_interval), S * self.growth_factor)
        S = xp.where(found_inf, S * self.backoff_factor, grown)
        self.value = xp.maximum(xp.minimum(S, self.scaler.ceiling), self.scaler.floor)

    def _explain_growth(self, before: float) -> str:
        if float(self.value) >= self.scaler.ceiling:
            return f"at {self.scaler.ceiling:g}, its ceiling"
        if bool(self.overflowed):
            return f"{before:g} * 2^(1/{self.growth_interval}): grows a little in every good step"
        return f"{before:g} * {self.growth_factor:g}: grows in every step until the first overflow"

    def state_dict(self) -> dict[str, float | int]:
        return super().state_dict() | {"overflowed": int(self.overflowed)}

    def _load_more(self, new: Saved) -> None:
        self.overflowed = self.xp.asarray(np.bool_(new.count("overflowed", 0, 1)))


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

    def explain(self, before: float, found_inf: bool) -> str:
        return "does not adapt"

    def state_dict(self) -> dict[str, float | int]:
        return {"scale": float(self.scale)}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Go on with a scale. Errors: ValueError for anything but a normal FP32 number."""
        scale = Saved(state, self.state_dict().keys()).scale("scale", _FP32.smallest_normal, _FP32.max, "fp32")
        self.scale = self.xp.asarray(np.float32(scale))


# ------------------------------------------------------------------------------------------------------- which one it is


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
    """The loss scale for a name in SCALERS, 'dynamic' (PyTorch's), 'none', or a number.

    All but kind and xp: of one that adapts; None takes the project's own. Errors: UsageError for any other name, and for a
    setting that the scale does not have.
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
