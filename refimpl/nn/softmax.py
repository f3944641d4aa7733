"""Softmax over the last axis: as an operation, and as the two formulas that attention shares with it."""

from __future__ import annotations

from typing import Any

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def unrounded_softmax(z: Array, p: OpPrecision) -> Array:
    """Return exp(z - max z) / sum(exp(z - max z)) over the last axis, not rounded: z is in the accumulation format."""
    e = p.xp.exp(z - z.max(-1, keepdims=True))  # without the maximum exp would overflow, in FP32 from z = 89 on
    return e / e.sum(-1, keepdims=True)


def softmax_slope(dy: Array, y: Array) -> Array:
    """Return dz = y (dy - sum(dy y)) over the last axis, not rounded: y and dy are in the accumulation format."""
    return (dy - (dy * y).sum(-1, keepdims=True)) * y


def softmax_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = softmax(x), rounded once. x (..., N) -> y (..., N). PyTorch: torch.softmax(x, -1)."""
    y = p.round(unrounded_softmax(p.widen(p.cast(x, "x")), p), "y", x)
    return y, (y, format_of(x))


def softmax_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = y (dy - sum(dy y)), with the rounded y that forward stored."""
    y, x_format = saved
    return (p.round_grad(softmax_slope(p.widen(dy), p.widen(y)), "x", x_format),)
