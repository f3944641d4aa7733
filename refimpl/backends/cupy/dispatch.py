"""What the fast versions for a GPU share: when a kernel runs and when the definition, grids, and the kernels of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.backends.cupy.launch import COLUMNS, FORMATS, LANES, THREADS, WARP, WARPS, elementwise_grid
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision
from refimpl.precision.policy import SAME

ROW = (THREADS,)
ROWS = (WARP, WARPS)
COLUMN = (COLUMNS, LANES)


class Fused(tuple[Any, ...]):
    """What a fast forward saved for its backward; what a definition saved is not of this type."""


def with_fallback(definition: Op, forward: Callable[..., Any], backward: Callable[..., Any]) -> Op:
    """Return an operation that runs `forward`, and its definition where `forward` returns None."""

    def either_forward(*arrays: Any, p: OpPrecision, **static: Any) -> tuple[Array, Any]:
        result = forward(*arrays, p=p, **static)
        return definition.forward(*arrays, p=p, **static) if result is None else result

    def either_backward(dy: Array, saved: Any, *params: Any, p: OpPrecision, **static: Any) -> tuple[Array | None, ...]:
        how = backward if isinstance(saved, Fused) else definition.backward
        gradients: tuple[Array | None, ...] = how(dy, saved, *params, p=p, **static)
        return gradients

    return replace(definition, forward=either_forward, backward=either_backward)


def one_format(p: OpPrecision, *arrays: Array | None) -> str | None:
    """Return the format that all these arrays (operands after their cast) have, if kernels exist for it; else None."""
    formats = {format_of(x) for x in arrays if x is not None}
    fmt = formats.pop() if len(formats) == 1 else ""
    return fmt if fmt in FORMATS and p.row.acc == "fp32" else None


def keeps(p: OpPrecision, fmt: str) -> bool:
    """Return whether a row reads operands of this format without a cast, and returns the same format."""
    inputs = {p.row.inputs} if isinstance(p.row.inputs, str) else set(p.row.inputs.values())
    return p.row.acc == "fp32" and fmt in FORMATS and inputs | {p.row.out} <= {SAME, fmt}


def becomes(p: OpPrecision, operand: str, fmt: str) -> bool:
    """Return whether a row reads an FP32 operand in this format."""
    return p.inputs[operand] == fmt or (p.inputs[operand] == SAME and fmt == "fp32")


def launcher(p: OpPrecision, fmt: str) -> Any:
    """Return the kernels of the run's backend for a storage format."""
    return p.run.backend.kernels(fmt)


def in_order(p: OpPrecision, x: Array) -> Array:
    """Return `x`, or a copy in C order, which kernels need."""
    return p.xp.ascontiguousarray(x)


def elementwise(p: OpPrecision, kernel: str, fmt: str, *arrays: Array) -> Array:
    """Return a new array y of the shape of the first, computed by `kernel(arrays..., y, n)`."""
    arrays = tuple(in_order(p, x) for x in arrays)
    y = p.empty(arrays[0].shape, fmt)
    getattr(launcher(p, fmt), kernel)(elementwise_grid(y.size), ROW, *arrays, y, np.int64(y.size))
    return y


def by_warps(rows: int) -> tuple[int]:
    """Return the grid of a kernel with one warp per row."""
    return (-(-rows // WARPS),)


def columns(C: int) -> tuple[int]:
    """Return the grid of a kernel that sums columns."""
    return (-(-C // COLUMNS),)


def split_heads(x: Array, shape: tuple[int, ...], p: OpPrecision) -> Array:
    """Split the heads: x (B, T, parts H D) -> `shape`, which is (parts, B, H, T, D)."""
    parts, B, H, T, D = shape
    fmt, y = format_of(x), p.empty(shape, format_of(x))
    launcher(p, fmt).split_heads((B * T,), ROW, in_order(p, x), y, *map(np.int32, (T, parts, H, D)))
    return y


def merge_heads(y: Array, p: OpPrecision) -> Array:
    """Join the heads: y (parts, B, H, T, D) -> (B, T, parts H D)."""
    (parts, B, H, T, D), fmt = y.shape, format_of(y)
    x = p.empty((B, T, parts * H * D), fmt)
    launcher(p, fmt).merge_heads((B * T,), ROW, y, x, *map(np.int32, (T, parts, H, D)))
    return x
