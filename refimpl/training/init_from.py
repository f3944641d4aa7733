"""What a run takes from the checkpoint or folder that it starts from (`--init-from`): its sizes, its tokenizer, its weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from refimpl.errors import UsageError
from refimpl.training.checkpoint_states import FirstWeights, read_weights, tokenizer_of
from refimpl.training.config import Flags
from refimpl.training.tokenizer import refuse_smaller

First: TypeAlias = tuple[Path, FirstWeights]
"""Where a run's first weights are, and what was read there."""

FINE_TUNING: Mapping[str, Any] = {"lr": 5e-5, "steps": 100, "warmup": 10, "batch_size": 4, "block_size": 128}
"""Defaults for weights of others, from which a short training with small steps starts. lr is that of transformers' Trainer."""


def settings_from(path: Path, given: Flags) -> tuple[dict[str, Any], First]:
    """Return the settings of a run that starts from a file or folder: those given, and its own sizes and tokenizer.

    Errors: UsageError if it cannot be read, or a given setting is not possible with it.
    """
    first = read_weights(path)
    print(f"reading {path}: {first.model.n_params:,} parameters", file=sys.stderr)
    tokenizer = tokenizer_of(path, first.model, given.get("tokenizer"))
    if "vocab_size" not in given:
        refuse_smaller(tokenizer, first.model.config["vocab_size"], f"the vocabulary of {path}")
    own = {name: value for name, value in given.items() if value is not None}
    return {**sizes_of(path, first, own), **own, "tokenizer": tokenizer.name}, (path, first)


def sizes_of(path: Path, first: FirstWeights, given: Flags) -> dict[str, Any]:
    """Return the settings of the model in a file, and FINE_TUNING for a Hugging Face folder.

    block_size, if it is not given, is that of the run that wrote the file. It may be less than the model's positions.
    Errors: UsageError for --model or --block-size that the file's model is not or cannot have.
    """
    name, sizes = first.model.name, dict(first.model.config)
    if given.get("model", name) != name:
        raise UsageError(f"{path} is a {name}, but this run's model is a {given['model']}")
    if name == "mlp":  # its first layer reads whole blocks
        return {"model": name, **sizes}
    positions = sizes.pop("block_size")
    usual = FINE_TUNING if first.block_size is None else {}
    block_size = given.get("block_size") or first.block_size or min(positions, FINE_TUNING["block_size"])
    if block_size > positions:
        raise UsageError(f"--block-size is {block_size}, but the model in {path} has {positions} positions: give at most that")
    more = {"block_size": block_size, "n_positions": positions if block_size < positions else None}
    return {**usual, "model": name, **sizes, **more}
