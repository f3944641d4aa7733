"""The histograms of a precision report: exponents before rounding, over the range of the format. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.numerics.formats import FORMATS
from refimpl.numerics.rounding_effects import HIGHEST, LOWEST, Counts
from refimpl.tools.precision_report.collect import Inspection
from refimpl.tools.precision_report.tables import exponents_text, merged, range_sentence, scales, scales_text, totals, zones
from refimpl.training.html.figures import Picture, as_svg, legend_above
from refimpl.training.palette import BLUE, GRAY, GREEN, ORANGE, PURPLE

LOST, SUBNORMAL, NORMAL = "#f7dcd7", "#e9f1fa", "#c9def2"
"""Background colors of a histogram: values that become zero or overflow, the subnormal range, and the normal range."""
COLORS = {
    "weights": BLUE, "activations": GREEN, "activation gradients": ORANGE, "weight gradients": PURPLE, "updated states": GRAY
}  # fmt: skip


def exponent_pictures(inspection: Inspection) -> list[Picture]:
    """Return histograms of the exponents of weights, activations, and gradients before and after the loss scale, by format.

    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2, figure 3.
    """
    after, before = _by_format(inspection.sites), _by_format(inspection.unscaled)
    result: list[Picture] = []
    for fmt, kinds in after.items():
        spread = range_shown(fmt, [*kinds.values(), *before.get(fmt, {}).values()])
        gradients = {kind for kind in kinds if kind.endswith("gradients")}
        named = display_name(fmt)
        for title, source, chosen in (
            (f"Weights in {named}", kinds, {"weights"}),
            (f"Activations in {named}", kinds, {"activations"}),
            *((title, source, gradients) for title, source in _gradient_panels(inspection, before.get(fmt, {}), kinds, fmt)),
            (f"Updated states in {named}", kinds, {"updated states"}),
        ):
            shown = {kind: counts for kind, counts in source.items() if kind in chosen}
            if shown:
                result.append(_histogram(f"exponents-{fmt}-{len(result)}", title, fmt, shown, spread))
    return result


def _by_format(sites: dict[str, Counts]) -> dict[str, dict[str, Counts]]:
    result: dict[str, dict[str, Counts]] = {}
    for total in totals(sites):
        result.setdefault(total.fmt, {})[total.kind] = total.counts
    return result


def _gradient_panels(
    inspection: Inspection, before: dict[str, Counts], after: dict[str, Counts], fmt: str
) -> list[tuple[str, dict[str, Counts]]]:
    named = f"Gradients in {display_name(fmt)}"
    if FORMATS[fmt].bits <= 8:
        return [(f"{named}, divided by their own scales", after)]
    if scales(inspection.rows) == [1.0]:
        return [(f"{named} (there is no loss scale)", after)]
    return [
        (f"{named} before the loss scale", before),
        (f"{named} times the loss scale, {scales_text(inspection.rows)}", after),
    ]


def display_name(fmt: str) -> str:
    """Return the name of a format in a title: 'BF16', and those of 8 bits as they are: 'e4m3'."""
    return fmt.upper() if FORMATS[fmt].bits > 8 else fmt


def range_shown(fmt: str, every: Sequence[Counts]) -> tuple[int, int]:
    """Return the range of exponents of histograms.

    It is the format's range, and beyond it every binade with a visible share, but BEYOND at most. Of a format of more than
    WIDE binades it is only the part that has visible shares.
    """
    lowest, _, overflow = zones(fmt)
    visible = [np.flatnonzero(c.binades > VISIBLE * c.binades.sum()) + LOWEST for c in every]
    used = [int(e) for exponents in visible for e in exponents] or [0]
    first, last = min(lowest - MARGIN, *used), max(overflow + MARGIN, max(used) + 1)
    if overflow - lowest > WIDE:
        first, last = max(first, min(used) - 2 * MARGIN), min(last, max(used) + 2 * MARGIN)
    return max(first, lowest - BEYOND, LOWEST), min(last, overflow + BEYOND, HIGHEST + 1)


VISIBLE, MARGIN, BEYOND, WIDE = 5e-4, 4, 12, 64


def _histogram(name: str, title: str, fmt: str, kinds: dict[str, Counts], spread: tuple[int, int]) -> Picture:
    counts = merged(kinds.values())
    beyond = any(c.exponents and (c.exponents[0] < spread[0] or c.exponents[1] >= spread[1]) for c in kinds.values())
    edges = " The outermost bars hold all values beyond them, too." if beyond else ""
    caption = f"{counts.elements:,} values, exponents {exponents_text(counts)}. {range_sentence(counts)}{edges}"
    label = f"Histogram of the exponents: {title}"
    svg = as_svg(name, lambda axes: draw_histogram(axes, fmt, kinds, spread))
    return Picture(name, title, label, caption, svg)


def draw_histogram(axes: Any, fmt: str, kinds: dict[str, Counts], spread: tuple[int, int]) -> None:
    """Draw percentages of the nonzero values by exponent: as bars for the first kind, as lines for others."""
    first, last = spread
    edges = np.arange(first, last + 1)
    for i, (kind, counts) in enumerate(kinds.items()):
        shares = 100 * _within(counts.binades, spread) / max(counts.nonzero, 1)
        filled = {"fill": True, "alpha": 0.85} if i == 0 else {"lw": 1.8}
        axes.stairs(shares, edges, color=COLORS[kind], label=kind, **filled)
    _draw_zones(axes, fmt, spread)
    axes.set_xlim(first, last)
    axes.set_xlabel("exponent e of values from $2^e$ to $2^{e+1}$")
    axes.set_ylabel("% of nonzero values")
    if len(kinds) > 1:
        legend_above(axes)


def _within(binades: np.ndarray, spread: tuple[int, int]) -> np.ndarray:
    """Return the counts of the binades of a range, with those beyond it in the outermost."""
    first, last = spread[0] - LOWEST, spread[1] - LOWEST
    shown = binades[first:last].copy()
    shown[0] += binades[:first].sum()
    shown[-1] += binades[last:].sum()
    return shown


def _draw_zones(axes: Any, fmt: str, spread: tuple[int, int]) -> None:
    """Draw the ranges of the format, with names above the axes in two lines, so that names of narrow ranges fit."""
    first, last = spread
    subnormal, normal, overflow = (min(max(cut, first), last) for cut in zones(fmt))
    for start, end, color, height, text, align in (
        (first, subnormal, LOST, 1.02, "flushed", "left"),
        (subnormal, normal, SUBNORMAL, 1.1, "subnormal", "center"),
        (normal, overflow, NORMAL, 1.02, f"normal in {display_name(fmt)}", "center"),
        (overflow, last, LOST, 1.1, "overflow", "right"),
    ):
        if start < end:
            axes.axvspan(start, end, color=color, lw=0, zorder=0)
            x = {"left": start, "center": (start + end) / 2, "right": end}[align]
            axes.text(x, height, text, transform=axes.get_xaxis_transform(), ha=align, fontsize=9, color="#444444")
