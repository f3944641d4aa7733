"""NVFP4: e2m1 elements, an e4m3 scale for each block of 16, an FP32 scale for the tensor.

    S_enc   = 448 * 6 / amax(tensor)              so that the largest block scale is 448
    S_block = e4m3(amax(block) * (S_enc / 6))
    element = e2m1(v / (S_block / S_enc))
    value   = element * S_block * (1 / S_enc)

With an e4m3 scale, which has 3 fraction bits, a block's largest value is scaled to within 6 % of 6, the largest e2m1. The
tensor's scale supplies the range that e4m3 lacks.

Source: NVIDIA 2025, 'Pretraining Large Language Models with NVFP4', arXiv 2509.25149; Transformer Engine, core_nvfp4.cuh.
"""

from __future__ import annotations

import math

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, along, block_amax, constant, encode

BLOCK = 16


def quantize_nvfp4(x: Array, axis: int = -1, *, square: bool = False, bits: Array | None = None) -> QuantizedTensor:
    """Quantize in blocks of 16 along `axis`, the axis that the product sums over; or, for weights, in blocks of 16 x 16.

    square: blocks of 16 x 16. They cost precision, but the same codes serve products that sum over either axis, so that forward
    and backward read one w. bits: 32 random bits per element, for stochastic rounding (gradients). Elements saturate: block
    scales are rounded to nearest, so a block's largest value may be up to 6 % too large for its scale.

    Roundings are Transformer Engine's, in FP32 and in its order: S_enc / 6 first. A tensor of zeros has S_enc = 1. A block too
    small for its scale (S_block = 0) becomes zero. A block with a NaN or an infinity has the scale NaN, so that all its
    values are NaN.
    Differs from the source: Transformer Engine ignores NaN in amax, and an infinity makes S_enc 1; torchao does not let S_block
      fall below e4m3's smallest normal value, and divides by the product of the scales.
    """
    x = widen(x, "fp32")
    block = tuple(max(1, min(BLOCK, n)) for n in x.shape) if square else along(axis, BLOCK, x.shape)
    amax = block_amax(x, block)
    finite = np.isfinite(amax)
    s_enc = encode_scale(amax[finite].max(initial=0))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = amax * (s_enc * _SIXTH)
        rounded = cast(np.where(finite, scaled, _NAN), "e4m3", overflow="saturate")
        s_dec = np.asarray(1 / s_enc)
        factors = np.minimum(1 / (widen(rounded, "fp32") * s_dec), _FP32_MAX)
    return QuantizedTensor(encode(x, factors, block, "e2m1", "saturate", bits), "e2m1", bits_of(rounded), "e4m3", block, s_dec)


def encode_scale(amax: Array) -> Array:
    """Return S_enc = 448 * 6 / amax: fp32, 0-d; fp32's largest value where it would be infinite, 1 for amax 0."""
    amax = np.asarray(amax)
    if amax == 0:
        return np.ones((), np.float32)
    with np.errstate(over="ignore"):
        return np.asarray(np.minimum(constant(FORMATS["e4m3"].max * FORMATS["e2m1"].max) / amax, _FP32_MAX))


_FP32_MAX = constant(FORMATS["fp32"].max)
_NAN = constant(math.nan)
_SIXTH = constant(1 / FORMATS["e2m1"].max)
