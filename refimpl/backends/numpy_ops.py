"""Fast versions of operations for the host, with the same bits as the definitions of the same names in `nn/`.

New arrays for the terms of a formula would cost as much as its arithmetic, so each term overwrites one that is not needed any
more. Rows are shared among threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refimpl.nn.elementwise import BETA, KAPPA
from refimpl.nn.norm import EPS
from refimpl.nn.op import Op
from refimpl.nn.ops import gelu_tanh as gelu_tanh_definition
from refimpl.nn.ops import layernorm as layernorm_definition
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def gelu_tanh_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""

    def formula(z: Array) -> Array:
        t = z * z
        t *= z
        t *= KAPPA
        t += z
        t *= BETA
        p.xp.tanh(t, out=t)
        t += 1
        t *= 0.5 * z
        return t

    xc = p.cast(x, "x")
    return p.map(formula, lambda z: p.round(z, "y", x), xc), (xc, format_of(x))


def gelu_tanh_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy ((1 + t)/2 + x/2 (1 - t^2) s), with t the tanh and s the derivative of its argument."""
    x, x_format = saved

    def formula(d: Array, z: Array) -> Array:
        # `t` is the tanh and becomes the result; `square` is x^2 and becomes x (1 - t^2) s.
        square = z * z
        t = square * z
        t *= KAPPA
        t += z
        t *= BETA
        p.xp.tanh(t, out=t)
        square *= 3 * KAPPA * BETA
        square += BETA
        square *= z
        square *= 1 - t * t
        t += 1
        t += square
        t *= 0.5
        t *= d
        return t

    return (p.map(formula, lambda d: p.round_grad(d, "x", x_format), dy, x),)


def layernorm_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = (x - mean) rstd w + b."""
    xc = p.cast(x, "x")
    scale, shift = p.widen(p.cast(w, "w")), None if b is None else p.widen(p.cast(b, "b"))

    def rows(xc: Array) -> tuple[Array, ...]:
        """Return y, mean and rstd of some of the rows."""
        z, C = p.widen(xc), xc.shape[-1]
        mean = p.row_sum(z) / C
        y = z - mean
        rstd = 1 / p.xp.sqrt(p.row_dot(y, y) / C + EPS)
        y *= rstd
        y *= scale
        if shift is not None:
            y += shift
        return p.round(y, "y", x), mean, rstd

    y, mean, rstd = p.by_example(rows, x.size, xc)
    return y, (xc, mean, rstd, format_of(x))


def layernorm_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = rstd (dh - mean(dh) - h mean(dh h)), dw = sum(dy h), db = sum(dy), with h = (x - mean) rstd, dh = dy w."""
    x, mean, rstd, x_format = saved
    scale = p.widen(p.cast(w, "w"))

    def rows(dy: Array, x: Array, mean: Array, rstd: Array) -> tuple[Array, ...]:
        """Return dx of some of the rows, and their dy h, whose sum over all rows is dw."""
        dy, C = p.widen(dy), x.shape[-1]
        h = p.widen(x) - mean
        h *= rstd
        dyh, dx = dy * h, dy * scale
        mean_dh, mean_dhh = p.row_sum(dx) / C, p.row_dot(dx, h) / C  # dx is still dh here
        dx -= mean_dh
        h *= mean_dhh
        dx -= h
        dx *= rstd
        return p.round_grad(dx, "x", x_format), dyh

    dx, dyh = p.by_example(rows, x.size, dy, x, mean, rstd)
    axes = tuple(range(dy.ndim - 1))
    dw = p.round_grad(dyh.sum(axes), "w", format_of(w))
    db = None if b is None else p.round_grad(p.widen(dy).sum(axes), "b", format_of(b))
    return dx, dw, db


NUMPY_OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op("gelu_tanh", gelu_tanh_forward, gelu_tanh_backward, gelu_tanh_definition.params),
        Op("layernorm", layernorm_forward, layernorm_backward, layernorm_definition.params),
    )
}
