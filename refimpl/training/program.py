"""Which program runs: a command of this project, or a test or notebook that borrows its functions."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

AS_MODULE = "python -m refimpl"


def is_command(file: str | None) -> bool:
    """Return whether the program in `file` is one of scripts/, `python -m refimpl` or the command `refimpl`."""
    if file is None:
        return False
    path = Path(file).resolve()
    as_module = path.name == "__main__.py" and path.parent.stem == "refimpl"  # the stem: on Windows it lies in refimpl.exe
    return path.parent.name == "scripts" or path.stem == "refimpl" or as_module


def command_line() -> str:
    """Return the command line of this process, to be repeated in a shell."""
    start = sys.argv[0].split() if sys.argv[0].startswith(AS_MODULE) else ["python", sys.argv[0]]
    return shlex.join([*start, *sys.argv[1:]])


def as_called(text: str) -> str:
    """Return `text` with its commands as the user starts them: without a clone there is no scripts/train.py to name."""
    if not sys.argv[0].startswith(AS_MODULE):
        return text
    return re.sub(r"(?:python\s+)?\bscripts/(\w+)\.py", rf"{AS_MODULE} \1", text)
