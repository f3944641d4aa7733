"""The rules by which other projects adapt their loss scales, as a table and as a class that computes them.

`make_loss_scale` returns any loss scale, PyTorch's and constant ones included, for its name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.errors import UsageError, unknown
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.optim.loss_scale import DynamicLossScale, LossScale, StaticLossScale
from refimpl.optim.scale_checks import LARGEST, SMALLEST, SavedState, check_count


@dataclass(frozen=True)
class ScalerRule:
    """The rule of one project. The defaults are PyTorch's, so a row of SCALER_RULES shows only how the project differs from it.

        late              'always': growth at growth_interval + 1;  'first': the same, and after growing good_steps = 1
        floor, ceiling    S = max(S * backoff_factor, floor);  S = min(S * growth_factor, ceiling)
        unbounded         S may grow to infinity
        hysteresis        found_inf: left -= 1, and S stays while left > 0;  refill: left = hysteresis
        tolerance         found_inf: overflows += 1, and S stays while overflows / steps < tolerance, with `steps` the number
                          of steps since S changed, including this one;  overflows = 0 when S backs off
        stops             sets `exhausted`, at which training should stop;  'at the floor': at an overflow while S is at its
                          floor;  'to the floor': at an overflow that would make S <= floor, and S stays
    """

    name: str
    source: str

    init_scale: float = 2.0**16
    growth_interval: int = 2000
    late: str = ""  # S grows one step later than growth_interval: 'always', or the 'first' time after an overflow
    gradual: bool = False  # doubles in every step until the first overflow; then a factor of 2^(1/growth_interval) per step

    floor: float = 0.0  # the smallest S
    stops: str = ""  # an overflow ends the run: 'at the floor', if S is there; 'to the floor', if S would get there
    ceiling: float = math.inf  # the largest S
    unbounded: bool = False  # S may grow beyond FP32's largest number; otherwise S stays instead

    hysteresis: int = 1  # overflows needed to back off
    refill: str = "growth"  # what resets their count: 'growth', or any 'good step'

    tolerance: float = 0.0  # S backs off when this share of the steps since its last change overflowed

    fmt: str = "fp32"  # the format in which the project stores S; 'fp64' is a Python float
    knobs: tuple[str, ...] = ("growth_factor", "backoff_factor")  # the settings beside init_scale and growth_interval


_FP32 = FORMATS["fp32"]

SCALER_RULES: dict[str, ScalerRule] = {
    rule.name: rule
    for rule in (
        ScalerRule("torch", "PyTorch, torch/amp/grad_scaler.py: GradScaler.update"),
        ScalerRule("apex-amp", "NVIDIA Apex (until 2025), apex/amp/scaler.py: LossScaler.update_scale",
                   ceiling=2.0**24, fmt="fp64", knobs=("growth_factor", "scale_floor")),
        ScalerRule("apex-fp16", "NVIDIA Apex, apex/fp16_utils/loss_scaler.py: DynamicLossScaler.update_scale",
                   init_scale=2.0**32, growth_interval=1000, floor=1.0, unbounded=True, fmt="fp64", knobs=("growth_factor",)),
        ScalerRule("apex-kernel", "NVIDIA Apex, csrc/update_scale_hysteresis.cu: update_scale_hysteresis_cuda_kernel",
                   hysteresis=2, refill="good step", knobs=("growth_factor", "backoff_factor", "hysteresis")),
        ScalerRule("megatron", "Megatron-LM, megatron/core/optimizer/grad_scaler.py: DynamicGradScaler.update",
                   init_scale=2.0**32, growth_interval=1000, floor=1.0, unbounded=True, hysteresis=2,
                   knobs=("growth_factor", "backoff_factor", "scale_floor", "hysteresis")),
        ScalerRule("deepspeed", "DeepSpeed, deepspeed/runtime/fp16/loss_scaler.py: DynamicLossScaler.update_scale",
                   growth_interval=1000, late="first", floor=1.0, stops="at the floor", unbounded=True, hysteresis=2,
                   fmt="fp64", knobs=("growth_factor", "scale_floor", "hysteresis")),
        ScalerRule("deepspeed-consecutive", "the same with consecutive_hysteresis=True",
                   growth_interval=1000, late="first", floor=1.0, stops="at the floor", unbounded=True, hysteresis=2,
                   refill="good step", fmt="fp64", knobs=("growth_factor", "scale_floor", "hysteresis")),
        ScalerRule("fairseq", "fairseq, fairseq/optim/dynamic_loss_scaler.py: DynamicLossScaler.check_overflow, update",
                   init_scale=2.0**7, growth_interval=2**14, floor=1e-4, stops="to the floor", unbounded=True, fmt="fp64",
                   knobs=("growth_factor", "scale_floor")),
        ScalerRule("fairseq-tolerance", "the same with fp16_scale_tolerance=0.05",
                   init_scale=2.0**7, growth_interval=2**14, floor=1e-4, stops="to the floor", unbounded=True, tolerance=0.05,
                   fmt="fp64", knobs=("growth_factor", "scale_floor")),
        ScalerRule("flax", "Flax, flax/training/dynamic_scale.py: DynamicScale.value_and_grad",
                   late="always", floor=_FP32.smallest_normal, ceiling=_FP32.max,
                   knobs=("growth_factor", "backoff_factor", "scale_floor")),
        ScalerRule("jmp", "jmp, jmp/_src/loss_scale.py: DynamicLossScale.adjust",
                   init_scale=2.0**15, floor=1.0, knobs=("growth_factor", "scale_floor")),
        ScalerRule("chainer", "Chainer 7, chainer/optimizer.py: Optimizer.update_loss_scale",
                   init_scale=1.0, growth_interval=1000, gradual=True, floor=1.0, ceiling=FORMATS["fp16"].max, fmt="fp64",
                   knobs=()),
    )
}  # fmt: skip


def find_scaler(kind: str) -> ScalerRule | None:
    """Return the row of SCALER_RULES of that name, PyTorch's for 'dynamic', or None for 'none', a number and any other text."""
    return SCALER_RULES.get("torch" if kind == "dynamic" else kind)


