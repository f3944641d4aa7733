"""The `loss_scale` command: the loss scales of several projects for a pattern of overflows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError, unknown
from refimpl.optim.loss_scalers import SCALER_RULES, make_loss_scale
from refimpl.training.columns import table
from refimpl.training.palette import CYCLE, GRAY
from refimpl.training.pictures import figure_for_flag, save

PICTURE = Path("loss_scale.png")


@dataclass(frozen=True)
class Trace:
    """The scale after each step, as its project stores it, and the step that ends the run (from 1; 0 for none)."""

    scales: Sequence[float]
    ends_at: int


def show_loss_scale(
    scaler: str | None,
    overflows: str,
    init_scale: float,
    interval: int,
    compare: bool = False,
    plot: Path | None = None,
    overwrite: bool = False,
    **knobs: float | None,
) -> None:
    """Print the scale after each step on one line or, with `compare`, a table of all scalers.

    overflows: one character per step, 1 if its gradients overflow, else 0. plot: a file to draw the scales in.
    knobs: settings of `make_loss_scale` (hysteresis, growth_factor, backoff_factor, scale_floor). In a comparison, each applies
    to the scalers that have it.
    Errors: UsageError for invalid arguments, an unknown scaler, or a picture that cannot be written.
    """
    if compare == (scaler is not None):
        raise UsageError(f"give one scaler ({', '.join(SCALER_RULES)}), or --compare for all")
    names = list(SCALER_RULES) if scaler is None else [scaler]
    taken = {name: {k: v for k, v in knobs.items() if not compare or k in SCALER_RULES[name].knobs} for name in names}
    traces = {name: trace(name, overflows, init_scale, interval, **taken[name]) for name in names}
    if plot is not None:
        print(f"drawn: {plot_traces(plot, traces, overflows, overwrite)}", file=sys.stderr)
    for name, found in traces.items():
        if found.ends_at:
            where = SCALER_RULES[name].stops.replace("to", "that would take S to").replace("the floor", "its floor")
            print(f"{name} ends the run at step {found.ends_at}: an overflow {where}", file=sys.stderr)
    print(_table(traces, overflows) if compare else " ".join(map(number_text, traces[names[0]].scales)))


def trace(name: str, overflows: str, init_scale: float, interval: int, **knobs: Any) -> Trace:
    """Run one scaler over a pattern. Errors: UsageError for an unknown scaler, a wrong pattern or invalid settings."""
    if name not in SCALER_RULES:
        raise UsageError(unknown("scaler", name, SCALER_RULES))
    if not overflows or set(overflows) - {"0", "1"}:
        raise UsageError(f"--overflows {overflows!r}: it must be 0s and 1s, one per step; 1 is an overflow")
    scale = make_loss_scale(name, init_scale, interval, **knobs)
    scales, ends_at = [], 0
    for step, overflow in enumerate(overflows, 1):
        scale.update(np.asarray(overflow == "1"))
        state = scale.state_dict()
        scales.append(float(state["scale"]))
        ends_at = ends_at or step * bool(state.get("exhausted"))
    return Trace(scales, ends_at)


def number_text(scale: float) -> str:
    """Return a scale as text: '1024' and not '1024.0'; a fraction with enough digits to identify it."""
    return str(int(scale)) if scale.is_integer() else repr(scale)


def _table(traces: Mapping[str, Trace], overflows: str) -> str:
    """Return a table with one row per scaler and one column per step; fractions have seven digits."""
    short = [[x if "." not in x else f"{float(x):.7g}" for x in map(number_text, t.scales)] for t in traces.values()]
    return table(["overflow", *overflows], [[name, *cells] for name, cells in zip(traces, short, strict=True)])


def plot_traces(path: Path, traces: Mapping[str, Trace], overflows: str, overwrite: bool = False) -> Path:
    """Draw the scales against the steps, with a mark at each overflow, write them as a PNG, and return its path.

    Errors: UsageError without matplotlib, for a name that does not end in .png, or if the file cannot be written.
    """
    figure, picture = figure_for_flag(path, PICTURE, overwrite, 9, 5)
    _draw(figure.subplots(), traces, overflows)
    return picture.write(lambda temporary: save(figure, temporary))


def _draw(axes: Any, traces: Mapping[str, Trace], overflows: str) -> None:
    """Draw one line for all scalers that agree. Later lines are thinner, so that those below them stay visible."""
    steps = range(1, len(overflows) + 1)
    lines: dict[tuple[float, ...], list[str]] = {}
    for name, found in traces.items():
        lines.setdefault(tuple(found.scales), []).append(name)
    for i, (scales, names) in enumerate(lines.items()):
        axes.step(steps, scales, where="post", lw=6 - 5 * i / len(lines), color=CYCLE[i % len(CYCLE)], label=", ".join(names))
    overflowed = [step for step, overflow in zip(steps, overflows, strict=True) if overflow == "1"]
    for step in overflowed:
        label = "gradients overflowed" if step == overflowed[0] else None
        axes.axvline(step, color=GRAY, lw=0.7, ls=":", label=label)
    axes.set_title("Loss scale by project")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss scale after the step")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)
