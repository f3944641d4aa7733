"""The figures of what updates move, with and without masters, in a precision report. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refimpl.numerics.formats import FORMATS
from refimpl.numerics.rounding_words import percent
from refimpl.tools.precision_report.collect import Inspection, StepRow
from refimpl.training.html.figures import Picture, as_svg, legend_above
from refimpl.training.palette import BLUE, GREEN, RED


def update_pictures(inspection: Inspection) -> list[Picture]:
    """Return the figures of the shares of weights that an update does not move, and that have moved since the start.

    One in which the copies of masters and weights without masters have the same curve is left out.
    """
    return [picture for picture, same in _update_figures(inspection) if not same]


def update_texts(inspection: Inspection) -> list[str]:
    """Return the text before the figures, and the captions of those that are left out."""
    found = _update_figures(inspection)
    if not found:
        return ["Every step was skipped, so no update was made."]
    return [UPDATES, *(f"{picture.title}: {picture.caption} {SAME}" for picture, same in found if same)]


UPDATES = """\
An update that is small compared with its weight is rounded away in 16 bits. FP32 masters keep it; without them, stochastic \
rounding keeps it on average, and Kahan summation keeps it for the next update. If the recipe has masters, weights without \
masters are simulated: each update's difference of the masters is added to weights in 16 bits."""
SAME = "There is no figure: at each of these steps the shares with and without masters differ by less than half a percent."


def _update_figures(inspection: Inspection) -> list[tuple[Picture, bool]]:
    """Return each figure, and whether its curves with and without masters are the same; [] if all steps were skipped."""
    rows = [row for row in inspection.rows if not row.skipped]
    if not rows:
        return []
    words = _weight_words(inspection)
    means = [f"{percent(_mean(rows, name))} of the {words[name]}" for name in words if getattr(rows[0], name) is not None]
    still = f"On average an update did not move {'; '.join(means)}. Skipped steps, which move nothing, are left out."
    moved = _moved_caption(inspection, rows[-1])
    return [
        _update_figure("still", "Weights that an update did not move", still, rows, words, "% not moved by the update"),
        _update_figure(
            "moved", "Weights that have moved since the start", moved, rows, _moved_words(words), "% moved since the start"
        ),
    ]


def _update_figure(
    name: str, title: str, caption: str, rows: Sequence[StepRow], words: dict[str, str], ylabel: str
) -> tuple[Picture, bool]:
    svg = as_svg(name, lambda axes: _draw_shares(axes, rows, words, ylabel))
    pairs = [(getattr(row, f"weights_{name}"), getattr(row, f"alone_{name}")) for row in rows]
    same = all(copy is not None and abs(copy - alone) < 0.005 for copy, alone in pairs)
    return Picture(name, title, f"{title}, step by step", caption, svg), same


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
    legend_above(axes)
