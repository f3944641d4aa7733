"""Checkpoints: named arrays and one JSON header in a safetensors file, never half-written and never half-loaded.

A file is written under a temporary name, synced and renamed, so that there is a whole old file or a whole new one. It
holds no time, no path and no machine's name: equal states make equal bytes. A SHA-256 of header and tensors stands in the
header and is checked when the file is read, so that one flipped bit is noticed.

    8 bytes         the length of what follows, as safetensors has it
    JSON            name -> type, shape and place of each tensor; the header as a text in its metadata
    spaces          8 at least, so that the data begin at a multiple of 64 bytes
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
"""Version 1 had no checksum. It is read, too."""
FILE_NAME = "checkpoint.safetensors"
"""What a checkpoint is called in the folder of a run."""
CHECKSUM = "sha256"
KEY = "refimpl"  # the one metadata key
_ALIGNMENT, _PADDING = 64, 8
_TYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16", "bfloat16": "BF16",
    "uint32": "U32", "int32": "I32", "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64",
}  # fmt: skip
"""NumPy's names -> safetensors'."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name beside `path`, sync what it wrote, and rename it to `path`.

    Errors: UsageError when the disk is full or the folder cannot be written; then `path` is as it was.
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
        reason = error.strerror or str(error).replace(str(temporary), str(path))  # nobody asked for the temporary name
        raise UsageError(f"cannot write {path}: {reason}; what was there before is unchanged") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """The same for a text. Errors: UsageError when it cannot be written."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
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
    """Write a safetensors file, whole or not at all. Equal arrays and metadata make equal bytes.

    The widest types come first, so that every tensor lies where its type may lie; those of one size by name. The library's
    own `save_file` copies all tensors before it writes, and its file has another mode than the umask's.
    Errors: UsageError when it cannot be written.
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
    """The bytes of an array in C order; a view where it lies so."""
    return bytes_of(np.asarray(array, order="C").reshape(-1)).data


def read_tensors(path: Path, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file and its metadata. `what` it should be, for the message when there is none.

    Errors: UsageError when it is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"no {what} at {path}")
    refuse_pickles(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UsageError(f"{path} is not a whole safetensors file: {one_line(error, 200)}") from error
    except AttributeError as error:  # what safetensors' NumPy side says of the types that only PyTorch has, such as FP8
        raise UsageError(f"{path} has a tensor of a type that NumPy has not: {one_line(error, 200)}") from error


def refuse_pickles(path: Path) -> None:
    """Errors: UsageError for a file as torch.save writes it, which is a zip archive of pickles, or was one pickle."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        raise UsageError(
            f"{path} is not a whole safetensors file but a pickle, as torch.save writes it, and those are not read, since they "
            "can run any program: in PyTorch, save the state_dict with safetensors.torch.save_file(weights, 'FILE.safetensors')"
        )


def written_here(path: Path) -> bool:
    """Return whether `write_tensors` wrote the file as it is: other programs leave fewer spaces before the data.

    A trace whose tensors somebody has changed and written anew has our header and its checksum still; that is no damage.
    """
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    return len(text) - len(text.rstrip()) >= _PADDING


# -- headers -----------------------------------------------------------------------------------------------------------


def as_json(header: Mapping[str, Any]) -> str:
    """A header as text: the same one for equal headers."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of a header, and of the name, type, shape and bytes of every tensor, as hexadecimal digits."""
    digest = hashlib.sha256(as_json(header).encode())
    for name in sorted(arrays):
        digest.update(json.dumps([name, arrays[name].dtype.name, arrays[name].shape]).encode())
        digest.update(_bytes(arrays[name]))
    return digest.hexdigest()


def sealed(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """The text of a header with the checksum in it, instead of any that it had."""
    rest = _unsealed(json.loads(as_json(header)))
    return as_json({**rest, CHECKSUM: checksum(rest, arrays)})


def _unsealed(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key != CHECKSUM}


def check_seal(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Errors: UsageError where header and tensors are not those that `sealed` saw."""
    if header.get(CHECKSUM) != checksum(_unsealed(header), arrays):
        raise UsageError(f"{path} is damaged: its data do not have the checksum that they were written with")


def check_exchanged(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Check the seal of a file of a kind that other programs write and rewrite, too: a trace.

    A file that another program has written anew may have our header, whose checksum is that of another file; that is said
    on stderr, and so is an older file of ours without a checksum. Errors: UsageError for a damaged file of ours.
    """
    if written_here(path):
        check_seal(path, header, arrays)
    elif CHECKSUM in header:
        print(f"note: {path} was written anew by another program: its checksum is that of the file before", file=sys.stderr)
    elif header.get("config"):
        note_without_checksum(path)


def parse_header(path: Path, text: str) -> dict[str, Any]:
    """The table that a header's JSON holds. Errors: UsageError when it holds none."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits is a ValueError, too
        raise UsageError(f"{path} has a damaged header: {one_line(error, 200)}") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path} has a damaged header: it is no table")
    return header


def note_without_checksum(path: Path) -> None:
    """Say on stderr that a file is older than checksums are."""
    print(f"note: {path} was written before files had a checksum: it is read, but damage could not be noticed", file=sys.stderr)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write `arrays` and a JSON-able `header` to `path`. Errors: UsageError when it cannot be written."""
    write_tensors(path, arrays, {KEY: sealed({**header, "version": FORMAT_VERSION}, arrays)})


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and header back. `path` may be the folder of a run.

    Errors: UsageError, before anything is used, when the file is missing, truncated, damaged, not a safetensors file, not
    one of this project's checkpoints, or of a newer version. What the header's fields are is for `header` to check.
    """
    path = file_in(path)
    arrays, metadata = read_tensors(path, "checkpoint")
    if KEY not in metadata:
        raise UsageError(
            f"{path} is a safetensors file, but not a checkpoint of refimpl; the state_dict of a PyTorch model becomes one "
            f"by `python scripts/convert.py import {path} start.safetensors`"
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


def file_in(path: Path) -> Path:
    """The checkpoint that a path means: the file itself, or that of the run in a folder."""
    return path / FILE_NAME if path.is_dir() else path


def checked(path: Path, arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The named array, if it is there with the expected shape and type. Errors: UsageError."""
    if name not in arrays:
        raise UsageError(f"{path} has no tensor {name}: it belongs to another model or recipe")
    array = arrays[name]
    if array.shape != shape:
        raise UsageError(f"{path}: {name} has shape {array.shape}, expected {shape}: another model")
    if array.dtype != dtype:
        raise UsageError(f"{path}: {name} is {array.dtype}, expected {dtype}: another recipe")
    return array
