"""The linear layer, fast: the thread that computes rows of a product adds the bias and rounds them while they are cached."""

from __future__ import annotations

from typing import Any

from refimpl.nn.linear import as_rows
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def linear_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x w^T + b."""
    y_p = p["y"]
    xc, wc = y_p.cast(as_rows(x), "x"), y_p.cast(w, "w")
    bias = None if b is None else y_p.widen(y_p.cast(b, "b"))

    def finish(z: Array) -> Array:
        if bias is not None:
            z += bias
        return y_p.round(z, "y", x, w)

    fmt = y_p.result_format(format_of(x), format_of(w))
    same = p["dw"].inputs["x"] == y_p.inputs["x"]
    y = p.run.backend.matmul_then(xc, wc.T, y_p.math, finish, fmt)
    return y.reshape(*x.shape[:-1], len(w)), (xc if same else as_rows(x), x.shape, format_of(x))


def linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = dy w,  dw = dy^T x,  db = the sum of the rows of dy."""
    x, x_shape, x_format = saved
    dy, dx_p, dw_p, db_p = as_rows(dy), p["dx"], p["dw"], p["db"]
    matmul_then = p.run.backend.matmul_then
    dy_x, dy_w, dy_b = dx_p.cast(dy, "dy"), dw_p.cast(dy, "dy"), db_p.cast(dy, "dy")
    one = dy_x is dy_w is dy_b and dx_p.math == dw_p.math == db_p.math  # then dy is widened once for all three
    dy_x = dx_p.widen(dy_x)
    dy_w, dy_b = (dy_x, dy_x) if one else (dw_p.widen(dy_w), db_p.widen(dy_b))
    dx = matmul_then(dy_x, dx_p.cast(w, "w"), dx_p.math, lambda z: dx_p.round_grad(z, "x", x_format), x_format)
    w_format = format_of(w)
    dw = matmul_then(dy_w.T, dw_p.cast(x, "x"), dw_p.math, lambda z: dw_p.round_grad(z, "w", w_format), w_format)
    db = None if b is None else db_p.round_grad(dy_b.sum(0), "b", format_of(b))
    return dx.reshape(x_shape), dw, db
