"""What may stand in a header: the type and range of every field, as a table, and one function that checks it.

A file may hold anything where a number belongs: 1e999, a list, 2^70, nothing. What is read from JSON is checked against a
table of these kinds before it is used; so what uses it need not ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from refimpl.errors import UsageError


@dataclass(frozen=True)
class Integer:
    """A whole number in a range. 1.0 and true are none."""

    least: int = 0
    most: int = 2**53

    def wrong(self, value: Any) -> str | None:
        """Return what the value should be, or None where it is that."""
        good = type(value) is int and self.least <= value <= self.most
        return None if good else f"an integer from {self.least} to {self.most}"


@dataclass(frozen=True)
class Real:
    """A number in a range, the ends among it: never NaN; infinite only where an end is."""

    least: float
    most: float

    def wrong(self, value: Any) -> str | None:
        """As in `Integer`."""
        good = type(value) in (int, float) and self.least <= value <= self.most
        return None if good else f"a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Text:
    """Characters."""

    def wrong(self, value: Any) -> str | None:
        """As in `Integer`."""
        return None if isinstance(value, str) else "a text"


@dataclass(frozen=True)
class OneOf:
    """One of a few values, of their own type: 1 is not true."""

    values: tuple[Any, ...]

    def wrong(self, value: Any) -> str | None:
        """As in `Integer`."""
        good = any(type(value) is type(other) and value == other for other in self.values)
        return None if good else " or ".join(map(repr, self.values))


@dataclass(frozen=True)
class Maybe:
    """Another kind, or null."""

    kind: Integer | Real | Text | OneOf

    def wrong(self, value: Any) -> str | None:
        """As in `Integer`."""
        expected = None if value is None else self.kind.wrong(value)
        return None if expected is None else f"{expected}, or null"


@dataclass(frozen=True)
class Words:
    """A list of texts."""

    def wrong(self, value: Any) -> str | None:
        """As in `Integer`."""
        good = isinstance(value, list) and all(isinstance(word, str) for word in value)
        return None if good else "a list of texts"


@dataclass(frozen=True)
class Table:
    """Fields by name. `fields` must be there, `optional` may be; others are not looked at, or not allowed if `closed`."""

    fields: Mapping[str, Kind] = field(default_factory=dict)
    optional: Mapping[str, Kind] = field(default_factory=dict)
    closed: bool = False

    def wrong(self, value: Any) -> str | None:
        """As in `Integer`; of the table alone, not of what stands in it."""
        return None if isinstance(value, dict) else "a table"


Kind: TypeAlias = Integer | Real | Text | OneOf | Maybe | Words | Table
FINITE = Real(-math.nextafter(math.inf, 0), math.nextafter(math.inf, 0))


def check(value: Any, kind: Kind, damage: str, name: str = "") -> None:
    """Check a value from a file, and all that stands in it. `damage` begins the message: 'FILE has a damaged header'.

    Errors: UsageError that names the first field that is missing or of another kind.
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
            raise UsageError(f"{damage}: {name or 'it'} has a field {_short(surplus[0])}, which is none")


def _short(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"about 2^{value.bit_length()}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:56] + " ..."
