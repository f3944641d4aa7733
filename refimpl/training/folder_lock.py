"""A lock on a folder for one process, which ends with that process, however it ends.

The lock is the system's, on a file in the folder (flock): it ends with its process, even after kill -9. Without such locks
(some network file systems, Windows) a marker file with process and host replaces it. A marker of a process that no longer
exists on this host is taken over; any other must be removed by hand.
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
    """Lock the folder for this process. Errors: UsageError if another process has the lock, or no lock can be made."""
    try:
        descriptor, path = _take(folder)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before unlocking it: no other process may lock a file that is about to be deleted
        if descriptor is not None:
            os.close(descriptor)


def _take(folder: Path) -> tuple[int | None, Path]:
    """Return the descriptor and path of the locked file, or None and the path of the marker. Errors: UsageError, OSError."""
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
        os.close(descriptor)  # the previous owner has deleted this file meanwhile: lock the next one
    return None, _mark(folder / MARKER)


def _leads_to(path: Path, descriptor: int) -> bool:
    """Return whether the path is that of this open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _mark(path: Path) -> Path:
    """Create the marker, or take over a stale one. Errors: UsageError, OSError."""
    own = path.with_name(f"{MARKER}.{os.getpid()}")
    while True:
        own.write_bytes(_myself())
        try:
            os.link(own, path)  # atomic: the marker appears with its content, or not at all
            return path
        except FileExistsError:
            with suppress(FileNotFoundError):  # its owner may remove it at any moment
                stale = path.read_bytes()
                if not _is_gone(stale):
                    raise _in_use(path) from None
                os.replace(path, own)  # of several processes that take it over, one succeeds
                if own.read_bytes() != stale:  # another process was faster, and this is its marker: put it back
                    os.link(own, path)
        finally:
            own.unlink(missing_ok=True)


def _myself() -> bytes:
    return f"{os.getpid()} {socket.gethostname()}\n".encode()


def _is_gone(owner: bytes) -> bool:
    """Return whether a marker names a process of this host that no longer exists."""
    process, _, host = owner.decode(errors="replace").strip().partition(" ")
    if host != socket.gethostname() or not process.isdigit() or os.name == "nt":  # on Windows, os.kill would end it
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists, and belongs to another user
        pass
    return False


def _in_use(path: Path) -> UsageError:
    owner = ""
    for _ in range(20):  # a file locked a moment ago may not have its owner in it yet
        with suppress(OSError):
            owner = path.read_text(encoding="utf-8", errors="replace").strip()
        if owner:
            break
        time.sleep(0.01)
    process, _, host = owner.partition(" ")
    where = f" on {host}" if host and host != socket.gethostname() else ""
    by_hand = f"; if it has ended, remove {path}" if path.name == MARKER else ""
    return UsageError(f"a run of process {process or '?'}{where} is using this folder ({path.parent}){by_hand}")
