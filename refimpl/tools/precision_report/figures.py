"""The figures of a precision report, as small SVGs inside the HTML page. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.numerics.formats import FORMATS
from refimpl.numerics.rounding_effects import HIGHEST, LOWEST, NEGLIGIBLE, Counts
from refimpl.numerics.rounding_words import percent, power
from refimpl.tools.precision_report.collect import Inspection, StepRow
from refimpl.tools.precision_report.layer_figures import layer_pictures
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
from refimpl.training.html.figures import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, Picture, as_svg

LOST, SUBNORMAL, NORMAL = "#f7dcd7", "#e9f1fa", "#c9def2"
"""Background colors of a histogram: values that become zero or overflow, the subnormal range, and the normal range."""


# -- 1. exponents ------------------------------------------------------------------------------------------------------

COLORS = {
    "weights": BLUE, "activations": GREEN, "activation gradients": ORANGE, "weight gradients": PURPLE, "updated states": GRAY
}  # fmt: skip


def exponent_pictures(inspection: Inspection) -> list[Picture]:
    """Return histograms of the exponents of weights, activations, and gradients before and after the loss scale.

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
    """Return the range of exponents of histograms: the format's range, and every binade with a visible share."""
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
    """Draw percentages of the nonzero values by exponent: as bars for the first kind, as lines for others."""
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
    """Draw the ranges of the format, with names above the axes in two lines, so that names of narrow ranges fit."""
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
    """Return the figure of the share of each layer's gradients that one batch loses per loss scale; [] without casts."""
    if not any(row["layers"] for row in inspection.sweep):
        return []
    label = "Share of each layer's gradients that becomes zero, against the loss scale"
    svg = as_svg("sweep", lambda axes: draw_sweep(axes, inspection))
    return [Picture("sweep", "Flushed to zero, layer by layer", label, sweep_caption(inspection), svg)]


def sweep_caption(inspection: Inspection) -> str:
    """Return the caption: which layer loses most, and from which loss scale on gradients survive, and overflow."""
    sweep, least = inspection.sweep, percent(NEGLIGIBLE)
    over = next((row for row in sweep if any(n for _, n in row["layers"].values())), None)
    sound = sweep[: sweep.index(over)] if over else sweep  # beyond it infinities become NaN, and shares mean nothing
    enough = next((row for row in sound if max(share for share, _ in row["layers"].values()) < NEGLIGIBLE), None)
    layer, (worst, _) = max(sweep[0]["layers"].items(), key=lambda item: item[1][0])
    most = f"the layer that loses most is {layer}: {percent(worst)} of its nonzero gradients become zero"
    parts = [f"Backward of one batch with {len(sweep)} loss scales and the weights of the last step."]
    parts.append(f"At S = 1 {most if worst else 'no gradient becomes zero'}.")
    if enough:
        parts.append(f"From S = {_scale_of(enough)} on no layer loses more than {least}.")
    else:
        parts.append(f"At no S below overflow does every layer lose less than {least}.")
    if over:
        where = ", ".join(layer for layer in _in_order(over["layers"]) if over["layers"][layer][1])
        parts.append(f"From S = {_scale_of(over)} on gradients overflow (first in {where}), and such a step is skipped.")
    else:
        parts.append("At none of these scales does a gradient overflow.")
    if not math.isfinite(inspection.rows[-1].loss):
        parts.append("The loss was not finite at that step; NaNs count neither as flushed nor as overflowed.")
    return f"{' '.join(parts)} This run had S = {scales_text(inspection.rows)}."


def _scale_of(row: dict[str, Any]) -> str:
    return power(2.0 ** row["exponent"])


def draw_sweep(axes: Any, inspection: Inspection) -> None:
    """Draw one line per layer up to the first loss scale at which any layer overflows, and crosses where the layer does."""
    overflowing = [row["exponent"] for row in inspection.sweep if any(n for _, n in row["layers"].values())]
    first_overflow = min(overflowing, default=math.inf)
    layers = _in_order(inspection.sweep[0]["layers"])
    for i, layer in enumerate(layers):
        # beyond the first overflow infinities become NaN in other layers, and their shares mean nothing
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
    """Return the layers in the order of the forward pass."""
    blocks = sorted((layer for layer in layers if layer.startswith("block ")), key=lambda layer: int(layer[6:]))
    return [layer for layer in ("embedding", *blocks, "head") if layer in layers]


