"""Folders that transformers' AutoModelForCausalLM.from_pretrained loads: of a checkpoint, of another folder, of a GGUF file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.formats import FORMATS
from refimpl.training.checkpoint import write_text_atomically
from refimpl.training.checkpoint_states import read_weights
from refimpl.training.huggingface import gguf_tokenizer
from refimpl.training.huggingface.config_json import CONFIG, config_table, is_hugging_face
from refimpl.training.huggingface.files import write_files
from refimpl.training.huggingface.gguf import read_gguf
from refimpl.training.huggingface.weights import their_weights
from refimpl.training.run_folder import first_weights

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_BESIDE = ("special_tokens_map.json", "chat_template.jinja", "generation_config.json", TOKENIZER_CONFIG)
"""Files that say how tokenizer and model are used. A run has none: they are copied from the folder that it began with."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder and yield it; what fails leaves nothing in it.

    Errors: UsageError if it has files already, or cannot be created.
    """
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UsageError(f"{path} is a file: name a new folder, or a file with the ending .safetensors for a state_dict")
    made = not os.path.isdir(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        empty = not any(path.iterdir())
    except OSError as error:
        raise UsageError(f"cannot create the folder {path}: {error.strerror}") from error
    if not empty:
        raise UsageError(f"{path} exists and is not empty: give another name, or remove it first")
    try:
        yield path
    except BaseException:
        for file in path.iterdir():
            file.unlink()
        if made:
            path.rmdir()
        raise


def export_folder(source: Path, target: Path, fmt: str = "fp32") -> None:
    """Write the folder of a model, for `scripts/convert.py export`.

    source: a checkpoint (its masters, if it has any), the folder of a run, or a folder of Hugging Face. fmt: of the weights.
    config.json is the last file, so that a folder that could not be finished is none. Errors: UsageError.
    """
    model, weights = read_weights(source)[:2]
    beside, origin = source if source.is_dir() else source.parent, _origin(source)
    table = config_table(model.name, model.config, fmt, _token_ids(origin))
    if fmt == "fp16":
        for name, array in weights.items():
            if np.isfinite(array).all() and float(np.abs(array).max()) > FORMATS[fmt].max:
                raise UsageError(f"{name} has values above {FORMATS[fmt].max:g}, the largest of FP16: export as bf16 or fp32")
    arrays, nbytes = their_weights(model, weights, fmt)
    with new_folder(target) as folder:
        write_files(folder, arrays, nbytes)
        if (beside / TOKENIZER).is_file():
            _copy(beside / TOKENIZER, folder)
            _copy_settings(origin, folder, model.config["block_size"])
        _finish(folder, table, nbytes, fmt)


def _origin(source: Path) -> Path | None:
    """Return the folder of Hugging Face that `source` is or that its run began with, if it is still there."""
    folder = source if source.is_dir() else source.parent
    try:
        begun = folder if is_hugging_face(folder) else Path(first_weights(folder) or "")
    except UsageError:  # no run's folder: weights alone
        return None
    return begun if is_hugging_face(begun) else None


def _token_ids(origin: Path | None) -> dict[str, Any]:
    table = {} if origin is None else json.loads((origin / CONFIG).read_text(encoding="utf-8"))
    return {name: table[name] for name in _TOKEN_IDS if name in table}


def _copy(path: Path, folder: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    write_text_atomically(folder / path.name, text)


def _copy_settings(origin: Path | None, folder: Path, positions: int) -> None:
    """Copy the files beside a tokenizer; without them AutoTokenizer would take another class than tokenizer.json needs."""
    for name in _BESIDE:
        if origin is not None and (origin / name).is_file():
            _copy(origin / name, folder)
    if not (folder / TOKENIZER_CONFIG).exists():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions}
        write_text_atomically(folder / TOKENIZER_CONFIG, json.dumps(settings, indent=2) + "\n")


def convert_gguf(source: Path, target: Path) -> None:
    """Write the folder of a GGUF file, for `scripts/convert.py gguf`. Errors: UsageError."""
    read = read_gguf(source)
    table = config_table("llama", read.sizes, "fp32", gguf_tokenizer.token_ids(read.metadata))
    reason = gguf_tokenizer.why_not(read.metadata)
    nbytes = {name: 4 * math.prod(read.tensors.shape(name)) for name in read.tensors}
    with new_folder(target) as folder:
        write_files(folder, read.tensors, nbytes)
        if reason is None:
            gguf_tokenizer.write_tokenizer(read.metadata, folder, read.sizes["block_size"])
        _finish(folder, table, nbytes, "fp32")
    if reason is not None:
        print(f"note: no {TOKENIZER} was written: {reason}")


def _finish(folder: Path, table: dict[str, Any], nbytes: dict[str, int], fmt: str) -> None:
    """Write config.json, and print what the folder has."""
    write_text_atomically(folder / CONFIG, json.dumps(table, indent=2) + "\n")
    what = f"{table['architectures'][0]} of {len(nbytes)} tensors in {fmt.upper()}, {sum(nbytes.values()):,} bytes"
    print(f"{folder}: {what}; AutoModelForCausalLM.from_pretrained reads it, and train.py --init-from")
