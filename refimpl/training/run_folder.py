"""The folder of a run: which one it is, what it may hold beforehand, and how it is opened."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.distributed.collectives import Comm
from refimpl.errors import UsageError
from refimpl.training.checkpoint import FILE_NAME, write_text_atomically
from refimpl.training.config import Config, check_types
from refimpl.training.folder_lock import locked
from refimpl.training.schema import Table, Text, check

CHECKPOINT = FILE_NAME
CONFIG = "config.json"
METRICS = "metrics.jsonl"
PICTURE = "loss.png"
FILES = (CONFIG, CHECKPOINT, METRICS, PICTURE)
INIT_FROM = "init_from"
"""In config.json beside the fields of Config: the file that a run's first weights came from, if they came from one."""


NAMED = ("optimizer", "schedule", "masters_from", "loss_scale", "mistake", "seed")
"""Choices that are in the name of a run's folder, beside model and recipe, where they are not the default ones."""


def prepare_folder(given: dict[str, Any], out: Path | None, resume: bool, overwrite: bool) -> tuple[Config, Path]:
    """The configuration and the folder of a run, before anything is written.

    A fresh run takes a folder without a checkpoint, or one of its own under runs/ when none is named. `resume` reads the
    choices that were not given from the folder's config.json. Errors: UsageError for a folder that holds a run or other files.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: choose one")
    if resume:
        if out is None:
            raise UsageError("--resume needs --out DIR: the folder of the run to go on with")
        saved = read_config(out)
        return Config.of({**saved, **_that_may_change(saved, given)}), out
    config = Config.of(given)
    if out is None:
        return config, next(path for path in numbered(Path("runs") / run_name(config)) if not path.exists())
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")
    if not overwrite:
        _refuse_to_replace(out)
    return config, out


def run_name(config: Config) -> str:
    """'gpt-bf16-seed1': model, recipe, and what else was chosen by name, or the seed, where it differs from the default."""
    usual = Config.of({"model": config.model, "recipe": config.recipe})
    words = [config.model, config.recipe]
    for name in NAMED:
        value = getattr(config, name, None)
        if value != getattr(usual, name, None):
            words.append(f"seed{value}" if name == "seed" else f"scale-{value}" if name == "loss_scale" else str(value))
    return re.sub(r"[^A-Za-z0-9.+-]", "_", "-".join(words))[:100]


def short_name(config: Config) -> str:
    """The same for a report, without the model where it is the usual one: 'bf16-seed1'."""
    return run_name(config).removeprefix("gpt-")


def numbered(path: Path, ending: str = "") -> Iterator[Path]:
    """path, path-2, path-3, ...; the number stands before `ending`, that of a file."""
    yield path
    yield from (path.with_name(f"{path.name.removesuffix(ending)}-{n}{ending}") for n in itertools.count(2))


def _refuse_to_replace(folder: Path) -> None:
    """Errors: UsageError where a fresh run would replace a run that can be resumed, or files that are no run's."""
    held = [name for name in FILES if (folder / name).exists()]
    if CHECKPOINT in held:
        raise UsageError(f"--out {folder} holds a run: --resume goes on with it, --overwrite replaces it")
    if held and CONFIG not in held:
        raise UsageError(f"--out {folder} holds a {held[0]}, of no run: name another folder, or --overwrite replaces it")


@contextmanager
def own_folder(config: Config, out: Path | None, comm: Comm, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Have the folder of a run for it alone, and make it; yields its path. All ranks together are one run.

    Where none is named the first number is taken that is free at this moment. A folder that was made here is removed again
    if no run begins in it. Errors: UsageError when another run has it, or it cannot be made.
    """
    if comm.rank != 0:
        yield _told(out or Path(), comm)
        return
    folder = out or Path("runs") / run_name(config)
    made = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if out is None:
            folder = _make_unused(folder)
            made.insert(0, folder)
        elif not out.exists():
            made.insert(0, folder)
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
    try:
        with locked(folder):
            if not resume and not overwrite:
                _refuse_to_replace(folder)  # since it was first looked at another run may have come and gone
            for name in FILES:  # what a run that was killed had half-written
                for leftover in folder.glob(f".{name}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            yield _told(folder, comm)
    finally:
        if not (folder / CONFIG).exists():
            for path in made:
                with suppress(OSError):
                    path.rmdir()


def _make_unused(path: Path) -> Path:
    """Make a folder that did not exist, and that nobody else can have made: this one, or the next number. Errors: OSError."""
    for folder in numbered(path):
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


def _told(folder: Path, comm: Comm) -> Path:
    """The folder that rank 0 has."""
    name = np.frombuffer(os.fsencode(folder).ljust(4096, b"\0"), np.uint8).copy()
    return Path(os.fsdecode(comm.on_host.broadcast(name).tobytes().rstrip(b"\0")))


def open_folder(config: Config, folder: Path, init_from: Path | None = None) -> None:
    """Make the folder, clear a replaced run's files out of it, and write config.json. Errors: UsageError.

    At each moment the folder holds what can be resumed, or what a fresh run may replace.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, METRICS, PICTURE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {folder}: {error.strerror}") from error
    write_config(config, folder, init_from)


def write_config(config: Config, folder: Path, init_from: Path | None = None) -> None:
    """Write config.json. init_from: the file that the weights came from, if any. Errors: UsageError."""
    started = {} if init_from is None else {INIT_FROM: str(init_from)}
    write_text_atomically(folder / CONFIG, json.dumps({**asdict(config), **started}, indent=2) + "\n")


def _that_may_change(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The flags given for a resumed run, if all those that decide the numbers are as they were."""
    there = {f.name: saved.get(f.name, f.default) for f in fields(Config) if not f.metadata.get("free")}
    for name, value in given.items():
        if name in there and value != there[name]:
            raise UsageError(
                f"the run in --out has {name.replace('_', '-')} {there[name]}, not {value}: it cannot go on as another run"
            )
    return given


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder. Errors: UsageError when there is none."""
    saved, names = _read(folder), {f.name for f in fields(Config)}
    settings = {name: value for name, value in saved.items() if name in names}
    try:
        check_types(settings)
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG} is damaged: {error}") from error
    if settings.get("steps") is None:
        raise UsageError(f"{folder / CONFIG} is damaged: it does not say for how many steps the run was planned")
    return settings


def first_weights(folder: Path) -> str | None:
    """The file that the run in a folder took its first weights from, if any. Errors: UsageError."""
    return _read(folder).get(INIT_FROM)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no run in {folder} (it has no config.json)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    check(saved, Table(optional={INIT_FROM: Text()}), f"{path} is damaged")
    table: dict[str, Any] = saved
    return table
