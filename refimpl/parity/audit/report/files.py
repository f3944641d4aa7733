"""The files of a report: audit.html for people, audit.json for programs, and the operands of a few operations for replays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from refimpl.errors import UsageError
from refimpl.parity.audit.report.page import audit_page
from refimpl.training.checkpoint import write_atomically, write_text_atomically
from refimpl.training.console import json_text

PAGE, DATA, TENSORS = "audit.html", "audit.json", "audit.safetensors"


def write_report(folder: Path, data: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write the files, each under a temporary name first, and return the path of the page. Errors: UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be created: {error.strerror}") from None
    if tensors:
        write_atomically(folder / TENSORS, lambda temporary: _write(temporary, save(dict(tensors))))
    else:
        (folder / TENSORS).unlink(missing_ok=True)
    write_text_atomically(folder / DATA, json_text(data) + "\n")
    write_text_atomically(folder / PAGE, audit_page(data))
    return folder / PAGE


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
