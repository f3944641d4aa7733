"""Causal attention, fast: in blocks of queries, without the keys that they do not see. Fused attention: by examples.

`attend` and its kind replace the functions of that name in `nn/`: they work on heads, which may share keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.backends.numpy.blocks import by_example
from refimpl.backends.numpy.reductions import row_dot, row_sum
from refimpl.nn.attention import merge_heads, merge_qkv, split_heads
from refimpl.nn.grouped_attention import all_heads, group_heads, sum_of_group, ungroup_heads
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision

QUERIES = 64
"""Queries per block. Keys after the last query of a block are hidden from all of them, and are not computed."""


def query_blocks(T: int) -> list[slice]:
    """Return slices of QUERIES positions that cover 0..T."""
    return [slice(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def hide_later(z: Array, fill: float) -> None:
    """Set z to `fill` where a key comes after the query, in place. z (..., queries, keys up to the last query)."""
    queries, keys = z.shape[-2:]
    # Only the last square of z has keys after their query.
    position, square = np.arange(queries), z[..., keys - queries :]
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


# ------------------------------------------------------------------------------------------------- operation by operation


def attend(q: Array, k: Array, v: Array, p: OpPrecision, softmax_p: OpPrecision) -> tuple[Array, Array]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v and P, for heads (..., T, D), block by block.

    Differs from the definition: keys after the last query of a block are left out, so an Inf or NaN in their v does not reach O
      as 0 * Inf = NaN.
    """
    scores, values, v_format = p["scores"], p["values"], format_of(v)
    S_format = scores.result_format(format_of(q), format_of(k))
    k, v = scores.widen(scores.cast(k, "k")), values.widen(values.cast(v, "v"))
    queries, earlier = q.shape[-2], k.shape[-2] - q.shape[-2]  # of a cache the keys are more than the queries
    O = P = None  # noqa: E741
    for rows in query_blocks(queries):
        seen = slice(0, earlier + rows.stop)
        S = scores.round_to(
            scores.matmul(scores.cast(q[..., rows, :], "q"), k[..., seen, :].swapaxes(-1, -2)), S_format, "S"
        )
        P_rows = _probabilities(S, p["scale"], softmax_p, q.shape[-1])
        z = values.matmul(values.cast(P_rows, "P"), v[..., seen, :])
        O_rows = values.round_to(z, values.result_format(format_of(P_rows), v_format), "O")
        if rows == slice(0, queries):
            return O_rows, P_rows
        if O is None or P is None:
            O = p.empty(q.shape, format_of(O_rows))  # noqa: E741
            P = p.empty((*q.shape[:-1], k.shape[-2]), format_of(P_rows))
        O[..., rows, :], P[..., rows, seen], P[..., rows, seen.stop :] = O_rows, P_rows, 0
    return O, P


def _probabilities(S: Array, scale: OpPrecision, softmax_p: OpPrecision, D: int) -> Array:
    """Return P of some queries from their S, which it may overwrite."""
    z = scale.widen(scale.cast(S, "S"))
    z *= 1 / math.sqrt(D)
    S = scale.round(z, "S", S)
    z = softmax_p.widen(softmax_p.cast(S, "S"))
    hide_later(z, -math.inf)
    return softmax_p.round(softmax(z), "P", S)


