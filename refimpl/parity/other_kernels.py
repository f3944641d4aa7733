"""Fused attention as another correct kernel may compute it: the source of the judge's bound of fused attention.

Correct kernels have one formula and round the same tensors, E = exp(S - max) and, backward, P and dS. Yet some of their
results differ from ours by more than the order of sums explains:

1. Their exp is faster and less accurate. The error of PyTorch's on the CPU, for results in 16 bits, is 5e-5 in the mean and at
   most 1.2e-4; that of GPUs (exp2) is 2^-22. An E or P that is this close to a tie is rounded to the other neighbor.
2. They take the keys in blocks and subtract the largest score *so far*. E is then rounded at another distance from a power
   of two, so that all roundings of E differ, each as large as ours.
3. They take the queries in blocks, and PyTorch's kernel for the CPU adds up dk and dv in 16 bits, one rounding per 32 queries
   of each query head: where heads share keys, the sum of their group is rounded so too.

This kernel does all three: it multiplies E and P by a factor before they are rounded (and the sum of E too, so that only the
roundings change), and sums dk and dv as in 3. Its distance from ours is that of two correct kernels.

Roundings that are not in the list are no part of it. In BF16, whose spacing is much wider than the errors of 1, they are found:
P rounded instead of E is twice the bound where all keys are one block. In FP16 that is as small as 1 and is not found; a
rounding of S is, in both, once scores are as large as in a trained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from refimpl.nn.attention import hide_later, merge_heads, merge_qkv, split_heads
from refimpl.nn.fused_attention import scores_of
from refimpl.nn.grouped_attention import all_heads, group_heads, ungroup_heads
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


def attend(q: Array, k: Array, v: Array, p: OpPrecision, error: float) -> tuple[Array, Array]:
    """Compute `attend_fused` with other roundings of E: by a relative error of E, 0 for none."""
    S, values = scores_of(q, k, p), p["values"]
    top = S.max(-1, keepdims=True)
    E = p.xp.exp(S - top)
    total = E.sum(-1, keepdims=True)
    factor = math.sqrt(2) if error and S.shape[-1] > KEYS else 1 + error  # a power of two would move no rounding
    z = values.matmul(values.cast(E * factor, "P"), values.cast(v, "v"))
    return values.round(z / (factor * total), "O", E, v), top + p.xp.log(total)


def attend_backward(
    dO: Array, q: Array, k: Array, v: Array, O: Array, lse: Array, p: OpPrecision, error: float  # noqa: E741
) -> tuple[Array, Array, Array]:
    """Compute the gradients of heads by group, q (B, K, G, T, D), k and v (B, K, 1, T, D), with a relative error of P.

    dk and dv of a group are rounded after each block of queries of each query head.
    """
    scores, values, D = p["scores"], p["values"], q.shape[-1]
    dO, O = values.widen(dO), values.widen(O)  # noqa: E741
    P = p.xp.exp(scores_of(q, k, p) - lse) * (1 + error)
    dS = P * (values.matmul(dO, values.cast(v, "v").swapaxes(-1, -2)) - (dO * O).sum(-1, keepdims=True))
    dS, P = scores.cast(hide_later(dS, p, 0.0), "dS"), values.cast(P, "P")
    dq = scores.round_grad(scores.matmul(dS, scores.cast(k, "k")) / math.sqrt(D), "q", format_of(q))
    dk, dv, qc = p.xp.zeros_like(k), p.xp.zeros_like(v), scores.cast(q, "q")
    for head in range(q.shape[2]):
        for start in range(0, q.shape[3], QUERIES):
            rows = (slice(None), slice(None), slice(head, head + 1), slice(start, start + QUERIES))
            dk_part = scores.matmul(dS[rows].swapaxes(-1, -2), qc[rows]) / math.sqrt(D)
            dv_part = values.matmul(P[rows].swapaxes(-1, -2), dO[rows])
            dk = scores.round_grad(scores.widen(dk) + dk_part, "k", format_of(k))
            dv = values.round_grad(values.widen(dv) + dv_part, "v", format_of(v))
    return dq, dk, dv


def forward(qkv: Array, p: OpPrecision, n_head: int, error: float) -> tuple[Array, Any]:
    """Compute `fused_attention` with other roundings of E."""
    O, lse = attend(*split_heads(qkv, n_head), p, error)  # noqa: E741
    O = merge_heads(O)  # noqa: E741
    return O, (qkv, O, lse)


def backward(dO: Array, saved: Any, p: OpPrecision, n_head: int, error: float) -> tuple[Array]:
    """Compute the gradient of qkv: each head is a group by itself."""
    qkv, O, lse = saved  # noqa: E741
    q, k, v = (x[:, :, None] for x in split_heads(qkv, n_head))
    dO, O = (group_heads(x, n_head, n_head) for x in (dO, O))  # noqa: E741
    dq, dk, dv = (d[:, :, 0] for d in attend_backward(dO, q, k, v, O, lse[:, :, None], p, error))
    return (merge_qkv(dq, dk, dv, p),)


def grouped_forward(
    q: Array, k: Array, v: Array, p: OpPrecision, n_head: int, n_kv_head: int, error: float
) -> tuple[Array, Any]:
    """Compute `fused_grouped_attention` with other roundings of E."""
    O, lse = attend(*all_heads(q, k, v, n_head, n_kv_head), p, error)  # noqa: E741
    O = ungroup_heads(O)  # noqa: E741
    return O, (q, k, v, O, lse)


def grouped_backward(
    dO: Array, saved: Any, p: OpPrecision, n_head: int, n_kv_head: int, error: float
) -> tuple[Array, ...]:
    """Compute the gradients of q, k and v."""
    q, k, v, O, lse = saved  # noqa: E741
    dO, O = (group_heads(x, n_head, n_kv_head) for x in (dO, O))  # noqa: E741
    return tuple(map(ungroup_heads, attend_backward(dO, *all_heads(q, k, v, n_head, n_kv_head), O, lse, p, error)))


def attention_kernels(error: float) -> dict[str, Op]:
    """Return the kernels of attention and of grouped attention, for `Run.overrides`. error: of E and P, 0 for none.

    With an error of 0 only the sums of dk and dv are rounded as PyTorch's kernel for the CPU rounds them.
    """

    def made(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Op:
        return Op(name, partial(forward, error=error), partial(backward, error=error), key="attention")

    return {
        "attention": made("attention", forward, backward),
        "grouped_attention": made("grouped_attention", grouped_forward, grouped_backward),
    }


OTHER_KERNELS: Mapping[str, Op] = attention_kernels(EXP_ERROR)
other_kernel = OTHER_KERNELS["attention"]
