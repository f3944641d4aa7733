"""Checkpoints: named arrays and a JSON header in a safetensors file, never half-written and never half-loaded.

A file is written under a temporary name, synced and renamed, so that either the old file or the new one is complete. It has no
time, path or machine name: equal states make equal bytes. The header has a SHA-256 of header and tensors, which is checked
when the file is read.

    8 bytes         the length of the JSON with its spaces, as in every safetensors file
    JSON            name -> type, shape and offsets of each tensor; the header as a string in the metadata
    spaces          at least 8, so that the data begin at a multiple of 64 bytes
    data            each tensor in C order
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (safetensors reads bfloat16 by its name, which NumPy knows once this is imported)
import numpy as np

from refimpl.errors import UsageError, one_line
from refimpl.numerics.bits import bytes_of

FORMAT_VERSION = 2
"""Version 1, which is still read, had no checksum."""
FILE_NAME = "checkpoint.safetensors"
"""The name of the checkpoint in the folder of a run."""
CHECKSUM = "sha256"
KEY, TRACE_KEY = "refimpl", "refimpl-trace"  # the only metadata key of a checkpoint, and that of a trace
_ALIGNMENT, _PADDING = 64, 8
_TYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16", "bfloat16": "BF16",
    "uint32": "U32", "int32": "I32", "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64",
}  # fmt: skip
"""NumPy's names of types -> those of safetensors."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name beside `path`, sync the file, and rename it to `path`.

    Errors: UsageError if the disk is full or the folder cannot be written to; `path` is unchanged then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error).replace(str(temporary), str(path))  # the temporary name means nothing to the user
        raise UsageError(f"cannot write {path}: {reason}; any previous file is unchanged") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text with `write_atomically`. Errors: UsageError if it cannot be written."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, contents: bytes) -> None:
    """Write a file of these contents with `write_atomically`. Errors: UsageError if it cannot be written."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(contents)

    write_atomically(path, write)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable, if the system supports it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


# -- safetensors files -------------------------------------------------------------------------------------------------


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Equal arrays and metadata make equal bytes.

    Tensors are sorted by item size, largest first, so that each is aligned, and then by name. safetensors' own `save_file`
    copies all tensors before it writes, and ignores the umask.
    Errors: UsageError if the file cannot be written.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        stop = start + arrays[name].nbytes
        table[name] = {
            "dtype": _TYPES[arrays[name].dtype.name], "shape": list(arrays[name].shape), "data_offsets": [start, stop],
        }  # fmt: skip
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (_PADDING + -(8 + len(text) + _PADDING) % _ALIGNMENT)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(_bytes(arrays[name]))

    write_atomically(path, write)


def _bytes(array: np.ndarray) -> Any:
    """Return the bytes of an array in C order, as a view if it is contiguous."""
    return bytes_of(np.asarray(array, order="C").reshape(-1)).data


def read_tensors(path: Path, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return all tensors of a safetensors file and its metadata. what: what the file should be, for the message.

    Errors: UsageError if the file is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"no {what} at {path}")
    refuse_pickles(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UsageError(f"{path} is not a valid safetensors file: {one_line(error, 200)}") from error
    except AttributeError as error:  # raised by safetensors for types that NumPy lacks, such as FP8
        raise UsageError(f"{path} has a tensor of a type that NumPy lacks: {one_line(error, 200)}") from error


def refuse_pickles(path: Path) -> None:
    """Raise UsageError for a file written by torch.save: a zip archive with pickles, or in old versions one pickle.

    Also for a GGUF file, which has a command of its own.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if start == b"GGUF":
        raise UsageError(f"{path} is a GGUF file: `python scripts/convert.py gguf {path} DIR` converts it to a folder")
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        raise UsageError(
            f"{path} is not a valid safetensors file but a pickle, as torch.save writes it. Pickles are not read, since "
            "loading one can run arbitrary code: in PyTorch, save the model with "
            "safetensors.torch.save_model(model, 'FILE.safetensors')"
        )


