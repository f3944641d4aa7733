"""A folder that one process at a time may use, and that is free again when that process has gone, however it ended.

The lock is the system's, on a file in the folder (flock): it dies with its process, also by kill -9. Where there are no such
locks (some network file systems, Windows) a marker with process and host stands in for it: that of a process which is gone
from this host is taken over, any other must be removed by hand.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refimpl.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, MARKER = ".lock", ".marker"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have the folder for this process alone. Errors: UsageError when another one has it, or none can be kept out."""
    try:
        descriptor, path = _take(folder)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before it is let go of: nobody may lock a file that is about to vanish
        if descriptor is not None:
            os.close(descriptor)


def _take(folder: Path) -> tuple[int | None, Path]:
    """The open file that is locked, or None and the marker. Errors: UsageError, OSError."""
    path = folder / LOCK
    while fcntl is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(path) from None
        except OSError:  # not on this file system
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            break
        if _leads_to(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _myself())
            return descriptor, path
        os.close(descriptor)  # whoever had it has removed it meanwhile: the next file is another one
    return None, _mark(folder / MARKER)


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether the path is that of this open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _mark(path: Path) -> Path:
    """A marker that nobody else has. Errors: UsageError, OSError."""
    mine = path.with_name(f"{MARKER}.{os.getpid()}")
    while True:
        mine.write_bytes(_myself())
        try:
            os.link(mine, path)  # with its content in it, or not at all
            return path
        except FileExistsError:
            with suppress(FileNotFoundError):  # it may be removed at any moment
                stale = path.read_bytes()
                if not _is_gone(stale):
                    raise _in_use(path) from None
                os.replace(path, mine)  # of several that take it over one has it
                if mine.read_bytes() != stale:  # another one was quicker, and this is its marker
                    os.link(mine, path)
        finally:
            mine.unlink(missing_ok=True)


def _myself() -> bytes:
    return f"{os.getpid()} {socket.gethostname()}\n".encode()


def _is_gone(owner: bytes) -> bool:
    """Whether the process that a marker names was one of this host and does not exist any more."""
    process, _, host = owner.decode(errors="replace").strip().partition(" ")
    if host != socket.gethostname() or not process.isdigit() or os.name == "nt":  # there os.kill would end it
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists, and is somebody else's
        pass
    return False


def _in_use(path: Path) -> UsageError:
    owner = ""
    for _ in range(20):  # it may have been locked a moment ago, and not say yet by whom
        with suppress(OSError):
            owner = path.read_text(errors="replace").strip()
        if owner:
            break
        time.sleep(0.01)
    process, _, host = owner.partition(" ")
    where = f" on {host}" if host and host != socket.gethostname() else ""
    by_hand = f"; if it has ended, remove {path}" if path.name == MARKER else ""
    return UsageError(f"a run of process {process or '?'}{where} is using this folder ({path.parent}){by_hand}")
