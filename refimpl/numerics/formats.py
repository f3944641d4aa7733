"""Floating-point formats as rows of a table.

A format is described by five facts: the numbers of sign, exponent and fraction bits, the bias, and what the codes with the
largest exponent mean. Largest value, smallest normal value, eps and so on follow from these:

    value = (-1)^sign * 2^(exponent - bias) * (1 + fraction / 2^fraction_bits)      exponent > 0    (normal)
    value = (-1)^sign * 2^(1 - bias)        * (0 + fraction / 2^fraction_bits)      exponent = 0    (zero and subnormal)

e8m0, the format of MX scales, has neither sign nor fraction. All its numbers are normal, also with exponent 0: it has no zero.

Source: IEEE 754-2019 section 3.4 (fp64, fp32, fp16); the bfloat16 and TF32 white papers; Micikevicius et al. 2022,
arXiv 2209.05433 (e4m3, e5m2); the OCP Microscaling Formats specification v1.0 (e3m2, e2m3, e2m1, e8m0).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Format:
    """One floating-point format.

    specials: what the codes with the largest exponent mean.
      'ieee'     infinities (fraction 0) and NaNs
      'one-nan'  numbers, except for the all-ones code, which is NaN; no infinities (e4m3, e8m0)
      'none'     numbers only (e3m2, e2m3, e2m1)
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    bias: int
    specials: str
    dtype: np.dtype  # the array type that holds it; TF32 is held in fp32 arrays
    sign_bits: int = 1

    @property
    def bits(self) -> int:
        """Return the bits of information in one value (19 for TF32, which is stored in 32)."""
        return self.sign_bits + self.exponent_bits + self.fraction_bits

    @property
    def itemsize(self) -> int:
        """Return the bytes that one value takes in an array."""
        return int(self.dtype.itemsize)

    @property
    def has_inf(self) -> bool:
        """Return whether the format has infinities."""
        return self.specials == "ieee"

    @property
    def eps(self) -> float:
        """Return the distance from 1 to the next larger value: 2^-fraction_bits."""
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def max(self) -> float:
        """Return the largest finite value."""
        largest_exponent = 2**self.exponent_bits - 1
        significand = 2.0 - self.eps
        if self.specials == "ieee" or (self.specials == "one-nan" and self.fraction_bits == 0):
            largest_exponent -= 1
        elif self.specials == "one-nan":
            significand -= self.eps  # the all-ones fraction is the NaN
        return math.ldexp(significand, largest_exponent - self.bias)

    @property
    def min(self) -> float:
        """Return the lowest finite value: -max, or the smallest positive value of the unsigned e8m0."""
        return -self.max if self.sign_bits else self.smallest_normal

    @property
    def smallest_normal(self) -> float:
        """Return the smallest positive value with full precision; in e8m0 its exponent is 0."""
        smallest_exponent = 1 if self.fraction_bits else 0
        return math.ldexp(1.0, smallest_exponent - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """Return the smallest positive value. Half of it, and all below, rounds to zero."""
        return math.ldexp(self.smallest_normal, -self.fraction_bits)


def _row(name: str, exponent_bits: int, fraction_bits: int, bias: int, specials: str, dtype: Any, **more: Any) -> Format:
    return Format(name, exponent_bits, fraction_bits, bias, specials, np.dtype(dtype), **more)


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        _row("fp64", 11, 52, 1023, "ieee", np.float64),
        _row("fp32", 8, 23, 127, "ieee", np.float32),
        _row("tf32", 8, 10, 127, "ieee", np.float32),
        _row("fp16", 5, 10, 15, "ieee", np.float16),
        _row("bf16", 8, 7, 127, "ieee", ml_dtypes.bfloat16),
        _row("e4m3", 4, 3, 7, "one-nan", ml_dtypes.float8_e4m3fn),
        _row("e5m2", 5, 2, 15, "ieee", ml_dtypes.float8_e5m2),
        _row("e3m2", 3, 2, 3, "none", ml_dtypes.float6_e3m2fn),
        _row("e2m3", 2, 3, 1, "none", ml_dtypes.float6_e2m3fn),
        _row("e2m1", 2, 1, 1, "none", ml_dtypes.float4_e2m1fn),
        _row("e8m0", 8, 0, 127, "one-nan", ml_dtypes.float8_e8m0fnu, sign_bits=0),
    )
}

# A TF32 array is an fp32 array whose last 13 fraction bits are zero, so its type says fp32.
_NAME_OF_DTYPE: dict[np.dtype, str] = {row.dtype: row.name for row in FORMATS.values() if row.name != "tf32"}


def dtype_of(fmt: str) -> np.dtype:
    """Return the array type that holds a format: `dtype_of('bf16')` is ml_dtypes' bfloat16."""
    return FORMATS[fmt].dtype


def format_of(x: Any) -> str:
    """Return the format of an array: 'fp32', 'bf16', ... Errors: TypeError for an array that holds no floats."""
    try:
        return _NAME_OF_DTYPE[x.dtype]
    except KeyError:
        raise TypeError(f"an array of {x.dtype} holds no floating-point format that this project knows") from None


def is_float(x: Any) -> bool:
    """Return whether an array holds one of the formats (tokens and masks do not)."""
    return x.dtype in _NAME_OF_DTYPE


@functools.cache
def widens_to(source: str, target: str) -> bool:
    """Return whether every value of `source` is a value of `target`, so that the conversion never rounds."""
    a, b = FORMATS[source], FORMATS[target]
    return (
        a.fraction_bits <= b.fraction_bits
        and a.max <= b.max
        and a.smallest_subnormal >= b.smallest_subnormal
        and (b.has_inf or not a.has_inf)
        and a.sign_bits <= b.sign_bits
    )


def widest(*fmts: str) -> str:
    """Return the format that mixed operands promote to: the widest, and fp32 where none contains the other (fp16, bf16).

    PyTorch: torch.promote_types.
    """
    result = fmts[0]
    for fmt in fmts[1:]:
        if widens_to(result, fmt):
            result = fmt
        elif not widens_to(fmt, result):
            result = "fp32"
    return result


def digits(value: float, fmt: str) -> str:
    """Write a value with enough decimal digits to tell any two of the format apart: 9 in fp32, 5 in fp16, 4 in bf16."""
    return f"{value:.{math.ceil(1 + (FORMATS[fmt].fraction_bits + 1) * math.log10(2))}g}"


def ulp(fmt: str, value: float) -> float:
    """Return the distance between neighboring values of a format around `value`.

        2^(max(e, smallest normal exponent) - fraction_bits),  where  2^e <= |value| < 2^(e + 1)

    The error of one rounding to nearest is at most half an ulp, unless it overflows. Inf and NaN give NaN.
    Source: Muller 2005, 'On the definition of ulp(x)', INRIA RR-5504: there called Goldberg's definition.
    """
    if not math.isfinite(value):
        return math.nan
    row = FORMATS[fmt]
    exponent = math.frexp(max(abs(value), row.smallest_normal))[1] - 1
    return math.ldexp(1.0, exponent - row.fraction_bits)
