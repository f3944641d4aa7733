"""Checkpoints: named arrays and one JSON header in a safetensors file, never half-written and never half-loaded.

A file is written under a temporary name, synced and renamed, so that there is a whole old file or a whole new one. It
holds no time, no path and no machine's name: equal states make equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (safetensors reads bfloat16 by its name, which NumPy knows once this is imported)
import numpy as np

from refimpl.errors import UsageError

FORMAT_VERSION = 1
_KEY = "refimpl"  # the one metadata key: safetensors does not keep the order of several


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
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise UsageError(f"cannot write {path}: {error}; what was there before is unchanged") from error
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


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all. Errors: UsageError when it cannot be written."""
    from safetensors.numpy import save_file

    # safetensors 0.8.0 writes the memory of an array as it lies, so any order but C would be silently corrupted.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def read_tensors(path: Path, what: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file and its metadata. `what` it should be, for the message when there is none.

    Errors: UsageError when it is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"no {what} at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is not a whole safetensors file: {error}") from error
    except AttributeError as error:  # what safetensors' NumPy side says of the types that only PyTorch has, such as FP8
        raise UsageError(f"{path} has a tensor of a type that NumPy has not: {error}") from error


def save(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write `arrays` and a JSON-able `header` to `path`. Errors: UsageError when it cannot be written."""
    text = json.dumps({"version": FORMAT_VERSION, **header}, sort_keys=True, separators=(",", ":"))
    write_tensors(path, arrays, {_KEY: text})


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and header back.

    Errors: UsageError, before anything is used, when the file is missing, truncated, not a safetensors file, not one of
    this project's checkpoints, or of a newer version.
    """
    arrays, metadata = read_tensors(path, "checkpoint")
    if _KEY not in metadata:
        raise UsageError(f"{path} is a safetensors file, but not a checkpoint of refimpl")
    header = parse_header(path, metadata[_KEY])
    if header.get("version") != FORMAT_VERSION:
        raise UsageError(f"{path} has checkpoint version {header.get('version')}; this program reads {FORMAT_VERSION}")
    return arrays, header


def parse_header(path: Path, text: str) -> dict[str, Any]:
    """The table that a header's JSON holds. Errors: UsageError when it holds none."""
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path} has a damaged header: it is no table")
    return header


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
