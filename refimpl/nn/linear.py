"""Matrix products: linear, whose three products each have a row of the policy, and batched matmul."""

from __future__ import annotations

import math
from typing import Any

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor
from refimpl.precision.context import OpPrecision


def as_rows(x: Array) -> Array:
    """Reshape (..., K) to (M, K), for one large product instead of many small ones."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x w^T + b, rounded once, after the bias is added.

    x (..., K), w (F, K), b (F,) or None -> y (..., F).
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.3. PyTorch: torch.nn.functional.linear.
    """
    y = p["y"]
    xc, wc = y.cast(as_rows(x), "x", axis=1), y.cast(w, "w", axis=1)
    bias = None if b is None else y.widen(y.cast(b, "b"))

    def finish(z: Array) -> Array:
        if bias is not None:
            z += bias
        return y.round(z, "y", x, w)

    result = y.matmul_then(finish, y.result_format(format_of(x), format_of(w)), xc, wc.T)
    # dw = dy^T x reads x again: save the cast copy if linear.dw reads the same format, else x itself. A quantized x cannot be
    # reused, since dw sums over its other axis.
    same = p["dw"].row.input("x") == y.row.input("x") and not isinstance(xc, QuantizedTensor)
    return result.reshape(*x.shape[:-1], len(w)), (xc if same else x, x.shape, format_of(x))


def linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = dy w,  dw = dy^T x,  db = the sum of the rows of dy, each rounded once.

    Each product casts dy and its other operand as its own row says. dx sums over F, dw over the rows.
    """
    x, x_shape, x_format = saved
    dy, x_row, w_row, b_row = as_rows(dy), p["dx"], p["dw"], p["db"]

    def finish_dx(dx: Array) -> Array:
        return x_row.round_grad(dx, "x", x_format, rounded=x_row.row.out)

    def finish_dw(dw: Array) -> Array:
        return w_row.round_grad(dw, "w", format_of(w), rounded=w_row.row.out)

    dy_x, dy_w, dy_b = x_row.cast(dy, "dy", axis=1), w_row.cast(dy, "dy", axis=0), b_row.cast(dy, "dy")
    one = dy_x is dy_w is dy_b and x_row.math == w_row.math == b_row.math  # then dy is widened once for all three
    dy_x = x_row.widen(dy_x)
    dy_w, dy_b = (dy_x, dy_x) if one else (w_row.widen(dy_w), b_row.widen(dy_b))
    dx = x_row.matmul_then(finish_dx, x_format, dy_x, x_row.cast(w, "w", axis=0))
    dw = w_row.matmul_then(finish_dw, format_of(w), dy_w.T, w_row.cast(as_rows(x), "x", axis=0))
    db = None if b is None else b_row.round_grad(dy_b.sum(0), "b", format_of(b), rounded=b_row.row.out)
    return dx.reshape(x_shape), dw, db


def matmul_forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = a b over the last two axes; the leading axes are equal.

    a (..., M, K), b (..., K, N) -> y (..., M, N). PyTorch: torch.matmul without broadcasting.
    """
    ac, bc = p.cast(a, "a"), p.cast(b, "b")
    return p.round(p.matmul(ac, bc), "y", a, b), (ac, bc, format_of(a), format_of(b))


def matmul_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, Array]:
    """Return da = dy b^T,  db = a^T dy."""
    a, b, a_format, b_format = saved
    da = p.matmul(dy, b.swapaxes(-1, -2))
    db = p.matmul(a.swapaxes(-1, -2), dy)
    return p.round_grad(da, "a", a_format), p.round_grad(db, "b", b_format)
