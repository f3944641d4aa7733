"""The figures of a precision report, as small SVGs inside the HTML page. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from refimpl.numerics.rounding_words import power
from refimpl.tools.precision_report.collect import Inspection, StepRow
from refimpl.tools.precision_report.exponent_figures import exponent_pictures
from refimpl.tools.precision_report.layer_figures import layer_pictures
from refimpl.tools.precision_report.sweep_figures import sweep_pictures
from refimpl.tools.precision_report.tables import loss_sentence, scales, scales_text, skipped_sentence
from refimpl.tools.precision_report.update_figures import update_pictures
from refimpl.training.html.figures import Picture, as_svg, legend_above
from refimpl.training.palette import BLUE, RED

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
        legend_above(axes)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def all_pictures(inspection: Inspection) -> dict[str, list[Picture]]:
    """Return all figures of a report by section."""
    return {
        "exponents": exponent_pictures(inspection),
        "sweep": sweep_pictures(inspection),
        "run": run_pictures(inspection),
        "updates": update_pictures(inspection),
        "layers": layer_pictures(inspection.layers),
    }