def _layer_style(layer: str, i: int, n: int) -> tuple[Any, str]:
    """Return color and marker of a layer; blocks go from dark to light."""
    import matplotlib

    block = matplotlib.colormaps["viridis"](0.85 * i / max(n - 1, 1)), "."
    return {"embedding": (ORANGE, "s"), "head": (RED, "^")}.get(layer, block)


def _layer_label(layer: str, i: int, n: int) -> str:
    """Return the label of a layer; of many blocks only the first and last get one (an underscore hides a label)."""
    ends = (0, 1, n - 2, n - 1)
    return layer if n <= 8 or i in ends else f"_{layer}"


# -- 3. the run --------------------------------------------------------------------------------------------------------


SKIPPED = " Such a step updates nothing; a dynamic loss scale is reduced, at once or after several of them."


def run_pictures(inspection: Inspection) -> list[Picture]:
    """Return the figures of the loss scale, unless it is always 1, and of the loss."""
    rows, result = inspection.rows, []
    if scales(rows) != [1.0]:
        svg = as_svg("loss-scale", lambda axes: draw_loss_scale(axes, rows))
        way = f"S was {power(rows[0].loss_scale)} at the first step and {power(rows[-1].loss_scale)} at the last."
        if len(scales(rows)) == 1:
            way = f"S was {scales_text(rows)} throughout."
        effect = SKIPPED if any(row.skipped for row in rows) else ""
        caption = f"{way} {skipped_sentence(rows)}{effect}"
        result.append(Picture("loss-scale", "Loss scale", "The loss scale at each step", caption, svg))
    svg = as_svg("loss", lambda axes: _draw_loss(axes, rows))
    result.append(Picture("loss", "Loss", "The training loss at each step", loss_sentence(rows), svg))
    return result


def draw_loss_scale(axes: Any, rows: Sequence[StepRow]) -> None:
    """Draw log2 of the loss scale of each step, and crosses at skipped steps."""
    steps, exponents = [row.step for row in rows], [math.log2(min(max(row.loss_scale, 2.0**-149), 2.0**128)) for row in rows]
    axes.step(steps, exponents, where="post", color=BLUE)
    axes.set_ylabel("$\\log_2$ of the loss scale S")
    axes.set_ylim(min(exponents) - 1.5, max(exponents) + 1.5)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _draw_skipped(axes, rows, exponents)


def _draw_loss(axes: Any, rows: Sequence[StepRow]) -> None:
    losses = [row.loss if math.isfinite(row.loss) else math.nan for row in rows]
    axes.plot([row.step for row in rows], losses, ".-" if len(rows) < 20 else "-", color=BLUE, lw=1.2)
    axes.set_ylabel("loss in nats")
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
    """Return the figures of the shares of weights that an update does not move, and that have moved since the start."""
    rows = [row for row in inspection.rows if not row.skipped]
    if not rows:
        return []
    words = _weight_words(inspection)
    means = [f"{percent(_mean(rows, name))} of the {words[name]}" for name in words if getattr(rows[0], name) is not None]
    still = f"On average an update did not move {'; '.join(means)}. Skipped steps, which move nothing, are left out."
    moved = _moved_caption(inspection, rows[-1])
    still_svg = as_svg("still", lambda axes: _draw_shares(axes, rows, words, "% not moved by the update"))
    moved_svg = as_svg("moved", lambda axes: _draw_shares(axes, rows, _moved_words(words), "% moved since the start"))
    still_label, moved_label = (f"Share of the weights that {what}, step by step" for what in (
        "the update did not move", "have moved since the start"))  # fmt: skip
    return [
        Picture("still", "Weights that an update did not move", still_label, still, still_svg),
        Picture("moved", "Weights that have moved since the start", moved_label, moved, moved_svg),
    ]


def _weight_words(inspection: Inspection) -> dict[str, str]:
    """Return the words for the weights of the three shares of a StepRow in this recipe."""
    low, state = inspection.low, inspection.config.make_recipe().state
    if inspection.rows[0].masters_still is None:
        return {"alone_still": f"{low} weights without masters"}
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
        return f"After step {last.step}, {alone} of the {low} weights have their initial values."
    return (
        f"After step {last.step}, {percent(1 - last.weights_moved)} of the {low} copies have their initial values, and {alone} "
        f"of {low} weights without masters would have. Without masters, an update that does not move a weight is lost; with "
        f"masters, it is kept and adds up until the copy moves."
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
    """Return all figures of a report by section."""
    return {
        "exponents": exponent_pictures(inspection),
        "sweep": sweep_pictures(inspection),
        "run": run_pictures(inspection),
        "updates": update_pictures(inspection),
        "layers": layer_pictures(inspection.layers),
    }
