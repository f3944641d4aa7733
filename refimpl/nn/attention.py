"""Causal self-attention, operation by operation, as PyTorch computes it without a fused kernel.

    S = R(q k^T)   S' = R(S / sqrt(D))   P = R(softmax(S'))   O = R(P v)

R is the rounding that the row of each says: `attention.scores`, `.scale`, `.softmax`, `.values`. In recipe fp16 all four round
to FP16, since the next product reads 16-bit operands. Under CUDA autocast P stays in FP32 and is rounded where P v reads it.
With other rows everything is FP32 and rounded once at the end, as PyTorch's SDPBackend.MATH does (`--attention math`). A fused
kernel rounds at other places: `fused_attention.py`; heads that share keys and values are in `grouped_attention.py`.
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


def hide_later(S: Array, p: OpPrecision, fill: float) -> Array:
    """Return S (..., Tq, T) with `fill` where the key, the last axis, comes after the query. The queries are the last Tq of T.

    Values are replaced: adding a large negative number could overflow, and 0 * Inf would be NaN.
    """
    queries, keys = S.shape[-2:]
    position = p.xp.arange(keys)
    return p.xp.where(position <= position[keys - queries :, None], S, p.xp.full((), fill, S.dtype))


def attend(q: Array, k: Array, v: Array, p: OpPrecision, softmax: OpPrecision) -> tuple[Array, Array]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v and P, for heads q, k, v (..., T, D). softmax: the row of the softmax."""
    scores, scale, values = p["scores"], p["scale"], p["values"]
    S = scores.matmul(scores.cast(q, "q"), scores.cast(k, "k").swapaxes(-1, -2))    # (..., T, T)
    S = scores.round(S, "S", q, k)
    S = scale.round(scale.widen(scale.cast(S, "S")) * (1 / math.sqrt(q.shape[-1])), "S", S)
    z = hide_later(softmax.widen(softmax.cast(S, "S")), p, -math.inf)
    P = softmax.round(unrounded_softmax(z, p), "P", S)
    O = values.matmul(values.cast(P, "P"), values.cast(v, "v"))                     # noqa: E741  (..., T, D)
    return values.round(O, "O", P, v), P


def attend_backward(
    dO: Array, q: Array, k: Array, v: Array, P: Array, p: OpPrecision, softmax: OpPrecision
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v, each (..., T, D) in the format of its operand:

        dP = dO v^T     dv = P^T dO     dS' = P (dP - sum(dP P))     dS = dS' / sqrt(D)     dq = dS k     dk = dS^T q
    """
    scores, scale, values = p["scores"], p["scale"], p["values"]
    S_format = scores.result_format(format_of(q), format_of(k))  # of S; that of S' follows from it
    dv = values.matmul(values.cast(P, "P").swapaxes(-1, -2), dO)
    dP = values.round_grad(values.matmul(dO, values.cast(v, "v").swapaxes(-1, -2)), "P", format_of(P))
    dS = softmax_slope(softmax.widen(dP), softmax.widen(P))
    dS = hide_later(dS, p, 0.0)  # P is 0 there, but 0 times an infinite dP would be NaN
    dS = softmax.round_grad(dS, "S", scale.result_format(S_format))
    dS = scale.round_grad(scale.widen(dS) * (1 / math.sqrt(q.shape[-1])), "S", S_format)
    dq = scores.round_grad(scores.matmul(dS, scores.cast(k, "k")), "q", format_of(q))
    dk = scores.round_grad(scores.matmul(dS.swapaxes(-1, -2), scores.cast(q, "q")), "k", format_of(k))
    return dq, dk, values.round_grad(dv, "v", format_of(v))


def attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, where each position attends to itself and earlier positions.

    qkv (B, T, 3C), the output of one linear layer -> O (B, T, C). Saved: qkv and P (B, H, T, T).
    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1. PyTorch: the four operations one after the other.
    """
    O, P = attend(*split_heads(qkv, n_head), p, p["softmax"])  # noqa: E741
    return merge_heads(O), (qkv, P)


def attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array]:
    """Return the gradient of qkv, those of q, k and v side by side."""
    qkv, P = saved
    q, k, v = split_heads(qkv, n_head)
    B, H, T, D = q.shape
    dO = dO.reshape(B, T, H, D).transpose(0, 2, 1, 3)                               # (B, H, T, D)
    return (merge_qkv(*attend_backward(dO, q, k, v, P, p, p["softmax"]), p),)


def merge_qkv(dq: Array, dk: Array, dv: Array, p: OpPrecision) -> Array:
    """Join the gradients of q, k and v, each (B, H, T, D), to that of qkv (B, T, 3C)."""
    B, H, T, D = dq.shape
    dqkv = p.empty((B, T, 3, H, D), format_of(dq))
    for i, d in enumerate((dq, dk, dv)):
        dqkv[:, :, i] = d.transpose(0, 2, 1, 3)
    return dqkv.reshape(B, T, 3 * H * D)