def refuse_trace(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise UsageError for a trace, which scripts/trace.py writes, where a file with the weights of a model is read."""
    if TRACE_KEY in metadata:
        raise UsageError(f"{path} is a trace, for scripts/trace.py diff: weights are in the checkpoint of a run")


def written_here(path: Path) -> bool:
    """Return whether `write_tensors` wrote the file: other programs put fewer spaces before the data.

    A trace that another program has changed and written again still has our header with the old checksum. It is not damaged.
    """
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    return len(text) - len(text.rstrip()) >= _PADDING


# -- headers -----------------------------------------------------------------------------------------------------------


def as_json(header: Mapping[str, Any]) -> str:
    """Return a header as text, equal for equal headers."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of a header and of the name, type, shape and bytes of every tensor, in hexadecimal."""
    digest = hashlib.sha256(as_json(header).encode())
    for name in sorted(arrays):
        digest.update(json.dumps([name, arrays[name].dtype.name, arrays[name].shape]).encode())
        digest.update(_bytes(arrays[name]))
    return digest.hexdigest()


def sealed(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return the text of a header with its checksum, which replaces any that it has."""
    rest = _unsealed(json.loads(as_json(header)))
    return as_json({**rest, CHECKSUM: checksum(rest, arrays)})


def _unsealed(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key != CHECKSUM}


def check_seal(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise UsageError unless the checksum is that of header and tensors."""
    if header.get(CHECKSUM) != checksum(_unsealed(header), arrays):
        raise UsageError(f"{path} is damaged: its data do not match its checksum")


def check_exchanged(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Check the checksum of a trace, which other programs may write or rewrite.

    A file rewritten by another program may have our header with the old checksum; a note on stderr says so, as it does for an
    older file of ours without a checksum. Errors: UsageError for a damaged file of ours.
    """
    if written_here(path):
        check_seal(path, header, arrays)
    elif CHECKSUM in header:
        print(f"note: {path} was rewritten by another program: its checksum is that of the previous file", file=sys.stderr)
    elif header.get("config"):
        note_without_checksum(path)


def parse_header(path: Path, text: str) -> dict[str, Any]:
    """Return the table in a header's JSON. Errors: UsageError if it is damaged."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of 5,000 digits
        raise UsageError(f"{path} has a damaged header: {one_line(error, 200)}") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path} has a damaged header: it is not a table")
    return header


def note_without_checksum(path: Path) -> None:
    """Print on stderr that a file is from before there were checksums."""
    print(f"note: {path} was written before files had a checksum: it is read, but damage would not be noticed", file=sys.stderr)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write `arrays` and a JSON-able `header` to `path`. Errors: UsageError if it cannot be written."""
    write_tensors(path, arrays, {KEY: sealed({**header, "version": FORMAT_VERSION}, arrays)})


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the header of a checkpoint. `path` may be the folder of a run.

    Errors: UsageError, before anything is used, if the file is missing, truncated, damaged, not a safetensors file, not a
    checkpoint of this project, or of a newer version. The fields of the header are checked by `checkpoint_states`.
    """
    if path.is_dir() and not file_in(path).is_file():
        raise UsageError(f"{path} has neither a {FILE_NAME}, as the folder of a run, nor a Hugging Face config.json")
    path = file_in(path)
    arrays, metadata = read_tensors(path, "checkpoint")
    refuse_trace(path, metadata)
    if KEY not in metadata:
        raise UsageError(
            f"{path} is a safetensors file, but not a checkpoint of refimpl; the state_dict of a PyTorch model becomes one "
            f"by `python scripts/convert.py import {path} start.safetensors`; of a Hugging Face model, give the folder"
        )
    header = parse_header(path, metadata[KEY])
    version = header.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise UsageError(f"{path} has checkpoint version {version!r}; this program reads 1 to {FORMAT_VERSION}")
    if version == 1 and not written_here(path):
        note_without_checksum(path)
    else:
        check_seal(path, header, arrays)
    return arrays, _unsealed(header)


def header_of(path: Path) -> dict[str, Any]:
    """Return the header of a checkpoint that `load` has checked, without its tensors; an empty one where there is none."""
    from safetensors import safe_open

    path = file_in(path)
    if not path.is_file():
        return {}
    with safe_open(path, framework="numpy") as file:
        return parse_header(path, (file.metadata() or {}).get(KEY, "{}"))


def file_in(path: Path) -> Path:
    """Return the path of a checkpoint: the path itself, or that of the file in the folder of a run."""
    return path / FILE_NAME if path.is_dir() else path


def checked(path: Path, arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the named array. Errors: UsageError if it is missing or has another shape or type."""
    if name not in arrays:
        raise UsageError(f"{path} has no tensor {name}: it belongs to another model or recipe")
    array = arrays[name]
    if array.shape != shape:
        raise UsageError(f"{path}: {name} has shape {array.shape}, expected {shape}: another model")
    if array.dtype != dtype:
        raise UsageError(f"{path}: {name} is {array.dtype}, expected {dtype}: another recipe")
    return array
