"""The errors that a person is meant to read: one line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(text: object, limit: int = 4000) -> str:
    """Return a message as it may be printed: control characters, line ends among them, escaped; cut where it is very long.

    What a damaged file or a strange name holds can be anything, and stands in messages.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    return line if len(line) <= limit else line[: limit - 4] + " ..."


class _OneLine(Exception):
    """An error whose text is one line, whatever was put into it."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(_OneLine):
    """Wrong input: an unknown recipe, a file too short, a folder in use. Scripts print it and exit with 2."""


class TrainingStopped(_OneLine):
    """A run that cannot go on: a loss that became NaN, a loss scale that collapsed. Scripts print it and exit with 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X?' for the known name that is most like `name`, or '' where none is. Case does not count."""
    by_lower = {other.lower().replace("_", "-"): other for other in known}
    close = difflib.get_close_matches(name.lower().replace("_", "-"), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Return the message for a name that is not among those known: all of them, and the nearest.

    Example: unknown("model", "gtp", ["gpt", "mlp"]) -> "unknown model 'gtp': choose one of gpt, mlp; did you mean gpt?".
    """
    names = list(known)
    return f"unknown {what} {name!r}: choose one of {', '.join(names)}{nearest(str(name), names)}"
