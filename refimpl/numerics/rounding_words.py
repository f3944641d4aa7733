"""Figures on roundings as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from refimpl.numerics.rounding_effects import NEGLIGIBLE, Counts


def scale_sentence(unscaled: Counts, fmt: str, others: bool = False) -> str:
    """Return what a gradient would lose in a format without a loss scale, and which scales would do.

    unscaled: its values divided by the loss scale that it had. others: whether some had arrived as Inf or NaN.
    """
    at_one = unscaled.flushed_at(0, fmt)
    if at_one < NEGLIGIBLE:
        needs = "of the others," if others else "needs no loss scale:"
        return f"{needs} at S = 1 {percent(at_one)} would become zero in {fmt}"
    return f"{percent(at_one)} would become zero in {fmt} at S = 1; {remedy(unscaled, fmt)}"


def remedy(unscaled: Counts, fmt: str) -> str:
    """Return the range of loss scales at which all but NEGLIGIBLE of a gradient survives and its largest value is finite."""
    enough, top = unscaled.saving_scales(fmt)
    if enough > top:
        return f"no S saves all but {percent(NEGLIGIBLE)} of it: that needs 2^{enough}, but it overflows above 2^{top}"
    return f"S >= 2^{enough} saves all but {percent(NEGLIGIBLE)} of it, and it overflows above 2^{top}"


def percent(share: float) -> str:
    """Return a share as text with two digits of the distance to 0 or 100 %: '12 %', '0.57 %', '99.66 %'."""
    distance = min(share, 1 - share)
    if distance <= 0:
        return f"{100 * share:.0f} %"
    digits = max(0, 1 - math.floor(math.log10(100 * distance)))
    return f"{100 * share:.{digits}f} %"


def decibels(ratio: float) -> str:
    """Return a ratio as text: '73.6 dB', 'without an error' if infinite, '-' if NaN."""
    return "without an error" if math.isinf(ratio) else "-" if math.isnan(ratio) else f"{ratio:.1f} dB"


def powers(scales: Sequence[float]) -> str:
    """Return the range of sorted loss scales: '2^16', or '2^14 to 2^16'."""
    return power(scales[0]) if len(scales) == 1 else f"{power(scales[0])} to {power(scales[-1])}"


def power(scale: float) -> str:
    """Return a scale as text: 65536 -> '2^16', 1000 -> '1000', 1 -> '1'."""
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 and exponent != 1 else f"{scale:g}"
