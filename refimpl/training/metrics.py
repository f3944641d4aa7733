"""The log of a run and its plot: `metrics.jsonl` has a JSON object per step, `validation.jsonl` one per evaluation.

All rows of a file have the same keys, but for the loss of the whole validation text in the last evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refimpl.errors import UsageError
from refimpl.training.checkpoint import write_atomically, write_text_atomically
from refimpl.training.pictures import new_figure, save
from refimpl.training.run_folder import METRICS, PICTURE, VALIDATION
from refimpl.training.schema import FINITE, Integer, Kind, Maybe, OneOf, Real, Table, Text, check


class Metrics(NamedTuple):
    """The log of a run: a row per step, and a row per evaluation."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


class MetricsLog:
    """The two files of a log, to which rows are appended. NaN and infinities, which JSON lacks, are written as null.

    run: the name of the run in each row, which is the same after the run is resumed.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder, self.run = folder, run

    def keep_up_to(self, step: int) -> Metrics:
        """Drop the rows after a checkpoint's step, which a resumed run writes again, and return the others."""
        log = read_metrics(self.folder)
        kept = Metrics(*([row for row in rows if row["step"] <= step] for rows in log))
        for name, rows in ((VALIDATION, kept.evaluations), (METRICS, kept.steps)):  # METRICS of earlier versions has both
            if rows or (self.folder / name).exists():
                write_text_atomically(self.folder / name, "".join(json.dumps(row) + "\n" for row in rows))
        return kept

    def write_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows of steps. Errors: UsageError if the disk is full."""
        self._append(METRICS, rows)

    def write_evaluation(self, row: Mapping[str, Any]) -> None:
        """Append the row of an evaluation. Errors: UsageError if the disk is full."""
        self._append(VALIDATION, [row])

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        path = self.folder / name
        lines = [json.dumps({"run": self.run, **{k: _finite_or_none(v) for k, v in row.items()}}) + "\n" for row in rows]
        try:
            with path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error}; the last checkpoint is complete") from error


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NUMBER = Maybe(FINITE)
_BOTH: dict[str, Kind] = {"run": Text(), "seconds": Real(0, math.inf), "tokens": Integer()}
STEP_ROW = Table({"step": Integer(1), "loss": _NUMBER}, {"loss_scale": _NUMBER, "skipped": OneOf((False, True)), **_BOTH})
WHOLE, WHOLE_BITS = "whole_text_loss", "whole_text_bits_per_byte"
EVALUATION_ROW = Table(
    {"step": Integer(0), "val_loss": _NUMBER}, {"val_bits_per_byte": _NUMBER, WHOLE: _NUMBER, WHOLE_BITS: _NUMBER, **_BOTH}
)
"""Losses in nats per token. Logs from before there were tokenizers lack the bits per byte. The last row has those of the whole
validation text too, unless it is long."""


def read_metrics(folder: Path) -> Metrics:
    """Return the rows of a log, without a last line that a killed run left incomplete.

    Logs of earlier versions have all rows in one file. Errors: UsageError for any other damaged line, and for a file that
    cannot be read.
    """
    evaluations = _read(folder / VALIDATION, EVALUATION_ROW)
    both = _read(folder / METRICS, None)
    known = {row["step"] for row in evaluations}
    earlier = [row for row in both if "val_loss" in row and row["step"] not in known]
    return Metrics([row for row in both if "val_loss" not in row], [*earlier, *evaluations])


def _read(path: Path, kind: Table | None) -> list[dict[str, Any]]:
    """Return the rows of one file. kind: that of all rows; None: of steps and evaluations."""
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
        check(row, kind or (EVALUATION_ROW if isinstance(row, dict) and "val_loss" in row else STEP_ROW), damage)
        rows.append(row)
    return rows


def plot_run(folder: Path, baselines: dict[int, float], title: str, unit: str = "byte") -> Path | None:
    """Plot losses, n-gram baselines, loss scale and skipped steps to `loss.png`. Return its path; None without matplotlib.

    unit: what a token is called.
    """
    figure = new_figure(9, 6)
    if figure is None:
        return None
    steps, evals = read_metrics(folder)
    steps = [row for row in steps if {"loss_scale", "skipped"} <= row.keys()]
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
    path = folder / PICTURE
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
