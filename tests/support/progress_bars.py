"""A progress bar that shows nothing."""

from __future__ import annotations

import signal


class NoBar:
    """It keeps what is written above it, and presses Ctrl-C, once, when `stop_at` steps have been logged."""

    def __init__(self, stop_at: int = 0) -> None:
        self.steps, self.stop_at = 0, stop_at
        self.written: list[str] = []

    def update(self, n: int) -> None:
        self.steps += n
        if self.stop_at and self.steps >= self.stop_at:
            self.stop_at = 0
            signal.raise_signal(signal.SIGINT)

    def write(self, text: str) -> None:
        self.written.append(text)

    def set_postfix_str(self, text: str) -> None: ...
