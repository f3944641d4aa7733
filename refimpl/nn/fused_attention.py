"""Causal self-attention as one kernel computes it (FlashAttention): the scores stay in the accumulation format.

    S = q k^T / sqrt(D)   E = exp(S - max S)   O = R(R(E) v / sum(E))        S, E and the sum in `acc`

It rounds fewer times than `attention`, and at other places: neither S nor P is stored. E is rounded, since the second product
reads 16 bits, and the product is divided by the sum of the unrounded E. Backward computes P again. Rows have the names of
those of `attention`; `precision.policy_variants.with_attention` makes them.
"""

from __future__ import annotations

import math
from typing import Any

from refimpl.nn.attention import hide_later, merge_heads, merge_qkv, split_heads
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def attend_fused(q: Array, k: Array, v: Array, p: OpPrecision) -> tuple[Array, Array]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v and log(sum(exp S)) in `acc`, for heads q, k, v (..., T, D)."""
    values = p["values"]
    S = scores_of(q, k, p)                                              # (..., T, T)
    top = S.max(-1, keepdims=True)
    E = p.xp.exp(S - top)
    total = E.sum(-1, keepdims=True)                                    # (..., T, 1)
    z = values.matmul(values.cast(E, "P"), values.cast(v, "v"))         # (..., T, D)
    return values.round(z / total, "O", E, v), top + p.xp.log(total)


def attend_fused_backward(
    dO: Array, q: Array, k: Array, v: Array, O: Array, lse: Array, p: OpPrecision  # noqa: E741
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v, each (..., T, D) in the format of its operand and rounded once:

        P = exp(S - log(sum(exp S)))      dv = R(P)^T dO     dP = dO v^T     dS = R(P (dP - sum(dO O)))
        dq = dS k / sqrt(D)     dk = dS^T q / sqrt(D)

    sum(dO O) over D equals sum(dP P) over the keys, but for the rounding of the stored O.
    """
    scores, values, D = p["scores"], p["values"], q.shape[-1]
    P = p.xp.exp(scores_of(q, k, p) - lse)                                   # (..., T, T)
    dv = values.matmul(values.cast(P, "P").swapaxes(-1, -2), dO)
    dP = values.matmul(dO, values.cast(v, "v").swapaxes(-1, -2))
    dS = P * (dP - (values.widen(dO) * values.widen(O)).sum(-1, keepdims=True))
    dS = scores.cast(hide_later(dS, p, 0.0), "dS")  # P is 0 there, but 0 times an infinite dP would be NaN
    dq = scores.matmul(dS, scores.cast(k, "k")) * (1 / math.sqrt(D))
    dk = scores.matmul(dS.swapaxes(-1, -2), scores.cast(q, "q")) * (1 / math.sqrt(D))
    dq, dk = scores.round_grad(dq, "q", format_of(q)), scores.round_grad(dk, "k", format_of(k))
    return dq, dk, values.round_grad(dv, "v", format_of(v))


def fused_attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, where each position attends to itself and earlier positions.

    qkv (B, T, 3C) -> O (B, T, C). Saved: qkv, O, and log(sum(exp S)) (B, H, T, 1) in `acc`, nothing with T x T elements.
    Source: Dao et al. 2022, arXiv 2205.14135, algorithm 1. Differs from the source: all keys are one block, so E uses the row's
    maximum from the start. A kernel with several blocks uses the largest score so far, and rescales its sums when a larger one
    comes: the same formula, with different roundings of E.
    PyTorch: F.scaled_dot_product_attention(q, k, v, is_causal=True) under SDPBackend.FLASH_ATTENTION.
    """
    O, lse = attend_fused(*split_heads(qkv, n_head), p)  # noqa: E741
    O = merge_heads(O)  # noqa: E741
    return O, (qkv, O, lse)


def scores_of(q: Array, k: Array, p: OpPrecision) -> Array:
    """Return q k^T / sqrt(D) in `acc`, -Inf where the key comes after the query."""
    row = p["scores"]
    S = row.matmul(row.cast(q, "q"), row.cast(k, "k").swapaxes(-1, -2))
    return hide_later(S * (1 / math.sqrt(q.shape[-1])), p, -math.inf)


def fused_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array]:
    """Return the gradient of qkv, those of q, k and v side by side.

    Source: Dao et al. 2022, algorithm 4. Differs from PyTorch: its CPU kernel rounds dk and dv after each 32 queries.
    """
    qkv, O, lse = saved  # noqa: E741
    q, k, v = split_heads(qkv, n_head)
    B, H, T, D = q.shape
    dO, O = (x.reshape(B, T, H, D).transpose(0, 2, 1, 3) for x in (dO, O))  # noqa: E741  (B, H, T, D)
    return (merge_qkv(*attend_fused_backward(dO, q, k, v, O, lse, p), p),)
