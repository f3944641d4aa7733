"""The rules by which projects adapt their loss scales, as a table; `loss_scale.py` computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS


@dataclass(frozen=True)
class Scaler:
    """The rules of one project. The defaults are PyTorch's, so a row of SCALERS shows only how the project differs from it."""

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

SCALERS: dict[str, Scaler] = {
    scaler.name: scaler
    for scaler in (
        Scaler("torch", "PyTorch, torch/amp/grad_scaler.py: GradScaler.update"),
        Scaler("apex-amp", "NVIDIA Apex (until 2025), apex/amp/scaler.py: LossScaler.update_scale",
               ceiling=2.0**24, fmt="fp64", knobs=("growth_factor", "scale_floor")),
        Scaler("apex-fp16", "NVIDIA Apex, apex/fp16_utils/loss_scaler.py: DynamicLossScaler.update_scale",
               init_scale=2.0**32, growth_interval=1000, floor=1.0, unbounded=True, fmt="fp64", knobs=("growth_factor",)),
        Scaler("apex-kernel", "NVIDIA Apex, csrc/update_scale_hysteresis.cu: update_scale_hysteresis_cuda_kernel",
               hysteresis=2, refill="good step", knobs=("growth_factor", "backoff_factor", "hysteresis")),
        Scaler("megatron", "Megatron-LM, megatron/core/optimizer/grad_scaler.py: DynamicGradScaler.update",
               init_scale=2.0**32, growth_interval=1000, floor=1.0, unbounded=True, hysteresis=2,
               knobs=("growth_factor", "backoff_factor", "scale_floor", "hysteresis")),
        Scaler("deepspeed", "DeepSpeed, deepspeed/runtime/fp16/loss_scaler.py: DynamicLossScaler.update_scale",
               growth_interval=1000, late="first", floor=1.0, stops="at the floor", unbounded=True, hysteresis=2, fmt="fp64",
               knobs=("growth_factor", "scale_floor", "hysteresis")),
        Scaler("deepspeed-consecutive", "the same with consecutive_hysteresis=True",
               growth_interval=1000, late="first", floor=1.0, stops="at the floor", unbounded=True, hysteresis=2,
               refill="good step", fmt="fp64", knobs=("growth_factor", "scale_floor", "hysteresis")),
        Scaler("fairseq", "fairseq, fairseq/optim/dynamic_loss_scaler.py: DynamicLossScaler.check_overflow, update",
               init_scale=2.0**7, growth_interval=2**14, floor=1e-4, stops="to the floor", unbounded=True, fmt="fp64",
               knobs=("growth_factor", "scale_floor")),
        Scaler("fairseq-tolerance", "the same with fp16_scale_tolerance=0.05",
               init_scale=2.0**7, growth_interval=2**14, floor=1e-4, stops="to the floor", unbounded=True, tolerance=0.05,
               fmt="fp64", knobs=("growth_factor", "scale_floor")),
        Scaler("flax", "Flax, flax/training/dynamic_scale.py: DynamicScale.value_and_grad",
               late="always", floor=_FP32.smallest_normal, ceiling=_FP32.max,
               knobs=("growth_factor", "backoff_factor", "scale_floor")),
        Scaler("jmp", "jmp, jmp/_src/loss_scale.py: DynamicLossScale.adjust",
               init_scale=2.0**15, floor=1.0, knobs=("growth_factor", "scale_floor")),
        Scaler("chainer", "Chainer 7, chainer/optimizer.py: Optimizer.update_loss_scale",
               init_scale=1.0, growth_interval=1000, gradual=True, floor=1.0, ceiling=FORMATS["fp16"].max, fmt="fp64",
               knobs=()),
    )
}  # fmt: skip


def find_scaler(kind: str) -> Scaler | None:
    """Return the row of SCALERS of that name, PyTorch's for 'dynamic', or None for 'none', a number and any other text."""
    return SCALERS.get("torch" if kind == "dynamic" else kind)


def words(name: str) -> str:
    """Return a setting's name for a message."""
    return name.replace("_", " ")


def chosen(scaler: Scaler, given: Mapping[str, float | None]) -> Scaler:
    """Return the rules with the given settings, checked. Errors: UsageError for an impossible setting."""
    for name, value in given.items():
        if value is not None and name not in scaler.knobs:
            those = ", ".join(other.name for other in SCALERS.values() if name in other.knobs)
            raise UsageError(f"{words(name)} {value} with {scaler.name}, which has no such setting; it is only for {those}")
    growth, backoff, floor, hysteresis = (given[x] for x in ("growth_factor", "backoff_factor", "scale_floor", "hysteresis"))
    if growth is not None and not 1 < growth <= _FP32.max:
        raise UsageError(f"growth factor {growth}: it must be above 1 and finite in FP32")
    if backoff is not None and not 0 < backoff < 1:
        raise UsageError(f"backoff factor {backoff}: it must be between 0 and 1")
    if hysteresis is not None and hysteresis < 1:
        raise UsageError(f"hysteresis {hysteresis} with {scaler.name}: it must be at least 1")
    if floor is None:
        return scaler
    least, most = _FP32.smallest_normal, min(_FP32.max, scaler.ceiling)
    if not least <= floor <= most:
        raise UsageError(f"scale floor {floor}: it must be from {least:.3g}, whose inverse is finite in FP32, to {most:.3g}")
    return replace(scaler, floor=float(cast(np.float64(floor), scaler.fmt)))
