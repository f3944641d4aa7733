"""Standard output and error, made so that no reader, no encoding and no terminal can end a program or be disturbed by it.

    a reader who has gone (`train.py | head`), a full disk, a closed stream (`>&-`)    -> `OutputLost`, or going on without it
    a character that the encoding lacks (cp1252, ascii)                                -> \\ufffd
    a control character: ESC, BEL, Shift-Out, those of Unicode                         -> \\x1b
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class OutputLost(Exception):
    """What was printed has nowhere to go. `reader_gone`: a pipe whose other end was closed, which is no error of anybody's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.reader_gone = error.errno == errno.EPIPE


def printable(text: str | bytes) -> str:
    r"""The text with everything that a terminal would obey, or not show, spelled out: \x1b for ESC, \u202e for an override.

    Bytes are read as UTF-8; those that are not become \xff. The end of a line and the tabulator stay.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return "".join(c if c in "\n\t" or c.isprintable() else _spelled(ord(c)) for c in text)


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Output:
    """A stream that is written to as long as that works. What is lost afterwards is dropped.

    Standard output raises `OutputLost` when it is lost, unless `goes_on`: then standard error is told, once. Standard error
    is never missed.
    """

    def __init__(self, stream: TextIO | None, is_error: bool, goes_on: bool) -> None:
        self.is_error, self.goes_on, self.lost = is_error, goes_on, False
        self.closed_before = None if stream is not None else OSError(errno.EBADF, "it is closed")
        self.stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115 (for as long as the process is)
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        """Write, or drop what can no longer be written."""
        try:
            if self.closed_before is not None:
                raise self.closed_before
            self.stream.write(text if self.is_error else printable(text))  # a progress bar moves the cursor on standard error
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self.lost:
            return
        self.lost = True
        with suppress(OSError):  # what is left in its buffer goes nowhere, also when Python flushes it at the end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        if self.is_error:
            return
        if not self.goes_on:
            raise OutputLost(error)
        reason = "its reader has gone" if error.errno == errno.EPIPE else error.strerror
        print(f"standard output cannot be written to ({reason}): going on without it", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def safe_streams(goes_on: bool) -> Iterator[None]:
    """Standard output and error as `Output`. goes_on: what the program does matters more than what it prints."""
    before = sys.stdout, sys.stderr
    sys.stderr = Output(before[1], True, True)
    sys.stdout = Output(before[0], False, goes_on)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def keep_closed_descriptors() -> None:
    """Open what is closed of descriptors 0, 1 and 2 on nothing, so that no file of ours becomes standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns as wide as their widest cell, two spaces apart; the last one is never padded."""
    lines = [list(header), *([list(row) for row in rows])] if header else [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    if header:
        lines.insert(1, ["-" * width for width in widths])
    cells = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(indent + line.rstrip() for line in cells)


def json_text(data: Any) -> str:
    """JSON, where numbers that JSON has no word for (NaN, infinities) are null."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(data), indent=2, allow_nan=False)
