"""Standard output and error that do not crash the program, and text that does not disturb the terminal.

    a reader that has gone (`train.py | head`), a full disk, a closed stream (`>&-`)    -> `OutputLost`, or continue without it
    a character that the encoding lacks (cp1252, ascii)                                 -> \\ufffd
    a control character: ESC, BEL, Shift-Out, those of Unicode                          -> \\x1b
    a line that is longer than the terminal is wide                                     -> wrapped at words
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from refimpl.training.columns import terminal_width, wrapped


class OutputLost(Exception):
    """Standard output cannot be written to. reader_gone: it is a pipe whose other end was closed, which is not an error."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.reader_gone = error.errno == errno.EPIPE


def printable(text: str | bytes) -> str:
    r"""Return the text with control and invisible characters escaped: \x1b for ESC, \u202e for an override.

    Bytes are decoded as UTF-8; invalid ones become \xff. Newlines and tabs stay.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return "".join(c if c in "\n\t" or c.isprintable() else _escaped(ord(c)) for c in text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Output:
    """A stream that wraps lines at the terminal's width, and drops what is written after its first failure.

    Standard output raises `OutputLost` at the failure, or if `goes_on` prints one line to standard error. Standard error
    fails silently. A line that is flushed before its end, and the progress bar, are not wrapped.
    """

    def __init__(self, stream: TextIO | None, is_error: bool, goes_on: bool) -> None:
        self.is_error, self.goes_on, self.lost = is_error, goes_on, False
        self.closed_before = None if stream is not None else OSError(errno.EBADF, "it is closed")
        # a file that stays open for as long as the process runs
        self.stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.line, self.streams = "", False  # the unfinished line; whether its beginning has been shown
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        """Write the text, or drop it after a failure."""
        try:
            if self.closed_before is not None:
                raise self.closed_before
            self.stream.write(self._shown(text))
        except OSError as error:
            self._lose(error)
        return len(text)

    def _shown(self, text: str) -> str:
        """Return what to show now of a text: the lines that end in it, wrapped. `line` keeps the rest."""
        text = text if self.is_error else printable(text)  # a progress bar moves the cursor on standard error
        width = terminal_width(self.stream)
        if width is None or "\r" in text:
            return text
        *lines, self.line = (self.line + text).split("\n")
        shown = [wrapped(line, width) for line in lines]
        if lines and self.streams:
            shown[0], self.streams = lines[0], False
        return "".join(f"{line}\n" for line in shown)

    def flush(self) -> None:
        """Flush the buffer, or drop it after a failure."""
        try:
            if self.line:
                self.stream.write(self.line)
                self.line, self.streams = "", True
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self.lost:
            return
        self.lost = True
        with suppress(OSError):  # so that Python can flush the rest of its buffer at exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        if self.is_error:
            return
        if not self.goes_on:
            raise OutputLost(error)
        reason = "its reader has gone" if error.errno == errno.EPIPE else error.strerror
        print(f"standard output cannot be written to ({reason}): continuing without it", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def safe_streams(goes_on: bool) -> Iterator[None]:
    """Replace standard output and error by `Output`. goes_on: continue without standard output if it fails."""
    before = sys.stdout, sys.stderr
    sys.stderr = Output(before[1], True, True)
    sys.stdout = Output(before[0], False, goes_on)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OutputLost):
                stream.flush()  # a line without an end
        sys.stdout, sys.stderr = before


def keep_closed_descriptors() -> None:
    """Open the closed ones of descriptors 0, 1 and 2 on os.devnull, so that no other file becomes standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor


def count(n: int, unit: str) -> str:
    """Return a number of things: '1 step', '1,000 steps'."""
    return f"{n:,} {unit}" if n == 1 else f"{n:,} {unit}s"


def json_text(data: Any) -> str:
    """Return data as JSON, with null for NaN and infinities, which JSON lacks."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(data), indent=2, allow_nan=False)
