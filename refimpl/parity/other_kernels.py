"""Fused attention as another correct kernel may compute it: the source of the judge's bound of fused attention.

Correct kernels have one formula and round the same tensors, E = exp(S - max) and, backward, P and dS. Yet some of their
results differ from ours by more than the order of sums explains:

1. Their exp is faster and less accurate. The error of PyTorch's on the CPU, for results in 16 bits, is 5e-5 in the mean and at
   most 1.2e-4; that of GPUs (exp2) is 2^-22. An E or P that is this close to a tie is rounded to the other neighbor.
2. They take the keys in blocks and subtract the largest score *so far*. E is then rounded at another distance from a power
   of two, so that all roundings of E differ, each as large as ours.
3. They take the queries in blocks, and PyTorch's kernel for the CPU adds up dk and dv in 16 bits, one rounding per 32 queries.

This kernel does all three: it multiplies E and P by a factor before they are rounded (and the sum of E too, so that only the
roundings change), and sums dk and dv as in 3. Its distance from ours is that of two correct kernels.

Roundings that are not in the list are no part of it. In BF16, whose spacing is much wider than the errors of 1, they are found:
P rounded instead of E is twice the bound where all keys are one block. In FP16 that is as small as 1 and is not found; a
rounding of S is, in both, once scores are as large as in a trained model.
"""

from __future__ import annotations

import math
from typing import Any

from refimpl.nn.attention import hide_later, merge_heads, split_heads
from refimpl.nn.fused_attention import scores_of
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision

EXP_ERROR = 6e-5
"""A constant relative error of E that changes as many roundings as the least accurate exp of these kernels does.

That is PyTorch 2.13's for 16 bits on the CPU, whose mean absolute error, 4.7e-5, was measured from its log(1 + 31 exp(-x))."""

KEYS = 64
"""Keys in the smallest block of the kernels (FlashAttention-2; PyTorch's on the CPU has 512). Up to this many keys, the maximum
that is subtracted is that of the whole row."""

QUERIES = 32
"""Queries per block of PyTorch's CPU kernel for fewer than 192 queries: the case with the most roundings of dk and dv."""


def forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
    """Compute `fused_attention` with other roundings of E."""
    q, k, v = split_heads(qkv, n_head)
    S, values = scores_of(q, k, p), p["values"]
    top = S.max(-1, keepdims=True)
    E = p.xp.exp(S - top)
    total = E.sum(-1, keepdims=True)
    factor = 1 + EXP_ERROR if S.shape[-1] <= KEYS else math.sqrt(2)  # a power of two would move no rounding
    z = values.matmul(values.cast(E * factor, "P"), values.cast(v, "v"))
    O = values.round(z / (factor * total), "O", E, qkv)  # noqa: E741
    O = merge_heads(O)  # noqa: E741
    return O, (qkv, O, top + p.xp.log(total))


def backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array]:
    """Compute the gradients of `fused_attention` with P slightly larger, and dk and dv rounded after each block of queries."""
    qkv, O, lse = saved  # noqa: E741
    fmt, (q, k, v) = format_of(qkv), split_heads(qkv, n_head)
    scores, values = p["scores"], p["values"]
    B, H, T, D = q.shape
    dO, O = (values.widen(x.reshape(B, T, H, D).transpose(0, 2, 1, 3)) for x in (dO, O))  # noqa: E741
    P = p.xp.exp(scores_of(q, k, p) - lse) * (1 + EXP_ERROR)
    dS = P * (values.matmul(dO, values.cast(v, "v").swapaxes(-1, -2)) - (dO * O).sum(-1, keepdims=True))
    dS, P = scores.cast(hide_later(dS, p, 0.0), "dS"), values.cast(P, "P")
    dq = scores.round_grad(scores.matmul(dS, scores.cast(k, "k")) / math.sqrt(D), "q", fmt)
    dk, dv = p.xp.zeros_like(k), p.xp.zeros_like(v)
    for start in range(0, T, QUERIES):
        rows = (..., slice(start, start + QUERIES), slice(None))
        dk_part = scores.matmul(dS[rows].swapaxes(-1, -2), scores.cast(q[rows], "q")) / math.sqrt(D)
        dv_part = values.matmul(P[rows].swapaxes(-1, -2), dO[rows])
        dk = scores.round_grad(scores.widen(dk) + dk_part, "k", fmt)
        dv = values.round_grad(values.widen(dv) + dv_part, "v", fmt)
    dqkv = p.xp.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4)  # (3, B, H, T, D) -> (B, T, 3, H, D)
    return (dqkv.reshape(qkv.shape),)


other_kernel = Op("attention", forward, backward)