class ProjectLossScale(DynamicLossScale):
    """A loss scale with a project's rule: PyTorch's, changed by the fields of `rule` as `ScalerRule` says.

    Products are computed in double precision and rounded once to the format in which the project stores S (`rule.fmt`).
    Source: `rule.source`, for each project's constants and timing. Flax compares its count of good steps before incrementing
      it, hence 'always'; DeepSpeed does not count the first good step, hence 'first'.
    Differs from the source: `left` stops at 0; Megatron and Apex's kernel count below it and DeepSpeed stops at 1, which
      changes no scale. An init_scale above the ceiling is replaced by the ceiling, as in Apex amp; one below the floor is an
      error, as in Megatron. DeepSpeed and fairseq raise an exception when `exhausted` is set. fairseq saves the scale but no
      counters. jmp loses its floor under jit; here it holds. Factors that are not powers of two give other last bits than in
      projects that multiply in FP32 (Megatron) or divide (those with one factor); all but Chainer use 2 and 1/2 by default.
      The step decides what an overflow is: some projects test sums or norms of gradients, and Flax tests after dividing.
    """

    def __init__(
        self,
        rule: ScalerRule,
        init_scale: float,
        growth_factor: float,
        backoff_factor: float,
        growth_interval: int,
        hysteresis: int,
        xp: Any = np,
    ) -> None:
        super().__init__(init_scale, growth_factor, backoff_factor, growth_interval, xp)
        if init_scale < rule.floor:
            raise UsageError(f"init scale {init_scale}: it must be at least {rule.floor:g}, the floor of {rule.name}")
        self.rule, self.hysteresis = rule, hysteresis
        self._store(init_scale if rule.gradual else min(init_scale, rule.ceiling))
        self.left = xp.asarray(np.int32(hysteresis))
        self.steps_since_change, self.overflows = xp.asarray(np.int32(0)), xp.asarray(np.int32(0))  # for the tolerance
        self.exhausted = xp.asarray(np.bool_(False))

    def _store(self, scale: float) -> None:
        """Set S to a number, in the format in which the project stores it."""
        self._scale = self.xp.asarray(np.float32(scale) if self.rule.fmt == "fp32" else np.float64(scale))

    @property
    def scale(self) -> Array:
        """S in FP32, 0-d."""
        return cast(self._scale, "fp32")

    def update(self, found_inf: Array) -> None:
        """Adapt S after a step, by the rule."""
        xp, rule = self.xp, self.rule
        good_steps = self.good_steps + 1
        due = good_steps == self.growth_interval + bool(rule.late)
        S_if_good = xp.where(due, self._grown(), self._scale)
        self._scale = xp.where(found_inf, self._backed_off(found_inf, due), S_if_good)
        restart = xp.zeros_like(good_steps)
        if rule.late == "first":
            restart = xp.where(found_inf, restart, restart + 1)
        self.good_steps = xp.where(found_inf | due, restart, good_steps)

    def _grown(self) -> Array:
        """Return S after growing."""
        larger = cast(widen(self._scale, "fp64") * self.growth_factor, self.rule.fmt)
        if self.rule.ceiling < math.inf:
            larger = self.xp.minimum(larger, self.rule.ceiling)
        return larger if self.rule.unbounded else self.xp.where(self.xp.isfinite(larger), larger, self._scale)

    def _backed_off(self, found_inf: Array, due: Array) -> Array:
        """Return S after an overflow, which not every rule lowers, and count this step. due: whether a good step grows S."""
        rule, backs_off = self.rule, found_inf
        smaller = cast(widen(self._scale, "fp64") * self.backoff_factor, rule.fmt)
        if rule.floor and rule.stops != "to the floor":
            smaller = self.xp.maximum(smaller, rule.floor)
        if rule.hysteresis > 1:
            backs_off = self._out_of_hysteresis(found_inf, due)
        if rule.tolerance:
            backs_off = self._too_often(found_inf, due)
        smaller = self.xp.where(backs_off, smaller, self._scale)
        return self._stay_if_exhausted(smaller, found_inf, backs_off) if rule.stops else smaller

    def _out_of_hysteresis(self, found_inf: Array, due: Array) -> Array:
        """Count this overflow, or refill the count. Return whether S backs off: at an overflow with none left."""
        xp, left = self.xp, self.xp.maximum(self.left - 1, 0)
        full = xp.full_like(left, self.hysteresis)
        refilled = full if self.rule.refill == "good step" else xp.where(due, full, self.left)
        self.left = xp.where(found_inf, left, refilled)
        return found_inf & (left == 0)

    def _too_often(self, found_inf: Array, due: Array) -> Array:
        """Count this step. Return whether S backs off: at an overflow when their share of the steps reaches the tolerance."""
        xp, steps, overflows = self.xp, self.steps_since_change + 1, self.overflows + found_inf
        backs_off = found_inf & (overflows / steps >= self.rule.tolerance)
        self.steps_since_change = xp.where(backs_off | (due & ~found_inf), 0, steps)
        self.overflows = xp.where(backs_off, 0, overflows)
        return backs_off

    def _stay_if_exhausted(self, smaller: Array, found_inf: Array, backs_off: Array) -> Array:
        """Set `exhausted` if the run should end. Return S after an overflow."""
        if self.rule.stops == "at the floor":
            ends = backs_off & (self._scale == self.rule.floor)
        else:
            ends = found_inf & (smaller <= self.rule.floor)
        self.exhausted = self.exhausted | ends
        return self.xp.where(ends, self._scale, smaller)

    def state_dict(self) -> dict[str, float | int]:
        """Return the state for a checkpoint: PyTorch's keys, and those that the rule adds."""
        state = super().state_dict()
        if self.rule.hysteresis > 1:
            state |= {"hysteresis": self.hysteresis, "_hysteresis_tracker": int(self.left)}
        if self.rule.tolerance:
            state |= {"_steps_since_change": int(self.steps_since_change), "_overflows": int(self.overflows)}
        if self.rule.stops:
            state["exhausted"] = int(self.exhausted)
        return state

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Load a state. All of it is checked before anything changes. Errors: ValueError, as `SavedState` says."""
        saved, rule, xp = SavedState(state, self.state_dict().keys()), self.rule, self.xp
        scale = saved.scale("scale", *self._range(), rule.fmt)
        growth_factor, backoff_factor, growth_interval = saved.settings()
        good_steps = saved.count("_growth_tracker", 0, growth_interval - (not rule.late))
        if rule.hysteresis > 1:
            hysteresis = saved.count("hysteresis", 1)
            left = saved.count("_hysteresis_tracker", 0, hysteresis)
        if rule.tolerance:
            steps, overflows = saved.count("_steps_since_change", 0), saved.count("_overflows", 0)
        exhausted = rule.stops and saved.count("exhausted", 0, 1)
        self._load_more(saved)
        self._store(scale)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.good_steps, self.exhausted = xp.asarray(np.int32(good_steps)), xp.asarray(np.bool_(exhausted))
        if rule.hysteresis > 1:
            self.hysteresis, self.left = hysteresis, xp.asarray(np.int32(left))
        if rule.tolerance:
            self.steps_since_change, self.overflows = xp.asarray(np.int32(steps)), xp.asarray(np.int32(overflows))

    def _range(self) -> tuple[float, float]:
        """Return the smallest and the largest S that `load_state_dict` accepts."""
        rule = self.rule
        largest = sys.float_info.max if rule.fmt == "fp64" and rule.unbounded else LARGEST
        return max(rule.floor, SMALLEST), largest if rule.gradual else min(largest, rule.ceiling)

    def _load_more(self, saved: SavedState) -> None:
        """Load the entries that only a subclass has."""


class GradualLossScale(ProjectLossScale):
    """Chainer's rule: double in every step until the first overflow; after it, grow a little in every good step.

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
        xp, S = self.xp, self._scale
        self.overflowed = self.overflowed | found_inf
        grown = xp.where(self.overflowed, S * 2.0 ** (1 / self.growth_interval), S * self.growth_factor)
        S = xp.where(found_inf, S * self.backoff_factor, grown)
        self._scale = xp.maximum(xp.minimum(S, self.rule.ceiling), self.rule.floor)

    def state_dict(self) -> dict[str, float | int]:
        return super().state_dict() | {"overflowed": int(self.overflowed)}

    def _load_more(self, saved: SavedState) -> None:
        self.overflowed = self.xp.asarray(np.bool_(saved.count("overflowed", 0, 1)))


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
    """Return the loss scale for a name in SCALER_RULES, 'dynamic' (PyTorch's), 'none', or a number.

    None means the project's own value: factors 2 and 1/2, or 1/growth_factor if the project has one factor. Errors: UsageError
    for any other name, for an impossible setting, and for a setting that the scale does not have: a constant one has none, and
    a dynamic one has init_scale, growth_interval and its `ScalerRule.knobs`.
    """
    given: dict[str, float | None] = {"growth_factor": growth_factor, "backoff_factor": backoff_factor,
                                      "scale_floor": scale_floor, "hysteresis": hysteresis}  # fmt: skip
    rule = find_scaler(kind)
    if rule is None:
        return StaticLossScale(_constant(kind, {"init_scale": init_scale, "growth_interval": growth_interval, **given}), xp)
    _check_knobs(rule, given)
    start = rule.init_scale if init_scale is None else init_scale
    interval = rule.growth_interval if growth_interval is None else growth_interval
    growth = 2.0 if growth_factor is None else growth_factor
    backoff = (0.5 if "backoff_factor" in rule.knobs else 1 / growth) if backoff_factor is None else backoff_factor
    if rule.name == "torch":
        return DynamicLossScale(start, growth, backoff, interval, xp)
    rule = replace(rule, floor=_floor(rule, scale_floor))
    project = GradualLossScale if rule.gradual else ProjectLossScale
    return project(rule, start, growth, backoff, interval, rule.hysteresis if hysteresis is None else hysteresis, xp)


