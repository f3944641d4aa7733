"""Matrix products: linear (three products, each with its own row) and batched matmul."""

from __future__ import annotations

import math
from typing import Any

from refimpl.formats import format_of
from refimpl.ops.op import Op
from refimpl.policy import Bound

Array = Any


def _rows(x: Array) -> Array:
    """(..., K) -> (M, K): one 2-D product instead of many small ones."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_forward(x: Array, w: Array, b: Array | None, p: Bound) -> tuple[Array, Any]:
    """y = x w^T + b, the bias added before the one rounding.

    x (..., K), w (F, K), b (F,) or None -> y (..., F).
    Source: the note, step 2. PyTorch: torch.nn.functional.linear.
    """
    y = p["y"]
    xc, wc = y.cast(_rows(x), "x"), y.cast(w, "w")
    z = y.gemm(xc, wc.T)
    if b is not None:
        z += y.wide(y.cast(b, "b"))
    # dw = dy^T x reads x again. Keep the copy that was cast here, if linear.dw reads the same format; else x as it came.
    same = p["dw"].row.input("x") == y.row.input("x")
    return y.out(z, "y", x, w).reshape(*x.shape[:-1], len(w)), (xc if same else x, x.shape, format_of(x))


def linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: Bound) -> tuple[Array | None, ...]:
    """dx = dy w,  dw = dy^T x,  db = the rows of dy summed (by the row linear.dw); each rounded once."""
    x, x_shape, x_format = saved
    dy = _rows(dy)
    row = p["dx"]
    dx = row.gemm(row.cast(dy, "dy"), row.cast(w, "w"))
    dx = row.grad(dx, "x", x_format, rounded=row.row.out)
    row = p["dw"]
    dyc = row.cast(dy, "dy")
    dw = row.gemm(dyc.T, row.cast(_rows(x), "x"))
    dw = row.grad(dw, "w", format_of(w), rounded=row.row.out)
    db = None if b is None else row.grad(row.wide(dyc).sum(0), "b", format_of(b), rounded=row.row.out)
    return dx.reshape(x_shape), dw, db


def matmul_forward(a: Array, b: Array, p: Bound) -> tuple[Array, Any]:
    """y = a b over the last two axes; the leading axes are equal.

    a (..., M, K), b (..., K, N) -> y (..., M, N). PyTorch: torch.matmul without broadcasting.
    """
    ac, bc = p.cast(a, "a"), p.cast(b, "b")
    return p.out(p.gemm(ac, bc), "y", a, b), (ac, bc, format_of(a), format_of(b))


def matmul_backward(dy: Array, saved: Any, p: Bound) -> tuple[Array, Array]:
    """da = dy b^T,  db = a^T dy."""
    a, b, a_format, b_format = saved
    da = p.gemm(dy, b.swapaxes(-1, -2))
    db = p.gemm(a.swapaxes(-1, -2), dy)
    return p.grad(da, "a", a_format), p.grad(db, "b", b_format)


linear = Op("linear", linear_forward, linear_backward, params=(("weight", "w"), ("bias", "b")))
matmul = Op("matmul", matmul_forward, matmul_backward)
