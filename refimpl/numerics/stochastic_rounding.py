"""Stochastic rounding: up or down at random, in proportion to the distance, so that the mean error is zero."""

from __future__ import annotations

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS


def stochastic_round(x: Array, fmt: str, bits: Array, out: Array | None = None, overflow: str | None = None) -> Array:
    """Round each value to one of its two neighbors in `fmt`: to the one farther from zero with the probability

        P(away from zero) = (|x| - |down|) / (|up| - |down|),     so that the mean of the result is x

    up to 2^-32: away where bits < P 2^32. Values of the format, zeros with their sign, infinities and NaN do not change.
    Subnormals are rounded as all other values.

    x: fp32, or a format that fp32 holds; an array of a device can be rounded to bf16 only. bits: uint32, of the shape of x, as
    `philox.random_bits` makes them. out: an array of `fmt` to write to; it may share x's memory where `fmt` is fp32.
    overflow: as in `cast`. The neighbor above the largest value is what the format would have there with one more exponent; a
    value rounded to it has overflowed. So with 'inf' a value above the largest becomes an infinity at random; with 'saturate'
    its mean is too small.

    Errors: TypeError where `overflow` is missing for a format of 8 bits or fewer, or `bits` is not uint32; ValueError where
      the shape of `bits` is not that of x.
    Source: Gupta et al. 2015, arXiv 1502.02551, section 3.  PyTorch: none; torchao's `_fp32_to_bf16_sr` for bf16.
    Differs from the source: torchao and llm.c use 16 bits per value, which is exact for bf16 too. Here bf16 reads the upper
      16 of 32, and rounds away where bits < P, not where bits + P carries.
    """
    x = widen(x, "fp32")
    if bits.dtype != np.uint32:
        raise TypeError(f"stochastic_round: bits are {bits.dtype}, not uint32")
    if bits.shape != x.shape:
        raise ValueError(f"stochastic_round: bits have the shape {bits.shape}, x {x.shape}")
    rounded = _round_to_bf16(x, bits) if fmt == "bf16" else round_exactly(x, fmt, bits)
    return cast(rounded, fmt, out=out, overflow=overflow)


def round_exactly(x: Array, fmt: str, bits: Array) -> Array:
    """Round to any format, as defined: by the steps of `rounding.rounding_steps`, but away from zero where bits / 2^32 < rest.

    Every line is exact: an ulp is a power of two, `kept` fits the format's significand, bits are compared in fp64.
    Returns fp32; values beyond the largest of `fmt` are left for `cast` to turn into overflows.
    """
    row = FORMATS[fmt]
    finite = np.isfinite(x)
    magnitude = np.where(finite, abs(x), 0)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, 1 - row.bias) - row.fraction_bits  # that of an ulp
    ulps = np.ldexp(magnitude, -exponent)
    kept = np.floor(ulps)
    away = bits < np.ldexp(widen(ulps - kept, "fp64"), 32)
    with np.errstate(over="ignore"):
        return np.where(finite, np.copysign(np.ldexp(kept + away, exponent), x), x)


def _round_to_bf16(x: Array, bits: Array) -> Array:
    """Return `round_exactly(x, 'bf16', bits)`, to the bit, in a few integer operations that any array library has.

    The lower half of the pattern is P 2^16. It exceeds the 16 random bits d exactly where adding 0xffff - d carries into the
    upper half. A carry is a step away from zero: into the next exponent if need be, and from the largest value to infinity.
    """
    pattern = bits_of(x)
    stepped = (pattern + (0xFFFF - (bits >> 16))) & 0xFFFF0000
    finite = (pattern & _EXPONENT) != _EXPONENT
    return from_bits(stepped * finite + pattern * ~finite, "fp32")


_EXPONENT = 0x7F800000  # the exponent field of FP32: all ones in infinities and NaN
