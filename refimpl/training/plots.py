"""The picture of a run's log, or of several on the same axes: losses, gradient norm, loss scale and skipped steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.checkpoint import write_atomically
from refimpl.training.metrics import Metrics, read_metrics
from refimpl.training.palette import BLUE, CYCLE, GRAY, GREEN, ORANGE, RED
from refimpl.training.pictures import legend_beside, log_in_plain_numbers, new_figure, save
from refimpl.training.run_folder import PICTURE

SIZE = (9.0, 7.5)
"""Width and height in inches."""
NGRAMS = {1: "unigram", 2: "bigram", 3: "trigram"}
AXES = ("step", "tokens", "seconds")
"""What the horizontal axis may be: each row of a log has all of them."""


def plot_run(folder: Path, baselines: Mapping[int, float], title: str, unit: str = "byte") -> Path | None:
    """Plot the run in a folder, with n-gram baselines, to `loss.png`. Return its path; None without matplotlib.

    unit: what a token is called.
    """
    figure = new_figure(*SIZE)
    if figure is None:
        return None
    top = draw_runs(figure, {"": read_metrics(folder)}, "step", unit)
    top.set_title(title)
    for (n, entropy), style in zip(baselines.items(), cycle((":", "--", "-.")), strict=False):
        top.axhline(entropy, ls=style, color=GRAY, lw=1.2, label=f"{NGRAMS.get(n, f'{n}-gram')}s: {entropy:.2f}")
    legend_beside(top)
    path = folder / PICTURE
    write_atomically(path, lambda temporary: save(figure, temporary))
    return path


def draw_runs(figure: Any, runs: Mapping[str, Metrics], axis: str, unit: str) -> Any:
    """Draw runs by name, and return the axes of their losses. axis: one of AXES.

    Errors: UsageError for a log of an earlier version, which has steps only.
    """
    for name, log in runs.items():
        if any(axis not in row for rows in log for row in rows):
            raise UsageError(f"the log of {name} has no {axis}: it is from an earlier version, so draw it by step")
    panels = top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    for i, (name, log) in enumerate(runs.items()):
        color = CYCLE[i % len(CYCLE)]
        losses = (color, color, f"{name} ", 0.35) if len(runs) > 1 else (BLUE, ORANGE, "", 0.6)
        _draw_losses(top, log, axis, *losses)
        others = color if len(runs) > 1 else GREEN
        middle.plot(*_points(log.steps, axis, "grad_norm"), lw=0.7, color=others)
        _draw_scale(bottom, log, axis, others, RED if len(runs) == 1 else others)
    top.set_ylabel(f"nats per {unit}")
    legend_beside(top)
    middle.set_ylabel("gradient norm")
    if any(y > 0 for line in middle.lines for y in line.get_ydata()):
        log_in_plain_numbers(middle)
    bottom.set_ylabel("loss scale")
    bottom.set_yscale("log", base=2)
    bottom.set_xlabel(axis)
    if bottom.get_legend_handles_labels()[1]:
        legend_beside(bottom)
    for axes in panels:
        axes.grid(alpha=0.3)
    return top


def _draw_losses(axes: Any, log: Metrics, axis: str, color: str, validation: str, name: str, alpha: float) -> None:
    axes.plot(*_points(log.steps, axis, "loss"), lw=0.7, alpha=alpha, color=color, label=f"{name}training loss")
    axes.plot(*_points(log.evaluations, axis, "val_loss"), "o-", ms=4, color=validation, label=f"{name}validation loss")


def _draw_scale(axes: Any, log: Metrics, axis: str, color: str, cross: str) -> None:
    """Draw the loss scale, with a cross at each skipped step. One label is enough for the crosses of all runs."""
    axes.step(*_points(log.steps, axis, "loss_scale"), where="post", color=color)
    skipped = [row for row in log.steps if row.get("skipped")]
    label = None if axes.get_legend_handles_labels()[1] else "skipped step"
    if skipped:
        axes.plot(*_points(skipped, axis, "loss_scale"), "x", color=cross, label=label)


def _points(rows: Sequence[Mapping[str, Any]], axis: str, name: str) -> tuple[list[float], list[float]]:
    """Return the coordinates of a line, with a gap where the log has null for NaN or infinity, or lacks the number."""
    ys = [row.get(name) for row in rows]
    return [row[axis] for row in rows], [math.nan if y is None else y for y in ys]
