"""`count_roundings`: the effects of roundings on PyTorch's tensors, with the figures of `numerics.rounding_effects.Counts`.

It is `Counts.add` for tensors, on their device, in fewer passes: most tensors are finite, and have no value in the subnormal
range, which a histogram of exponents shows.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from refimpl.numerics.formats import FORMATS
from refimpl.numerics.rounding_effects import HIGHEST, LOWEST, Counts, overflow_threshold

PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}
"""How many elements are looked at at once, by kind of device: what fits a cache of the CPU's."""


class _Bits(NamedTuple):
    """Where the exponent stands in a format's bits."""

    integers: torch.dtype
    fraction: int
    mask: int
    bias: int


BITS = {
    torch.float32: _Bits(torch.int32, 23, 0x7F800000, 127),
    torch.float64: _Bits(torch.int64, 52, 0x7FF0000000000000, 1023),
}


class _Limits(NamedTuple):
    """What is known of a format: see `Format` and `overflow_threshold`. below_normal: the binades below its normal range."""

    eps: float
    smallest_normal: float
    threshold: float
    below_normal: slice


@cache
def _limits(fmt: str, dtype: torch.dtype) -> _Limits:
    """Return the limits of a format for values in FP32 or FP64."""
    row, threshold = FORMATS[fmt], overflow_threshold(fmt)
    if dtype == torch.float32 and float(np.float32(threshold)) < threshold:  # the smallest FP32 number that is as large
        threshold = float(np.nextafter(np.float32(threshold), np.float32(math.inf)))
    lowest_normal = math.frexp(row.smallest_normal)[1] - 1
    return _Limits(row.eps, row.smallest_normal, threshold, slice(max(0, lowest_normal - LOWEST)))


def count_roundings(counts: Counts, x: Tensor, y: Tensor) -> None:
    """Add the effects of rounding x to y, which has the format of `counts`. x may have any format, or be of integers.

    The result is that of `Counts.add`; signal and noise are sums in another order.
    """
    wide = torch.float64 if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
    x, y = x.detach().reshape(-1), y.detach().reshape(-1)
    size = PIECE.get(x.device.type, max(PIECE.values()))
    for start in range(0, x.numel(), size):
        _add_piece(counts, x[start : start + size].to(wide), y[start : start + size].to(wide))


def count_widened(counts: Counts, x: Tensor) -> None:
    """Add a conversion to a format that has all values of x's: all are exact, and only what arrived has to be looked for.

    Binades are not counted, nor signal and noise.
    """
    x = x.detach().float() if x.dtype.itemsize == 1 else x.detach()  # FP8 has no arithmetic
    arrived = 0 if _all_finite(x) else x.numel() - int(x.isfinite().sum())
    counts.elements += x.numel()
    counts.arrived += arrived
    counts.exact += x.numel() - arrived
    counts.zeros += x.numel() - int(torch.count_nonzero(x))
    counts.largest = max(counts.largest, largest_of(x))


def largest_of(x: Tensor) -> float:
    """Return the largest finite magnitude, 0 if there is none."""
    largest = _largest(x.detach())
    return largest if math.isfinite(largest) else float(x.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())


def _add_piece(counts: Counts, before: Tensor, after: Tensor) -> None:
    limits, n = _limits(counts.fmt, before.dtype), before.numel()
    counts.elements += n
    if not _all_finite(before):
        finite = before.isfinite()
        before, after = before[finite], after[finite]
        counts.arrived += n - before.numel()
    if not before.numel():
        return
    binades = _binades(before)
    nonzero = int(binades.sum())
    counts.binades += binades
    counts.zeros += before.numel() - nonzero
    largest = _largest(before)
    counts.largest = max(counts.largest, largest)
    if not _all_finite(after):
        finite = after.isfinite()
        before, after = before[finite], after[finite]
        counts.overflowed += finite.numel() - before.numel()
    few_bits = bool(binades[limits.below_normal].any())
    _add_finite(counts, before, after, few_bits, largest >= limits.threshold)


def _add_finite(counts: Counts, before: Tensor, after: Tensor, few_bits: bool, too_large: bool) -> None:
    """Count values that are finite before and after.

    few_bits: whether any is below the smallest normal value. too_large: whether any may be beyond the largest.
    """
    limits, difference = _limits(counts.fmt, before.dtype), before - after
    changed = int(torch.count_nonzero(difference))
    counts.exact += before.numel() - changed
    signal = before.double()
    counts.signal += float(torch.dot(signal, signal))
    if few_bits:
        counts.subnormal += int(((after != 0) & (after.abs() < limits.smallest_normal)).sum())
    if not changed:
        return
    noise = difference.double()
    counts.noise += float(torch.dot(noise, noise))
    tie = difference.abs_().mul_(2) == _ulps(before, limits)
    flushed = saturated = 0
    if few_bits:
        flushed = int(((after == 0) & (before != 0)).sum())
    if too_large:
        beyond = (before.abs() >= limits.threshold) & (after != before) & (after != 0)
        saturated = int(beyond.sum())
        tie &= ~beyond
    counts.flushed += flushed
    counts.saturated += saturated
    counts.rounded += changed - flushed - saturated
    counts.tie += int(torch.count_nonzero(tie))


def _all_finite(x: Tensor) -> bool:
    return math.isfinite(_largest(x))


def _largest(x: Tensor) -> float:
    """Return the largest magnitude: Inf or NaN where x has one."""
    low, high = x.aminmax() if x.numel() else (0.0, 0.0)
    return max(-float(low), float(high))


def _ulps(x: Tensor, limits: _Limits) -> Tensor:
    """Return the distance between the values of a format in the binade of each x."""
    bits = BITS[x.dtype]
    powers = (x.view(bits.integers) & bits.mask).view(x.dtype)  # 2^e, and 0 below x's own normal range
    return powers.clamp_(min=limits.smallest_normal).mul_(limits.eps)


def _binades(x: Tensor) -> np.ndarray:
    """Return how many nonzero x there are in [2^e, 2^(e+1)), for e from LOWEST, smaller ones included, to HIGHEST."""
    bits = BITS[x.dtype]
    fields = (x.view(bits.integers) & bits.mask) >> bits.fraction
    found = torch.bincount(fields, minlength=2 * bits.bias + 2).cpu().numpy()
    result = np.zeros(HIGHEST - LOWEST + 1, np.int64)
    present = found[1:].nonzero()[0] + 1
    np.add.at(result, (present - bits.bias).clip(LOWEST, HIGHEST) - LOWEST, found[present])
    if found[0]:  # zeros, and subnormal numbers of x's format
        tiny = x[(fields == 0) & (x != 0)]
        if tiny.numel():
            exponents = (torch.frexp(tiny).exponent - 1).cpu().numpy()
            np.add.at(result, exponents.clip(LOWEST, HIGHEST) - LOWEST, 1)
    return result
