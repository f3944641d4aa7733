"""Fast versions of operations for a GPU: each pass over memory is one kernel of `kernels/kernels.cu`, each product one GEMM.

They round at the same places as the definitions of the same names in `nn/`, but sum in another order. All tensors of a kernel
have one storage format. Where an operation's row asks for something else, its definition runs instead, which is slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.backends.cupy.dispatch import (
    COLUMN,
    ROW,
    ROWS,
    Fused,
    by_warps,
    columns,
    elementwise,
    in_order,
    keeps,
    launcher,
    merge_heads,
    one_format,
    split_heads,
    with_fallback,
)
from refimpl.backends.cupy.launch import THREADS, number
from refimpl.backends.cupy.llama_ops import (
    grouped_attention_backward,
    grouped_attention_forward,
    llama_rmsnorm_backward,
    llama_rmsnorm_forward,
    rope_backward,
    rope_forward,
    silu_backward,
    silu_forward,
    swiglu_backward,
    swiglu_forward,
)
from refimpl.nn.linear import as_rows
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.nn.norm import EPS
from refimpl.nn.op import Op, no_backward
from refimpl.nn.ops import OPS, fan_in
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision
from refimpl.precision.policy import SAME

# ---------------------------------------------------------------------------------------------------- pointwise


def add_forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return y = a + b, for equal shapes."""
    ac, bc = p.cast(a, "a"), p.cast(b, "b")
    fmt = one_format(p, ac, bc)
    if fmt is None or a.shape != b.shape or p.result_format(format_of(a), format_of(b)) != fmt:
        return None
    return elementwise(p, "add_forward", fmt, ac, bc), (format_of(a), b.shape, format_of(b))


def fan_in_forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return the sum of two gradients."""
    fmt = one_format(p, a, b)
    if fmt is None or p.result_format(fmt) != fmt:
        return None
    return elementwise(p, "add_forward", fmt, a, b), None


def gelu_tanh_forward(x: Array, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return y = x/2 (1 + tanh(...))."""
    xc = p.cast(x, "x")
    fmt = one_format(p, xc)
    if fmt is None or format_of(x) != fmt or p.result_format(fmt) != fmt:
        return None
    return elementwise(p, "gelu_tanh_forward", fmt, xc), Fused((xc,))


def gelu_tanh_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx."""
    (x,) = saved
    return (elementwise(p, "gelu_tanh_backward", format_of(x), dy, x),)


# ---------------------------------------------------------------------------------------------------- norms


def layernorm_forward(x: Array, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any] | None:
    """Return y, computed with mean and rstd in one kernel."""
    xc, wc, bc = p.cast(x, "x"), p.cast(w, "w"), None if b is None else p.cast(b, "b")
    fmt = one_format(p, xc, wc, bc)
    stored = {format_of(array) for array in (x, w, b) if array is not None}
    if fmt is None or p.result_format(format_of(x)) != fmt or stored != {fmt}:
        return None
    xc, C = in_order(p, xc), x.shape[-1]
    y, mean, rstd = p.empty(x.shape, fmt), p.empty((*x.shape[:-1], 1), "fp32"), p.empty((*x.shape[:-1], 1), "fp32")
    sizes = np.int32(mean.size), np.int32(C)
    launcher(p, fmt).layernorm_forward(by_warps(mean.size), ROWS, xc, wc, bc, y, mean, rstd, *sizes, number(eps))
    return y, Fused((xc, mean, rstd))


def layernorm_backward(
    dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS
) -> tuple[Array | None, ...]:
    """Return dx, computed by rows, and dw and db, computed by columns in a second kernel."""
    x, mean, rstd = saved
    fmt, rows, C, dy = format_of(x), mean.size, x.shape[-1], in_order(p, dy)
    dx, dw, db = p.empty(x.shape, fmt), p.empty(w.shape, fmt), None if b is None else p.empty(w.shape, fmt)
    kernels, sizes = launcher(p, fmt), (np.int32(rows), np.int32(C))
    kernels.layernorm_backward(by_warps(rows), ROWS, dy, x, w, mean, rstd, dx, *sizes)
    kernels.layernorm_weights_backward(columns(C), COLUMN, dy, x, mean, rstd, dw, db, *sizes)
    return dx, dw, db


# ---------------------------------------------------------------------------------------------------- products


def linear_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return y = x w^T + b, rounded once: the GEMM's sums stay in FP32 until the bias is added.

    cuBLAS can add a bias (beta = 1), but on an H200 it rounded first: a quarter of the results were one ulp off.
    """
    row = p["y"]
    xc, wc, bc = row.cast(as_rows(x), "x"), row.cast(w, "w"), None if b is None else row.cast(b, "b")
    fmt = one_format(row, xc, wc, bc)
    if fmt is None or row.result_format(format_of(x), format_of(w)) != fmt or not p["dx"].row == p["dw"].row == row.row:
        return None
    y = p.run.backend.product(xc, wc.T, fmt if bc is None else "fp32")
    if bc is not None:
        y, products = p.empty(y.shape, fmt), y
        launcher(p, fmt).bias_forward((len(y),), ROW, products, in_order(p, bc), y, np.int32(len(w)))
    return y.reshape(*x.shape[:-1], len(w)), Fused((xc, x.shape, format_of(x)))


def linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = dy w,  dw = dy^T x, each one GEMM that rounds,  and db = the sum of the rows of dy."""
    x, x_shape, x_format = saved
    fmt, dy, row, product = format_of(x), in_order(p, as_rows(dy)), p["dx"], p.run.backend.product
    dx = product(dy, row.cast(w, "w"), fmt)
    dw = product(dy.T, x, fmt)
    db = None if b is None else p.empty(b.shape, fmt)
    if db is not None:
        launcher(p, fmt).bias_backward(columns(len(db)), COLUMN, dy, db, np.int32(len(dy)), np.int32(len(db)))
    return widen(dx, x_format).reshape(x_shape), widen(dw, format_of(w)), db if b is None else widen(db, format_of(b))


def attention_forward(qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any] | None:
    """Return O = softmax(mask(q k^T / sqrt(D))) v: two batched GEMMs, and a kernel before, between and after them."""
    fmt = format_of(qkv)
    if not all(keeps(p[part], fmt) for part in ("scores", "scale", "softmax", "values")):
        return None
    (B, T, C3), product = qkv.shape, p.run.backend.product
    D = C3 // 3 // n_head
    heads = split_heads(qkv, (3, B, n_head, T, D), p)
    q, k, v = heads
    P = product(q, k.swapaxes(-1, -2), fmt)  # S, which becomes P
    grid = (B * n_head, *by_warps(T))
    launcher(p, fmt).causal_softmax_forward(grid, ROWS, P, P, np.int32(T), number(1 / math.sqrt(D)))
    return merge_heads(product(P, v, fmt)[None], p), Fused((heads, P))


def attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int) -> tuple[Array]:
    """Return the gradient of qkv: dv = P^T dO,  dP = dO v^T,  dS from P and dP in one kernel,  dq = dS k,  dk = dS^T q."""
    heads, P = saved
    (_, B, H, T, D), fmt, product = heads.shape, format_of(heads), p.run.backend.product
    q, k, v = heads
    (dO,) = split_heads(dO, (1, B, H, T, D), p)
    gradients = p.empty(heads.shape, fmt)
    dq, dk, dv = gradients
    product(P.swapaxes(-1, -2), dO, fmt, out=dv)
    dS = product(dO, v.swapaxes(-1, -2), fmt)  # dP, which becomes dS
    grid = (B * H, *by_warps(T))
    launcher(p, fmt).causal_softmax_backward(grid, ROWS, P, dS, dS, np.int32(T), number(1 / math.sqrt(D)))
    product(dS, k, fmt, out=dq)
    product(dS.swapaxes(-1, -2), q, fmt, out=dk)
    return (merge_heads(gradients, p),)


# ---------------------------------------------------------------------------------------------------- embedding, loss


def embedding_backward(dy: Array, saved: Any, w: Array, p: OpPrecision) -> tuple[None, Array]:
    """Return dw[r] = the sum of dy over all positions of token r, in their order: no atomics, so the same bits each time."""
    (tokens,), fmt = saved, format_of(w)
    dw = p.empty(w.shape, fmt)
    grid = (len(w), -(-w.shape[1] // THREADS))
    launcher(p, fmt).embedding_backward(grid, ROW, tokens, in_order(p, dy), dw, np.int32(tokens.size), np.int32(w.shape[1]))
    return None, dw


def embedding_backward_by_product(dy: Array, tokens: Array, w: Array, p: OpPrecision) -> tuple[None, Array]:
    """Return dw in formats that no kernel has, as a product with ones and zeros: CuPy's `add.at` would add in any order."""
    rows, xp = p.widen(dy).reshape(tokens.size, w.shape[-1]), p.xp
    belongs = xp.where(xp.arange(len(w))[:, None] == tokens.reshape(-1), xp.ones((), rows.dtype), xp.zeros((), rows.dtype))
    return None, p.round_grad(xp.matmul(belongs, rows), "w", format_of(w))


