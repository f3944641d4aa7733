"""The type of an array, wherever it lives."""

from __future__ import annotations

from typing import Any

Array = Any
"""A numpy.ndarray or a cupy.ndarray; no type covers both, so for type checkers it is Any."""
