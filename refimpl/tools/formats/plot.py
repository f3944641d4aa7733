"""A picture of the formats: the spacing of their values, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refimpl.numerics.formats import FORMATS, ulp
from refimpl.training.palette import FORMAT_COLORS
from refimpl.training.pictures import figure_for_flag, legend_beside, save

PICTURE = Path("formats.png")


def plot_formats(path: Path, formats: Sequence[str], overwrite: bool = False) -> Path:
    """Draw two panels, spacing above and ranges below, write them as a PNG, and return its path.

    Errors: UsageError without matplotlib, for a name that does not end in .png, or if the file cannot be written.
    """
    figure, picture = figure_for_flag(path, PICTURE, overwrite, 11, 10)
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    top, bottom = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_spacing(top, formats)
    _draw_ranges(bottom, formats)
    powers = StrMethodFormatter("$2^{{{x:.0f}}}$")
    for axis in (top.xaxis, top.yaxis, bottom.xaxis):
        axis.set_major_formatter(powers)
        axis.set_major_locator(MaxNLocator(12, integer=True))
    return picture.write(lambda temporary: save(figure, temporary))


def spacing(fmt: str) -> tuple[list[float], list[float]]:
    """Return log2 of the magnitudes where binades begin, and of the largest value; and log2 of the ulp from each on."""
    row = FORMATS[fmt]
    first, last = (math.frexp(value)[1] - 1 for value in (row.smallest_subnormal, row.max))
    exponents = range(first, last + 1)
    ulps = [math.log2(ulp(fmt, math.ldexp(1.0, exponent))) for exponent in exponents]
    return [*exponents, math.log2(row.max)], [*ulps, ulps[-1]]


def _draw_spacing(axes: Any, formats: Sequence[str]) -> None:
    """Draw the spacing on logarithmic axes, in the range of the formats with up to five exponent bits if there are any."""
    for i, fmt in enumerate(formats):  # formats with equal fraction bits overlap, so later lines are thinner
        axes.plot(*spacing(fmt), drawstyle="steps-post", lw=6 - 4 * i / len(formats), color=FORMAT_COLORS[fmt], label=fmt)
    window = [fmt for fmt in formats if FORMATS[fmt].exponent_bits <= 5] or formats
    left = min(math.log2(FORMATS[fmt].smallest_subnormal) for fmt in window) - 4
    right = max(math.log2(FORMATS[fmt].max) for fmt in window) + 4
    seen = [y for fmt in formats for x, y in zip(*spacing(fmt), strict=True) if left <= x <= right]
    axes.set_xlim(left, right)
    axes.set_ylim(min(seen) - 2, max(seen) + 2)
    axes.set_xlabel("magnitude")
    axes.set_ylabel("distance to the next value (ulp)")
    axes.set_title("Spacing of the values of each format")
    legend_beside(axes)
    axes.grid(alpha=0.3)


def _draw_ranges(axes: Any, formats: Sequence[str]) -> None:
    for i, fmt in enumerate(formats):
        row = FORMATS[fmt]
        smallest, normal, largest = (math.log2(x) for x in (row.smallest_subnormal, row.smallest_normal, row.max))
        axes.barh(i, normal - smallest, left=smallest, height=0.6, color=FORMAT_COLORS[fmt], alpha=0.35)
        axes.barh(i, largest - normal, left=normal, height=0.6, color=FORMAT_COLORS[fmt])
        axes.annotate(f"$2^{{{smallest:.0f}}}$ ", (smallest, i), ha="right", va="center")
        axes.annotate(f" {row.max:.6g}", (largest, i), va="center")
    axes.set_yticks(range(len(formats)), formats)
    axes.invert_yaxis()
    axes.use_sticky_edges = False  # leaves room for the numbers at both ends
    axes.margins(x=0.15)
    axes.set_xlabel("magnitude")
    axes.set_title("Range of each format, from the smallest to the largest value: subnormal light, normal dark")
    axes.grid(alpha=0.3, axis="x")
