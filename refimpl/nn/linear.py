"""Matrix products: linear, whose three products each have a row of the policy, and batched matmul.

`quantized_linear.py` has the linear layer whose products read quantized operands, or sum in fewer bits than FP32.
"""

from __future__ import annotations

import math
from typing import Any

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def as_rows(x: Array) -> Array:
    """Reshape (..., K) to (M, K), for one large product instead of many small ones."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x w^T + b, rounded once, after the bias is added.

    x (..., K), w (F, K), b (F,) or None -> y (..., F).
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.3. PyTorch: torch.nn.functional.linear.
    """
    y_p = p["y"]
    xc, wc = y_p.cast(as_rows(x), "x"), y_p.cast(w, "w")  # autocast rounds x here; w is in 16 bits already (`Tape._parameter`)
    z = y_p.matmul(xc, wc.T)                              # (M, F), sums in FP32
    if b is not None:
        z += y_p.widen(y_p.cast(b, "b"))
    y = y_p.round(z, "y", x, w)                           # the one rounding
    same = p["dw"].inputs["x"] == y_p.inputs["x"]         # dw = dy^T x reads the copy, unless its row asks for another format
    return y.reshape(*x.shape[:-1], len(w)), (xc if same else as_rows(x), x.shape, format_of(x))


def linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = dy w,  dw = dy^T x,  db = the sum of the rows of dy, each rounded once.

    Each of the three casts what it reads as its own row says. dx sums over F, dw and db over the M rows.
    """
    x, x_shape, x_format = saved                                        # x (M, K)
    dy, dx_p, dw_p, db_p = as_rows(dy), p["dx"], p["dw"], p["db"]       # dy (M, F)
    dx = dx_p.matmul(dx_p.cast(dy, "dy"), dx_p.cast(w, "w"))            # (M, K)
    dw = dw_p.matmul(dw_p.cast(dy, "dy").T, dw_p.cast(x, "x"))          # (F, K)
    db = None if b is None else db_p.widen(db_p.cast(dy, "dy")).sum(0)  # (F,)
    dx = dx_p.round_grad(dx, "x", x_format).reshape(x_shape)
    dw = dw_p.round_grad(dw, "w", format_of(w))
    return dx, dw, None if b is None else db_p.round_grad(db, "b", format_of(b))


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
