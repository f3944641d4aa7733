"""Fast versions of Llama's operations for a GPU, as `ops.py` has those of GPT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.backends.cupy.dispatch import (
    COLUMN,
    ROW,
    ROWS,
    Fused,
    becomes,
    by_warps,
    columns,
    elementwise,
    in_order,
    keeps,
    launcher,
    merge_heads,
    one_format,
    split_heads,
)
from refimpl.backends.cupy.launch import elementwise_grid, number
from refimpl.nn.grouped_attention import sum_of_group
from refimpl.nn.norm import EPS
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def silu_forward(x: Array, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return y = x / (1 + exp(-x))."""
    xc = p.cast(x, "x")
    fmt = one_format(p, xc)
    if fmt is None or format_of(x) != fmt or p.result_format(fmt) != fmt:
        return None
    return elementwise(p, "silu_forward", fmt, xc), Fused((xc,))


def silu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx."""
    (x,) = saved
    return (elementwise(p, "silu_backward", format_of(x), dy, x),)


def swiglu_forward(gate: Array, up: Array, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return y = R(R(silu(gate)) up)."""
    gc, uc = p.cast(gate, "gate"), p.cast(up, "up")
    fmt = one_format(p, gc, uc)
    if fmt is None or {format_of(gate), format_of(up)} != {fmt} or p.result_format(fmt) != fmt:
        return None
    return elementwise(p, "swiglu_forward", fmt, gc, uc), Fused((in_order(p, gc), in_order(p, uc)))


def swiglu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, Array]:
    """Return the gradients of gate and up, both of one kernel."""
    gate, up = saved
    fmt, dgate, dup = format_of(gate), p.empty(gate.shape, format_of(gate)), p.empty(gate.shape, format_of(gate))
    grid = elementwise_grid(gate.size)
    launcher(p, fmt).swiglu_backward(grid, ROW, in_order(p, dy), gate, up, dgate, dup, np.int64(gate.size))
    return dgate, dup


def rope_forward(x: Array, cos: Array, sin: Array, p: OpPrecision) -> tuple[Array, Any] | None:
    """Return x with its pairs rotated. The kernel rounds cos and sin to the format of x, which the row must do too."""
    xc, fmt = p.cast(x, "x"), format_of(x)
    known = one_format(p, x, xc) is not None and format_of(cos) == format_of(sin) == "fp32"
    if not (known and becomes(p, "cos", fmt) and becomes(p, "sin", fmt) and p.result_format(fmt, "fp32") == fmt):
        return None
    return rotated(xc, cos, sin, 1.0, p), Fused((cos, sin))


def rope_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, None, None]:
    """Return dx, the rotation of dy by the opposite angle."""
    cos, sin = saved
    return rotated(dy, cos, sin, -1.0, p), None, None


