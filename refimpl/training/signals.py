"""Ctrl-C and its like: the first one lets a run stop where nothing is lost, the next one ends it at once, each with a line.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal has gone) are treated alike; one that the process was started to ignore
(nohup, a job in the background) stays ignored.
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
"""The exit code of a program that a signal has ended, or stopped before it was done."""
_Handler = Callable[[int, FrameType | None], Any]


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program now."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {_name(signum)}")


def _name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def say(line: str) -> None:
    """A line on standard error, from inside a signal handler: past Python's buffers, which it may have interrupted.

    It begins a new one, since a progress bar may stand there, or the ^C that a terminal shows.
    """
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def end_now(signum: int, frame: FrameType | None = None) -> None:
    """The handler for when nothing has to be tidied up, or no time is left for it: while Python still imports, for one."""
    say(f"ended by {_name(signum)}")
    os._exit(ENDED)


def _install(handler: _Handler) -> dict[int, Any]:
    """Handle the signals that are not ignored; returns how they were handled before."""
    before: dict[int, Any] = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum is None or signal.getsignal(signum) == signal.SIG_IGN:
            continue
        try:
            before[signum] = signal.signal(signum, handler)
        except ValueError:  # not in the main thread: whoever runs this handles signals
            break
    return before


def _restore(before: dict[int, Any]) -> None:
    for signum, handler in before.items():
        signal.signal(signum, handler)


def end_at_once() -> None:
    """From now on a signal ends the program with a line."""
    _install(end_now)


@contextmanager
def interrupting() -> Iterator[None]:
    """A signal raises `Interrupted`, so that files and locks are left tidy; one more ends the program there and then."""
    ending = [False]

    def handle(signum: int, frame: FrameType | None) -> None:
        if ending[0]:
            end_now(signum)
        ending[0] = True
        raise Interrupted(signum)

    def unraisable(what: Any) -> None:  # it hit Python inside a destructor, where exceptions are only reported
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
    """Whether a signal has asked a run to stop at its next safe point. It listens inside `with stop:`, which may be nested.

    saying: the answer to the first signal. A second one raises `Interrupted`. speaks: whether this process answers.
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
