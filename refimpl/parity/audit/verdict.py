"""`Verdict`: what the judge says of one result of one operation, and the statistics that it rests on.

Three statistics see different faults. The largest error over its bound proves a result wrong. The share of results that are
the correctly rounded ones sees sums in few bits, at any length, where the bound no longer can. The mean signed excess over
correct rounding sees truncation, which stays within every tolerance. Products have a fourth, their effective bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.values import Twin

LEVELS = ("wrong", "worse than it need be", "biased", "note", "fine")
"""From worst to best; what could not be judged has none of them."""
BIAS = 0.1
"""A mean signed excess above this, in units in the last place, over at least ENOUGH results, is a bias."""
ENOUGH = 1000
SOME = 4096
"""Elements of which the share is taken that have a mean excess."""
EXPONENT = 0x7FF << 52
"""The bits of an FP64 number's exponent."""
JUST_WRONG = 1.001
"""The least ratio of a result that had to be the correctly rounded one and is not."""
MOSTLY = 0.999
"""A kernel that is known to round badly is noted where fewer results than this are the correctly rounded ones."""
ROOM = 8
"""Numbers on the way to a result are at most this many times as large as its bound by one rounding: x^2 + x, or e^x / 2."""
LEAST_BITS = 18.0
"""FP32 products have 21 to 22 effective bits whatever K is, TF32 11.1, one bf16 product 8.1."""
SMALLEST_PRODUCTS = 2.0**-108
"""Larger products have effective bits: K products below 2^-126 err by up to K 2^-150, at most 2^-22 of this for K < 2^20."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judged result.

    result, by, note: as in `Twin`. dtype: of the result. elements: how many it has; judged: how many were looked at.
    ratio: the largest error, over its bound with the rounding of the result, of those that are not the correctly rounded
    result; 0 if all are. where: the index of that one among those judged.
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
    # Without the bits of its significand a number is the power of two at or below it.
    return (x.abs().clamp_(info.smallest_normal, info.max).view(torch.int64) & EXPONENT).view(torch.float64).mul_(info.eps)


def measure(twin: Twin, elements: int) -> Verdict:
    """Return the verdict over a result. elements: how many the whole result has.

    Most results are the correctly rounded ones, and no error of theirs is looked at: what an element costs is a conversion
    and a comparison.
    """
    actual, exact = twin.actual.detach().reshape(-1), twin.exact.detach().reshape(-1)
    n, dtype = actual.numel(), actual.dtype
    if n == 0:
        return Verdict(twin.result, name_of(dtype), twin.by, elements, 0, 0.0, (), 1.0, None, 0.0, None, "fine", "")
    bound, typical = _flat(twin.bound, twin.exact), _flat(twin.typical, twin.exact)
    spared = bound if typical is None else 6 * typical
    off = _off(actual, exact, bound, typical, spared, arithmetic=dtype if twin.note else torch.float32)
    worst, equal, excess, close, outside = 0.0, 1.0, 0.0, n, False
    where: tuple[int, ...] = ()
    if off is not None:
        at = off.ratio.argmax()
        worst, beyond, place = torch.stack([off.ratio[at], off.excess.sum(), off.where[at].double()]).tolist()
        equal, close = 1 - off.ratio.numel() / n, _close(spared, exact, dtype)
        excess = beyond / max(close, 1)
        where = _index(int(place), twin.actual.shape)
        outside = off.outside is not None and bool(off.outside.any())
    expected = bits = None
    if typical is not None:
        expected = 1 - float((2 * typical / _spacing(exact, dtype)).clamp(max=1.0).nan_to_num(1.0).mean())
    if twin.products is not None:
        error = (actual.double() - exact).abs()
        size, rms = _rms(twin.products), _rms(error if dtype == torch.float32 else error.where(exact.to(dtype) != actual, 0.0))
        bits = -math.log2(rms / size) if 0 < rms < math.inf and SMALLEST_PRODUCTS < size < math.inf else None
    level, reason = _level(worst, equal, expected, outside, excess, bits if dtype == torch.float32 else None, n, close)
    if twin.note and level != "wrong" and equal < MOSTLY:
        level, reason = "note", twin.note
    return Verdict(
        result=twin.result, dtype=name_of(dtype), by=twin.by, elements=elements, judged=n, ratio=worst, where=where,
        equal=equal, expected=expected, excess=excess, bits=bits, level=level, reason=reason, note=twin.note,
    )  # fmt: skip


class _Off(NamedTuple):
    """The elements that are not the correctly rounded result.

    where: their places among all. ratio: their error over its bound. excess: how far they are beyond the correctly rounded
    result, in units in the last place, 0 where the bound is not well below one. outside: whether the error is more than six
    typical ones, None without these.
    """

    where: Tensor
    ratio: Tensor
    excess: Tensor
    outside: Tensor | None


def _off(
    actual: Tensor,
    exact: Tensor,
    bound: Tensor | float,
    typical: Tensor | float | None,
    spared: Tensor | float,
    arithmetic: torch.dtype,
) -> _Off | None:
    """Compare a result with the rounded FP64 one. None where all elements are equal; NaN is equal to NaN.

    spared: what the arithmetic before the last rounding may cost. arithmetic: its format, in which it may overflow.
    """
    rounded = exact.to(actual.dtype)
    if torch.equal(rounded, actual):
        return None
    where = (rounded != actual).nonzero().squeeze(1)
    got, nearest = actual.index_select(0, where), rounded.index_select(0, where)
    wide = got.double()
    low, high = wide.aminmax()
    finite = math.isfinite(low) and math.isfinite(high)
    if not finite:
        number = ~(got.isnan() & nearest.isnan())
        where, got, nearest, wide = where[number], got[number], nearest[number], wide[number]
    if not where.numel():
        return None

    def there(x: Tensor | float) -> Tensor | float:
        return x.index_select(0, where) if isinstance(x, Tensor) and x.dim() else x

    info = torch.finfo(actual.dtype)
    right, allowed = exact.index_select(0, where), there(bound)
    error, spacing = (wide - right).abs(), _spacing(right, got.dtype)
    last = info.eps / 2 * right.abs() + _half_subnormal(got.dtype)
    # With a bound of 0 only the correctly rounded result will do: any other is more than half a unit away, or breaks a tie.
    ratio = (2 * error / spacing).clamp(min=JUST_WRONG) if _is_zero(bound) else error / (allowed + last)
    ratio = ratio.nan_to_num(math.inf, math.inf)
    outside = error > 6 * there(typical) + last if typical is not None else None
    if not finite:
        # Above half a unit beyond the largest number the rounded result is Inf, which is no error.
        beyond = got.isinf() & (torch.sign(wide) * right + allowed >= info.max * (1 + info.eps / 4))
        # So it is where numbers on the way are so large, by the bound, that they may exceed the format of the arithmetic.
        inside = torch.finfo(arithmetic)
        beyond |= ~got.isfinite() & torch.as_tensor(allowed >= inside.eps / 2 * inside.max / ROOM, device=got.device)
        ratio, outside = ratio.masked_fill(beyond, 0.0), outside & ~beyond if outside is not None else None
    # Where the arithmetic before the last rounding may cost a unit by itself, its errors are not the rounding's.
    far = there(spared) > spacing / 4
    excess = ((wide - nearest.double()) / spacing).masked_fill(far, 0.0).nan_to_num(0.0, 0.0, 0.0)
    return _Off(where, ratio, excess, outside)


def _close(spared: Tensor | float, exact: Tensor, dtype: torch.dtype) -> int:
    """Return over how many elements the mean excess is taken: where the arithmetic before the last rounding costs no unit.

    Of many elements that share is taken of some, at equal distances: odd ones, which meet all columns of most matrices.
    """
    if _is_zero(spared):
        return exact.numel()
    step = -(-exact.numel() // SOME) | 1
    some = exact[::step]
    near = (spared[::step] if isinstance(spared, Tensor) and spared.dim() else spared) <= _spacing(some, dtype) / 4
    return round(exact.numel() * float(near.double().mean()))


def _flat(x: Tensor | float | None, like: Tensor) -> Any:
    """Return a bound for each element in a row, or one number for all."""
    if not isinstance(x, Tensor):
        return x
    return x.reshape(()) if x.numel() == 1 else x.expand(like.shape).reshape(-1)


def _index(place: int, shape: torch.Size) -> tuple[int, ...]:
    """Return the index of an element from its place among all."""
    index: list[int] = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.insert(0, at)
    return tuple(index)


def _spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    return ulp(x.nan_to_num(0.0, 0.0, 0.0), dtype)


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
