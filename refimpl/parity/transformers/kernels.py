"""Operations as PyTorch's kernels for the CPU compute them, where these round more often than the definitions in `nn/`.

That is a property of these kernels, not of the algorithm: those for GPUs lack it. To judge what PyTorch computes, they stand in
place of the definitions; `PROPERTIES` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refimpl.nn.embedding import embedding_forward
from refimpl.nn.loss import IGNORE_INDEX, cross_entropy_backward, cross_entropy_forward
from refimpl.nn.norm import EPS, layernorm_backward, layernorm_forward
from refimpl.nn.op import Op
from refimpl.nn.ops import cross_entropy, embedding, layernorm
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.parity.other_kernels import attention_kernels
from refimpl.precision.context import OpPrecision
from refimpl.precision.recipes import Recipe

_SUMS = "the CPU kernel adds up dk and dv in 16 bits, rounded after each 32 queries of each query head"
PROPERTIES = {
    "embedding": "the CPU kernel rounds the gradient of a 16-bit table after each row that it adds",
    "layernorm": "the CPU kernel keeps mean and rstd in the 16 bits of x, and rounds dw and db after each row that it adds",
    "cross_entropy": "the sums of exponentials are PyTorch's, in an order of its own: over 49,152 columns they err by 2e-5",
    "attention": _SUMS,
    "grouped_attention": _SUMS,
}
"""By operation: what its kernel does."""


def rounded_sums(rows: Array, into: Array, size: int, fmt: str, p: OpPrecision, site: str) -> Array:
    """Return sums of rows (M, N) into `size` sums (size, N), in order, each rounded to a format after every addition.

    into: (M,), which sum a row belongs to. Only the last rounding of a sum is reported: its others make no result.
    """
    order = np.zeros(len(into), np.int64)  # how many earlier rows belong to the same sum
    for value in np.unique(into):
        here = into == value
        order[here] = np.arange(here.sum())
    sums = p.xp.zeros((size, rows.shape[-1]), rows.dtype)
    for i in range(int(order.max(initial=-1)) + 1):
        now = order == i
        sums[into[now]] = p.widen(p.run.backend.cast(sums[into[now]] + rows[now], fmt))
    return p.round_to(sums, fmt, site)


def embedding_backward(dy: Array, saved: Any, w: Array, p: OpPrecision) -> tuple[None, Array]:
    """Return dw[r], the sum of dy over all positions of token r, rounded after each addition."""
    tokens = saved.reshape(-1)
    rows = p.widen(dy).reshape(tokens.size, w.shape[-1])
    return None, rounded_sums(rows, tokens, len(w), format_of(w), p, "dw")


def layernorm_forward_kept(x: Array, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any]:
    """Return y, and keep mean and rstd in the format of x."""
    y, (xc, mean, rstd, x_format) = layernorm_forward(x, w, b, p, eps)
    fmt = format_of(xc)
    return y, (xc, p.widen(p.round_to(mean, fmt, "mean")), p.widen(p.round_to(rstd, fmt, "rstd")), x_format)


def layernorm_backward_by_rows(
    dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS
) -> tuple[Array | None, ...]:
    """Return dx from the kept mean and rstd, and dw and db rounded after each row, where w has 16 bits."""
    x, mean, rstd, x_format = saved
    fmt = format_of(w)
    if FORMATS[fmt].bits > 16:
        return layernorm_backward(dy, saved, w, b, p, eps)
    dy, h = p.widen(dy), (p.widen(x) - mean) * rstd
    dh = dy * p.widen(w)
    dx = (dh - dh.mean(-1, keepdims=True) - h * (dh * h).mean(-1, keepdims=True)) * rstd
    rows = {"dw": dy * h} if b is None else {"dw": dy * h, "db": dy}
    one = np.zeros(dy.size // len(w), np.int64)
    dw, *db = (rounded_sums(part.reshape(-1, len(w)), one, 1, fmt, p, site).reshape(-1) for site, part in rows.items())
    return p.round_grad(dx, "x", x_format), dw, *(db or [None])


def cross_entropy_with(log_sums: Callable[[Array], Array]) -> Op:
    """Return the loss with other logarithms of the sums of exponentials. log_sums: ours (rows, 1) -> those used."""

    def forward(logits: Array, targets: Array, p: OpPrecision, ignore_index: int = IGNORE_INDEX) -> tuple[Array, Any]:
        _, (kept, largest, own, target, n, *rest) = cross_entropy_forward(logits, targets, p, ignore_index)
        log_sum, counts = log_sums(own), target != ignore_index
        z = p.widen(p.cast(logits, "logits")).reshape(len(target), -1)
        at_target = z[np.arange(len(target)), np.where(counts, target, 0)][:, None]
        loss = p.xp.where(counts[:, None], log_sum - (at_target - largest), 0).sum() / n
        return p.round(loss, "loss", logits), (kept, largest, log_sum, target, n, *rest)

    return Op(cross_entropy.name, forward, cross_entropy_backward)


ROUNDED_BY_ROW: Mapping[str, Op] = {
    "embedding": Op(embedding.name, embedding_forward, embedding_backward, embedding.params),
    "layernorm": Op(layernorm.name, layernorm_forward_kept, layernorm_backward_by_rows, layernorm.params),
}


def kernels_of(recipe: Recipe, fused: bool) -> dict[str, Op]:
    """Return what stands in place of definitions, by operation, for `Run.overrides`. fused: whether attention is a kernel."""
    found: dict[str, Op] = {**ROUNDED_BY_ROW} if FORMATS[recipe.state["weights"]].bits <= 16 else {}
    reads = FORMATS[recipe.policy.row("linear.y").input("x")]
    return {**found, **attention_kernels(0.0)} if fused and reads.bits <= 16 else found
