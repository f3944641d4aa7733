"""Elementwise operations, fast: in blocks, where each term of a formula overwrites one that is not needed any more.

New arrays for the terms would cost as much as the arithmetic.
"""

from __future__ import annotations

from typing import Any

from refimpl.backends.numpy.blocks import by_example, elementwise
from refimpl.nn.elementwise import BETA, KAPPA
from refimpl.nn.elementwise import add_forward as add_definition
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def add_forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = a + b; in blocks where the shapes are equal."""
    if a.shape != b.shape:
        return add_definition(a, b, p)
    y = elementwise(p.run.backend, lambda ac, bc: p.round(p.widen(ac) + p.widen(bc), "y", a, b), p.cast(a, "a"), p.cast(b, "b"))
    return y, (format_of(a), b.shape, format_of(b))


def fan_in_forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return a + b, two gradients of one tensor."""
    return elementwise(p.run.backend, lambda a, b: p.round(p.widen(a) + p.widen(b), "sum", a, b), a, b), None


def relu_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = max(x, 0)."""
    y = elementwise(p.run.backend, lambda xc: p.round(p.xp.maximum(p.widen(xc), 0), "y", x), p.cast(x, "x"))
    return y, (y, format_of(x))


def relu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy where y > 0 or y is NaN, else 0."""
    y, x_format = saved

    def rounded(dy: Array, y: Array) -> Array:
        return p.round_grad(p.xp.where(p.widen(y) <= 0, 0, p.widen(dy)), "x", x_format)

    return (elementwise(p.run.backend, rounded, dy, y),)


def one_plus_exp(z: Array, p: OpPrecision) -> Array:
    """Return 1 + exp(-z), the inverse of the sigmoid."""
    e = p.xp.exp(-z)
    e += 1
    return e


def silu_slope(z: Array, sigmoid: Array) -> Array:
    """Return 1 + z (1 - sigmoid), which the sigmoid is multiplied by in the derivative of silu."""
    t = 1 - sigmoid
    t *= z
    t += 1
    return t


def silu_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x / (1 + exp(-x))."""

    def rounded(xc: Array) -> Array:
        z = p.widen(xc)
        y = one_plus_exp(z, p)
        return p.round(p.xp.divide(z, y, out=y), "y", x)

    xc = p.cast(x, "x")
    return elementwise(p.run.backend, rounded, xc), (xc, format_of(x))


def silu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy s (1 + x (1 - s)),  s = sigmoid(x)."""
    x, x_format = saved

    def rounded(dy: Array, x: Array) -> Array:
        z = p.widen(x)
        s = 1 / one_plus_exp(z, p)
        dx = p.widen(dy) * s
        dx *= silu_slope(z, s)
        return p.round_grad(dx, "x", x_format)

    return (elementwise(p.run.backend, rounded, dy, x),)


def swiglu_forward(gate: Array, up: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = R(R(silu(gate)) up)."""

    def rounded(gc: Array, uc: Array) -> Array:
        g = p.widen(gc)
        s = one_plus_exp(g, p)
        y = p.widen(p.round(p.xp.divide(g, s, out=s), "silu", gate))
        y *= p.widen(uc)
        return p.round(y, "y", gate, up)

    gc, uc = p.cast(gate, "gate"), p.cast(up, "up")
    return elementwise(p.run.backend, rounded, gc, uc), (gc, uc, format_of(gate), format_of(up))


def swiglu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, ...]:
    """Return dup = dy s  and  dgate = R(dy up) sigmoid(g) (1 + g (1 - sigmoid(g))), with s = R(silu(gate))."""
    gate, up, gate_format, up_format = saved
    s_format = p.result_format(gate_format)

    def rounded(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        g, dy, e = p.widen(gate), p.widen(dy), one_plus_exp(p.widen(gate), p)
        dup = p.widen(p.round_to(g / e, s_format, "silu"))
        dup *= dy
        dgate = p.widen(p.round_to(dy * p.widen(up), s_format, "ds"))
        sigmoid = p.xp.divide(1, e, out=e)
        dgate *= sigmoid
        dgate *= silu_slope(g, sigmoid)
        return p.round_grad(dgate, "gate", gate_format), p.round_grad(dup, "up", up_format)

    return by_example(p.run.backend, rounded, dy.size, dy, gate, up)


def gelu_tanh_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""

    def rounded(xc: Array) -> Array:
        z = p.widen(xc)
        t = z * z
        t *= z
        t *= KAPPA
        t += z
        t *= BETA
        p.xp.tanh(t, out=t)
        t += 1
        t *= 0.5 * z
        return p.round(t, "y", x)

    xc = p.cast(x, "x")
    return elementwise(p.run.backend, rounded, xc), (xc, format_of(x))


def gelu_tanh_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy ((1 + t)/2 + x/2 (1 - t^2) s), with t the tanh and s the derivative of its argument."""
    x, x_format = saved

    def rounded(dy: Array, x: Array) -> Array:
        z = p.widen(x)
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
        t *= p.widen(dy)
        return p.round_grad(t, "x", x_format)

    return (elementwise(p.run.backend, rounded, dy, x),)
