"""The figures of a precision report, each a small SVG that stands in an HTML page as text. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.numerics.formats import FORMATS
from refimpl.tools.html.figures import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, Picture, as_svg
from refimpl.tools.precision_report.collect import Inspection, StepRow
from refimpl.tools.precision_report.counts import HIGHEST, LOWEST, Counts
from refimpl.tools.precision_report.tables import (
    exponents_text,
    loss_sentence,
    merged,
    range_sentence,
    scales,
    scales_text,
    skipped_sentence,
    totals,
    zones,
)
from refimpl.tools.precision_report.verdicts import NEGLIGIBLE, percent, power

LOST, SUBNORMAL, NORMAL = "#f7dcd7", "#e9f1fa", "#c9def2"
"""Behind a histogram: what becomes zero or overflows, the subnormal range, and the normal range of the format."""


# -- 1. exponents ------------------------------------------------------------------------------------------------------

COLORS = {
    "weights": BLUE, "activations": GREEN, "activation gradients": ORANGE, "weight gradients": PURPLE, "updated states": GRAY
}  # fmt: skip


def exponent_pictures(inspection: Inspection) -> list[Picture]:
    """Histograms of the exponents of weights, activations, and gradients before and after the loss scale.

    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2, figure 3.
    """
    after, before = _by_format(inspection.sites), _by_format(inspection.unscaled)
    result: list[Picture] = []
    for fmt, kinds in after.items():
        spread = range_shown(fmt, [*kinds.values(), *before.get(fmt, {}).values()])
        gradients = {kind for kind in kinds if kind.endswith("gradients")}
        for title, source, chosen in (
            ("weights", kinds, {"weights"}),
            ("activations", kinds, {"activations"}),
            *((title, source, gradients) for title, source in _gradient_panels(inspection, before.get(fmt, {}), kinds)),
            ("updated states", kinds, {"updated states"}),
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
    inspection: Inspection, before: dict[str, Counts], after: dict[str, Counts]
) -> list[tuple[str, dict[str, Counts]]]:
    if scales(inspection.rows) == [1.0]:
        return [("gradients (there is no loss scale)", after)]
    return [
        ("gradients before the loss scale", before),
        (f"gradients times the loss scale, {scales_text(inspection.rows)}", after),
    ]


def range_shown(fmt: str, every: Sequence[Counts]) -> tuple[int, int]:
    """The exponents that histograms run over: all of the format's range, and every binade with a visible share."""
    lowest, _, overflow = zones(fmt)
    visible = [np.flatnonzero(c.binades > VISIBLE * c.binades.sum()) + LOWEST for c in every]
    used = [int(e) for exponents in visible for e in exponents]
    first, last = min([lowest - 4, *used]), max([overflow + 4, *(e + 1 for e in used)])
    return max(first, LOWEST), min(last, HIGHEST + 1)


VISIBLE = 5e-4


def _histogram(name: str, title: str, fmt: str, kinds: dict[str, Counts], spread: tuple[int, int]) -> Picture:
    counts = merged(kinds.values())
    caption = f"{counts.elements:,} values, exponents {exponents_text(counts)}. {range_sentence(counts)}"
    label = f"Histogram of the exponents of {title}, over the range of {fmt}"
    svg = as_svg(name, lambda axes: draw_histogram(axes, fmt, kinds, spread))
    return Picture(name, title[0].upper() + title[1:], label, caption, svg)


def draw_histogram(axes: Any, fmt: str, kinds: dict[str, Counts], spread: tuple[int, int]) -> None:
    """Bars for the first kind and a line for another: shares of the nonzero values of each, in percent, by exponent."""
    first, last = spread
    edges = np.arange(first, last + 1)
    for i, (kind, counts) in enumerate(kinds.items()):
        shares = 100 * counts.binades[first - LOWEST : last - LOWEST] / max(counts.elements - counts.zeros, 1)
        filled = {"fill": True, "alpha": 0.85} if i == 0 else {"lw": 1.8}
        axes.stairs(shares, edges, color=COLORS[kind], label=kind, **filled)
    _draw_zones(axes, fmt, spread)
    axes.set_xlim(first, last)
    axes.set_xlabel("exponent e of values from $2^e$ to $2^{e+1}$")
    axes.set_ylabel("% of nonzero values")
    if len(kinds) > 1:
        axes.legend(frameon=False)


