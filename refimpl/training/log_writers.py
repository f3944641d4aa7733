"""The log of a run for TensorBoard and for Weights & Biases, beside its own (`--log`): the same numbers by the same names."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from refimpl.errors import UsageError, unknown

EVENTS = Path("tensorboard/events.out.tfevents.*")
"""TensorBoard's files in the folder of a run."""
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The values of --log with the package that each needs."""


class LogWriter(Protocol):
    """Something that is given each row of a log, in order."""

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, which belong to one or several steps."""


def chosen(text: str) -> list[str]:
    """Return the names in --log: none, or several with commas. Errors: UsageError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ("none", *PACKAGES):
            raise UsageError(f"--log: {unknown('log', name, ('none', *PACKAGES))}")
    return [name for name in PACKAGES if name in names]


def require_packages(text: str) -> None:
    """Raise UsageError if a package is missing that --log needs."""
    for name in chosen(text):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UsageError(f"--log {name} needs {PACKAGES[name]}: pip install {PACKAGES[name]}")


@contextmanager
def open_writers(
    names: Sequence[str], folder: Path, run: str, before: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[list[LogWriter]]:
    """Yield the writers of some logs of a run, and close them. names: what `chosen` returned.

    folder, run, before, settings: of the run, its folder, its name in logs, its rows so far by step, and its settings.
    Errors: UsageError if a log cannot be opened.
    """
    with ExitStack() as opened:
        writers: list[LogWriter] = []
        if "tensorboard" in names:
            writers.append(opened.enter_context(_tensorboard(folder, before)))
        if "wandb" in names:
            writers.append(opened.enter_context(_wandb(folder, run, before, settings)))
        yield writers


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row. The row of a step has the seconds and tokens for its evaluation too: that has no others."""
    left_out = ("run", "step") if "loss" in row else ("run", "step", "seconds", "tokens")
    return {name: math.nan if value is None else float(value) for name, value in row.items() if name not in left_out}


class TensorBoard:
    """Event files in the folder `tensorboard` of a run. writer: tensorboardX's FileWriter."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one event per row, and flush them: what precedes a checkpoint must not be lost with the process."""
        from tensorboardX.proto.summary_pb2 import Summary

        for row in rows:
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in _numbers(row).items()])
            self.writer.add_summary(summary, row["step"])
        self.writer.flush()


@contextmanager
def _tensorboard(folder: Path, before: Sequence[Mapping[str, Any]]) -> Iterator[TensorBoard]:
    """Yield the writer of one more event file. It begins with a mark that discards the events of later steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.writer import FileWriter

    place = folder / EVENTS.parent
    step = before[-1]["step"] + 1 if before else 1
    new = not any(folder.glob(str(EVENTS)))
    file = FileWriter(str(place), filename_suffix=f".{step:09}")  # two files of one second have different names
    try:
        file.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
        writer = TensorBoard(file)
        if new:
            writer.write(before)
        yield writer
    finally:
        file.close()


class WandB:
    """A run of Weights & Biases. run: what wandb.init returned."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows; those of one step become one."""
        for row in rows:
            self.run.log(_numbers(row), step=row["step"])


@contextmanager
def _wandb(
    folder: Path, run: str, before: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[WandB]:
    """Yield the writer of the run of that name, which is created or continued. Errors: UsageError, as without an account.

    The rows before that W&B has not are written: offline all of them, and of a killed run those that were on their way.
    """
    import wandb

    ours: dict[str, Any] = {"project": "refimpl", "id": run, "name": folder.name, "dir": str(folder), "config": dict(settings)}
    try:
        begun = wandb.init(**ours, resume="allow", settings=wandb.Settings(console="off", silent=True))
    except wandb.Error as error:
        raise UsageError(f"--log wandb: {error}; without an account or a network: WANDB_MODE=offline") from error
    code = 1
    try:
        writer = WandB(begun)
        writer.write([row for row in before if row["step"] >= begun.step])
        yield writer
        code = 0
    finally:
        begun.finish(exit_code=code)
