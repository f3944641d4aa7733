"""The folder of a run: which one it is, what it may hold beforehand, and how it is opened."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from refimpl.checkpoint import write_text_atomically
from refimpl.config import Config
from refimpl.errors import UsageError

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
PICTURE = "loss.png"
FILES = (CONFIG, CHECKPOINT, METRICS, PICTURE)


def prepare_folder(given: dict[str, Any], out: Path | None, resume: bool, overwrite: bool) -> tuple[Config, Path]:
    """The configuration and the folder of a run, before anything is written.

    A fresh run takes an empty folder, or one of its own under runs/ when none is named. `resume` reads the choices that
    were not given from the folder's config.json. Errors: UsageError for a folder in use, or one that cannot be written.
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
        out = _unused(Path("runs"), f"{config.model}-{config.recipe}")
    elif out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")
    elif not overwrite and any((out / name).exists() for name in FILES):
        raise UsageError(f"--out {out} holds a run: --resume goes on with it, --overwrite replaces it")
    return config, out


def open_folder(config: Config, folder: Path) -> None:
    """Make the folder, clear a replaced run's files out of it, and write config.json. Errors: UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        text = json.dumps(asdict(config), indent=2) + "\n"
        write_text_atomically(folder / CONFIG, text)
    except OSError as error:
        raise UsageError(f"cannot write to --out {folder}: {error.strerror}") from error


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
    path = folder / CONFIG
    try:
        saved = json.loads(path.read_text())
        names = {f.name for f in fields(Config)}
        return {name: value for name, value in saved.items() if name in names}
    except FileNotFoundError:
        raise UsageError(f"there is no run in {folder} (it has no config.json)") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _unused(parent: Path, name: str) -> Path:
    """parent/name, or the first of name-2, name-3, ... that does not exist yet."""
    folder, n = parent / name, 1
    while folder.exists():
        n += 1
        folder = parent / f"{name}-{n}"
    return folder
