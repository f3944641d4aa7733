"""Quantization schemes by name: what a row of a policy may say instead of a format.

    Precision({"x": "e4m3-tensor", "w": "e4m3-tensor"}, "fp32", "bf16")

A scheme is a function (tensor, axis that the product sums over, Place) -> QuantizedTensor. What schemes remember from step to
step, and where their random bits come from, is in `scaling_state.ScalingState`, one per run and kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from refimpl.numerics.arrays import Array
from refimpl.numerics.quantization.fp8 import quantize_blocks, quantize_rows, quantize_tensor, quantize_tiles
from refimpl.numerics.quantization.mx import quantize_mx
from refimpl.numerics.quantization.nvfp4 import quantize_nvfp4
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor
from refimpl.numerics.quantization.rotation import BLOCK as ROTATED
from refimpl.numerics.quantization.rotation import random_signs, rotate
from refimpl.numerics.quantization.scaling_state import ScalingState


class Place(NamedTuple):
    """Where a tensor is quantized: the run's scaling state, and the tensor's name, e.g. 'transformer.h.0.mlp.c_fc.x'."""

    scales: ScalingState
    name: str


Scheme = Callable[[Array, int, Place], QuantizedTensor]


def _tensor(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take one scale for the tensor, from its own largest magnitude."""
    return quantize_tensor(x, fmt)


def _delayed(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take one scale for the tensor, from its largest magnitude in past steps."""
    return place.scales.delayed_scaling(place.name, fmt).quantize(x)


def _rows(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a scale for each row (column) that the product sums over."""
    return quantize_rows(x, fmt, axis)


def _tiles(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a scale for each 128 elements that the product sums over."""
    return quantize_tiles(x, fmt, axis)


def _blocks(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a scale for each 128 x 128 elements."""
    return quantize_blocks(x, fmt)


def _mx(fmt: str, rule: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a power of two for each 32 elements."""
    return quantize_mx(x, fmt, axis, rule)


def _nvfp4(x: Array, axis: int, place: Place, square: bool = False, stochastic: bool = False) -> QuantizedTensor:
    """Take an e4m3 scale for each 16 (or 16 x 16) elements, and an FP32 scale for the tensor."""
    bits = place.scales.random_bits(place.name, x.shape) if stochastic else None
    return quantize_nvfp4(x, axis, square=square, bits=bits)


SCHEMES: Mapping[str, Scheme] = {
    "e4m3-tensor": partial(_tensor, "e4m3"),
    "e5m2-tensor": partial(_tensor, "e5m2"),
    "e4m3-delayed": partial(_delayed, "e4m3"),
    "e5m2-delayed": partial(_delayed, "e5m2"),
    "e4m3-rows": partial(_rows, "e4m3"),
    "e4m3-1x128": partial(_tiles, "e4m3"),
    "e4m3-128x128": partial(_blocks, "e4m3"),
    **{f"mx-{fmt}-{rule}": partial(_mx, fmt, rule)
       for fmt in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1") for rule in ("floor", "ceil", "rceil", "even")},
    "nvfp4": _nvfp4,
    "nvfp4-16x16": partial(_nvfp4, square=True),
    "nvfp4-sr": partial(_nvfp4, stochastic=True),
    "nvfp4-rotated": _nvfp4,
    "nvfp4-rotated-sr": partial(_nvfp4, stochastic=True),
}  # fmt: skip
"""Name in a policy -> scheme. The functions that they call name their sources."""

ROTATING = frozenset({"nvfp4-rotated", "nvfp4-rotated-sr"})
"""Schemes that rotate a tensor first. Both operands of a product need one of them, so that the rotations cancel."""


def quantize_operand(scales: ScalingState, scheme: str, x: Array, axis: int, name: str) -> QuantizedTensor:
    """Quantize the tensor of that name. axis: the axis that the product sums over."""
    return SCHEMES[scheme](rotated_operand(scales, scheme, x, axis), axis, Place(scales, name))


def rotated_operand(scales: ScalingState, scheme: str, x: Array, axis: int) -> Array:
    """Return x, rotated where the scheme rotates and the length of the axis is a multiple of 16."""
    return rotate(x, random_signs(scales.seed), axis) if scheme in ROTATING and x.shape[axis] % ROTATED == 0 else x
