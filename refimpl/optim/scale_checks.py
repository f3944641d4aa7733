"""Checks of a loss scale's settings, and of its state in a checkpoint."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from refimpl.errors import UsageError, one_line
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS

_FP32 = FORMATS["fp32"]
SMALLEST, LARGEST = _FP32.smallest_normal, _FP32.max
"""The scales of a checkpoint: normal FP32 numbers. The inverse of a smaller one may be infinite."""


def check_scale(name: str, scale: float) -> None:
    """Raise UsageError unless the scale is positive and finite when rounded to FP32."""
    if not _FP32.smallest_subnormal / 2 < scale <= _FP32.max:
        raise UsageError(f"{name} {scale}: it must be positive and finite in FP32")


def check_count(name: str, count: object) -> None:
    """Raise UsageError unless the count is an integer of at least 1."""
    if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
        raise UsageError(f"{name} {count}: it must be a whole number, at least 1")


def check_settings(init_scale: float, growth_factor: float, backoff_factor: float, growth_interval: int) -> None:
    """Raise UsageError for a setting that is impossible in every rule."""
    if not 1 < growth_factor <= _FP32.max:
        raise UsageError(f"growth factor {growth_factor}: it must be above 1 and finite in FP32")
    if not 0 < backoff_factor < 1:
        raise UsageError(f"backoff factor {backoff_factor}: it must be between 0 and 1")
    check_scale("init scale", init_scale)
    check_count("growth interval", growth_interval)


class SavedState:
    """A `state_dict` of a loss scale, checked number by number as it is read.

    Errors: ValueError, in one line, for a missing or unknown key; for a scale that is 0, subnormal, not finite, not exact in
    its format, below the floor or above the ceiling; for a count that is negative, not an integer or too high.
    """

    def __init__(self, state: object, keys: Collection[str]) -> None:
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of a loss scale is {_shown(state)}: it must be a dictionary")
        if missing := [key for key in keys if key not in state]:
            raise ValueError(f"the state of a loss scale lacks {missing[0]}")
        if surplus := [key for key in state if key not in keys]:
            raise ValueError(f"the state of a loss scale has {_shown(surplus[0])}, which this one does not know")
        self.state = state

    def number(self, name: str, fits: Callable[[Any], bool], must: str, kind: Any = numbers.Real) -> float:
        """Return the number of that name. must: the condition `fits`, in words."""
        x: Any = self.state[name]
        if not isinstance(x, kind) or isinstance(x, bool) or not fits(x):
            raise ValueError(f"the state of a loss scale has {name} {_shown(x)}: it must be {must}")
        return float(x)

    def count(self, name: str, least: int, most: int = 2**31 - 1) -> int:
        """Return the integer of that name, from `least` to `most`."""
        return int(self.number(name, lambda x: least <= x <= most, f"a whole number from {least} to {most}", numbers.Integral))

    def scale(self, name: str, least: float, most: float, fmt: str) -> float:
        """Return the scale of that name, which must be exact in `fmt`."""
        with np.errstate(over="ignore"):
            must = f"a number of {fmt.upper()} from {least:g} to {most:g}"
            return self.number(name, lambda x: least <= x <= most and float(cast(np.float64(x), fmt)) == x, must)

    def settings(self) -> tuple[float, float, int]:
        """Return growth_factor, backoff_factor and growth_interval."""
        growth_factor = self.number("growth_factor", lambda x: 1 < x <= _FP32.max, "above 1")
        backoff_factor = self.number("backoff_factor", lambda x: 0 < x < 1, "between 0 and 1")
        return growth_factor, backoff_factor, self.count("growth_interval", 1)


def _shown(x: object) -> str:
    return one_line(repr(x), 100)
