"""Fused attention as another correct kernel may compute it: what the judge's bound of fused attention is made of.

Correct kernels have one formula and round the same things, E = exp(S - max) and, backward, P and dS, yet a few of their
results differ from ours by more than an order of sums explains:

1. Their exp is a quicker one. PyTorch's on the CPU, for results in 16 bits, errs by 5e-5 in the mean and 1.2e-4 at most; that
   of GPUs (exp2) by 2^-22. An E or a P that lies so near to the middle between two 16-bit numbers is rounded to the other one.
2. They take the keys in blocks, and what they subtract is the largest score *so far*. E is then rounded at another distance
   from a power of two, so that the roundings of E are others altogether, each as large as ours.
3. They take the queries in blocks, and PyTorch's kernel for the CPU adds up dk and dv in 16 bits, a rounding per 32 queries.

This kernel does all three: it multiplies E and P by a factor before they are rounded (and the sum of E too, so that it has no
effect but on the roundings), and sums dk and dv as in 3. Its distance from ours is that of two correct kernels.

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
from refimpl.precision.context import Bound

EXP_ERROR = 6e-5
"""A constant relative error that moves as many roundings as the quickest exp among the kernels does: PyTorch 2.13's for 16 bits
on the CPU, measured from its log(1 + 31 exp(-x)). How many is said by its mean absolute error, 4.7e-5."""

KEYS = 64
"""Keys in the smallest block of the kernels (FlashAttention-2; PyTorch's on the CPU has 512): up to here the maximum is the
row's own."""

QUERIES = 32
"""Queries in a block of PyTorch's CPU kernel where there are less than 192 of them: the most roundings of dk and dv."""


def forward(qkv: Array, p: Bound, n_head: int) -> tuple[Array, Any]:
    """As `fused_attention`, with E rounded in other places."""
    q, k, v = split_heads(qkv, n_head)
    S, values = scores_of(q, k, p), p["values"]
    top = S.max(-1, keepdims=True)
    E = p.xp.exp(S - top)
    total = p["softmax"].row_sum(E)
    factor = 1 + EXP_ERROR if S.shape[-1] <= KEYS else math.sqrt(2)  # a power of two would move no rounding
    z = values.gemm(values.cast(E * factor, "P"), values.cast(v, "v"))
    O = values.round(z / (factor * total), values.out_format(format_of(E), format_of(qkv)), "O")  # noqa: E741
    O = merge_heads(O)  # noqa: E741
    return O, (qkv, O, top + p.xp.log(total))


def backward(dO: Array, saved: Any, p: Bound, n_head: int) -> tuple[Array]:
    """As `fused_attention`, with P a little larger, and dk and dv rounded after each block of queries."""
    qkv, O, lse = saved  # noqa: E741
    fmt, (q, k, v) = format_of(qkv), split_heads(qkv, n_head)
    scores, values = p["scores"], p["values"]
    B, H, T, D = q.shape
    dO, O = (values.wide(x.reshape(B, T, H, D).transpose(0, 2, 1, 3)) for x in (dO, O))  # noqa: E741
    P = p.xp.exp(scores_of(q, k, p) - lse) * (1 + EXP_ERROR)
    dS = P * (values.gemm(dO, values.cast(v, "v").swapaxes(-1, -2)) - values.row_dot(dO, O))
    hide_later(dS, slice(0, T), p, 0.0)
    dS, P = scores.cast(dS, "dS"), values.cast(P, "P")
    dq = scores.grad(scores.gemm(dS, scores.cast(k, "k")) / math.sqrt(D), "q", fmt)
    dk, dv = p.xp.zeros_like(k), p.xp.zeros_like(v)
    for start in range(0, T, QUERIES):
        rows = (..., slice(start, start + QUERIES), slice(None))
        dk_part = scores.gemm(dS[rows].swapaxes(-1, -2), scores.cast(q[rows], "q")) / math.sqrt(D)
        dv_part = values.gemm(P[rows].swapaxes(-1, -2), dO[rows])
        dk = scores.grad(scores.wide(dk) + dk_part, "k", fmt)
        dv = values.grad(values.wide(dv) + dv_part, "v", fmt)
    dqkv = p.xp.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4)  # (3, B, H, T, D) -> (B, T, 3, H, D)
    return (dqkv.reshape(qkv.shape),)


other_kernel = Op("attention", forward, backward)
