"""The safetensors files of a folder as arrays: one file, or shards with an index, mapped into memory and never unpickled.

    model.safetensors               all tensors
    model.safetensors.index.json    {"weight_map": {name of a tensor: file}} beside the files that it names

Nothing is read before it is used: an array is a view of its file. All headers are checked first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError, one_line
from refimpl.numerics.formats import FORMATS, dtype_of
from refimpl.training.checkpoint import write_tensors, write_text_atomically
from refimpl.training.schema import Table, check

FILE = "model.safetensors"
INDEX = FILE + ".index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FORMATS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""Types of safetensors that are read as weights -> formats."""
SHARD_BYTES = 4 * 10**9
"""The largest file that is written, unless one tensor is larger."""


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a folder by name: read-only views of its files, of FP64, FP32, FP16 or BF16.

    Errors: UsageError that names the first file that is missing, truncated or contradicts the index, and the first tensor that
    is in several files or of another type.
    """
    if (folder / FILE).is_file():
        return map_tensors(folder / FILE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    pickle = next((name for name in PICKLES if (folder / name).is_file()), None)
    if pickle is None:
        raise UsageError(f"{folder} has neither {FILE} nor {INDEX}")
    raise UsageError(
        f"{folder} has its weights as a pickle, {pickle}, which is not read, since loading it can run arbitrary code: save it "
        f"again with transformers 5, AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
    )


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX
    table = _json(index, index.read_bytes)
    check(table, Table({"weight_map": Table()}), f"{index} is damaged")
    files: dict[str, list[str]] = {}
    for name, file in table["weight_map"].items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UsageError(f"{index} is damaged: the file of {name} is {file!r:.60}, not a name in this folder")
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        if not (folder / file).is_file():
            raise UsageError(f"{index} names {file} for {names[0]}, but there is no such file: the folder is not complete")
    arrays: dict[str, np.ndarray] = {}
    for file, names in sorted(files.items()):
        held = map_tensors(folder / file)
        missing, surplus = sorted(set(names) - held.keys()), sorted(held.keys() - set(names))
        if missing:
            raise UsageError(f"{folder / file} has no {missing[0]}, which {INDEX} says it has")
        if surplus:
            where = table["weight_map"].get(surplus[0])
            also = f"{INDEX} says is in {where}" if where else f"{INDEX} does not name"
            raise UsageError(f"{folder / file} has a tensor {surplus[0]} that {also}")
        arrays |= held
    return arrays


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of one safetensors file by name: read-only views of the mapped file.

    Source: the format as https://github.com/huggingface/safetensors describes it: 8 bytes with the length of the JSON, the JSON
    {name: {dtype, shape, data_offsets}}, then the data. Errors: UsageError for a damaged file and for types that are not read.
    """
    try:
        size = path.stat().st_size
        whole = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    if bytes(whole[:12]) == b"version http":
        raise UsageError(f"{path} is a Git LFS pointer, not the file itself: get the file with git lfs pull")
    if size < 8 or start > size:
        raise UsageError(f"{path} is not a valid safetensors file: its header is cut off after {size:,} bytes")
    table = _json(path, whole[8:start].tobytes)
    table.pop("__metadata__", None)
    spans = []
    arrays = {}
    for name, entry in table.items():
        fmt, shape, first, last = _entry(path, name, entry)
        spans.append((first, last))
        if start + last > size:
            raise UsageError(f"{path} is truncated: it has {size:,} bytes, and {name} ends at {start + last:,}")
        arrays[name] = np.ndarray(shape, dtype_of(fmt), whole, start + first)
    if any(after[0] < before[1] for before, after in zip(sorted(spans), sorted(spans)[1:], strict=False)):
        raise UsageError(f"{path} is damaged: two of its tensors share bytes")
    return arrays


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return format, shape, first and last byte of a tensor, checked."""
    damaged = f"{path} is not a valid safetensors file: the entry of {name} is damaged"
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(key not in entry for key in keys):
        raise UsageError(damaged)
    dtype, shape, offsets = (entry[key] for key in keys)
    if not isinstance(dtype, str) or dtype not in _FORMATS:
        what = "FP8: weights that are stored with scales" if str(dtype).startswith("F8") else "not a floating-point format"
        raise UsageError(f"{path}: {name} is {dtype!r:.40}, {what}; supported are {', '.join(_FORMATS)}")
    fmt = _FORMATS[dtype]
    whole_numbers = all(
        isinstance(list_, list) and all(type(n) is int and 0 <= n < 2**62 for n in list_) for list_ in (shape, offsets)
    )
    if not whole_numbers or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * FORMATS[fmt].itemsize:
        raise UsageError(damaged)
    return fmt, tuple(shape), offsets[0], offsets[1]


def _json(path: Path, read: Any) -> dict[str, Any]:
    """Return the table in a file's JSON. Errors: UsageError if it is damaged, or has a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            raise UsageError(f"{path} has {next(name for name in names if names.count(name) > 1)} twice")
        return table

    try:
        table = json.loads(read(), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error, 200)
        raise UsageError(f"{path} cannot be read: {reason}") from error
    if not isinstance(table, dict):
        raise UsageError(f"{path} is damaged: it does not hold a JSON object")
    return table


# -- the way out -------------------------------------------------------------------------------------------------------------


def write_files(folder: Path, arrays: Mapping[str, np.ndarray], nbytes: Mapping[str, int], limit: int = SHARD_BYTES) -> None:
    """Write tensors to model.safetensors, or to shards of at most `limit` bytes with an index.

    arrays: may compute a tensor when it is asked for: those of one file are in memory together. nbytes: the bytes of each.
    Errors: UsageError if a file cannot be written.
    """
    shards: list[list[str]] = [[]]
    room = limit
    for name in arrays:
        if shards[-1] and nbytes[name] > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= nbytes[name]
    if len(shards) == 1:
        write_tensors(folder / FILE, dict(arrays), {"format": "pt"})
        return
    stem, ending = FILE.split(".")
    weight_map: dict[str, str] = {}
    for n, names in enumerate(shards, 1):
        file = f"{stem}-{n:05d}-of-{len(shards):05d}.{ending}"
        write_tensors(folder / file, {name: arrays[name] for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(nbytes[name] for name in arrays)}, "weight_map": weight_map}
    write_text_atomically(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
