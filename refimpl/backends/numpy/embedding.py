"""The gradient of an embedding, fast: rows are sorted by token, and the rows of each token added in one call."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def embedding_backward(dy: Array, saved: Any, w: Array, p: OpPrecision) -> tuple[None, Array]:
    """Return dw[r] = the sum of dy over all positions of token r."""
    tokens = saved.reshape(-1)
    rows = p.widen(dy).reshape(tokens.size, w.shape[-1])
    return None, p.round_grad(sum_by_index(rows, tokens, len(w)), "w", format_of(w))


def sum_by_index(rows: Array, index: Array, count: int) -> Array:
    """Sum the rows of each index, rows (n, C), index (n,) -> (count, C): sorted by index (stable), then added first to last."""
    sums = np.zeros((count, rows.shape[1]), rows.dtype)
    if index.size:
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        starts = np.flatnonzero(np.concatenate([np.ones(1, bool), ordered[1:] != ordered[:-1]]))
        sums[ordered[starts]] = np.add.reduceat(rows[order], starts, axis=0)
    return sums