def rotated(x: Array, cos: Array, sin: Array, sign: float, p: OpPrecision) -> Array:
    """Return x (..., T, H D) rotated by the angles of cos and sin (T, D/2) times `sign`."""
    fmt, (T, half), y = format_of(x), cos.shape, p.empty(x.shape, format_of(x))
    sizes = np.int32(T), np.int32(x.shape[-1] // (2 * half)), np.int32(half)
    grid = (x.size // x.shape[-1],)
    launcher(p, fmt).rope(grid, ROW, in_order(p, x), in_order(p, cos), in_order(p, sin), y, *sizes, number(sign))
    return y


def llama_rmsnorm_forward(x: Array, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any] | None:
    """Return y, rounded before the weight and after it, and computed with rrms in one kernel."""
    xc, wc = p.cast(x, "x"), p.cast(w, "w")
    fmt = one_format(p, xc, wc)
    if fmt is None or {format_of(x), format_of(w)} != {fmt} or p.result_format(fmt) != fmt:
        return None
    xc, C = in_order(p, xc), len(w)
    y, rrms = p.empty(x.shape, fmt), p.empty((x.size // C, 1), "fp32")
    sizes = np.int32(rrms.size), np.int32(C)
    launcher(p, fmt).llama_rmsnorm_forward(by_warps(rrms.size), ROWS, xc, wc, y, rrms, *sizes, number(eps))
    return y, Fused((xc, rrms))


def llama_rmsnorm_backward(dy: Array, saved: Any, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Array]:
    """Return dx, computed by rows, and dw, computed by columns in a second kernel."""
    x, rrms = saved
    fmt, C, dy = format_of(x), len(w), in_order(p, dy)
    dx, dw = p.empty(x.shape, fmt), p.empty(w.shape, fmt)
    kernels, sizes = launcher(p, fmt), (np.int32(rrms.size), np.int32(C))
    kernels.llama_rmsnorm_backward(by_warps(rrms.size), ROWS, dy, x, w, rrms, dx, *sizes)
    kernels.llama_rmsnorm_weights_backward(columns(C), COLUMN, dy, x, rrms, dw, *sizes)
    return dx, dw


def same_rounding(p: OpPrecision, q: Array, k: Array, v: Array, fmt: str) -> bool:
    """Return whether the rows of grouped attention round where its kernels do: to `fmt`, but for P, which is FP32."""
    scores, scale, softmax, values = (p[part] for part in ("scores", "scale", "wide_softmax", "values"))
    return (
        softmax.row.acc == values.row.acc == "fp32"
        and scores.result_format(format_of(q), format_of(k)) == fmt
        and keeps(scale, fmt)
        and becomes(softmax, "S", "fp32")
        and softmax.result_format(fmt) == "fp32"
        and becomes(values, "P", fmt)
        and values.result_format("fp32", format_of(v)) == fmt
    )


def grouped_attention_forward(
    q: Array, k: Array, v: Array, p: OpPrecision, n_head: int, n_kv_head: int
) -> tuple[Array, Any] | None:
    """Return O = softmax(mask(q k^T / sqrt(D))) v, with P in FP32. The heads of a group are rows of one product."""
    scores, values = p["scores"], p["values"]
    (B, T, width), cast_q, cast_k, cast_v = q.shape, scores.cast(q, "q"), scores.cast(k, "k"), values.cast(v, "v")
    fmt, D = one_format(scores, cast_q, cast_k, cast_v), width // n_head
    if fmt is None or not same_rounding(p, q, k, v, fmt) or k.shape[1] != T:
        return None
    product, group = p.run.backend.product, n_head // n_kv_head
    (heads,) = split_heads(cast_q, (1, B, n_head, T, D), p)
    q_heads = heads.reshape(B, n_kv_head, group * T, D)
    (k_heads,), (v_heads,) = (split_heads(x, (1, B, n_kv_head, T, D), p) for x in (cast_k, cast_v))
    S = product(q_heads, k_heads.swapaxes(-1, -2), fmt)  # (B, K, G T, T)
    P = p.empty((B, n_kv_head, group * T, T), "fp32")
    grid = (B * n_head, *by_warps(T))
    launcher(p, fmt).wide_causal_softmax_forward(grid, ROWS, S, P, np.int32(T), number(1 / math.sqrt(D)))
    O = product(values.cast(P, "P"), v_heads, fmt)  # noqa: E741
    formats = tuple(map(format_of, (q, k, v)))
    return merge_heads(O.reshape(1, B, n_head, T, D), p), Fused((q_heads, k_heads, v_heads, P, formats))


def grouped_attention_backward(dO: Array, saved: Any, p: OpPrecision, n_head: int, n_kv_head: int) -> tuple[Array, ...]:
    """Return dq, dk and dv: as of `attention` for each query head, and dk and dv summed over each group."""
    q, k, v, P, formats = saved
    (B, K, rows, D), fmt, product = q.shape, format_of(q), p.run.backend.product
    T = k.shape[-2]
    each = (B, K, rows // T, T, -1)  # of query heads
    (dO,) = split_heads(dO, (1, B, n_head, T, D), p)
    dO = dO.reshape(q.shape)
    dv = product(p["values"].cast(P, "P").reshape(each).swapaxes(-1, -2), dO.reshape(each), fmt)
    dS = product(dO, v.swapaxes(-1, -2), fmt)  # dP, which becomes dS
    grid = (B * n_head, *by_warps(T))
    launcher(p, fmt).wide_causal_softmax_backward(grid, ROWS, P, dS, dS, np.int32(T), number(1 / math.sqrt(D)))
    dq = product(dS, k, fmt)
    dk = product(dS.reshape(each).swapaxes(-1, -2), q.reshape(each), fmt)
    joined = [dq.reshape(1, B, n_head, T, D)]
    for d, stored, site in ((dk, formats[1], "dk"), (dv, formats[2], "dv")):
        joined.append(sum_of_group(widen(d, stored), p, site).reshape(1, B, K, T, D))
    dq, dk, dv = (merge_heads(d, p) for d in joined)
    return widen(dq, formats[0]), dk, dv
