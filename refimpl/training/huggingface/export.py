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
from refimpl.training.checkpoint import write_bytes_atomically, write_text_atomically
from refimpl.training.checkpoint_states import read_weights
from refimpl.training.huggingface import gguf_tokenizer
from refimpl.training.huggingface.beside import GENERATION, OF_TOKENIZER, TOKENIZER_CONFIG, kept_by, read_file
from refimpl.training.huggingface.config_json import CONFIG, config_table, read_table
from refimpl.training.huggingface.files import write_files
from refimpl.training.huggingface.gguf import read_gguf
from refimpl.training.huggingface.weights import their_weights
from refimpl.training.run_folder import first_weights

TOKENIZER = "tokenizer.json"
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

    source: a checkpoint (its masters, if it has any), the folder of a run, or a Hugging Face folder. fmt: of the weights.
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
        has_tokenizer = (beside / TOKENIZER).is_file()
        _copy(origin, (GENERATION, *(OF_TOKENIZER if has_tokenizer else ())), folder)
        if has_tokenizer:
            _copy(beside, (TOKENIZER,), folder)
            _write_tokenizer_config(folder, model.config["block_size"])
        _finish(folder, table, nbytes, fmt)
    if not has_tokenizer:
        print(f"note: no {TOKENIZER} was written: {beside} has none")


def _origin(source: Path) -> Path | None:
    """Return the folder with the small files of `source`: its own, those that its run has kept, or that it began with."""
    if (kept := kept_by(source)) is not None:
        return kept
    try:
        begun = first_weights(source if source.is_dir() else source.parent)  # a run from before these files were kept
    except UsageError:  # no run's folder: weights alone
        return None
    return None if begun is None else kept_by(Path(begun))


def _token_ids(origin: Path | None) -> dict[str, Any]:
    table = {} if origin is None else read_table(origin / CONFIG)
    return {name: table[name] for name in _TOKEN_IDS if name in table}


def _copy(origin: Path | None, names: tuple[str, ...], folder: Path) -> None:
    """Copy those of the files that there are. Errors: UsageError."""
    for name in names:
        if origin is not None and (origin / name).is_file():
            write_bytes_atomically(folder / name, read_file(origin / name))


def _write_tokenizer_config(folder: Path, positions: int) -> None:
    """Write tokenizer_config.json if none was copied: AutoTokenizer would take another class than tokenizer.json needs."""
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
