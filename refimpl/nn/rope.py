"""Rotary position embedding (RoPE) of queries and keys, with the two halves of a head as the pairs (Hugging Face's layout).

Meta's own code and GGUF files pair neighbors instead, (2i, 2i + 1): the same, once the rows of the weights are permuted.
"""

from __future__ import annotations

from typing import Any

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def head_halves(x: Array, half: int) -> tuple[Array, Array]:
    """Split each head of x (..., N 2 half) into its halves, two views (..., N, half)."""
    pairs = x.reshape(*x.shape[:-1], -1, 2, half)
    return pairs[..., 0, :], pairs[..., 1, :]


def rope_forward(x: Array, cos: Array, sin: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return x with the pair (a, b) = (x_i, x_{i + D/2}) of each head rotated by the angle of its position and frequency:

        y_i = R(R(a cos) + R(-b sin))        y_{i + D/2} = R(R(b cos) + R(a sin))

    x (B, T, N D), of N heads; cos, sin (T, D/2), which the policy rounds to 16 bits where x has 16 -> y (B, T, N D).
    Saved: cos and sin as they arrived, which all layers share.
    Source: Su et al. 2021, arXiv 2104.09864, section 3.4.2. PyTorch: transformers' `apply_rotary_pos_emb`.
    """
    a, b = head_halves(p.widen(p.cast(x, "x")), cos.shape[-1])
    c, s = p.widen(p.cast(cos, "cos"))[:, None], p.widen(p.cast(sin, "sin"))[:, None]

    def rotated(to_cos: Array, to_sin: Array) -> Array:
        by_cos, by_sin = p.round(to_cos * c, "x_cos", x, cos), p.round(to_sin * s, "x_sin", x, sin)
        return p.round(p.widen(by_cos) + p.widen(by_sin), "y", x, cos)

    y = p.xp.stack([rotated(a, -b), rotated(b, a)], axis=-2)
    return y.reshape(x.shape), (cos, sin, format_of(x))


def rope_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, None, None]:
    """Return dx, the rotation of dy by the opposite angle: da = R(R(d1 cos) + R(d2 sin)),  db = R(R(d2 cos) + R(-d1 sin)).

    The roundings are to the format of x, also where cos and sin have FP32. cos and sin are data, without gradients.
    """
    cos, sin, x_format = saved
    d1, d2 = head_halves(p.widen(dy), cos.shape[-1])
    c, s = p.widen(p.cast(cos, "cos"))[:, None], p.widen(p.cast(sin, "sin"))[:, None]

    def rotated(to_cos: Array, to_sin: Array) -> Array:
        by_cos, by_sin = p.round_to(to_cos * c, x_format, "dy_cos"), p.round_to(to_sin * s, x_format, "dy_sin")
        return p.round_grad(p.widen(by_cos) + p.widen(by_sin), "x", x_format)

    dx = p.xp.stack([rotated(d1, d2), rotated(d2, -d1)], axis=-2)
    return dx.reshape(dy.shape), None, None
