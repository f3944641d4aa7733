"""The linear layer, fast: the thread that computes rows of a product adds the bias and rounds them while they are cached."""

from __future__ import annotations

from typing import Any

from refimpl.nn.linear import as_rows
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def linear_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x w^T + b."""
    row = p["y"]
    xc, wc = row.cast(as_rows(x), "x"), row.cast(w, "w")
    bias = None if b is None else row.widen(row.cast(b, "b"))

    def finish(z: Array) -> Array:
        if bias is not None:
            z += bias
        return row.round(z, "y", x, w)

    fmt = row.result_format(format_of(x), format_of(w))
    same = p["dw"].inputs["x"] == row.inputs["x"]
    y = p.run.backend.matmul_then(xc, wc.T, row.math, finish, fmt)
    return y.reshape(*x.shape[:-1], len(w)), (xc if same else as_rows(x), x.shape, format_of(x))


def linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = dy w,  dw = dy^T x,  db = the sum of the rows of dy."""
    x, x_shape, x_format = saved
    dy, x_row, w_row, b_row = as_rows(dy), p["dx"], p["dw"], p["db"]
    matmul_then = p.run.backend.matmul_then
    dy_x, dy_w, dy_b = x_row.cast(dy, "dy"), w_row.cast(dy, "dy"), b_row.cast(dy, "dy")
    one = dy_x is dy_w is dy_b and x_row.math == w_row.math == b_row.math  # then dy is widened once for all three
    dy_x = x_row.widen(dy_x)
    dy_w, dy_b = (dy_x, dy_x) if one else (w_row.widen(dy_w), b_row.widen(dy_b))
    dx = matmul_then(dy_x, x_row.cast(w, "w"), x_row.math, lambda z: x_row.round_grad(z, "x", x_format), x_format)
    w_format = format_of(w)
    dw = matmul_then(dy_w.T, w_row.cast(x, "x"), w_row.math, lambda z: w_row.round_grad(z, "w", w_format), w_format)
    db = None if b is None else b_row.round_grad(dy_b.sum(0), "b", format_of(b))
    return dx.reshape(x_shape), dw, db
