"""Embedding: one row of a table for each token."""

from __future__ import annotations

from typing import Any

from refimpl.nn.indices import check_indices
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def embedding_forward(tokens: Array, w: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y[i] = w[tokens[i]]. tokens (...) integers, w (V, C) -> y (..., C).

    Errors: UsageError for a token outside 0 to V - 1 (on the host only: see `check_indices`).
    PyTorch: torch.nn.functional.embedding.
    """
    check_indices(tokens, len(w), "token", p)
    return p.round(p.cast(w, "w")[tokens], "y", w), tokens


def embedding_backward(dy: Array, saved: Any, w: Array, p: OpPrecision) -> tuple[None, Array]:
    """Return dw[r] = the sum of dy over all positions of token r: summed in `acc`, in a fixed order, and rounded once.

    Differs from PyTorch, which on the CPU rounds a 16-bit gradient after every addition; on CUDA it does not.
    """
    tokens = saved.reshape(-1)
    rows = p.widen(dy).reshape(tokens.size, w.shape[-1])
    dw = p.xp.zeros(w.shape, rows.dtype)
    p.xp.add.at(dw, tokens, rows)  # dw[tokens[i]] += rows[i] for each i in turn; `dw[tokens] += rows` would add a token once
    return None, p.round_grad(dw, "w", format_of(w))
