"""The folder of a run: its name, the files that it may already have, its lock, and config.json."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.distributed.collectives import Comm
from refimpl.errors import UsageError
from refimpl.training.checkpoint import FILE_NAME, write_bytes_atomically, write_text_atomically
from refimpl.training.config import Config, Flags, check_types
from refimpl.training.folder_lock import locked
from refimpl.training.huggingface.beside import keep, read_files
from refimpl.training.huggingface.config_json import file_of_hugging_face, is_hugging_face
from refimpl.training.kept_checkpoints import BEST, kept_in
from refimpl.training.log_writers import EVENTS
from refimpl.training.resume import refuse_changes
from refimpl.training.schema import Table, Text, check
from refimpl.training.tokenizer import BYTES, load_tokenizer
from refimpl.training.tokenizer import FILE as TOKENIZER

CHECKPOINT = FILE_NAME
CONFIG = "config.json"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
PICTURE = "loss.png"
FILES = (CONFIG, CHECKPOINT, METRICS, VALIDATION, PICTURE, TOKENIZER, BEST)
INIT_FROM = "init_from"
TOKENIZER_CHECKSUM = "tokenizer_sha256"
RUN = "run"
"""Keys in config.json, beside the fields of Config: the file with a run's first weights, if there is one; the checksum of its
tokenizer, if it has one, of which the folder has a copy; the run's name in logs, which no other run has."""
BESIDE = Table(optional={INIT_FROM: Text(), TOKENIZER_CHECKSUM: Text(), RUN: Text()})


NAMED = ("optimizer", "schedule", "masters_from", "loss_scale", "mistake", "seed")
"""Settings that appear in the name of a run's folder, beside model and recipe, if they are not the defaults."""


def prepare_folder(given: Flags, out: Path | None, resume: bool, overwrite: bool) -> tuple[Config, Path]:
    """Return the configuration and the folder of a run. Nothing is written.

    A new run takes a folder without a checkpoint, or a new one under runs/ if `out` is None. With `resume`, settings that are
    not given are read from the folder's config.json. Errors: UsageError for a folder that has a run or other files.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other: choose one")
    if resume:
        if out is None:
            raise UsageError("--resume needs --out DIR: the folder of the run to resume")
        _refuse_hugging_face(out)
        saved = read_config(out)
        refuse_changes(saved, given)
        return Config.of({**saved, **given, "tokenizer": _same_tokenizer(out, saved, given)}), out
    config = Config.of(given)
    if out is None:
        return config, next(path for path in numbered(Path("runs") / run_name(config)) if not path.exists())
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")
    _refuse_hugging_face(out)
    if not overwrite:
        _refuse_to_replace(out)
    return config, out


def _same_tokenizer(folder: Path, saved: Flags, given: Flags) -> str:
    """Return the path of a resumed run's tokenizer: the one that is given, or the copy in its folder. Errors: UsageError."""
    checksum = _read(folder).get(TOKENIZER_CHECKSUM, BYTES.checksum)
    copy, before = folder / TOKENIZER, str(saved.get("tokenizer", Config.tokenizer))
    path = given.get("tokenizer") or (str(copy) if checksum != BYTES.checksum and copy.exists() else before)
    if load_tokenizer(path).checksum != checksum:
        raise UsageError(f"the run in --out has the tokenizer {before}, and {path} is another: it cannot be resumed with that")
    return path


def run_name(config: Config) -> str:
    """Return the name of a run's folder: model, recipe, and the settings NAMED that are not the defaults: 'gpt-bf16-seed1'."""
    usual = Config.of({"model": config.model, "recipe": config.recipe})
    words = [config.model, config.recipe]
    for name in NAMED:
        value = getattr(config, name, None)
        if value != getattr(usual, name, None):
            words.append(f"seed{value}" if name == "seed" else f"scale-{value}" if name == "loss_scale" else str(value))
    return re.sub(r"[^A-Za-z0-9.+-]", "_", "-".join(words))[:100]


def short_name(config: Config) -> str:
    """Return the name of a run for a report: `run_name` without the default model: 'bf16-seed1'."""
    return run_name(config).removeprefix("gpt-")


def numbered(path: Path, ending: str = "") -> Iterator[Path]:
    """Yield path, path-2, path-3, ...; the number precedes `ending`, the extension of a file."""
    yield path
    yield from (path.with_name(f"{path.name.removesuffix(ending)}-{n}{ending}") for n in itertools.count(2))


def _refuse_to_replace(folder: Path) -> None:
    """Raise UsageError if a new run would replace a run that can be resumed, or files that are not a run's."""
    present = [name for name in FILES if (folder / name).exists()]
    if CHECKPOINT in present:
        raise UsageError(f"--out {folder} has a run: --resume continues it, --overwrite replaces it")
    if present and CONFIG not in present:
        raise UsageError(f"--out {folder} has a {present[0]} that belongs to no run: name another folder, or give --overwrite")


