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


def fused_attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, where each position attends to itself and earlier positions.

    qkv (B, T, 3C) -> O (B, T, C). Saved: qkv, O, and log(sum(exp S)) (B, H, T, 1) in `acc`, nothing with T x T elements.
    Source: Dao et al. 2022, arXiv 2205.14135, algorithm 1. Differs from the source: all keys are one block, so E uses the row's
    maximum from the start. A kernel with several blocks uses the largest score so far, and rescales its sums when a larger one
    comes: the same formula, with different roundings of E.
    PyTorch: F.scaled_dot_product_attention(q, k, v, is_causal=True) under SDPBackend.FLASH_ATTENTION.
    """
    q, k, v = split_heads(qkv, n_head)                                  # (B, H, T, D)
    values = p["values"]
    S = scores_of(q, k, p)                                              # (B, H, T, T)
    top = S.max(-1, keepdims=True)
    E = p.xp.exp(S - top)
    total = E.sum(-1, keepdims=True)                                    # (B, H, T, 1)
    z = values.matmul(values.cast(E, "P"), values.cast(v, "v"))         # (B, H, T, D)
    O = merge_heads(values.round(z / total, "O", E, qkv))               # noqa: E741
    return O, (qkv, O, top + p.xp.log(total))


def scores_of(q: Array, k: Array, p: OpPrecision) -> Array:
    """Return q k^T / sqrt(D) in `acc`, -Inf where the key comes after the query."""
    row = p["scores"]
    S = row.matmul(row.cast(q, "q"), row.cast(k, "k").swapaxes(-1, -2))
    return hide_later(S * (1 / math.sqrt(q.shape[-1])), p, -math.inf)


def fused_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array]:
    """Return the gradient of qkv:

        P = exp(S - log(sum(exp S)))      dv = R(P)^T dO     dP = dO v^T     dS = R(P (dP - sum(dO O)))
        dq = dS k / sqrt(D)     dk = dS^T q / sqrt(D)

    sum(dO O) over D equals sum(dP P) over the keys, but for the rounding of the stored O. Each of dq, dk, dv is rounded once.
    Source: Dao et al. 2022, algorithm 4. Differs from PyTorch: its CPU kernel rounds dk and dv after each 32 queries.
    """
    qkv, O, lse = saved  # noqa: E741
    fmt, (q, k, v) = format_of(qkv), split_heads(qkv, n_head)
    scores, values = p["scores"], p["values"]
    B, H, T, D = q.shape
    dO, O = (x.reshape(B, T, H, D).transpose(0, 2, 1, 3) for x in (dO, O))  # noqa: E741  (B, H, T, D)
    P = p.xp.exp(scores_of(q, k, p) - lse)                                   # (B, H, T, T)
    dv = values.matmul(values.cast(P, "P").swapaxes(-1, -2), dO)
    dP = values.matmul(dO, values.cast(v, "v").swapaxes(-1, -2))
    dS = P * (dP - (values.widen(dO) * values.widen(O)).sum(-1, keepdims=True))
    dS = scores.cast(hide_later(dS, p, 0.0), "dS")  # P is 0 there, but 0 times an infinite dP would be NaN
    dq = scores.matmul(dS, scores.cast(k, "k")) * (1 / math.sqrt(D))
    dk = scores.matmul(dS.swapaxes(-1, -2), scores.cast(q, "q")) * (1 / math.sqrt(D))
    return (merge_qkv(scores.round_grad(dq, "q", fmt), scores.round_grad(dk, "k", fmt), values.round_grad(dv, "v", fmt), p),)
