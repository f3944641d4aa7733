"""The files of a report: audit.html for people, audit.json for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.parity.audit.report.page import audit_page
from refimpl.training.checkpoint import write_text_atomically
from refimpl.training.console import json_text

PAGE, DATA = "audit.html", "audit.json"


def write_report(folder: Path, data: dict[str, Any]) -> Path:
    """Write both files, each under a temporary name first, and return the path of the page. Errors: UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be created: {error.strerror}") from error
    write_text_atomically(folder / DATA, json_text(data) + "\n")
    write_text_atomically(folder / PAGE, audit_page(data))
    return folder / PAGE
