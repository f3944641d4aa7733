"""Progress of long work: a bar on a terminal, which cuts no number, and lines in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from refimpl.training.columns import terminal_width

LEAST_BAR = 6
"""Columns of the bar below which it gives up fields after it."""
WITH_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
WITH_FIELDS = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
NARROW = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
DELAY = 0.5
"""Seconds before the bar appears."""
SECONDS = 10.0
"""Seconds between two lines on progress where standard error is not a terminal."""

Tick = Callable[[], object]
"""A callback after each part of some work, such as `ProgressBar.update`."""


def no_tick() -> None:
    """Show no progress."""


def fitted(**shown: Any) -> str:
    """Return tqdm's bar without the last fields if the terminal is too narrow: tqdm would cut in the middle of a number."""
    from tqdm import tqdm  # only where a bar is shown: the library needs it for nothing else

    width, fields = shown["ncols"] or sys.maxsize, (shown["postfix"] or "").split(", ")
    while True:
        shown["postfix"] = ", ".join(fields)
        shown["bar_format"] = WITH_FIELDS if fields[0] else WITH_RATE
        natural = len(tqdm.format_meter(**{**shown, "ncols": None}))  # with a bar of 10 columns
        if natural - 10 + LEAST_BAR <= width:
            return str(tqdm.format_meter(**shown))
        if not fields[0]:
            return str(tqdm.format_meter(**{**shown, "bar_format": NARROW}))
        fields = fields[:-1] or [""]


class ProgressBar:
    """Shows how much of some work is done, inside `with`.

    On standard error, a bar if it is a terminal. If it is not: a line every SECONDS, or with `show` each time
    that it is called, on standard output, which has these lines too if it is a file and only standard error is a terminal.

    total: how much work there is, in `unit`. what: its name. done: how much of it is done at the start. delay: seconds before
    the bar is shown, in which errors at the start appear. quiet: show nothing. stays: leave the bar at the end.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        what: str = "",
        done: int = 0,
        delay: float = DELAY,
        quiet: bool = False,
        stays: bool = True,
    ) -> None:
        self.total, self.unit, self.what, self.done, self.quiet = total, unit, what, done, quiet
        self.has_bar = terminal_width(sys.stderr) is not None
        self._bar: Any = None
        self._begun = self._said = time.monotonic()
        if self.has_bar and not quiet:
            from tqdm import tqdm

            shown: dict[str, Any] = {"total": total, "initial": done, "desc": what, "unit": unit, "unit_scale": unit == "B"}
            kind: dict[str, Any] = {"leave": stays, "delay": delay, "dynamic_ncols": True, "smoothing": 0.1}
            self._bar = tqdm(**shown, **kind)
            self._bar.format_meter = fitted

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: int = 1) -> None:
        """Count n more units as done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif not self.quiet and not self.has_bar and time.monotonic() - self._said >= SECONDS:
            self._say()

    def show(self, fields: str) -> None:
        """Show the state of the work, such as 'loss 2.5, scale 1024': behind the bar, or in a line."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(fields)
        if self._bar is None or terminal_width(sys.stdout) is None:
            self._said = time.monotonic()
            self.write(f"{self.unit} {self.done} of {self.total}: {fields}")

    def write(self, text: str) -> None:
        """Print a text on standard output, above the bar."""
        if self._bar is None:
            print(text)
        else:
            self._bar.write(text)

    def _say(self) -> None:
        self._said = time.monotonic()
        begin = f"{self.what}: " if self.what else ""
        unit = "byte" if self.unit == "B" else self.unit
        print(f"{begin}{unit} {self.done:,} of {self.total:,}, {self._said - self._begun:.0f} s", file=sys.stderr)
