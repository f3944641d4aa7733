"""Causal self-attention, written out: it rounds where autocast rounds when no fused kernel runs.

    S = R(q k^T)   S' = R(S / sqrt(D))   P = R(softmax(S'))   O = R(P v)

Each of the four has its own row: `attention.scores`, `.scale`, `.softmax`, `.values`. 'All FP32 and one rounding at the
end', which is what PyTorch's SDPBackend.MATH does, is four other rows and no other code.
"""

from __future__ import annotations

import math
from typing import Any

from refimpl.formats import format_of
from refimpl.ops.norm import softmax, softmax_slope
from refimpl.ops.op import Op
from refimpl.policy import Bound

Array = Any


def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    """(B, T, 3C) -> q, k, v, each a view (B, H, T, D) with D = C/H."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, n_head, C3 // 3 // n_head).transpose(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(x: Array) -> Array:
    """(B, H, T, D) -> (B, T, C)."""
    B, H, T, D = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)


def causal_mask(T: int, p: Bound) -> Array:
    """(T, T): True where position i may look at position j, j <= i."""
    position = p.xp.arange(T)
    return position[:, None] >= position[None, :]


def attention_forward(qkv: Array, p: Bound, n_head: int) -> tuple[Array, Any]:
    """O = softmax(mask(q k^T / sqrt(D))) v, each position looking at itself and those before.

    qkv (B, T, 3C), as one linear layer makes it -> O (B, T, C). Saved: qkv and P (B, H, T, T).
    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1. PyTorch: the four operations one after the other.
    """
    B, T, _ = qkv.shape
    O, P = p.by_example(lambda part: _attend(part, p, n_head), B * n_head * T * T, qkv)  # noqa: E741
    return O, (qkv, P)


def _attend(qkv: Array, p: Bound, n_head: int) -> tuple[Array, Array]:
    """O and P, step by step."""
    q, k, v = split_heads(qkv, n_head)
    row = p["scores"]
    S = row.out(row.gemm(row.cast(q, "q"), row.cast(k, "k").swapaxes(-1, -2)), "S", q, k)
    row = p["scale"]
    S = row.out(row.wide(row.cast(S, "S")) * (1 / math.sqrt(q.shape[-1])), "S", S)
    row = p["softmax"]
    # The mask is a choice between values, not an addition of a large negative number, which could overflow.
    z = p.xp.where(causal_mask(qkv.shape[1], p), row.wide(row.cast(S, "S")), -math.inf)
    P = row.out(softmax(z, p), "P", S)
    row = p["values"]
    O = row.out(row.gemm(row.cast(P, "P"), row.cast(v, "v")), "O", P, v)  # noqa: E741
    return merge_heads(O), P


def attention_backward(dO: Array, saved: Any, p: Bound, n_head: int) -> tuple[Array]:
    """dP = dO v^T,  dv = P^T dO,  dS' = P (dP - sum(dP P)),  dS = dS' / sqrt(D),  dq = dS k,  dk = dS^T q."""
    qkv, P = saved
    (dqkv,) = p.by_example(lambda dO, qkv, P: (_attend_backward(dO, qkv, P, p, n_head),), P.size, dO, qkv, P)
    return (dqkv,)


def _attend_backward(dO: Array, qkv: Array, P: Array, p: Bound, n_head: int) -> Array:
    """The gradient of qkv, step by step."""
    q, k, v = split_heads(qkv, n_head)
    B, H, T, D = q.shape
    dO = dO.reshape(B, T, H, D).transpose(0, 2, 1, 3)
    unscaled_format = p["scores"].out_format(format_of(qkv))
    S_format = p["scale"].out_format(unscaled_format)

    row = p["values"]
    dP = row.grad(row.gemm(dO, row.cast(v, "v").swapaxes(-1, -2)), "P", format_of(P))
    dv = row.grad(row.gemm(row.cast(P, "P").swapaxes(-1, -2), dO), "v", format_of(qkv))

    row = p["softmax"]
    dS = softmax_slope(row.wide(dP), row.wide(P))
    # P is 0 where masked, but 0 times an infinite dP would be NaN.
    dS = row.grad(p.xp.where(causal_mask(T, p), dS, p.xp.zeros_like(dS)), "S", S_format)
    row = p["scale"]
    dS = row.grad(row.wide(dS) * (1 / math.sqrt(D)), "S", unscaled_format)

    row = p["scores"]
    dq = row.grad(row.gemm(dS, row.cast(k, "k")), "q", format_of(qkv))
    dk = row.grad(row.gemm(dS.swapaxes(-1, -2), row.cast(q, "q")), "k", format_of(qkv))

    dqkv = p.empty((B, T, 3, H, D), format_of(qkv))
    for i, d in enumerate((dq, dk, dv)):
        dqkv[:, :, i] = d.transpose(0, 2, 1, 3)
    return dqkv.reshape(qkv.shape)


attention = Op("attention", attention_forward, attention_backward)
