"""Rotary position embedding, fast: products with cos and sin of whole rows, in blocks of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.backends.numpy.blocks import by_example
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision

Rounding = Callable[[Array], Array]


def rotate(x: Array, cos: Array, sin: Array, sign: int, p: OpPrecision, roundings: tuple[Rounding, ...]) -> Array:
    """Return x (B, T, N D) rotated by the angles of cos and sin (T, D/2) times `sign`.

    roundings: of the product with cos, of that with sin, and of their sum.
    """
    by_cos, by_sin, last = roundings
    T, half = cos.shape
    n_head = x.shape[-1] // (2 * half)
    c, s = p.widen(p.cast(cos, "cos")), p.widen(p.cast(sin, "sin")) * sign
    # (T, N, 2, D/2): one product of all heads, with the sign that the *other* value of the pair reads it with.
    c = p.xp.tile(c, 2 * n_head).reshape(T, n_head, 2, half)
    s = p.xp.tile(p.xp.concatenate([s, -s], -1), n_head).reshape(c.shape)

    def examples(x: Array) -> tuple[Array]:
        z = p.widen(x)
        y, turned = p.widen(by_cos(z * c)), p.widen(by_sin(z * s))
        y += turned[..., ::-1, :]
        return (last(y),)

    (y,) = by_example(p.run.backend, examples, x.size, x.reshape(-1, *c.shape))
    return y.reshape(x.shape)


def rope_forward(x: Array, cos: Array, sin: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y_i = R(R(a cos) + R(-b sin)),  y_{i + D/2} = R(R(b cos) + R(a sin))."""

    def rounding(site: str) -> Rounding:
        return lambda z: p.round(z, site, x, cos)

    y = rotate(p.cast(x, "x"), cos, sin, 1, p, (rounding("x_cos"), rounding("x_sin"), rounding("y")))
    return y, (cos, sin, format_of(x))


def rope_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, None, None]:
    """Return dx, the rotation of dy by the opposite angle, with every rounding to the format of x."""
    cos, sin, x_format = saved

    def rounding(site: str) -> Rounding:
        return lambda z: p.round_to(z, x_format, site)

    last = lambda z: p.round_grad(z, "x", x_format)  # noqa: E731
    return rotate(dy, cos, sin, -1, p, (rounding("dy_cos"), rounding("dy_sin"), last)), None, None
