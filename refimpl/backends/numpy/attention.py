"""Causal attention, fast: in blocks of queries, without the keys that they do not see. Fused attention: by examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.backends.numpy.blocks import by_example
from refimpl.backends.numpy.reductions import row_dot, row_sum
from refimpl.nn.attention import merge_heads, merge_qkv, split_heads
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision

QUERIES = 64
"""Queries per block. Keys after the last query of a block are hidden from all of them, and are not computed."""


def query_blocks(T: int) -> list[slice]:
    """Return slices of QUERIES positions that cover 0..T."""
    return [slice(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def hide_later(z: Array, queries: slice, fill: float) -> None:
    """Set z to `fill` where a key comes after the query, in place. z (..., queries, keys up to the last query)."""
    # Only the last square of z has keys after their query.
    position, square = np.arange(queries.stop - queries.start), z[..., queries.start :]
    square[...] = np.where(position[:, None] >= position, square, np.full((), fill, z.dtype))


def softmax(z: Array) -> Array:
    """Return softmax over the last axis, not rounded, in the memory of one array."""
    e = np.exp(z - z.max(-1, keepdims=True))
    e /= row_sum(e)
    return e


def softmax_slope(dy: Array, y: Array) -> Array:
    """Return y (dy - sum(dy y)), not rounded."""
    dz = dy - row_dot(dy, y)
    dz *= y
    return dz


def attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v.

    Differs from the definition: keys after the last query of a block are left out, so an Inf or NaN in their v does not reach O
      as 0 * Inf = NaN.
    """
    B, T, _ = qkv.shape
    O, P = by_example(p.run.backend, lambda part: _attend(part, p, n_head), B * n_head * T * T, qkv)  # noqa: E741
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
    S = row.round_to(row.matmul(row.cast(q, "q"), k.swapaxes(-1, -2)), row.result_format(fmt), "S")
    row = p["scale"]
    z = row.widen(row.cast(S, "S"))
    z *= 1 / math.sqrt(q.shape[-1])
    S = row.round(z, "S", S)
    row = p["softmax"]
    z = row.widen(row.cast(S, "S"))
    hide_later(z, queries, -math.inf)
    P = row.round(softmax(z), "P", S)
    row = p["values"]
    O = row.round_to(row.matmul(row.cast(P, "P"), v), row.result_format(format_of(P), fmt), "O")  # noqa: E741
    return O, P


def attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array]:
    """Return the gradient of qkv. dk and dv are summed over blocks of queries, from the last to the first, and rounded once."""
    qkv, P = saved
    return by_example(p.run.backend, lambda dO, qkv, P: (_attend_backward(dO, qkv, P, p, n_head),), P.size, dO, qkv, P)


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
            dq, dk, dv = dq_rows if rows.start == 0 else np.empty_like(dk_rows), dk_rows, dv_rows
        else:
            dk[..., seen, :] += dk_rows
            dv[..., seen, :] += dv_rows
        dq[..., rows, :] = dq_rows

    return merge_qkv(scores.round_grad(dq, "q", fmt), scores.round_grad(dk, "k", fmt), values.round_grad(dv, "v", fmt), p)


def _scores_gradient(dO: Array, v: Array, P: Array, queries: slice, p: OpPrecision, fmt: str, D: int) -> Array:
    """Return dS of a block of queries. dO (..., queries, D), v (..., keys, D), P (..., queries, keys)."""
    unscaled_format = p["scores"].result_format(fmt)
    row = p["values"]
    dP = row.round_grad(row.matmul(dO, v.swapaxes(-1, -2)), "P", format_of(P))
    row = p["softmax"]
    dS = softmax_slope(row.widen(dP), row.widen(P))
    hide_later(dS, queries, 0.0)  # P is 0 there, but 0 times an infinite dP would be NaN
    dS = row.round_grad(dS, "S", p["scale"].result_format(unscaled_format))
    row = p["scale"]
    z = row.widen(dS)
    z *= 1 / math.sqrt(D)
    return row.round_grad(z, "S", unscaled_format)


def fused_attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O and log(sum(exp S)) for `fused_attention`, some examples at a time."""
    B, T, _ = qkv.shape
    O, lse = by_example(p.run.backend, lambda part: _attend_fused(part, p, n_head), B * n_head * T * T, qkv)  # noqa: E741
    return O, (qkv, O, lse)


def _attend_fused(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Array]:
    """Return O and log(sum(exp S))."""
    q, k, v = split_heads(qkv, n_head)                                  # (B, H, T, D)
    S, values = _scores_of(q, k, p), p["values"]                        # (B, H, T, T)
    top = S.max(-1, keepdims=True)
    E = np.exp(S - top)
    total = row_sum(E)                                                  # (B, H, T, 1)
    z = values.matmul(values.cast(E, "P"), values.cast(v, "v"))         # (B, H, T, D)
    O = values.round(z / total, "O", E, qkv)                            # noqa: E741
    return merge_heads(O), top + np.log(total)


def _scores_of(q: Array, k: Array, p: OpPrecision) -> Array:
    """Return q k^T / sqrt(D) in `acc`, -Inf where the key comes after the query."""
    row = p["scores"]
    S = row.matmul(row.cast(q, "q"), row.cast(k, "k").swapaxes(-1, -2))
    S *= 1 / math.sqrt(q.shape[-1])
    hide_later(S, slice(0, q.shape[-2]), -math.inf)
    return S


def fused_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array, ...]:
    """Return the gradient of qkv for `fused_attention`, some examples at a time."""
    qkv, O, lse = saved  # noqa: E741
    size = dO.shape[0] * n_head * dO.shape[1] ** 2

    def gradient(*saved: Array) -> tuple[Array, ...]:
        return (_attend_fused_backward(*saved, p=p, n_head=n_head),)

    return by_example(p.run.backend, gradient, size, dO, qkv, O, lse)


def _attend_fused_backward(dO: Array, qkv: Array, O: Array, lse: Array, *, p: OpPrecision, n_head: int) -> Array:  # noqa: E741
    """Return the gradient of qkv."""
    fmt, (q, k, v) = format_of(qkv), split_heads(qkv, n_head)
    scores, values = p["scores"], p["values"]
    B, H, T, D = q.shape

    def heads(x: Array) -> Array:
        return values.widen(x.reshape(B, T, H, D).transpose(0, 2, 1, 3))

    dO, O = heads(dO), heads(O)  # noqa: E741
    P = np.exp(_scores_of(q, k, p) - lse)
    dv = values.matmul(values.cast(P, "P").swapaxes(-1, -2), dO)
    dP = values.matmul(dO, values.cast(v, "v").swapaxes(-1, -2))
    dS = P * (dP - row_dot(dO, O))
    hide_later(dS, slice(0, T), 0.0)  # P is 0 there, but 0 times an infinite dP would be NaN
    dS = scores.cast(dS, "dS")
    dq = scores.matmul(dS, scores.cast(k, "k"))
    dk = scores.matmul(dS.swapaxes(-1, -2), scores.cast(q, "q"))
    dq *= 1 / math.sqrt(D)
    dk *= 1 / math.sqrt(D)

    return merge_qkv(scores.round_grad(dq, "q", fmt), scores.round_grad(dk, "k", fmt), values.round_grad(dv, "v", fmt), p)
