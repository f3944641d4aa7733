"""Norms, fast: each term of the formula overwrites one that is not needed any more, in blocks of rows."""

from __future__ import annotations

from typing import Any

from refimpl.backends.numpy.blocks import by_example
from refimpl.backends.numpy.reductions import row_dot, row_sum
from refimpl.nn.norm import EPS
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def layernorm_forward(x: Array, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any]:
    """Return y = (x - mean) rstd w + b."""
    xc = p.cast(x, "x")
    scale, shift = p.widen(p.cast(w, "w")), None if b is None else p.widen(p.cast(b, "b"))

    def rows(xc: Array) -> tuple[Array, ...]:
        """Return y, mean and rstd of some of the rows."""
        z, C = p.widen(xc), xc.shape[-1]
        mean = row_sum(z) / C
        y = z - mean
        rstd = 1 / p.xp.sqrt(row_dot(y, y) / C + eps)
        y *= rstd
        y *= scale
        if shift is not None:
            y += shift
        return p.round(y, "y", x), mean, rstd

    y, mean, rstd = by_example(p.run.backend, rows, x.size, xc)
    return y, (xc, mean, rstd, format_of(x))


def layernorm_backward(
    dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS
) -> tuple[Array | None, ...]:
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


def llama_rmsnorm_forward(x: Array, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any]:
    """Return y = R(w n),  n = R(x rrms)."""
    xc, scale = p.cast(x, "x"), p.widen(p.cast(w, "w"))

    def rows(xc: Array) -> tuple[Array, ...]:
        """Return y and rrms of some of the rows."""
        z = p.widen(xc)
        rrms = 1 / p.xp.sqrt(row_dot(z, z) / z.shape[-1] + eps)
        y = p.widen(p.round(z * rrms, "n", x))
        y *= scale
        return p.round(y, "y", x, w), rrms

    y, rrms = by_example(p.run.backend, rows, x.size, xc.reshape(-1, len(w)))
    return y.reshape(x.shape), (xc, rrms, format_of(x))


def llama_rmsnorm_backward(dy: Array, saved: Any, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Array]:
    """Return dx = rrms (dn - h mean(dn h)),  dn = R(dy w),  dw = sum(R(dy n)), with h = x rrms, and n = R(h) once more."""
    x, rrms, x_format = saved
    n_format, dy_format, scale = p.result_format(x_format), format_of(dy), p.widen(p.cast(w, "w"))

    def rows(dy: Array, x: Array, rrms: Array) -> tuple[Array, ...]:
        """Return dx of some of the rows, and their dy n, whose sum over all rows is dw."""
        dy = p.widen(dy)
        h = p.widen(x) * rrms
        dyn = p.round_to(dy * p.widen(p.round_to(h, n_format, "n")), dy_format, "dy_n")
        dx = p.widen(p.round_to(dy * scale, n_format, "dn"))
        h *= row_dot(dx, h) / h.shape[-1]  # dx is still dn here
        dx -= h
        dx *= rrms
        return p.round_grad(dx, "x", x_format), dyn

    as_rows = (a.reshape(-1, len(w)) for a in (dy, x))
    dx, dyn = by_example(p.run.backend, rows, x.size, *as_rows, rrms)
    return dx.reshape(x.shape), p.round_grad(p.widen(dyn).sum(0), "w", format_of(w))
