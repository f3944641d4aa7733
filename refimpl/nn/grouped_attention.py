"""Causal self-attention whose query heads share heads of keys and values, as Llama's: operation by operation, or as one kernel.

K heads of keys and values serve H = K G query heads, G each. Every query head rounds its own dk and dv; the group's sum is
formed in the accumulation format and rounded once more. Softmax has the row `attention.wide_softmax`: these models compute it
in FP32 whatever the format of the rest, and P stays in FP32 until P v reads it. The other rows are those of `attention`.
"""

from __future__ import annotations

from typing import Any

from refimpl.nn.attention import attend, attend_backward
from refimpl.nn.fused_attention import attend_fused, attend_fused_backward
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def group_heads(x: Array, n_head: int, n_kv_head: int) -> Array:
    """Split x (B, T, n_head D) into heads by group: a view (B, K, G, T, D) with K = n_kv_head; G is 1 for keys and values."""
    B, T, C = x.shape
    return x.reshape(B, T, n_kv_head, n_head // n_kv_head, C // n_head).transpose(0, 2, 3, 1, 4)


def all_heads(q: Array, k: Array, v: Array, n_head: int, n_kv_head: int) -> tuple[Array, Array, Array]:
    """Split q (B, T, H D), k and v (B, T, K D) into heads by group: q (B, K, G, T, D), k and v (B, K, 1, T, D)."""
    return group_heads(q, n_head, n_kv_head), group_heads(k, n_kv_head, n_kv_head), group_heads(v, n_kv_head, n_kv_head)


def ungroup_heads(x: Array) -> Array:
    """Join the heads: (B, K, G, T, D) -> (B, T, K G D)."""
    B, K, G, T, D = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G * D)


def sum_of_group(d: Array, p: OpPrecision, site: str) -> Array:
    """Return the sum over the query heads of each group, (B, K, G, T, D) -> (B, K, 1, T, D), rounded to the format of d."""
    return d if d.shape[2] == 1 else p.round_to(p.widen(d).sum(2, keepdims=True), format_of(d), site)


def grouped_attention_forward(q: Array, k: Array, v: Array, p: OpPrecision, n_head: int, n_kv_head: int) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, where each position attends to itself and earlier positions.

    q (B, T, H D), k and v (B, T, K D) with H = n_head, K = n_kv_head -> O (B, T, H D). Saved: q, k, v and P (B, K, G, T, T).
    Source: Ainslie et al. 2023, arXiv 2305.13245.
    PyTorch: `eager_attention_forward` of transformers' Llama, which repeats keys and values for each query head.
    """
    O, P = attend(*all_heads(q, k, v, n_head, n_kv_head), p, p["wide_softmax"])  # noqa: E741
    return ungroup_heads(O), (q, k, v, P)


def grouped_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int, n_kv_head: int) -> tuple[Array, ...]:
    """Return dq, dk and dv: those of `attention` for each query head, and dk and dv summed over each group."""
    q, k, v, P = saved
    heads, dO = all_heads(q, k, v, n_head, n_kv_head), group_heads(dO, n_head, n_kv_head)
    dq, dk, dv = attend_backward(dO, *heads, P, p, p["wide_softmax"])
    return ungroup_heads(dq), ungroup_heads(sum_of_group(dk, p, "dk")), ungroup_heads(sum_of_group(dv, p, "dv"))


def fused_grouped_attention_forward(
    q: Array, k: Array, v: Array, p: OpPrecision, n_head: int, n_kv_head: int
) -> tuple[Array, Any]:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, rounded as `fused_attention` does.

    Saved: q, k, v, O, and log(sum(exp S)) (B, K, G, T, 1), nothing with T x T elements.
    PyTorch: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) under SDPBackend.FLASH_ATTENTION.
    """
    O, lse = attend_fused(*all_heads(q, k, v, n_head, n_kv_head), p)  # noqa: E741
    O = ungroup_heads(O)  # noqa: E741
    return O, (q, k, v, O, lse)


def fused_grouped_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int, n_kv_head: int) -> tuple[Array, ...]:
    """Return dq, dk and dv: those of `fused_attention` for each query head, and dk and dv summed over each group.

    PyTorch: FlashAttention-2 for GPUs sums the group in this way. Differs from PyTorch's CPU kernel, which adds dk and dv in 16
    bits, and rounds after each 32 queries and each head.
    """
    q, k, v, O, lse = saved  # noqa: E741
    dO, O = (group_heads(x, n_head, n_kv_head) for x in (dO, O))  # noqa: E741
    dq, dk, dv = attend_fused_backward(dO, *all_heads(q, k, v, n_head, n_kv_head), O, lse, p)
    return ungroup_heads(dq), ungroup_heads(sum_of_group(dk, p, "dk")), ungroup_heads(sum_of_group(dv, p, "dv"))