def _draw_zones(axes: Any, fmt: str, spread: tuple[int, int]) -> None:
    """The ranges of the format, named above the axes: in two lines, so that names of narrow ranges find room."""
    first, last = spread
    subnormal, normal, overflow = zones(fmt)
    for start, end, color in (
        (first, subnormal, LOST), (subnormal, normal, SUBNORMAL), (normal, overflow, NORMAL), (overflow, last, LOST)
    ):  # fmt: skip
        axes.axvspan(start, end, color=color, lw=0, zorder=0)
    for x, height, text, align in (
        (first, 1.02, "flushed", "left"), ((subnormal + normal) / 2, 1.1, "subnormal", "center"),
        ((normal + overflow) / 2, 1.02, f"normal in {fmt}", "center"), (last, 1.1, "overflow", "right"),
    ):  # fmt: skip
        axes.text(x, height, text, transform=axes.get_xaxis_transform(), ha=align, fontsize=9, color="#444444")


# -- 2. loss scales ----------------------------------------------------------------------------------------------------


def sweep_pictures(inspection: Inspection) -> list[Picture]:
    """Which share of each layer's gradients one batch loses at each loss scale; nothing where no gradient is cast."""
    if not any(row["layers"] for row in inspection.sweep):
        return []
    label = "Share of each layer's gradients that becomes zero, against the loss scale"
    svg = as_svg("sweep", lambda axes: draw_sweep(axes, inspection))
    return [Picture("sweep", "Flushed to zero, layer by layer", label, sweep_caption(inspection), svg)]


def sweep_caption(inspection: Inspection) -> str:
    """Where gradients are lost, from which loss scale on they are not, and from which on they overflow."""
    sweep, least = inspection.sweep, percent(NEGLIGIBLE)
    over = next((row for row in sweep if any(n for _, n in row["layers"].values())), None)
    sound = sweep[: sweep.index(over)] if over else sweep  # beyond it infinities become NaN, and shares say nothing
    enough = next((row for row in sound if max(share for share, _ in row["layers"].values()) < NEGLIGIBLE), None)
    layer, (worst, _) = max(sweep[0]["layers"].items(), key=lambda item: item[1][0])
    most = f"the layer that loses most is {layer}: {percent(worst)} of its nonzero gradients become zero"
    parts = [f"One batch, sent backward at {len(sweep)} loss scales with the weights of the last step."]
    parts.append(f"At S = 1 {most if worst else 'no gradient becomes zero'}.")
    if enough:
        parts.append(f"From S = {_scale_of(enough)} on no layer loses more than {least}.")
    else:
        parts.append(f"At no S below overflow does every layer lose less than {least}.")
    if over:
        where = ", ".join(layer for layer in _in_order(over["layers"]) if over["layers"][layer][1])
        parts.append(f"From S = {_scale_of(over)} on gradients overflow (there in {where}), and such a step is skipped.")
    else:
        parts.append("At none of these scales does a gradient overflow.")
    if not math.isfinite(inspection.rows[-1].loss):
        parts.append("The loss was not finite by then: NaNs are counted neither as flushed nor as overflowed.")
    return f"{' '.join(parts)} This run had S = {scales_text(inspection.rows)}."


def _scale_of(row: dict[str, Any]) -> str:
    return power(2.0 ** row["exponent"])


