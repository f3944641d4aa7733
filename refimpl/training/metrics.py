"""The log of a run, `metrics.jsonl`, with one JSON object per step and one per evaluation, and its plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.checkpoint import write_atomically, write_text_atomically
from refimpl.training.pictures import new_figure, save
from refimpl.training.schema import FINITE, Integer, Maybe, OneOf, Table, check


class MetricsLog:
    """An append-only file of rows. NaN and infinities, which JSON lacks, are written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_up_to(self, step: int) -> None:
        """Drop the rows after a checkpoint's step, which a resumed run writes again."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text_atomically(self.path, text)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows. Errors: UsageError if the disk is full."""
        lines = [json.dumps({k: _finite_or_none(v) for k, v in row.items()}) + "\n" for row in rows]
        try:
            with self.path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error}; the last checkpoint is complete") from error


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NUMBER = Maybe(FINITE)
STEP_ROW = Table({"step": Integer(1), "loss": _NUMBER}, {"loss_scale": _NUMBER, "skipped": OneOf((False, True))})
WHOLE, WHOLE_BITS = "whole_text_loss", "whole_text_bits_per_byte"
EVALUATION_ROW = Table(
    {"step": Integer(0), "val_loss": _NUMBER}, {"val_bits_per_byte": _NUMBER, WHOLE: _NUMBER, WHOLE_BITS: _NUMBER}
)
"""Losses in nats per token. Logs from before there were tokenizers lack the bits per byte. The last row has those of the whole
validation text too, unless it is long."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, without a last line that a killed run left incomplete.

    Errors: UsageError for any other damaged line, and for a file that cannot be read.
    """
    try:
        *lines, unfinished = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate([*lines, unfinished] if unfinished.endswith(b"}") else lines, 1):
        damage = f"line {number} of {path} is damaged (repair it, or move the file away)"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{damage}: {error}") from error
        check(row, EVALUATION_ROW if isinstance(row, dict) and "val_loss" in row else STEP_ROW, damage)
        rows.append(row)
    return rows


def plot_run(folder: Path, baselines: dict[int, float], title: str, unit: str = "byte") -> Path | None:
    """Plot losses, n-gram baselines, loss scale and skipped steps to `loss.png`. Return its path; None without matplotlib.

    unit: what a token is called.
    """
    figure = new_figure(9, 6)
    if figure is None:
        return None
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if {"loss", "loss_scale", "skipped"} <= row.keys()]
    evals = [row for row in rows if "val_loss" in row]
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(top, steps, evals, baselines)
    top.set_ylabel(f"nats per {unit}")
    top.set_title(title)
    bottom.step([row["step"] for row in steps], [row["loss_scale"] for row in steps], where="post", color="tab:green")
    skipped = [row for row in steps if row["skipped"]]
    bottom.plot([r["step"] for r in skipped], [r["loss_scale"] for r in skipped], "x", color="tab:red", label="skipped step")
    bottom.set_yscale("log", base=2)
    bottom.set_ylabel("loss scale")
    bottom.set_xlabel("step")
    if skipped:
        bottom.legend()
    path = folder / "loss.png"
    write_atomically(path, lambda temporary: save(figure, temporary))
    return path


def _draw_losses(axes: Any, steps: list[dict[str, Any]], evals: list[dict[str, Any]], baselines: dict[int, float]) -> None:
    nan = float("nan")
    losses = [nan if row["loss"] is None else row["loss"] for row in steps]
    axes.plot([row["step"] for row in steps], losses, lw=0.7, alpha=0.6, label="training loss")
    axes.plot([row["step"] for row in evals], [nan if r["val_loss"] is None else r["val_loss"] for r in evals],
              "o-", ms=4, label="validation loss")  # fmt: skip
    for n, entropy in baselines.items():
        axes.axhline(entropy, ls=":", color="gray", lw=1)
        axes.annotate(f"{n}-gram", (1, entropy), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom")
    axes.legend(loc="upper right", bbox_to_anchor=(0.9, 1))
    axes.grid(alpha=0.3)
