"""Floating-point formats as rows of facts.

A format is fully described by four facts: how many exponent bits, how many fraction bits, the bias, and what the
top exponent means. Everything else that a person asks for (largest value, smallest normal, eps) follows:

    value = (-1)^sign * 2^(exponent - bias) * (1 + fraction / 2^fraction_bits)      exponent > 0    (normal)
    value = (-1)^sign * 2^(1 - bias)        * (0 + fraction / 2^fraction_bits)      exponent = 0    (subnormal)

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

    `specials` says what the codes with the largest exponent are:
    `ieee`: infinities (fraction 0) and NaNs, so the largest exponent holds no number;
    `one-nan`: numbers, but for the all-ones code, which is NaN; there is no infinity (e4m3, e8m0);
    `none`: numbers only (e3m2, e2m3, e2m1).
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    bias: int
    specials: str
    dtype: np.dtype  # the array type that stores it; TF32 is stored in fp32 and shares its type
    sign_bits: int = 1

    @property
    def bits(self) -> int:
        """Bits of information in one value (TF32 has 19, and is stored in 32)."""
        return self.sign_bits + self.exponent_bits + self.fraction_bits

    @property
    def itemsize(self) -> int:
        """Bytes that one value takes in an array."""
        return int(self.dtype.itemsize)

    @property
    def has_inf(self) -> bool:
        """Whether an overflow can become an infinity."""
        return self.specials == "ieee"

    @property
    def eps(self) -> float:
        """Distance from 1 to the next larger value: 2^-fraction_bits."""
        return math.ldexp(1.0, -self.fraction_bits)

    @property
    def max(self) -> float:
        """Largest finite value."""
        largest_exponent = 2**self.exponent_bits - 1
        significand = 2.0 - self.eps
        if self.specials == "ieee" or (self.specials == "one-nan" and self.fraction_bits == 0):
            largest_exponent -= 1
        elif self.specials == "one-nan":
            significand -= self.eps  # the all-ones fraction is the NaN
        return math.ldexp(significand, largest_exponent - self.bias)

    @property
    def min(self) -> float:
        """Lowest value: -max, or the smallest positive value of the unsigned e8m0."""
        return -self.max if self.sign_bits else self.smallest_normal

    @property
    def smallest_normal(self) -> float:
        """Smallest value with full precision. e8m0 has no subnormals: its exponent 0 is a normal number."""
        smallest_exponent = 1 if self.fraction_bits else 0
        return math.ldexp(1.0, smallest_exponent - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value: half of it, and all below, rounds to zero."""
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

# TF32 arrays are fp32 arrays whose last 13 fraction bits are zero, so their type says fp32.
_NAME_OF_DTYPE: dict[np.dtype, str] = {row.dtype: row.name for row in FORMATS.values() if row.name != "tf32"}


def dtype_of(fmt: str) -> np.dtype:
    """The array type that stores a format: `dtype_of('bf16')` is ml_dtypes' bfloat16."""
    return FORMATS[fmt].dtype


def format_of(x: Any) -> str:
    """The format that an array is stored in: 'fp32', 'bf16', ... Raises TypeError for an array that holds no floats."""
    try:
        return _NAME_OF_DTYPE[x.dtype]
    except KeyError:
        raise TypeError(f"an array of {x.dtype} holds no floating-point format that this project knows") from None


def is_float(x: Any) -> bool:
    """Whether the array holds one of the formats (token numbers and masks do not)."""
    return x.dtype in _NAME_OF_DTYPE


@functools.cache
def widens_to(source: str, target: str) -> bool:
    """Whether every value of `source` is a value of `target`, so that the conversion never rounds."""
    a, b = FORMATS[source], FORMATS[target]
    return (
        a.fraction_bits <= b.fraction_bits
        and a.max <= b.max
        and a.smallest_subnormal >= b.smallest_subnormal
        and (b.has_inf or not a.has_inf)
        and a.sign_bits <= b.sign_bits
    )


def widest(*fmts: str) -> str:
    """The format that mixed operands promote to: the widest; fp32 for fp16 with bf16, which contain neither each other.

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
    """As many decimal digits as tell any two values of the format apart: 9 in fp32, 5 in fp16, 4 in bf16."""
    return f"{value:.{math.ceil(1 + (FORMATS[fmt].fraction_bits + 1) * math.log10(2))}g}"


def ulp(fmt: str, value: float) -> float:
    """The distance between neighboring values of a format around `value`.

        2^(max(e, smallest normal exponent) - fraction_bits),  where  2^e <= |value| < 2^(e + 1)

    So the error of one rounding to nearest is at most half an ulp, unless it overflows. NaN for Inf and NaN.
    Source: Muller 2005, 'On the definition of ulp(x)', INRIA RR-5504: the one that he names after Goldberg.
    """
    if not math.isfinite(value):
        return math.nan
    row = FORMATS[fmt]
    exponent = math.frexp(max(abs(value), row.smallest_normal))[1] - 1
    return math.ldexp(1.0, exponent - row.fraction_bits)