def draw_sweep(axes: Any, inspection: Inspection) -> None:
    """A line for each layer, up to the first loss scale where anything overflows, and crosses where the layer itself does."""
    overflowing = [row["exponent"] for row in inspection.sweep if any(n for _, n in row["layers"].values())]
    first_overflow = min(overflowing, default=math.inf)
    layers = _in_order(inspection.sweep[0]["layers"])
    for i, layer in enumerate(layers):
        # beyond the first overflow infinities become NaN further down, and a share of them says nothing
        points = [(row["exponent"], 100 * row["layers"][layer][0], row["layers"][layer][1]) for row in inspection.sweep]
        line = [(x, y) for x, y, _ in points if x <= first_overflow]
        crosses = [(x, 0.0 if x > first_overflow else y) for x, y, n in points if n]
        (color, marker), name = _layer_style(layer, i, len(layers)), _layer_label(layer, i, len(layers))
        axes.plot(*zip(*line, strict=True), marker, ls="-", color=color, lw=1.4, ms=4, label=name)
        if crosses:
            axes.plot(*zip(*crosses, strict=True), "x", color=color, ms=8, mew=2)
    exponents = [math.log2(scale) for scale in scales(inspection.rows) if 0 < scale < math.inf]
    axes.axvspan(min(exponents) - 0.15, max(exponents) + 0.15, color=GRAY, alpha=0.3, lw=0, label="S of this run")
    if overflowing:
        axes.axvspan(first_overflow - 1, max(overflowing) + 1, color=LOST, lw=0, zorder=0)
        axes.plot([], [], "x", color="black", mew=2, label="overflow")
    axes.set_yscale("symlog", linthresh=1e-4, linscale=0.5)
    ticks = [0, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(-2e-5, 100)
    axes.set_xlabel("$\\log_2$ of the loss scale S")
    axes.set_ylabel("% flushed to zero")
    legend = {"ncols": 3, "columnspacing": 1.2, "handlelength": 1.2, "labelspacing": 0.2, "frameon": False}
    axes.figure.legend(loc="outside upper center", **legend)


def _in_order(layers: Sequence[str]) -> list[str]:
    """From the first to the last that the forward pass goes through."""
    blocks = sorted((layer for layer in layers if layer.startswith("block ")), key=lambda layer: int(layer[6:]))
    return [layer for layer in ("embedding", *blocks, "head") if layer in layers]


def _layer_style(layer: str, i: int, n: int) -> tuple[Any, str]:
    """Color and marker: blocks go from dark to light."""
    import matplotlib

    block = matplotlib.colormaps["viridis"](0.85 * i / max(n - 1, 1)), "."
    return {"embedding": (ORANGE, "s"), "head": (RED, "^")}.get(layer, block)


def _layer_label(layer: str, i: int, n: int) -> str:
    """Of many blocks only the first and the last are named; an underscore keeps a line out of the legend."""
    ends = (0, 1, n - 2, n - 1)
    return layer if n <= 8 or i in ends else f"_{layer}"


# -- 3. the run --------------------------------------------------------------------------------------------------------


SKIPPED = " Such a step updates nothing; a loss scale that adapts backs off, at once or after more of them."


def run_pictures(inspection: Inspection) -> list[Picture]:
    """The way of the loss scale, where it is not 1 throughout, and that of the loss."""
    rows, result = inspection.rows, []
    if scales(rows) != [1.0]:
        svg = as_svg("loss-scale", lambda axes: draw_loss_scale(axes, rows))
        way = f"S began at {power(rows[0].loss_scale)}, and was {power(rows[-1].loss_scale)} at the last step."
        if len(scales(rows)) == 1:
            way = f"S was {scales_text(rows)} throughout."
        effect = SKIPPED if any(row.skipped for row in rows) else ""
        caption = f"{way} {skipped_sentence(rows)}{effect}"
        result.append(Picture("loss-scale", "Loss scale", "The loss scale at each step", caption, svg))
    svg = as_svg("loss", lambda axes: _draw_loss(axes, rows))
    result.append(Picture("loss", "Loss", "The training loss at each step", loss_sentence(rows), svg))
    return result


def draw_loss_scale(axes: Any, rows: Sequence[StepRow]) -> None:
    """log2 of the loss scale that each step used, and crosses at those that were skipped."""
    steps, exponents = [row.step for row in rows], [math.log2(min(max(row.loss_scale, 2.0**-149), 2.0**128)) for row in rows]
    axes.step(steps, exponents, where="post", color=BLUE)
    axes.set_ylabel("$\\log_2$ of the loss scale S")
    axes.set_ylim(min(exponents) - 1.5, max(exponents) + 1.5)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _draw_skipped(axes, rows, exponents)


def _draw_loss(axes: Any, rows: Sequence[StepRow]) -> None:
    losses = [row.loss if math.isfinite(row.loss) else math.nan for row in rows]
    axes.plot([row.step for row in rows], losses, ".-" if len(rows) < 20 else "-", color=BLUE, lw=1.2)
    axes.set_ylabel("nats a byte")
    axes.grid(alpha=0.3)
    _draw_skipped(axes, rows, losses)


def _draw_skipped(axes: Any, rows: Sequence[StepRow], heights: Sequence[float]) -> None:
    marks = [(row.step, height) for row, height in zip(rows, heights, strict=True) if row.skipped]
    if marks:
        axes.plot(*zip(*marks, strict=True), "x", color=RED, ms=8, mew=2, label="skipped step")
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


# -- 4. updates --------------------------------------------------------------------------------------------------------


def update_pictures(inspection: Inspection) -> list[Picture]:
    """Which share of the weights an update leaves as they are, and which share has moved since the start."""
    rows = [row for row in inspection.rows if not row.skipped]
    if not rows:
        return []
    words = _weight_words(inspection)
    means = [f"{percent(_mean(rows, name))} of the {words[name]}" for name in words if getattr(rows[0], name) is not None]
    still = f"On average an update left as they were: {'; '.join(means)}. Skipped steps, which move nothing, are left out."
    moved = _moved_caption(inspection, rows[-1])
    still_svg = as_svg("still", lambda axes: _draw_shares(axes, rows, words, "% not moved by the update"))
    moved_svg = as_svg("moved", lambda axes: _draw_shares(axes, rows, _moved_words(words), "% not where they started"))
    still_label, moved_label = (f"Share of the weights that {what}, step by step" for what in (
        "the update left as they were", "are no longer where they started"))  # fmt: skip
    return [
        Picture("still", "Weights that an update did not move", still_label, still, still_svg),
        Picture("moved", "Weights that have moved since the start", moved_label, moved, moved_svg),
    ]


def _weight_words(inspection: Inspection) -> dict[str, str]:
    """What the three shares of a StepRow are of, in this recipe."""
    low, state = inspection.low, inspection.config.make_recipe().state
    if inspection.rows[0].masters_still is None:
        return {"alone_still": f"{low} weights, which have no masters"}
    kept = f"{state['master']} masters" if state["master"] else f"{state['weights']} weights"
    if state["weights"] not in FORMATS:
        kept = "fp32 masters, in two halves"
    return {
        "masters_still": kept,
        "weights_still": f"{low} copies of them",
        "alone_still": f"{low} weights without masters",
    }


def _moved_words(words: dict[str, str]) -> dict[str, str]:
    return {name.replace("still", "moved"): text for name, text in words.items() if name != "masters_still"}


def _moved_caption(inspection: Inspection, last: StepRow) -> str:
    alone, low = percent(1 - last.alone_moved), inspection.low
    if last.weights_moved is None:
        return f"After step {last.step}, {alone} of the {low} weights are where they started."
    return (
        f"After step {last.step}, {percent(1 - last.weights_moved)} of the {low} copies are where they started, and {alone} of "
        f"{low} weights without masters would be. What an update does not move is lost without masters; with them it is kept, "
        f"and added up until the copy moves."
    )


def _mean(rows: Sequence[StepRow], name: str) -> float:
    return float(sum(getattr(row, name) for row in rows)) / len(rows)


def _draw_shares(axes: Any, rows: Sequence[StepRow], words: dict[str, str], ylabel: str) -> None:
    styles = {"masters": (BLUE, "-"), "weights": (GREEN, "-"), "alone": (RED, "--")}
    top = 0.0
    for name, text in words.items():
        color, style = styles[name.partition("_")[0]]
        shares = [100 * getattr(row, name) for row in rows]
        top = max(top, *shares)
        marker = "." if len(rows) < 20 else ""
        axes.plot([row.step for row in rows], shares, style, marker=marker, color=color, lw=1.4, label=text)
    axes.set_ylim(-0.03 * max(top, 1), 1.08 * max(top, 1))
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside upper center", frameon=False, labelspacing=0.2)


def all_pictures(inspection: Inspection) -> dict[str, list[Picture]]:
    """All figures of a report, by the section that they stand in."""
    return {
        "exponents": exponent_pictures(inspection),
        "sweep": sweep_pictures(inspection),
        "run": run_pictures(inspection),
        "updates": update_pictures(inspection),
    }
