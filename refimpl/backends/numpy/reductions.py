"""Sums of rows with einsum: in another order than `sum()`, and faster where rows are short."""

from __future__ import annotations

import numpy as np

from refimpl.numerics.arrays import Array


def row_sum(x: Array) -> Array:
    """Sum each row, x (..., N) -> (..., 1), in the format of `x`."""
    return np.einsum("...i->...", _whole_rows(x))[..., None] if x.ndim and x.itemsize >= 4 else x.sum(-1, keepdims=True)


def row_dot(x: Array, y: Array) -> Array:
    """Return the scalar product of each row, x and y (..., N) -> (..., 1), without an array of the products."""
    if not x.ndim or x.itemsize < 4:
        return (x * y).sum(-1, keepdims=True)
    return np.einsum("...i,...i->...", _whole_rows(x), _whole_rows(y))[..., None]


def _whole_rows(x: Array) -> Array:
    """Return `x`, or a copy where rows are not contiguous, which einsum would add in another order."""
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)
