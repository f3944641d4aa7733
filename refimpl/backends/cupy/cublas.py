"""Matrix products on the GPU with one cuBLAS call: 16-bit operands, sums in FP32, one rounding.

CuPy's `matmul` cannot do that: it does not multiply batches of BF16 matrices, it makes FP32 copies of FP16 ones, and its result
has the format of the operands, which rounds before a bias can be added.
"""

from __future__ import annotations

import importlib
import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import dtype_of, format_of

FORMATS = ("fp32", "fp16", "bf16")
"""The formats of operands and results."""

SUMS_IN_FP32 = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy has no name for: where cuBLAS splits K, it adds the parts in
FP32, never in the 16 bits of the result. PyTorch: allow_fp16_reduced_precision_reduction = False, not its default."""


class Layout(NamedTuple):
    """The memory layout of a batch of matrices (M, K), in row-major terms."""

    transposed: bool  # columns are contiguous, not rows
    step: int  # elements from one row (column) to the next
    batch_step: int  # elements from one matrix to the next


def product(a: Array, b: Array, fmt: str, out: Array | None = None) -> Array:
    """Multiply a (..., M, K) and b (..., K, N) -> (..., M, N) in format `fmt`: accumulated in FP32 and rounded once.

    a, b: device arrays of one format, FP32, FP16 or BF16; transposed views are not copied. out: an array in C order.
    Errors: TypeError for other or unequal formats, ValueError for shapes that do not match.
    PyTorch: torch.matmul of 16-bit tensors on CUDA, which calls the same function.
    """
    cupy = importlib.import_module("cupy")
    if format_of(a) != format_of(b) or format_of(a) not in FORMATS or fmt not in FORMATS:
        raise TypeError(f"no product of {format_of(a)} and {format_of(b)} in {fmt}: both in one of {', '.join(FORMATS)}")
    (*batch, M, K), N = a.shape, b.shape[-1]
    if tuple(batch) != b.shape[:-2] or b.shape[-2] != K:
        raise ValueError(f"cannot multiply {a.shape} by {b.shape}")
    if out is None:
        out = cupy.empty((*batch, M, N), dtype_of(fmt))
    _check_result(out, (*batch, M, N), fmt)
    if out.size and K:
        _call(cupy, a, b, out, (math.prod(batch), M, N, K))
    else:
        out[...] = 0
    return out


def _check_result(out: Array, shape: tuple[int, ...], fmt: str) -> None:
    if out.shape != shape or out.dtype != dtype_of(fmt) or not out.flags.c_contiguous:
        raise ValueError(f"the result is {fmt} {shape} in C order, out is {format_of(out)} {out.shape}")


def _call(cupy: Any, a: Array, b: Array, out: Array, sizes: tuple[int, int, int, int]) -> None:
    """Call cuBLAS. It is column-major: our a b is its b^T a^T, so b comes first, and our rows are its columns."""
    cublas = importlib.import_module("cupy_backends.cuda.libs.cublas")
    kinds = {
        "fp32": cupy.cuda.runtime.CUDA_R_32F, "fp16": cupy.cuda.runtime.CUDA_R_16F, "bf16": cupy.cuda.runtime.CUDA_R_16BF,
    }  # fmt: skip
    batch, M, N, K = sizes
    a, b = _readable(cupy, a), _readable(cupy, b)  # copies, if made, live until the call is queued
    layout_a, layout_b = _layout(a), _layout(b)
    assert layout_a is not None and layout_b is not None
    handle = cupy.cuda.device.get_cublas_handle()
    cublas.setMathMode(handle, SUMS_IN_FP32)
    one, zero = np.array(1, np.float32), np.array(0, np.float32)
    cublas.gemmStridedBatchedEx(
        handle, int(layout_b.transposed), int(layout_a.transposed), N, M, K, one.ctypes.data,
        b.data.ptr, kinds[format_of(b)], layout_b.step, layout_b.batch_step,
        a.data.ptr, kinds[format_of(a)], layout_a.step, layout_a.batch_step, zero.ctypes.data,
        out.data.ptr, kinds[format_of(out)], N, M * N, batch, cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip


def _readable(cupy: Any, x: Array) -> Array:
    """Return `x`, or a copy in C order where cuBLAS cannot read the layout of `x`."""
    return x if _layout(x) is not None else cupy.ascontiguousarray(x)


def _layout(x: Array) -> Layout | None:
    """Return the layout of matrices (..., M, K) with contiguous rows or columns and one step per batch; else None."""
    (*batch, rows, columns), item = x.shape, x.itemsize
    *batch_strides, row_step, column_step = (stride // item for stride in x.strides)
    counted = [(size, stride) for size, stride in zip(batch, batch_strides, strict=True) if size > 1]
    if any(outer != size * inner for (_, outer), (size, inner) in pairwise(counted)):
        return None
    batch_step = counted[-1][1] if counted else 0
    if (column_step == 1 or columns == 1) and (row_step >= columns or rows == 1):
        return Layout(False, max(row_step, columns, 1), batch_step)
    if (row_step == 1 or rows == 1) and (column_step >= rows or columns == 1):
        return Layout(True, max(column_step, rows, 1), batch_step)
    return None
