"""A progress bar that shows nothing, and a terminal that keeps what it is shown."""

from __future__ import annotations

import io
import signal

from refimpl.training.progress_bar import ProgressBar


class NoBar(ProgressBar):
    """It keeps what is written above it, and presses Ctrl-C, once, when `stop_at` steps have been logged."""

    def __init__(self, stop_at: int = 0) -> None:
        self.steps, self.stop_at, self.quiet = 0, stop_at, False
        self.written: list[str] = []

    def update(self, n: int = 1) -> None:
        self.steps += n
        if self.stop_at and self.steps >= self.stop_at:
            self.stop_at = 0
            signal.raise_signal(signal.SIGINT)

    def write(self, text: str) -> None:
        self.written.append(text)

    def show(self, fields: str) -> None: ...


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True
