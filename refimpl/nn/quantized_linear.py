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
    y_p = p["y"]
    xc, wc = operand(y_p, as_rows(x), "x", axis=1), operand(y_p, w, "w", axis=1)
    z = multiply(y_p, xc, wc.T)
    if b is not None:
        z += y_p.widen(y_p.cast(b, "b"))
    # dw sums over the rows of x, along which a quantized x has no scales
    same = p["dw"].inputs["x"] == y_p.inputs["x"] and not isinstance(xc, QuantizedTensor)
    return y_p.round(z, "y", x, w).reshape(*x.shape[:-1], len(w)), (xc if same else as_rows(x), x.shape, format_of(x))


def quantized_linear_backward(dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array | None, ...]:
    """Return dx = dy w,  dw = dy^T x,  db = the sum of the rows of dy, each rounded once to its row's `out`.

    dx quantizes dy and w along F, dw quantizes dy and x along the rows: each from the unquantized tensor.
    """
    x, x_shape, x_format = saved
    dy, dx_p, dw_p, db_p = as_rows(dy), p["dx"], p["dw"], p["db"]
    dx = multiply(dx_p, operand(dx_p, dy, "dy", axis=1), operand(dx_p, w, "w", axis=0))
    dw = multiply(dw_p, operand(dw_p, dy, "dy", axis=0).T, operand(dw_p, x, "x", axis=0))
    dx, dw = gradient(dx_p, dx, "x", x_format).reshape(x_shape), gradient(dw_p, dw, "w", format_of(w))
    db = None if b is None else gradient(db_p, db_p.widen(db_p.cast(dy, "dy")).sum(0), "b", format_of(b))
    return dx, dw, db


def operand(p: OpPrecision, x: Array, name: str, axis: int) -> Any:
    """Return an operand of a product as its row names it: cast to a format, or quantized along `axis`, which is summed over.

    The monitor sees its elements, divided by their scales, before and after rounding.
    """
    scheme, scales = p.inputs[name], p.run.scales
    if scheme not in SCHEMES:
        return p.cast(x, name)
    q = quantize_operand(scales, scheme, x, axis, f"{p.place}.{name}")
    if p.run.monitor is not None:
        p.run.monitor(f"{p.place}:{p.op}.{name}", *rounding(p, rotated_operand(scales, scheme, x, axis), q))
    return q


def rounding(p: OpPrecision, x: Array, q: QuantizedTensor) -> tuple[Array, Array]:
    """Return the elements of x before and after rounding, both divided by their scales."""
    with p.xp.errstate(over="ignore", under="ignore", invalid="ignore"):
        scale = spread(q.scale_values(), q.block, q.shape) * (1 if q.tensor_scale is None else q.tensor_scale)
        before = widen(x, "fp32") / p.xp.where(scale == 0, 1, scale)  # a block too small for its scale: 0, kept as zeros
    return before, from_bits(q.codes * (scale != 0), q.fmt)


def multiply(p: OpPrecision, a: Any, b: Any) -> Array:
    """Multiply two operands in the row's accumulator, unrounded. Errors: TypeError where only one of them is quantized."""
    if isinstance(a, QuantizedTensor) != isinstance(b, QuantizedTensor):
        raise TypeError(f"{p.op}: a policy quantizes both factors of a product, or none")
    acc, in_fp32 = p.row.acc, partial(p.run.backend.matmul, acc=p.math)
    if isinstance(a, QuantizedTensor):
        return product(a, b, acc, in_fp32)
    return p.matmul(a, b) if acc == p.math else matmul(a, b, acc, in_fp32)


def gradient(p: OpPrecision, dz: Array, name: str, stored: str) -> Array:
    """Round a gradient to the row's `out`: the format of an operand that was quantized says nothing about its gradient."""
    dz = p.round_to(dz, stored if p.row.out == SAME else p.row.out, f"d{name}")
    return p.store_grad(dz, name, stored)
