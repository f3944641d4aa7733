"""The log of a run: `metrics.jsonl` has a JSON object per step, `validation.jsonl` one per evaluation.

All rows of a file have the same keys, but for the loss of the whole validation text in the last evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refimpl.errors import UsageError
from refimpl.training.checkpoint import header_of, write_text_atomically
from refimpl.training.log_writers import LogWriter
from refimpl.training.run_folder import CHECKPOINT, METRICS, VALIDATION
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
        self.others: Sequence[LogWriter] = ()  # written before these files: a killed run writes rows again that only they have

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
        for writer in self.others:
            writer.write(rows)
        path = self.folder / name
        lines = [json.dumps({"run": self.run, **{k: _finite_or_none(v) for k, v in row.items()}}) + "\n" for row in rows]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            step = header_of(self.folder / CHECKPOINT).get("progress", {}).get("step")
            saved = "no checkpoint has been written" if step is None else f"the checkpoint of step {step} is complete"
            raise UsageError(f"cannot write {path}: {error.strerror}; {saved}") from error


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
    except NotADirectoryError:
        raise UsageError(f"{path.parent} is a file: give the folder of the run") from None
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


def as_table(log: Metrics) -> list[dict[str, Any]]:
    """Return one row per step, in which an evaluation after that step is included. One before the first step has its own."""
    evaluations = {row["step"]: row for row in log.evaluations}
    steps = {row["step"]: row for row in log.steps}
    numbers = sorted(steps.keys() | evaluations.keys())
    return [{**evaluations.get(n, {}), **steps.get(n, {})} for n in numbers]
