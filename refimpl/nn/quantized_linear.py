"""The linear layer of recipes that quantize the operands of its products, or sum them in fewer bits than FP32.

A policy selects it (`Policy.operation`) where a row of `linear` names a scheme of `quantization/registry.py` as an input, or an
accumulator of `accumulators.py` as `acc`. Rows and sites are those of `linear`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from refimpl.nn.linear import as_rows
from refimpl.numerics.accumulators import matmul
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import from_bits
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import format_of
from refimpl.numerics.quantization.products import product
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, spread
from refimpl.numerics.quantization.registry import SCHEMES, quantize_operand, rotated_operand
from refimpl.precision.context import OpPrecision
from refimpl.precision.policy import SAME


def quantized_linear_forward(x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x w^T + b: quantize x and w along K, multiply, add the bias, round once.

    x (..., K), w (F, K), b (F,) or None -> y (..., F). Saved: x, or its copy if no scheme quantized it and dw reads the same.
    Source: Micikevicius et al. 2022, arXiv 2209.05433 (FP8); each scheme and each accumulator names its own.
    PyTorch: torch._scaled_mm.
    """
    row = p["y"]
    xc, wc = operand(row, as_rows(x), "x", axis=1), operand(row, w, "w", axis=1)
    z = multiply(row, xc, wc.T)
    if b is not None:
        z += row.widen(row.cast(b, "b"))
    # dw sums over the rows of x, along which a quantized x has no scales
    same = p["dw"].inputs["x"] == row.inputs["x"] and not isinstance(xc, QuantizedTensor)
    return row.round(z, "y", x, w).reshape(*x.shape[:-1], len(w)), (xc if same else as_rows(x), x.shape, format_of(x))


def quantized_linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = dy w,  dw = dy^T x,  db = the sum of the rows of dy, each rounded once to its row's `out`.

    dx quantizes dy and w along F, dw quantizes dy and x along the rows: each from the unquantized tensor.
    """
    x, x_shape, x_format = saved
    dy, x_row, w_row, b_row = as_rows(dy), p["dx"], p["dw"], p["db"]
    dx = multiply(x_row, operand(x_row, dy, "dy", axis=1), operand(x_row, w, "w", axis=0))
    dw = multiply(w_row, operand(w_row, dy, "dy", axis=0).T, operand(w_row, x, "x", axis=0))
    dx, dw = gradient(x_row, dx, "x", x_format).reshape(x_shape), gradient(w_row, dw, "w", format_of(w))
    db = None if b is None else gradient(b_row, b_row.widen(b_row.cast(dy, "dy")).sum(0), "b", format_of(b))
    return dx, dw, db


def operand(row: OpPrecision, x: Array, name: str, axis: int) -> Any:
    """Return an operand of a product as its row names it: cast to a format, or quantized along `axis`, which is summed over.

    The monitor sees its elements, divided by their scales, before and after rounding.
    """
    scheme, scales = row.inputs[name], row.run.scales
    if scheme not in SCHEMES:
        return row.cast(x, name)
    q = quantize_operand(scales, scheme, x, axis, f"{row.place}.{name}")
    if row.run.monitor is not None:
        row.run.monitor(f"{row.place}:{row.op}.{name}", *rounding(row, rotated_operand(scales, scheme, x, axis), q))
    return q


def rounding(row: OpPrecision, x: Array, q: QuantizedTensor) -> tuple[Array, Array]:
    """Return the elements of x before and after rounding, both divided by their scales."""
    with row.xp.errstate(over="ignore", under="ignore", invalid="ignore"):
        scale = spread(q.scale_values(), q.block, q.shape) * (1 if q.tensor_scale is None else q.tensor_scale)
        before = widen(x, "fp32") / row.xp.where(scale == 0, 1, scale)  # a block too small for its scale: 0, kept as zeros
    return before, from_bits(q.codes * (scale != 0), q.fmt)


def multiply(row: OpPrecision, a: Any, b: Any) -> Array:
    """Multiply two operands in the row's accumulator, unrounded. Errors: TypeError where only one of them is quantized."""
    if isinstance(a, QuantizedTensor) != isinstance(b, QuantizedTensor):
        raise TypeError(f"{row.op}: a policy quantizes both factors of a product, or none")
    acc, in_fp32 = row.row.acc, partial(row.run.backend.matmul, acc=row.math)
    if isinstance(a, QuantizedTensor):
        return product(a, b, acc, in_fp32)
    return row.matmul(a, b) if acc == row.math else matmul(a, b, acc, in_fp32)


def gradient(row: OpPrecision, dz: Array, name: str, stored: str) -> Array:
    """Round a gradient to the row's `out`: the format of an operand that was quantized says nothing about its gradient."""
    dz = row.round_to(dz, stored if row.row.out == SAME else row.row.out, f"d{name}")
    return row.store_grad(dz, name, stored)
