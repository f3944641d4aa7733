"""Checks of data read from JSON: the type and range of every field as a table, and one function that checks a value.

A file may have anything in place of a number: 1e999, a list, 2^70, nothing. Headers are checked against a table of these kinds
before they are used, so that the code that uses them need not check again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from refimpl.errors import UsageError


@dataclass(frozen=True)
class Integer:
    """An integer in a range. 1.0 and true are not integers."""

    least: int = 0
    most: int = 2**53

    def wrong(self, value: Any) -> str | None:
        """Return None if the value is of this kind, else a description of the kind."""
        good = type(value) is int and self.least <= value <= self.most
        return None if good else f"an integer from {self.least} to {self.most}"


@dataclass(frozen=True)
class Real:
    """A number in a closed range: never NaN, and infinite only if an end of the range is."""

    least: float
    most: float

    def wrong(self, value: Any) -> str | None:
        """Return None if the value is of this kind, else a description of the kind."""
        good = type(value) in (int, float) and self.least <= value <= self.most
        return None if good else f"a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Text:
    """A string."""

    def wrong(self, value: Any) -> str | None:
        """Return None if the value is of this kind, else a description of the kind."""
        return None if isinstance(value, str) else "a text"


@dataclass(frozen=True)
class OneOf:
    """One of a few values, of the same type: 1 is not true."""

    values: tuple[Any, ...]

    def wrong(self, value: Any) -> str | None:
        """Return None if the value is of this kind, else a description of the kind."""
        good = any(type(value) is type(other) and value == other for other in self.values)
        return None if good else " or ".join(map(repr, self.values))


@dataclass(frozen=True)
class Maybe:
    """A value of another kind, or null. Of a table the fields are not checked."""

    kind: Integer | Real | Text | OneOf | Words | Table

    def wrong(self, value: Any) -> str | None:
        """Return None if the value is of this kind, else a description of the kind."""
        expected = None if value is None else self.kind.wrong(value)
        return None if expected is None else f"{expected}, or null"


@dataclass(frozen=True)
class Words:
    """A list of strings."""

    def wrong(self, value: Any) -> str | None:
        """Return None if the value is of this kind, else a description of the kind."""
        good = isinstance(value, list) and all(isinstance(word, str) for word in value)
        return None if good else "a list of texts"


@dataclass(frozen=True)
class Table:
    """A table of `fields`, which are required, and `optional` ones. Others are ignored, or errors if `closed`."""

    fields: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)
    closed: bool = False

    def wrong(self, value: Any) -> str | None:
        """Return None if the value is a table, whatever its fields are."""
        return None if isinstance(value, dict) else "a table"


Kind: TypeAlias = Integer | Real | Text | OneOf | Maybe | Words | Table
FINITE = Real(-math.nextafter(math.inf, 0), math.nextafter(math.inf, 0))


def check(value: Any, kind: Kind, damage: str, name: str = "") -> None:
    """Check a value from a file, including its fields. damage: the start of the message, such as 'FILE has a damaged header'.

    Errors: UsageError that names the first field that is missing, unknown or of another kind.
    """
    expected = kind.wrong(value)
    if expected is not None:
        raise UsageError(f"{damage}: {name or 'it'} is {_short(value)}, not {expected}")
    if isinstance(kind, Table):
        known = {**kind.fields, **kind.optional}
        for key, inner in known.items():
            place = f"{name}.{key}" if name else key
            if key in value:
                check(value[key], inner, damage, place)
            elif key in kind.fields:
                raise UsageError(f"{damage}: {place} is missing")
        surplus = sorted(value.keys() - known.keys())
        if kind.closed and surplus:
            raise UsageError(f"{damage}: {name or 'it'} has a field {_short(surplus[0])}, which is unknown")


def _short(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"about 2^{value.bit_length()}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:56] + " ..."
