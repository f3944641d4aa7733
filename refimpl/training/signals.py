"""Signals: the first one lets a run stop where nothing is lost, the second one ends it at once; both print a line.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed) are treated alike. A signal that was ignored when the process
started (nohup, a background job) stays ignored.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ENDED = 130
"""The exit code of a program that a signal has ended or stopped early."""
_Handler = Callable[[int, FrameType | None], Any]


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program now."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {_name(signum)}")


def _name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def say(line: str) -> None:
    """Print a line on standard error from a signal handler, bypassing Python's buffers, whose use it may have interrupted.

    It begins with a newline: the cursor may stand behind a progress bar, or behind the ^C that a terminal shows.
    """
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def end_now(signum: int, frame: FrameType | None = None) -> None:
    """End the program at once. This is the handler while Python still imports, when there is nothing to clean up."""
    say(f"ended by {_name(signum)}")
    os._exit(ENDED)


def _install(handler: _Handler) -> dict[int, Any]:
    """Install a handler for the signals that are not ignored. Return their previous handlers."""
    before: dict[int, Any] = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum is None or signal.getsignal(signum) == signal.SIG_IGN:
            continue
        try:
            before[signum] = signal.signal(signum, handler)
        except ValueError:  # not in the main thread: the program around this one handles signals
            break
    return before


def _restore(before: dict[int, Any]) -> None:
    for signum, handler in before.items():
        signal.signal(signum, handler)


def end_at_once() -> None:
    """Make signals end the program with a line."""
    _install(end_now)


@contextmanager
def interrupting() -> Iterator[None]:
    """Make the first signal raise `Interrupted`, so that files and locks are cleaned up, and the second end the program."""
    ending = [False]

    def handle(signum: int, frame: FrameType | None) -> None:
        if ending[0]:
            end_now(signum)
        ending[0] = True
        raise Interrupted(signum)

    def unraisable(what: Any) -> None:  # raised inside a destructor, where Python only reports exceptions
        if issubclass(what.exc_type, Interrupted):
            say(str(what.exc_value))
            os._exit(ENDED)
        hook(what)

    before, hook = _install(handle), sys.unraisablehook
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        _restore(before)


class Stop:
    """Handles signals inside `with stop:`, which may be nested: the first one sets `asked`, the second raises `Interrupted`.

    saying: the line to print at the first signal. speaks: whether this process prints it.
    """

    def __init__(self, saying: str, speaks: bool = True) -> None:
        self.saying, self.speaks, self.asked = saying, speaks, False
        self._depth, self._before = 0, dict[int, Any]()

    def __enter__(self) -> Stop:
        if self._depth == 0:
            self._before = _install(self._handle)
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            _restore(self._before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Interrupted(signum)
        self.asked = True
        if self.speaks:
            say(self.saying)
