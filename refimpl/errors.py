"""Errors for the user: one line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(text: object, limit: int = 4000) -> str:
    """Return a message with control characters and line ends escaped, cut at `limit` characters.

    Messages quote names and file contents, which may hold anything.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    return line if len(line) <= limit else line[: limit - 4] + " ..."


class _OneLine(Exception):
    """An error whose text is always one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(_OneLine):
    """Wrong input: an unknown recipe, a file that is too short, a folder in use. Scripts print it and exit with 2."""


class TrainingStopped(_OneLine):
    """A run that cannot continue: a NaN loss, a loss scale that collapsed. Scripts print it and exit with 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean X or Y?' for the most similar known name, and up to two that have all words of `name`; or ''.

    Example: for llama-8b, llama-7b is the most similar, and llama-3.1-8b has both words. Case does not count, nor do the dashes
    that all flags begin with.
    """

    by_plain, plain = {_plain(other): other for other in known}, _plain(name)
    fuller = [other for other in by_plain if {*plain.split("-")} <= {*other.split("-")}]
    close = difflib.get_close_matches(plain, by_plain, n=1) + difflib.get_close_matches(plain, fuller, n=2, cutoff=0)
    return f"; did you mean {' or '.join(by_plain[other] for other in dict.fromkeys(close))}?" if close else ""


def _plain(text: str) -> str:
    return text.lower().replace("_", "-").lstrip("-")


def spelled(name: str, known: Iterable[str]) -> str:
    """Return the known name that differs from `name` in case or underscores only, as FP16 and amp_fp16 do; else `name`."""
    return {_plain(other): other for other in known}.get(_plain(name), name)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Return the message for an unknown name: all known ones, and the nearest.

    Example: unknown("model", "gtp", ["gpt", "mlp"]) -> "unknown model 'gtp': choose one of gpt, mlp; did you mean gpt?".
    """
    names = list(known)
    return f"unknown {what} {name!r}: choose one of {', '.join(names)}{nearest(str(name), names)}"