def attend_backward(
    dO: Array, q: Array, k: Array, v: Array, P: Array, p: OpPrecision, softmax_p: OpPrecision
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v. dk and dv are summed over blocks of queries, from the last to the first, and rounded
    once: the last block sees all keys, so those of the others are added to its own.
    """
    q_format, k_format, v_format = map(format_of, (q, k, v))
    S_format, D = p["scores"].result_format(q_format, k_format), q.shape[-1]
    scores, values = p["scores"], p["values"]
    queries, earlier = q.shape[-2], k.shape[-2] - q.shape[-2]
    dO = values.widen(dO)
    q, k, v = scores.widen(scores.cast(q, "q")), scores.widen(scores.cast(k, "k")), values.widen(values.cast(v, "v"))
    dq = dk = dv = None
    for rows in reversed(query_blocks(queries)):
        seen = slice(0, earlier + rows.stop)
        P_rows = P[..., rows, seen]
        dv_rows = values.matmul(values.cast(P_rows, "P").swapaxes(-1, -2), dO[..., rows, :])
        dP = values.round_grad(values.matmul(dO[..., rows, :], v[..., seen, :].swapaxes(-1, -2)), "P", format_of(P))
        dS = _scores_gradient(dP, P_rows, p["scale"], softmax_p, S_format, D)
        dq_rows = scores.matmul(dS, k[..., seen, :])
        dk_rows = scores.matmul(dS.swapaxes(-1, -2), q[..., rows, :])
        if dq is None or dk is None or dv is None:
            dq, dk, dv = dq_rows if rows.start == 0 else np.empty(q.shape, dq_rows.dtype), dk_rows, dv_rows
        else:
            dk[..., seen, :] += dk_rows
            dv[..., seen, :] += dv_rows
        dq[..., rows, :] = dq_rows
    return scores.round_grad(dq, "q", q_format), scores.round_grad(dk, "k", k_format), values.round_grad(dv, "v", v_format)


def _scores_gradient(dP: Array, P: Array, scale: OpPrecision, softmax_p: OpPrecision, S_format: str, D: int) -> Array:
    """Return dS of a block of queries. dP, P (..., queries, keys)."""
    dS = softmax_slope(softmax_p.widen(dP), softmax_p.widen(P))
    hide_later(dS, 0.0)  # P is 0 there, but 0 times an infinite dP would be NaN
    dS = softmax_p.round_grad(dS, "S", scale.result_format(S_format))
    z = scale.widen(dS)
    z *= 1 / math.sqrt(D)
    return scale.round_grad(z, "S", S_format)


def attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, some examples at a time."""
    B, T, _ = qkv.shape

    def examples(qkv: Array) -> tuple[Array, Array]:
        O, P = attend(*split_heads(qkv, n_head), p, p["softmax"])  # noqa: E741
        return merge_heads(O), P

    O, P = by_example(p.run.backend, examples, B * n_head * T * T, qkv)  # noqa: E741
    return O, (qkv, P)


def attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array, ...]:
    """Return the gradient of qkv, some examples at a time."""
    qkv, P = saved

    def examples(dO: Array, qkv: Array, P: Array) -> tuple[Array]:
        heads = split_heads(qkv, n_head)
        return (merge_qkv(*attend_backward(_heads(dO, n_head), *heads, P, p, p["softmax"]), p),)

    return by_example(p.run.backend, examples, P.size, dO, qkv, P)


def _heads(x: Array, n_head: int) -> Array:
    """Split (B, T, C) into heads: a view (B, H, T, D)."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)


def grouped_attention_forward(q: Array, k: Array, v: Array, p: OpPrecision, n_head: int, n_kv_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, some examples at a time."""
    B, queries, _ = q.shape

    def examples(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        O, P = attend(*all_heads(q, k, v, n_head, n_kv_head), p, p["wide_softmax"])  # noqa: E741
        return ungroup_heads(O), P

    O, P = by_example(p.run.backend, examples, B * n_head * queries * k.shape[1], q, k, v)  # noqa: E741
    return O, (q, k, v, P)


def grouped_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int, n_kv_head: int) -> tuple[Array, ...]:
    """Return dq, dk and dv, some examples at a time."""
    q, k, v, P = saved

    def examples(dO: Array, q: Array, k: Array, v: Array, P: Array) -> tuple[Array, ...]:
        heads = all_heads(q, k, v, n_head, n_kv_head)
        gradients = attend_backward(group_heads(dO, n_head, n_kv_head), *heads, P, p, p["wide_softmax"])
        return _ungrouped(*gradients, p)

    return by_example(p.run.backend, examples, P.size, dO, q, k, v, P)


def _ungrouped(dq: Array, dk: Array, dv: Array, p: OpPrecision) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v from those of all heads: dk and dv are summed over each group."""
    return ungroup_heads(dq), ungroup_heads(sum_of_group(dk, p, "dk")), ungroup_heads(sum_of_group(dv, p, "dv"))


# ------------------------------------------------------------------------------------------------------------------ fused


def attend_fused(q: Array, k: Array, v: Array, p: OpPrecision) -> tuple[Array, Array]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v and log(sum(exp S)), for heads (..., T, D)."""
    S, values = _scores_of(q, k, p), p["values"]                        # (..., T, T)
    top = S.max(-1, keepdims=True)
    E = np.exp(S - top)
    total = row_sum(E)                                                  # (..., T, 1)
    z = values.matmul(values.cast(E, "P"), values.cast(v, "v"))         # (..., T, D)
    return values.round(z / total, "O", E, v), top + np.log(total)


