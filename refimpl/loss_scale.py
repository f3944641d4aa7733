"""Loss scales: what the loss is multiplied by, so that small gradients survive in 16 bits.

`SCALERS` is a table of how PyTorch and others adapt theirs. One class computes them all, but for the one that grows gradually.
The scale and its counters are 0-d arrays of the backend and change by `where`: nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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

    def explain(self, before: float, found_inf: bool) -> str:
        """What `update` has just made of the scale `before`, and what it waits for, in words; waits for the device."""

    def state_dict(self) -> dict[str, float | int]:
        """What a checkpoint keeps; waits for the device."""

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """The way back."""


# ------------------------------------------------------------------------------------------------------- whose rules they are


@dataclass(frozen=True)
class Scaler:
    """The rules of one project. What is not said is as in PyTorch, so a row of SCALERS shows how it differs from it."""

    name: str
    source: str

    init_scale: float = 2.0**16
    growth_interval: int = 2000
    late: str = ""  # S grows one step later than growth_interval says: 'always', or the 'first' time after an overflow
    gradual: bool = False  # doubles in every step until the first overflow, from then on by 2^(1/growth_interval) a step

    floor: float = 0.0  # backing off ends here
    stops_at_floor: bool = False  # an overflow at the floor, with no hysteresis left, ends the run
    ceiling: float = math.inf  # growth ends here
    unbounded: bool = False  # S may grow beyond FP32's largest number; otherwise a growth that would is left out

    hysteresis: int = 1  # overflows that it takes to back off; above 1 it can be chosen
    refill: str = "growth"  # what gives all of them back: 'growth', or any 'good step'

    kept: str = "fp32"  # the format that the project keeps S in; 'fp64' is a number of Python


_FP32 = FORMATS["fp32"]

SCALERS: dict[str, Scaler] = {
    scaler.name: scaler
    for scaler in (
        Scaler("torch", "PyTorch, torch/amp/grad_scaler.py: GradScaler.update"),
        Scaler("apex-amp", "NVIDIA Apex (until 2025), apex/amp/scaler.py: LossScaler.update_scale",
               ceiling=2.0**24, kept="fp64"),
        Scaler("apex-fp16", "NVIDIA Apex, apex/fp16_utils/loss_scaler.py: DynamicLossScaler.update_scale",
               init_scale=2.0**32, growth_interval=1000, floor=1.0, unbounded=True, kept="fp64"),
        Scaler("apex-kernel", "NVIDIA Apex, csrc/update_scale_hysteresis.cu: update_scale_hysteresis_cuda_kernel",
               hysteresis=2, refill="good step"),
        Scaler("megatron", "Megatron-LM, megatron/core/optimizer/grad_scaler.py: DynamicGradScaler.update",
               init_scale=2.0**32, growth_interval=1000, floor=1.0, unbounded=True, hysteresis=2),
        Scaler("deepspeed", "DeepSpeed, deepspeed/runtime/fp16/loss_scaler.py: DynamicLossScaler.update_scale",
               growth_interval=1000, late="first", floor=1.0, stops_at_floor=True, unbounded=True, hysteresis=2, kept="fp64"),
        Scaler("deepspeed-consecutive", "the same with consecutive_hysteresis=True",
               growth_interval=1000, late="first", floor=1.0, stops_at_floor=True, unbounded=True, hysteresis=2,
               refill="good step", kept="fp64"),
        Scaler("flax", "Flax, flax/training/dynamic_scale.py: DynamicScale.value_and_grad",
               late="always", floor=_FP32.smallest_normal, ceiling=_FP32.max),
        Scaler("jmp", "jmp, jmp/_src/loss_scale.py: DynamicLossScale.adjust",
               init_scale=2.0**15, floor=1.0),
        Scaler("chainer", "Chainer 7, chainer/optimizer.py: Optimizer.update_loss_scale",
               init_scale=1.0, growth_interval=1000, gradual=True, floor=1.0, ceiling=FORMATS["fp16"].max, kept="fp64"),
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- how they are computed


def _check_scale(name: str, scale: float) -> None:
    """A scale must still be positive and finite as an fp32 number."""
    if not _FP32.smallest_subnormal / 2 < scale <= _FP32.max:
        raise UsageError(f"{name} {scale}: it must be positive and finite in FP32")


class DynamicLossScale:
    """Back off when a gradient overflows, grow after `growth_interval` good steps in a row; by default PyTorch's way.

        found_inf:  S = S * backoff_factor;  good_steps = 0
        else:       good_steps += 1;  at growth_interval:  S = S * growth_factor if that is finite;  good_steps = 0

    A `scaler` changes this:

        late              'always': growth at growth_interval + 1;  'first': the same, but then good_steps = 1
        floor, ceiling    S = max(S * backoff_factor, floor);  S = min(S * growth_factor, ceiling)
        unbounded         S grows also to what is not finite
        hysteresis        found_inf: left -= 1, and S stays while left > 0;  refill: left = hysteresis
        stops_at_floor    an overflow that finds S at the floor, and none left, sets `exhausted`: whoever trains should stop

    Products are made in double precision and rounded once to the format that the project keeps S in. `scale` is S in FP32.

    Errors: UsageError for a growth factor <= 1, a backoff factor >= 1, an interval or a hysteresis below 1, a scale <= 0 or
    below the floor, and a hysteresis where the project has none.
    Source: Micikevicius et al. 2018 name the idea; constants and timing are each project's (`Scaler.source`). Flax compares
      its count of good steps before it adds to it, hence 'always'; DeepSpeed does not count the first one, hence 'first'.
    PyTorch: torch.amp.GradScaler.
    Differs from the source: `left` ends at 0; Megatron and the kernel of Apex count on below it and DeepSpeed ends at 1, which
      changes no scale. An init_scale above the ceiling becomes it, as in Apex amp; one below the floor is refused, as in
      Megatron. DeepSpeed raises an exception where `exhausted` is set. jmp loses its floor under jit, here it stays. Factors
      that are no powers of two give other last bits than the projects that multiply in FP32 or divide; all take 2 and 1/2.
      What counts as an overflow is for the step to say: some projects test sums of gradients, and Flax tests after dividing.
      CuPy's kernels flush subnormal FP32 numbers: there an FP32 scale is 0 below 2^-126.
    """

    adapts = True

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        xp: Any = np,
        scaler: Scaler = SCALERS["torch"],
        hysteresis: int | None = None,
    ) -> None:
        _check_scale("init scale", init_scale)
        if init_scale < scaler.floor:
            raise UsageError(f"init scale {init_scale}: it must be at least {scaler.floor:g}, the floor of {scaler.name}")
        if not 1 < growth_factor < math.inf or not 0 < backoff_factor < 1:
            raise UsageError(f"growth factor {growth_factor} must be > 1 and backoff factor {backoff_factor} in (0, 1)")
        if growth_interval < 1:
            raise UsageError(f"growth interval {growth_interval}: it must be at least 1")
        if hysteresis is not None and (scaler.hysteresis == 1 or hysteresis < 1):
            patient = ", ".join(other.name for other in SCALERS.values() if other.hysteresis > 1)
            raise UsageError(f"hysteresis {hysteresis} with {scaler.name}: it is at least 1, and only for {patient}")
        self.xp, self.scaler = xp, scaler
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.hysteresis = scaler.hysteresis if hysteresis is None else hysteresis
        self._start(init_scale if scaler.gradual else min(init_scale, scaler.ceiling))
        self.growth_tracker = xp.asarray(np.int32(0))
        self.hysteresis_tracker = xp.asarray(np.int32(self.hysteresis))
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
        if scaler.floor:
            smaller = xp.maximum(smaller, scaler.floor)
        if scaler.ceiling < math.inf:
            larger = xp.minimum(larger, scaler.ceiling)
        if scaler.hysteresis > 1:
            smaller = self._if_out_of_hysteresis(smaller, found_inf, grow)
        grown = xp.where(grow if scaler.unbounded else grow & xp.isfinite(larger), larger, self.value)
        self.value = xp.where(found_inf, smaller, grown)
        restart = xp.zeros_like(good_steps)
        if scaler.late == "first":
            restart = xp.where(found_inf, restart, restart + 1)
        self.growth_tracker = xp.where(found_inf | grow, restart, good_steps)

    def _if_out_of_hysteresis(self, smaller: Array, found_inf: Array, grow: Array) -> Array:
        """Count this overflow, or refill; `smaller` where none is left to be borne, else S as it is."""
        xp, left = self.xp, self.xp.maximum(self.hysteresis_tracker - 1, 0)
        full = xp.full_like(left, self.hysteresis)
        refilled = full if self.scaler.refill == "good step" else xp.where(grow, full, self.hysteresis_tracker)
        self.hysteresis_tracker = xp.where(found_inf, left, refilled)
        if self.scaler.stops_at_floor:
            self.exhausted = self.exhausted | (found_inf & (left == 0) & (self.value == self.scaler.floor))
        return xp.where(left == 0, smaller, self.value)

    def explain(self, before: float, found_inf: bool) -> str:
        """What `update` has just done with S, which was `before`, in words; waits for the device."""
        scaler, left = self.scaler, int(self.hysteresis_tracker)
        if math.isinf(self.scale):
            return "infinite in FP32"
        if not found_inf:
            return self._explain_growth(before)
        if before <= scaler.floor and bool(self.exhausted):
            return f"an overflow at its floor, {scaler.floor:g}: ends the run"
        if scaler.hysteresis > 1 and left:
            return f"an overflow that is borne: backs off at {'the next one' if left == 1 else f'number {left} from here'}"
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
        if self.scaler.stops_at_floor:
            state["exhausted"] = int(self.exhausted)
        return state

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self._start(float(state["scale"]))
        self.growth_factor, self.backoff_factor = float(state["growth_factor"]), float(state["backoff_factor"])
        self.growth_interval = int(state["growth_interval"])
        self.growth_tracker = self.xp.asarray(np.int32(state["_growth_tracker"]))
        if self.scaler.hysteresis > 1:
            self.hysteresis = int(state["hysteresis"])
            self.hysteresis_tracker = self.xp.asarray(np.int32(state["_hysteresis_tracker"]))
        if self.scaler.stops_at_floor:
            self.exhausted = self.xp.asarray(np.bool_(state["exhausted"]))


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

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        super().load_state_dict(state)
        self.overflowed = self.xp.asarray(np.bool_(state["overflowed"]))


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
        self.scale = self.xp.asarray(np.float32(state["scale"]))


# ------------------------------------------------------------------------------------------------------- which one it is


def find_scaler(kind: str) -> Scaler | None:
    """The row of SCALERS behind a name; 'dynamic' is PyTorch's. None for 'none', a number, or what is no name at all."""
    return SCALERS.get("torch" if kind == "dynamic" else kind)


def make_loss_scale(
    kind: str,
    init_scale: float | None = None,
    growth_interval: int | None = None,
    xp: Any = np,
    hysteresis: int | None = None,
) -> LossScale:
    """The loss scale for a name in SCALERS, 'dynamic' (PyTorch's), 'none', or a number.

    init_scale, growth_interval, hysteresis: of one that adapts; None takes the project's own. Errors: UsageError for any
    other name, and for a hysteresis where there is none.
    """
    scaler = find_scaler(kind)
    if scaler is not None:
        start = scaler.init_scale if init_scale is None else init_scale
        interval = scaler.growth_interval if growth_interval is None else growth_interval
        make = GradualLossScale if scaler.gradual else DynamicLossScale
        return make(start, growth_interval=interval, xp=xp, scaler=scaler, hysteresis=hysteresis)
    try:
        scale = 1.0 if kind == "none" else float(kind)
    except ValueError:
        names = f"{', '.join(SCALERS)}, dynamic, none, or a number"
        raise UsageError(f"loss scale {kind!r}: choose one of {names}") from None
    if hysteresis is not None:
        raise UsageError(f"hysteresis {hysteresis} with loss scale {kind}: only one that adapts can have it")
    return StaticLossScale(scale, xp=xp)
