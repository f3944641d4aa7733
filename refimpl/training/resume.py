"""Resume a run bit for bit: which settings may change, and what a checkpoint holds beside the arrays of the states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import check_run_header, load_scales, load_state_arrays
from refimpl.training.config import Config, Flags, flag
from refimpl.training.data import Corpus
from refimpl.training.setup import Training

# -- settings ----------------------------------------------------------------------------------------------------------

MAY_CHANGE = (
    "backend", "tokenizer", "steps", "eval_every", "eval_batches", "log_every", "sample_bytes", "keep", "log", "zero",
    "checkpointing",
)  # fmt: skip
"""The settings that may change when a run is resumed. Other `steps` change the schedule of the learning rate. Another `backend`
or number of ranks, or with micro-batches another `zero`, may change last bits. `tokenizer` is a path: what is there must be the
same. The others do not affect training."""

FIXED = tuple(f.name for f in fields(Config) if f.name not in MAY_CHANGE)
"""The settings that determine the numbers of a run."""

IN_CHECKPOINT = tuple(name for name in FIXED if name != "data")
"""Those in a checkpoint's header. It describes the data by their contents: a path there would make equal runs unequal files."""

_DEFAULTS = {f.name: f.default for f in fields(Config)}


def conflicts(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """Return, per flag, how a run differs from the settings of a checkpoint's header: '--beta1 0.9 there, 0.8 here'."""
    return [f"{flag(name)} {there} there, {here} here" for name, there, here in _changed(saved, _in_checkpoint(config))]


def _in_checkpoint(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in IN_CHECKPOINT}


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


# -- checkpoints -------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """The position of a run: the number of its steps, of those that were skipped, and of the last ones that were, in a row."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """Count one more step whose result is known as skipped, or not."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


def run_header(
    config: Config, corpus: Corpus, training: Training, progress: Progress, batches: np.random.Generator
) -> dict[str, Any]:
    """Return a checkpoint's header: what determines the rest of the run, beside arrays.

    It has neither times nor paths, so that equal runs write equal bytes. batches: the generator that samples them.
    """
    return {
        "model": training.model.name,
        "sizes": dict(training.model.config),
        "recipe": config.recipe,
        "config": _in_checkpoint(config),
        "corpus": corpus.description,
        "progress": asdict(progress),
        "t": int(training.state.t),
        "loss_scale": training.loss_scale.state_dict(),
        "delayed_scales": len(training.run.scales.delayed),
        "generator": batches.bit_generator.state,
    }


def load_run(path: Path, config: Config, corpus: Corpus, training: Training, batches: np.random.Generator) -> Progress:
    """Load a checkpoint into the objects of a run, and return its position. No file is changed.

    Errors: UsageError if the checkpoint is damaged or belongs to another run.
    """
    arrays, header = checkpoint.load(path)
    check_run_header(path, header)
    if corpus.description.get("tokenizer") != header["corpus"].get("tokenizer"):
        raise UsageError(f"{path} was trained with a tokenizer other than --tokenizer {config.tokenizer} is now")
    if header["corpus"] != corpus.description:
        raise UsageError(f"{path} was trained on other data than --data {config.data} has now")
    other = conflicts(config, header["config"])
    if other:
        raise UsageError(f"{path} is another run: {'; '.join(other)}")
    sizes = dict(training.model.config)
    if {**sizes, **header["sizes"]} != sizes:
        raise UsageError(f"{path} is of a model with the sizes {header['sizes']}, not those of its run: it is damaged")
    progress, state, scales = Progress(**header["progress"]), training.state, training.run.scales
    load_scales(path, training.run, progress.step, arrays)
    if len(scales.delayed) != header.get("delayed_scales", 0):
        raise UsageError(f"{path} lacks some of the scales that its quantization had: it is damaged")
    load_state_arrays(path, arrays, state)
    state.t = state.backend.xp.asarray(np.int64(header["t"]))
    try:
        training.loss_scale.load_state_dict(header["loss_scale"])
    except (KeyError, ValueError, UsageError) as error:
        raise UsageError(f"{path} has a damaged loss scale: {error}") from error
    batches.bit_generator.state = header["generator"]
    if progress.step > config.steps:
        raise UsageError(f"{path} is at step {progress.step} already, --steps is {config.steps}")
    return progress