def _refuse_hugging_face(folder: Path) -> None:
    """Raise UsageError for a folder with a Hugging Face model: a run has a config.json too, which would replace its."""
    file = file_of_hugging_face(folder)
    if file is not None:
        raise UsageError(
            f"--out {folder} has a Hugging Face model ({file}), whose files a run would replace: name a new folder; "
            f"a run starts from that model with --init-from {folder}"
        )


@contextmanager
def own_folder(config: Config, out: Path | None, comm: Comm, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Create and lock the folder of a run, and yield its path. All ranks must call this together; they share the lock.

    If `out` is None, the folder gets the first number that is free. A folder created here is removed again if no run begins
    in it. Errors: UsageError if another run has the lock, or the folder cannot be created.
    """
    if comm.rank != 0:
        yield _of_rank_0(out or Path(), comm)
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
        raise UsageError(f"cannot create the folder {folder}: {error.strerror}") from error
    try:
        with locked(folder):
            _refuse_hugging_face(folder)  # another program may have written to it since prepare_folder
            if not resume and not overwrite:
                _refuse_to_replace(folder)  # another run may have used it since prepare_folder
            for name in (*FILES, "checkpoint-*"):  # half-written by a run that was killed
                for leftover in folder.glob(f".{name}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            yield _of_rank_0(folder, comm)
    finally:
        if not (folder / CONFIG).exists():
            for path in made:
                with suppress(OSError):
                    path.rmdir()


def _make_unused(path: Path) -> Path:
    """Create and return a folder that did not exist: `path`, or the first number that is free. Errors: OSError."""
    for folder in numbered(path):
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


def _of_rank_0(folder: Path, comm: Comm) -> Path:
    """Return the folder of rank 0."""
    name = np.frombuffer(os.fsencode(folder).ljust(4096, b"\0"), np.uint8).copy()
    return Path(os.fsdecode(comm.on_host.broadcast(name).tobytes().rstrip(b"\0")))


def open_folder(config: Config, folder: Path, init_from: Path | None = None) -> None:
    """Create the folder, delete the files of a replaced run, and write config.json. Errors: UsageError.

    At each moment the folder has a run that can be resumed, or files that a new run may replace.
    """
    beside = read_files(init_from)  # perhaps from this folder, as the tokenizer
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(config.tokenizer)
        for name in FILES:
            if name != CONFIG:
                (folder / name).unlink(missing_ok=True)
        for path in (*kept_in(folder), *folder.glob(str(EVENTS))):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {folder}: {error.strerror}") from error
    if tokenizer.contents is not None:
        write_bytes_atomically(folder / TOKENIZER, tokenizer.contents)
    keep(beside, folder)
    write_config(config, folder, secrets.token_hex(4), init_from)


def write_config(config: Config, folder: Path, run: str, init_from: Path | None = None) -> None:
    """Write config.json. run: the run's name in logs. init_from: the file with the first weights, if any.

    Errors: UsageError if it cannot be written.
    """
    more = {RUN: run} if init_from is None else {RUN: run, INIT_FROM: str(init_from)}
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is not BYTES:
        more[TOKENIZER_CHECKSUM] = tokenizer.checksum
    if Path(tokenizer.name) == folder / TOKENIZER and (folder / CONFIG).exists():  # a resumed run: keep where it came from
        more["tokenizer"] = _read(folder).get("tokenizer", tokenizer.name)
    write_text_atomically(folder / CONFIG, json.dumps({**asdict(config), **more}, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder. Errors: UsageError if there is none."""
    saved, names = _read(folder), {f.name for f in fields(Config)}
    if is_hugging_face(folder):
        raise UsageError(f"there is no run in {folder}: it has a Hugging Face model, which --init-from reads")
    settings = {name: value for name, value in saved.items() if name in names}
    try:
        check_types(settings)
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG} is damaged: {error}") from error
    if settings.get("steps") is None:
        raise UsageError(f"{folder / CONFIG} is damaged: the number of steps is missing")
    return settings


def first_weights(folder: Path) -> str | None:
    """Return the file with the first weights of the run in a folder, if there is one. Errors: UsageError."""
    return _read(folder).get(INIT_FROM)


def name_in_logs(folder: Path) -> str:
    """Return the name in logs of the run in a folder, or a new name if it has none. Errors: UsageError if it is damaged."""
    saved = _read(folder) if (folder / CONFIG).exists() else {}
    return saved.get(RUN) or secrets.token_hex(4)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no run in {folder} (it has no config.json)") from None
    except NotADirectoryError:
        raise UsageError(f"{folder} is a file: give the folder of the run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    check(saved, BESIDE, f"{path} is damaged")
    table: dict[str, Any] = saved
    return table
