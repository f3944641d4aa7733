"""The figure of what each layer loses with each loss scale, in a precision report. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from refimpl.numerics.rounding_effects import NEGLIGIBLE
from refimpl.numerics.rounding_words import percent, power
from refimpl.tools.precision_report.collect import Inspection
from refimpl.tools.precision_report.exponent_figures import LOST
from refimpl.tools.precision_report.tables import scales, scales_text
from refimpl.training.html.figures import Picture, as_svg, legend_above
from refimpl.training.palette import BLACK, GRAY, ORANGE, RED


def sweep_pictures(inspection: Inspection) -> list[Picture]:
    """Return the figure of the share of each layer's gradients that one batch loses per loss scale; [] if none loses any."""
    if not any(share or overflowed for row in inspection.sweep for share, overflowed in row["layers"].values()):
        return []
    label = "Share of each layer's gradients that becomes zero, against the loss scale"
    svg = as_svg("sweep", lambda axes: draw_sweep(axes, inspection))
    return [Picture("sweep", "Flushed to zero, layer by layer", label, sweep_caption(inspection), svg)]


def sweep_text(inspection: Inspection) -> str:
    """Return the text before the figure, or the sentence in its place."""
    if not any(row["layers"] for row in inspection.sweep):
        return "No gradient is rounded to 16 bits, so a loss scale makes no difference."
    if not sweep_pictures(inspection):
        return (
            f"Nothing to show: with the loss scales of 1 to {_scale_of(inspection.sweep[-1])}, no gradient of one batch became "
            f"zero or overflowed in the 16-bit format of this recipe. It needs no loss scale."
        )
    return SWEEP


SWEEP = "A larger loss scale moves small gradients above the smallest value of the format, until the largest ones overflow."


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
        (color, style), name = _layer_style(layer, i, len(layers)), _layer_label(layer, i, len(layers))
        axes.plot(*zip(*line, strict=True), style, color=color, lw=1.4, ms=4, label=name)
        if crosses:
            axes.plot(*zip(*crosses, strict=True), "x", color=color, ms=8, mew=2)
    exponents = [math.log2(scale) for scale in scales(inspection.rows) if 0 < scale < math.inf]
    axes.axvspan(min(exponents) - 0.15, max(exponents) + 0.15, fc="none", ec=GRAY, hatch="///", lw=0, label="S of this run")
    if overflowing:
        axes.axvspan(first_overflow - 1, max(overflowing) + 1, color=LOST, lw=0, zorder=0, label="skipped step")
        axes.plot([], [], "x", color=BLACK, mew=2, label="overflow")
    axes.set_yscale("symlog", linthresh=1e-4, linscale=0.5)
    ticks = [0, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.set_ylim(-2e-5, 100)
    axes.set_xlabel("$\\log_2$ of the loss scale S")
    axes.set_ylabel("% flushed to zero")
    legend_above(axes)


def _in_order(layers: Sequence[str]) -> list[str]:
    """Return the layers in the order of the forward pass."""
    blocks = sorted((layer for layer in layers if layer.startswith("block ")), key=lambda layer: int(layer[6:]))
    return [layer for layer in ("embedding", *blocks, "head") if layer in layers]


def _layer_style(layer: str, i: int, n: int) -> tuple[Any, str]:
    """Return color, and marker and line, of a layer.

    Blocks go from dark to light, but not so far that a page hides them, and neighbors have other lines.
    """
    import matplotlib

    block = matplotlib.colormaps["viridis"](0.3 + 0.4 * i / max(n - 1, 1)), (".-", ".--", ".-.", ".:")[i % 4]
    return {"embedding": (ORANGE, "s-"), "head": (RED, "^-")}.get(layer, block)


def _layer_label(layer: str, i: int, n: int) -> str:
    """Return the label of a layer; of many blocks only the first and last get one (an underscore hides a label)."""
    ends = (0, 1, n - 2, n - 1)
    return layer if n <= 8 or i in ends else f"_{layer}"