def _scores_of(q: Array, k: Array, p: OpPrecision) -> Array:
    """Return q k^T / sqrt(D) in `acc`, -Inf where the key comes after the query."""
    row = p["scores"]
    S = row.matmul(row.cast(q, "q"), row.cast(k, "k").swapaxes(-1, -2))
    S *= 1 / math.sqrt(q.shape[-1])
    hide_later(S, -math.inf)
    return S


def attend_fused_backward(
    dO: Array, q: Array, k: Array, v: Array, O: Array, lse: Array, p: OpPrecision  # noqa: E741
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v."""
    scores, values, scale = p["scores"], p["values"], 1 / math.sqrt(q.shape[-1])
    dO, O = values.widen(dO), values.widen(O)  # noqa: E741
    P = np.exp(_scores_of(q, k, p) - lse)
    dv = values.matmul(values.cast(P, "P").swapaxes(-1, -2), dO)
    dP = values.matmul(dO, values.cast(v, "v").swapaxes(-1, -2))
    dS = P * (dP - row_dot(dO, O))
    hide_later(dS, 0.0)  # P is 0 there, but 0 times an infinite dP would be NaN
    dS = scores.cast(dS, "dS")
    dq = scores.matmul(dS, scores.cast(k, "k"))
    dk = scores.matmul(dS.swapaxes(-1, -2), scores.cast(q, "q"))
    dq *= scale
    dk *= scale
    dq, dk = scores.round_grad(dq, "q", format_of(q)), scores.round_grad(dk, "k", format_of(k))
    return dq, dk, values.round_grad(dv, "v", format_of(v))


def fused_attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O and log(sum(exp S)) for `fused_attention`, some examples at a time."""
    B, T, _ = qkv.shape

    def examples(qkv: Array) -> tuple[Array, Array]:
        O, lse = attend_fused(*split_heads(qkv, n_head), p)  # noqa: E741
        return merge_heads(O), lse

    O, lse = by_example(p.run.backend, examples, B * n_head * T * T, qkv)  # noqa: E741
    return O, (qkv, O, lse)


def fused_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array, ...]:
    """Return the gradient of qkv for `fused_attention`, some examples at a time."""

    def examples(dO: Array, qkv: Array, O: Array, lse: Array) -> tuple[Array]:  # noqa: E741
        dO, O = _heads(dO, n_head), _heads(O, n_head)  # noqa: E741
        return (merge_qkv(*attend_fused_backward(dO, *split_heads(qkv, n_head), O, lse, p), p),)

    return by_example(p.run.backend, examples, dO.shape[0] * n_head * dO.shape[1] ** 2, dO, *saved)


def fused_grouped_attention_forward(
    q: Array, k: Array, v: Array, p: OpPrecision, n_head: int, n_kv_head: int
) -> tuple[Array, Any]:
    """Return O and log(sum(exp S)) for `fused_grouped_attention`, some examples at a time."""
    B, queries, _ = q.shape

    def examples(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        O, lse = attend_fused(*all_heads(q, k, v, n_head, n_kv_head), p)  # noqa: E741
        return ungroup_heads(O), lse

    O, lse = by_example(p.run.backend, examples, B * n_head * queries * k.shape[1], q, k, v)  # noqa: E741
    return O, (q, k, v, O, lse)


def fused_grouped_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int, n_kv_head: int) -> tuple[Array, ...]:
    """Return dq, dk and dv for `fused_grouped_attention`, some examples at a time."""
    size = dO.shape[0] * n_head * dO.shape[1] * saved[1].shape[1]

    def examples(dO: Array, q: Array, k: Array, v: Array, O: Array, lse: Array) -> tuple[Array, ...]:  # noqa: E741
        dO, O = (group_heads(x, n_head, n_kv_head) for x in (dO, O))  # noqa: E741
        heads = all_heads(q, k, v, n_head, n_kv_head)
        return _ungrouped(*attend_fused_backward(dO, *heads, O, lse, p), p)

    return by_example(p.run.backend, examples, size, dO, *saved)
