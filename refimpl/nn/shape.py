"""Operations without arithmetic: reshape, transpose, split, and the recorded cast of a parameter."""

from __future__ import annotations

from typing import Any

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def reshape_forward(x: Array, p: OpPrecision, shape: tuple[int, ...]) -> tuple[Array, Any]:
    """Return x in another shape. PyTorch: torch.reshape."""
    return x.reshape(shape), x.shape


def reshape_backward(dy: Array, saved: Any, p: OpPrecision, shape: tuple[int, ...]) -> tuple[Array]:
    """Return dy in the shape of x."""
    return (dy.reshape(saved),)


def transpose_forward(x: Array, p: OpPrecision, axes: tuple[int, ...]) -> tuple[Array, Any]:
    """Return x with its axes in another order. PyTorch: torch.permute."""
    return x.transpose(axes), None


def transpose_backward(dy: Array, saved: Any, p: OpPrecision, axes: tuple[int, ...]) -> tuple[Array]:
    """Return dy with its axes in the order of x."""
    return (dy.transpose([axes.index(i) for i in range(len(axes))]),)


def split_forward(x: Array, p: OpPrecision, start: int, stop: int) -> tuple[Array, Any]:
    """Return the slice start:stop of the last axis. PyTorch: one part of torch.split(x, ..., dim=-1)."""
    return x[..., start:stop], x.shape


def split_backward(dy: Array, saved: Any, p: OpPrecision, start: int, stop: int) -> tuple[Array]:
    """Return dx = dy in the slice, and zero outside."""
    dx = p.xp.zeros(saved, dy.dtype)
    dx[..., start:stop] = dy
    return (dx,)


def cast_forward(w: Array, p: OpPrecision, fmt: str) -> tuple[Array, Any]:
    """Return R(w), the 16-bit copy of a parameter that all its uses in a micro-batch share. PyTorch: autocast's cached cast."""
    return p.round_to(w, fmt, "w"), None


def cast_backward(dy: Array, saved: Any, w: Array, p: OpPrecision, fmt: str) -> tuple[Array]:
    """Return the gradient of the copy, widened to the format of the parameter."""
    return (p.store_grad(p.round_to(dy, fmt, "dw"), "w", format_of(w)),)