def _constant(kind: str, given: Mapping[str, float | None]) -> float:
    """Return the number that a constant loss scale's name stands for. Errors: UsageError for another name, or any setting."""
    try:
        scale = 1.0 if kind == "none" else float(kind)
    except ValueError:
        raise UsageError(unknown("loss scale", kind, (*SCALER_RULES, "dynamic", "none", "or a number"))) from None
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{_words(name)} {value} with loss scale {kind}: only a dynamic loss scale has this setting")
    return scale


def _check_knobs(rule: ScalerRule, given: Mapping[str, float | None]) -> None:
    """Raise UsageError for a setting that the project does not have, and for an impossible hysteresis."""
    for name, value in given.items():
        if value is not None and name not in rule.knobs:
            those = ", ".join(other.name for other in SCALER_RULES.values() if name in other.knobs)
            raise UsageError(f"{_words(name)} {value} with {rule.name}, which has no such setting; it is only for {those}")
    if given["hysteresis"] is not None:
        check_count("hysteresis", given["hysteresis"])


def _floor(rule: ScalerRule, floor: float | None) -> float:
    """Return the floor that was asked for, in the project's format, or its own. Errors: UsageError for an impossible one."""
    if floor is None:
        return rule.floor
    least, most = SMALLEST, min(LARGEST, rule.ceiling)
    if not least <= floor <= most:
        raise UsageError(f"scale floor {floor}: it must be from {least:.3g}, whose inverse is finite in FP32, to {most:.3g}")
    return float(cast(np.float64(floor), rule.fmt))


def _words(name: str) -> str:
    """Return a setting's name for a message."""
    return name.replace("_", " ")
