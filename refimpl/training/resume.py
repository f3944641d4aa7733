"""Which settings a resumed run may change, and the refusal of all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.config import Config, Flags, flag

MAY_CHANGE = ("backend", "steps", "eval_every", "eval_batches", "log_every", "sample_bytes", "zero")
"""The settings that may change when a run is resumed. Other `steps` change the schedule of the learning rate. Another `backend`
or number of ranks, or with micro-batches another `zero`, may change last bits. The others do not affect training."""

FIXED = tuple(f.name for f in fields(Config) if f.name not in MAY_CHANGE)
"""The settings that determine the numbers of a run."""

IN_CHECKPOINT = tuple(name for name in FIXED if name != "data")
"""Those in a checkpoint's header. It describes the data by their contents: a path there would make equal runs unequal files."""

_DEFAULTS = {f.name: f.default for f in fields(Config)}


def checkpoint_settings(config: Config) -> dict[str, Any]:
    """Return the settings for a checkpoint's header."""
    return {name: getattr(config, name) for name in IN_CHECKPOINT}


def conflicts(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """Return, per flag, how a run differs from the settings of a checkpoint's header: '--beta1 0.9 there, 0.8 here'."""
    return [f"{flag(name)} {there} there, {here} here" for name, there, here in _changed(saved, checkpoint_settings(config))]


def refuse_changes(saved: Mapping[str, Any], given: Flags) -> None:
    """Raise UsageError if one of the flags given for a resumed run must not change. saved: the settings in its config.json."""
    for name, there, here in _changed(saved, {name: value for name, value in given.items() if name in FIXED}):
        setting = name.replace("_", "-")
        raise UsageError(f"the run in --out has {setting} {there}, not {here}: it cannot be resumed as another run")


def _changed(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (setting, saved value, other value) where they differ.

    A setting missing from `saved` did not exist when the run was saved: it had today's default.
    """
    for name, value in here.items():
        there = saved.get(name, _DEFAULTS[name])
        if there != value:
            yield name, there, value
