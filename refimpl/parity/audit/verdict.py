"""`Verdict`: what the judge says of one result of one operation, and the statistics that it rests on.

Three statistics see different faults. The largest error over its bound proves a result wrong. The share of results that are
the correctly rounded ones sees sums in few bits, at any length, where the bound no longer can. The mean signed excess over
correct rounding sees truncation, which stays within every tolerance. Products have a fourth, their effective bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.values import Twin

LEVELS = ("wrong", "worse than it need be", "biased", "note", "fine")
"""From worst to best; what could not be judged has none of them."""
BIAS = 0.1
"""A mean signed excess above this, in units in the last place, over at least ENOUGH results, is a bias."""
ENOUGH = 1000
JUST_WRONG = 1.001
"""The least ratio of a result that had to be the correctly rounded one and is not."""
MOSTLY = 0.999
"""A kernel that is known to round badly is noted where fewer results than this are the correctly rounded ones."""
LEAST_BITS = 18.0
"""FP32 products have 21 to 22 effective bits whatever K is, TF32 11.1, one bf16 product 8.1."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judged result.

    result, by, note: as in `Twin`. dtype: of the result. elements: how many it has; judged: how many were looked at.
    ratio: the largest error, over its bound with the rounding of the result. where: the index of that one among those judged.
    equal: share that is the correctly rounded result. expected: the share that independent FP32 roundings leave, None where
    no estimate is made. excess: mean of (result - correctly rounded) in units in the last place, where the bound is
    well below one. bits: effective bits of a
    matrix product. level: one of LEVELS; reason: why, '' where it is fine.
    """

    result: str
    dtype: str
    by: str
    elements: int
    judged: int
    ratio: float
    where: tuple[int, ...]
    equal: float
    expected: float | None
    excess: float
    bits: float | None
    level: str
    reason: str
    note: str = ""


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of a format's numbers at each FP64 x: 2^(e - p + 1), and the smallest subnormal below 2^emin."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(info.smallest_normal, info.max))
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)


def measure(twin: Twin, elements: int) -> Verdict:
    """Return the verdict over a result. elements: how many the whole result has."""
    actual, exact = twin.actual.detach(), twin.exact.detach()
    info = torch.finfo(actual.dtype)
    rounded = exact.to(actual.dtype)
    same = (rounded == actual) | (rounded.isnan() & actual.isnan())
    wide = actual.double()
    error = (wide - exact).abs()
    bound = torch.as_tensor(twin.bound, dtype=torch.float64, device=exact.device)
    allowed = bound + info.eps / 2 * exact.abs() + _half_subnormal(actual.dtype)
    spacing = ulp(exact.nan_to_num(0.0, 0.0, 0.0), actual.dtype)
    # With a bound of 0 only the correctly rounded result will do: any other is more than half a unit away, or breaks a tie.
    ratio = (2 * error / spacing).clamp(min=JUST_WRONG) if _is_zero(twin.bound) else error / allowed
    # Above half a unit beyond the largest number the rounded result is Inf, which is no error.
    overflow = info.max * (1 + info.eps / 4)
    beyond = actual.isinf() & (torch.sign(wide) * exact + bound >= overflow)
    right = torch.where(error.isfinite(), ratio.clamp(max=1.0), 0.0)
    ratio = torch.where(same | beyond, right, ratio.nan_to_num(math.inf, math.inf))
    n = actual.numel()
    if n == 0:
        return Verdict(twin.result, name_of(actual.dtype), twin.by, elements, 0, 0.0, (), 1.0, None, 0.0, None, "fine", "")
    at = int(ratio.argmax())
    worst, equal = float(ratio.flatten()[at]), float(same.double().mean())
    # Where the arithmetic before the last rounding may cost a unit by itself, its errors are not the rounding's.
    spared = torch.as_tensor(twin.bound if twin.typical is None else 6 * twin.typical, dtype=torch.float64, device=exact.device)
    close = (spared <= spacing / 4).expand(exact.shape)
    away = torch.where(same | ~close, 0.0, ((wide - rounded.double()) / spacing)).nan_to_num(0.0, 0.0, 0.0)
    count = int(close.sum())
    excess = float(away.sum()) / max(count, 1)
    expected, outside = None, False
    if twin.typical is not None:
        typical = torch.as_tensor(twin.typical, dtype=torch.float64, device=exact.device).expand(exact.shape)
        expected = 1 - float((2 * typical / spacing).clamp(max=1.0).nan_to_num(1.0).mean())
        slack = 6 * typical + info.eps / 2 * exact.abs() + _half_subnormal(actual.dtype)
        outside = bool(((error > slack) & ~same & ~beyond).any())
    bits = None
    if twin.products is not None:
        size, rms = _rms(twin.products), _rms(torch.where(same & (actual.dtype != torch.float32), 0.0, error))
        bits = -math.log2(rms / size) if rms > 0 and size > 0 and math.isfinite(rms) and math.isfinite(size) else None
    level, reason = _level(worst, equal, expected, outside, excess, bits if actual.dtype == torch.float32 else None, n, count)
    if twin.note and level != "wrong" and equal < MOSTLY:
        level, reason = "note", twin.note
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape)) if actual.dim() else ()
    return Verdict(
        result=twin.result, dtype=name_of(actual.dtype), by=twin.by, elements=elements, judged=n, ratio=worst, where=where,
        equal=equal, expected=expected, excess=excess, bits=bits, level=level, reason=reason, note=twin.note,
    )  # fmt: skip


def _level(
    worst: float, equal: float, expected: float | None, outside: bool, excess: float, bits: float | None, n: int, close: int
) -> tuple[str, str]:
    """Return the level and its reason."""
    if worst > 1:
        return "wrong", f"error {worst:.3g} times its bound"
    if bits is not None and bits <= LEAST_BITS:
        return "worse than it need be", f"{bits:.1f} effective bits, where FP32 has 21 to 22"
    if expected is not None and n >= ENOUGH and equal < 1 - 4 * (1 - expected) - 4 / math.sqrt(n):
        return "worse than it need be", f"{equal:.1%} correctly rounded, where FP32 sums leave about {expected:.1%}"
    if outside:
        return "worse than it need be", "errors beyond six standard deviations of FP32 sums"
    if close >= ENOUGH and abs(excess) > BIAS:
        return "biased", f"on average {excess:+.2f} units in the last place beyond correct rounding"
    return "fine", ""


def _is_zero(bound: Tensor | float) -> bool:
    return not isinstance(bound, Tensor) and bound == 0


def _half_subnormal(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps / 2)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
