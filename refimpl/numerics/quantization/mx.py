"""MX (microscaling): blocks of 32 elements along one axis that share a power of two as their scale.

    X = 2^e, stored as e8m0:  code e + 127, e in -127..127, code 255 is NaN
    element = v / X rounded to nearest even, saturated

The sources disagree on how e follows from the block's largest magnitude, amax: SCALE_RULES. With emax the exponent of the
element format's largest value (8 for e4m3: 448 = 1.75 * 2^8):

    floor   floor(log2 amax) - emax       the OCP text; elements saturate where amax / 2^floor(log2 amax) > 1.75 (e4m3)
    ceil    ceil(log2 amax) - emax        an option of torchao; nothing saturates
    rceil   ceil(log2(amax / max))        cuBLAS, Transformer Engine; nothing saturates, and less range is lost than with ceil
    even    floor(log2(amax + half an ulp of the element format)) - emax      an option of torchao

Source: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3; Rouhani et al. 2023, arXiv 2310.10537; torchao, mx_tensor.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, along, block_amax, constant, encode

BLOCK = 32
E8M0_BIAS, E8M0_NAN = 127, 255
_NAN = constant(math.nan)


def emax(fmt: str) -> int:
    """Return the exponent of a format's largest value: 8 for e4m3, 15 for e5m2, 4 for e3m2, 2 for e2m3 and e2m1."""
    return int(np.frexp(FORMATS[fmt].max)[1]) - 1


# Each rule maps amax, finite and positive, to the exponent e, an integer array. frexp gives amax = m 2^k with m in [1/2, 1),
# exactly, so floor(log2 amax) is k - 1. A logarithm would round to the wrong side beside powers of two.


def floor_rule(amax: Array, fmt: str) -> Array:
    """Return floor(log2 amax) - emax."""
    _, k = np.frexp(amax)
    return k - 1 - emax(fmt)


def ceil_rule(amax: Array, fmt: str) -> Array:
    """Return ceil(log2 amax) - emax."""
    m, k = np.frexp(amax)
    return k - 1 + (m > 0.5) - emax(fmt)


def rceil_rule(amax: Array, fmt: str) -> Array:
    """Return ceil(log2(amax / max)): the smallest exponent with which amax / 2^e does not exceed the largest value.

    Differs from the source: torchao and Transformer Engine multiply amax by the rounded 1 / max. The exponent is the same,
    except near the smallest scale, where that product is subnormal.
    """
    (m, k), (m_max, k_max) = np.frexp(amax), np.frexp(FORMATS[fmt].max)
    return k - k_max + (m > m_max)


def even_rule(amax: Array, fmt: str) -> Array:
    """Return floor(log2 of amax rounded half up to the element's fraction bits) - emax."""
    m, k = np.frexp(amax)
    return k - 1 + (m + FORMATS[fmt].eps / 4 >= 1) - emax(fmt)


SCALE_RULES: dict[str, Callable[[Array, str], Array]] = {
    "floor": floor_rule,
    "ceil": ceil_rule,
    "rceil": rceil_rule,
    "even": even_rule,
}


def quantize_mx(
    x: Array, fmt: str, axis: int = -1, rule: str = "floor", *, block: int = BLOCK, overflow: str = "saturate",
    bits: Array | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Quantize in blocks of 32 along `axis`, the axis that the product sums over, with e8m0 scales.

    x: fp32 or a format that fp32 holds. fmt: e4m3, e5m2, e3m2, e2m3 or e2m1. rule: one of SCALE_RULES.
    A block of zeros has the smallest scale, 2^-127. A block with a NaN or an infinity has the scale NaN, so that all its values
    are NaN: some element formats have neither.
    overflow: what becomes of a value beyond the largest under 'floor' and 'even'; 'saturate' in the OCP text.
    Errors: KeyError for an unknown rule; ValueError for a format that is not an element format.
    PyTorch: torchao.prototype.mx_formats.mx_tensor.to_mx, whose axis is the last.
    Differs from the source: to_mx needs an axis that is a multiple of 32; here the last block may be shorter. Its 'even' gives
      the scale NaN where amax rounds up to 2^128; here that is an exponent like others.
    """
    x, shape = widen(x, "fp32"), along(axis, block, x.shape)
    amax = block_amax(x, shape)
    finite = np.isfinite(amax)
    exponent = SCALE_RULES[rule](np.where(finite, amax, np.float32(0)), fmt)
    exponent = np.where(amax == 0, -E8M0_BIAS, exponent).clip(-E8M0_BIAS, E8M0_BIAS)
    scales = np.asarray(np.where(finite, exponent + E8M0_BIAS, E8M0_NAN), np.uint8)
    factors = np.where(finite, np.ldexp(np.float32(1), -exponent), _NAN)
    return QuantizedTensor(encode(x, factors, shape, fmt, overflow, bits), fmt, scales, "e8m0", shape)