def embedding_forward(tokens: Array, w: Array, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return y[i] = w[tokens[i]]."""
    wc = p.cast(w, "w")
    if one_format(p, w, wc) is None or p.result_format(format_of(w)) != format_of(w) or tokens.dtype != np.int64:
        return None
    return wc[tokens], Fused((in_order(p, tokens),))


def cross_entropy_forward(
    logits: Array, targets: Array, p: OpPrecision, ignore_index: int = IGNORE_INDEX
) -> tuple[Array, Any] | None:
    """Return the mean loss. Logits are read in their own format, and widened one value at a time."""
    fmt, out = one_format(p, logits), p.result_format("fp32")
    if fmt is None or out != "fp32" or p.inputs["logits"] not in ("fp32", SAME) or targets.dtype != np.int64:
        return None
    if targets.shape != logits.shape[:-1]:
        return None  # the definition refuses it; the kernel would read past the last row
    z, target, V = in_order(p, logits.reshape(-1, logits.shape[-1])), in_order(p, targets.reshape(-1)), logits.shape[-1]
    each, largest, log_sum = (p.empty(target.shape, "fp32") for _ in range(3))
    loss, counted = p.empty((), "fp32"), p.empty((), "fp32")
    kernels, ignored = launcher(p, fmt), np.int64(ignore_index)
    kernels.cross_entropy_forward((target.size,), ROW, z, target, each, largest, log_sum, np.int32(V), ignored)
    kernels.cross_entropy_mean((1,), ROW, each, target, loss, counted, np.int32(target.size), ignored)
    return loss, Fused((z, target, largest, log_sum, counted, logits.shape))


def cross_entropy_backward(dloss: Array, saved: Any, p: OpPrecision, ignore_index: int = IGNORE_INDEX) -> tuple[Array, None]:
    """Return dz = (softmax(z) - onehot(target)) dloss / n in the n rows that count, 0 in the others."""
    z, target, largest, log_sum, counted, shape = saved
    dz, fmt, sizes = p.empty(z.shape, format_of(z)), format_of(z), (np.int32(shape[-1]), np.int64(ignore_index))
    launcher(p, fmt).cross_entropy_backward((target.size,), ROW, z, target, largest, log_sum, counted, dloss, dz, *sizes)
    return dz.reshape(shape), None


CUPY_OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        with_fallback(OPS["add"], add_forward, OPS["add"].backward),
        with_fallback(fan_in, fan_in_forward, no_backward),
        with_fallback(OPS["gelu_tanh"], gelu_tanh_forward, gelu_tanh_backward),
        with_fallback(OPS["silu"], silu_forward, silu_backward),
        with_fallback(OPS["swiglu"], swiglu_forward, swiglu_backward),
        with_fallback(OPS["rope"], rope_forward, rope_backward),
        with_fallback(OPS["layernorm"], layernorm_forward, layernorm_backward),
        with_fallback(OPS["llama_rmsnorm"], llama_rmsnorm_forward, llama_rmsnorm_backward),
        with_fallback(OPS["linear"], linear_forward, linear_backward),
        with_fallback(OPS["attention"], attention_forward, attention_backward),
        with_fallback(OPS["grouped_attention"], grouped_attention_forward, grouped_attention_backward),
        with_fallback(replace(OPS["embedding"], backward=embedding_backward_by_product), embedding_forward, embedding_backward),
        with_fallback(OPS["cross_entropy"], cross_entropy_forward, cross_entropy_backward),
    )
}
