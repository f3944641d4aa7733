"""Where a script's report, picture or data go: never over a file that is there already, unless it is told to replace it.

A file that nobody named takes the first free number; one that was named and exists is refused, both before anything is
computed. Whether a file can be written is seen then, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from refimpl.errors import UsageError
from refimpl.training.checkpoint import write_atomically
from refimpl.training.run_folder import numbered


@dataclass(frozen=True)
class Target:
    """A file to write. `replaces`: what is there by then; otherwise the next free number is taken, so that nothing is lost."""

    path: Path
    replaces: bool

    def write(self, write: Callable[[Path], None]) -> Path:
        """Let `write` write it under a temporary name, and give it its own; returns that. Errors: UsageError."""
        if self.replaces:
            write_atomically(self.path, write)
            return self.path
        for path in numbered(self.path, self.path.suffix):
            if not path.exists() and _claim(path):
                try:
                    write_atomically(path, write)
                except BaseException:
                    with suppress(OSError):
                        path.unlink()
                    raise
                return path
        raise AssertionError("numbers do not end")

    def write_text(self, text: str) -> Path:
        """Write a text; returns where. Errors: UsageError."""
        return self.write(lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _claim(path: Path) -> bool:
    """Make an empty file, unless there is one: of two that end at the same moment each gets a name of its own."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return True


def target(flag: str, named: Path | None, default: Path, overwrite: bool) -> Target:
    """The file that a flag names, or a free one like `default`; its folder is made. To be called before what takes time.

    Errors: UsageError for a file that exists, or that cannot be written.
    """
    path = named if named is not None else default
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder: name a file")
    if named is not None and path.exists() and not overwrite:
        raise UsageError(f"{flag} {path} exists: name another file, or --overwrite replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path}: its folder cannot be made: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} {path}: its folder cannot be written to")
    return Target(path, overwrite)
