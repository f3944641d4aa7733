"""Layer norm, fast: each term of the formula overwrites one that is not needed any more, in blocks of rows."""

from __future__ import annotations

from typing import Any

from refimpl.backends.numpy.blocks import by_example
from refimpl.backends.numpy.reductions import row_dot, row_sum
from refimpl.nn.norm import EPS
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def layernorm_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = (x - mean) rstd w + b."""
    xc = p.cast(x, "x")
    scale, shift = p.widen(p.cast(w, "w")), None if b is None else p.widen(p.cast(b, "b"))

    def rows(xc: Array) -> tuple[Array, ...]:
        """Return y, mean and rstd of some of the rows."""
        z, C = p.widen(xc), xc.shape[-1]
        mean = row_sum(z) / C
        y = z - mean
        rstd = 1 / p.xp.sqrt(row_dot(y, y) / C + EPS)
        y *= rstd
        y *= scale
        if shift is not None:
            y += shift
        return p.round(y, "y", x), mean, rstd

    y, mean, rstd = by_example(p.run.backend, rows, x.size, xc)
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
        mean_dh, mean_dhh = row_sum(dx) / C, row_dot(dx, h) / C  # dx is still dh here
        dx -= mean_dh
        h *= mean_dhh
        dx -= h
        dx *= rstd
        return p.round_grad(dx, "x", x_format), dyh

    dx, dyh = by_example(p.run.backend, rows, x.size, dy, x, mean, rstd)
    axes = tuple(range(dy.ndim - 1))
    dw = p.round_grad(dyh.sum(axes), "w", format_of(w))
    db = None if b is None else p.round_grad(p.widen(dy).sum(axes), "b", format_of(b))
    return dx, dw, db
