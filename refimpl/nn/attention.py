"""Causal self-attention, operation by operation, as PyTorch computes it without a fused kernel.

    S = R(q k^T)   S' = R(S / sqrt(D))   P = R(softmax(S'))   O = R(P v)

R is the rounding that the row of each says: `attention.scores`, `.scale`, `.softmax`, `.values`. In recipe fp16 all four round
to FP16, since the next product reads 16-bit operands. Under CUDA autocast P stays in FP32 and is rounded where P v reads it.
With other rows everything is FP32 and rounded once at the end, as PyTorch's SDPBackend.MATH does (`--attention math`). A fused
kernel rounds at other places: `fused_attention.py`.
"""

from __future__ import annotations

import math
from typing import Any

from refimpl.nn.softmax import softmax_slope, unrounded_softmax
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    """Split (B, T, 3C) into q, k, v, each a view (B, H, T, D) with D = C/H."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, n_head, C3 // 3 // n_head).transpose(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(x: Array) -> Array:
    """Join the heads: (B, H, T, D) -> (B, T, C)."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


QUERIES = 64
"""Queries per block. Keys after the last query of a block are hidden from all of them, and are not computed."""


def query_blocks(T: int) -> list[slice]:
    """Return slices of QUERIES positions that cover 0..T."""
    return [slice(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def hide_later(z: Array, queries: slice, p: OpPrecision, fill: float) -> None:
    """Set z to `fill` where a key comes after the query, in place. z (..., queries, keys up to the last query).

    Values are replaced: adding a large negative number could overflow, and 0 * Inf would be NaN.
    """
    # Only the last square of z has keys after their query.
    position, square = p.xp.arange(queries.stop - queries.start), z[..., queries.start :]
    square[...] = p.xp.where(position[:, None] >= position, square, p.xp.full((), fill, z.dtype))


def attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, where each position attends to itself and earlier positions.

    qkv (B, T, 3C), the output of one linear layer -> O (B, T, C). Saved: qkv and P (B, H, T, T).
    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1. PyTorch: the four operations one after the other.
    Differs from the source: keys after the last query of a block are left out, so an Inf or NaN in their v does not reach O as
      0 * Inf = NaN.
    """
    B, T, _ = qkv.shape
    O, P = p.by_example(lambda part: _attend(part, p, n_head), B * n_head * T * T, qkv)  # noqa: E741
    return O, (qkv, P)


def _attend(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Array]:
    """Return O and P of all positions, computed block by block."""
    q, k, v = split_heads(qkv, n_head)
    T = q.shape[-2]
    k = p["scores"].widen(p["scores"].cast(k, "k"))
    v = p["values"].widen(p["values"].cast(v, "v"))
    O = P = None  # noqa: E741
    for rows in query_blocks(T):
        O_rows, P_rows = _attend_block(q[..., rows, :], k[..., : rows.stop, :], v[..., : rows.stop, :], rows, p, format_of(qkv))
        if rows == slice(0, T):
            return merge_heads(O_rows), P_rows
        if O is None or P is None:
            O = p.empty(q.shape, format_of(O_rows))  # noqa: E741
            P = p.empty((*q.shape[:-1], T), format_of(P_rows))
        O[..., rows, :], P[..., rows, : rows.stop], P[..., rows, rows.stop :] = O_rows, P_rows, 0
    return merge_heads(O), P


def _attend_block(q: Array, k: Array, v: Array, queries: slice, p: OpPrecision, fmt: str) -> tuple[Array, Array]:
    """Return O and P of some queries. k, v: cast and widened, of all positions up to the last query. fmt: the format of qkv."""
    row = p["scores"]
    S = row.round_to(row.matmul(row.cast(q, "q"), k.swapaxes(-1, -2)), row.result_format(fmt, fmt), "S")
    row = p["scale"]
    z = row.widen(row.cast(S, "S"))
    z *= 1 / math.sqrt(q.shape[-1])
    S = row.round(z, "S", S)
    row = p["softmax"]
    z = row.widen(row.cast(S, "S"))
    hide_later(z, queries, p, -math.inf)
    P = row.round(unrounded_softmax(z, p), "P", S)
    row = p["values"]
    O = row.round_to(row.matmul(row.cast(P, "P"), v), row.result_format(format_of(P), fmt), "O")  # noqa: E741
    return O, P


def attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array]:
    """Return the gradient of qkv:

        dP = dO v^T     dv = P^T dO     dS' = P (dP - sum(dP P))     dS = dS' / sqrt(D)     dq = dS k     dk = dS^T q

    dk and dv are summed over blocks of queries, in `acc` and from the last block to the first, and rounded once.
    """
    qkv, P = saved
    (dqkv,) = p.by_example(lambda dO, qkv, P: (_attend_backward(dO, qkv, P, p, n_head),), P.size, dO, qkv, P)
    return (dqkv,)


def _attend_backward(dO: Array, qkv: Array, P: Array, p: OpPrecision, n_head: int) -> Array:
    """Return the gradient of qkv. The last block sees all keys, so the dk and dv of the others are added to its own."""
    fmt, (q, k, v) = format_of(qkv), split_heads(qkv, n_head)
    B, H, T, D = q.shape
    scores, values = p["scores"], p["values"]
    dO = values.widen(dO.reshape(B, T, H, D).transpose(0, 2, 1, 3))
    q, k, v = scores.widen(scores.cast(q, "q")), scores.widen(scores.cast(k, "k")), values.widen(values.cast(v, "v"))
    dq = dk = dv = None
    for rows in reversed(query_blocks(T)):
        seen = slice(0, rows.stop)
        P_rows = P[..., rows, seen]
        dv_rows = values.matmul(values.cast(P_rows, "P").swapaxes(-1, -2), dO[..., rows, :])
        dS = _scores_gradient(dO[..., rows, :], v[..., seen, :], P_rows, rows, p, fmt, D)
        dq_rows = scores.matmul(dS, k[..., seen, :])
        dk_rows = scores.matmul(dS.swapaxes(-1, -2), q[..., rows, :])
        if dq is None or dk is None or dv is None:
            dq, dk, dv = dq_rows if rows.start == 0 else p.xp.empty_like(dk_rows), dk_rows, dv_rows
        else:
            dk[..., seen, :] += dk_rows
            dv[..., seen, :] += dv_rows
        dq[..., rows, :] = dq_rows

    dqkv = p.empty((B, T, 3, H, D), fmt)
    for i, d in enumerate((scores.round_grad(dq, "q", fmt), scores.round_grad(dk, "k", fmt), values.round_grad(dv, "v", fmt))):
        dqkv[:, :, i] = d.transpose(0, 2, 1, 3)
    return dqkv.reshape(qkv.shape)


def _scores_gradient(dO: Array, v: Array, P: Array, queries: slice, p: OpPrecision, fmt: str, D: int) -> Array:
    """Return dS of a block of queries. dO (..., queries, D), v (..., keys, D), P (..., queries, keys)."""
    unscaled_format = p["scores"].result_format(fmt)
    row = p["values"]
    dP = row.round_grad(row.matmul(dO, v.swapaxes(-1, -2)), "P", format_of(P))
    row = p["softmax"]
    dS = softmax_slope(row.widen(dP), row.widen(P), row)
    hide_later(dS, queries, p, 0.0)  # P is 0 there, but 0 times an infinite dP would be NaN
    dS = row.round_grad(dS, "S", p["scale"].result_format(unscaled_format))
    row = p["scale"]
    z = row.widen(dS)
    z *= 1 / math.sqrt(D)
    return row.round_grad(z, "S", unscaled_format)
