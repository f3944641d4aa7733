"""The files of reports, pictures and data, which never replace an existing file without --overwrite.

A default name gets the first free number; a name that was given and exists is an error. Both, and whether the file can be
written, are checked before anything is computed.
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
    """A file to write. replaces: overwrite a file of that name; otherwise take the next free number if it exists by then."""

    path: Path
    replaces: bool

    def write(self, write: Callable[[Path], None]) -> Path:
        """Call `write` with a temporary name, rename the file, and return its path. Errors: UsageError."""
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
        """Write a text, and return the path of the file. Errors: UsageError."""
        return self.write(lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _claim(path: Path) -> bool:
    """Create an empty file and return True, or False if it exists: two programs at the same moment get different names."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return True


def target(flag: str, named: Path | None, default: Path, overwrite: bool) -> Target:
    """Return the file that a flag names, or `default`, and create its folder. Call this before the work.

    Errors: UsageError for a named file that exists, or a file that cannot be written.
    """
    path = named if named is not None else default
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder: name a file")
    if named is not None and path.exists() and not overwrite:
        raise UsageError(f"{flag} {path} exists: name another file, or --overwrite replaces it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path}: its folder cannot be created: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} {path}: its folder cannot be written to")
    return Target(path, overwrite)
