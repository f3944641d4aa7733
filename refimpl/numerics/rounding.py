"""Rounding to nearest, ties to even, written out: what `casts.cast` does to one number, on exact fractions.

`cast` leaves the rounding to the array library, and is tested against this definition; `fast_cast`, which does it by arithmetic
on bits, is tested against `cast`.
`python scripts/formats.py 0.1 --explain fp16` prints the steps for a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from refimpl.numerics.formats import FORMATS

_HALF = Fraction(1, 2)


def round_to_nearest_even(x: float | Fraction, fmt: str, overflow: str = "inf") -> float:
    """Return the value of `fmt` that is nearest to x, and of two that are equally near the one whose significand is even.

    x: one number, exactly: an int, a Fraction, or what `float` reads. The result is a float, which holds the values of all
    formats. x is rounded once, however many bits it has; `cast` rounds FP64 numbers to FP32 first if the format is narrower.

    overflow: as in `cast`, what a number becomes that would be rounded to more than the largest value if the format went on.
      'inf'       an infinity; NaN in a format without infinities; the largest value in a format without either
      'saturate'  the largest value of the same sign, also for infinities
    Zeros keep their sign, and so do numbers that are rounded to zero. NaN stays NaN. In e8m0, which has neither sign nor zero,
    zero and negative numbers become NaN, and smaller numbers than its smallest value are raised to it.

    Errors: TypeError for another `overflow`; ValueError for NaN in a format without NaN (`cast` makes it a zero).
    Source: IEEE 754-2019, sections 4.3.1 (roundTiesToEven) and 7.4 (overflow).
    PyTorch: `torch.tensor(x).to(torch.float16).item()`, for an x that FP32 holds.
    """
    row = FORMATS[fmt]
    if overflow not in ("inf", "saturate"):
        raise TypeError(f"round_to_nearest_even: overflow is {overflow!r}; it is 'inf' or 'saturate'")
    x = x if isinstance(x, int | Fraction) else float(x)
    if x != x and row.specials == "none":  # only NaN is unequal to itself
        raise ValueError(f"round_to_nearest_even: {fmt} has no NaN")
    if x != x or (x <= 0 and not row.sign_bits):
        return math.nan
    magnitude = math.inf if abs(x) == math.inf else rounding_steps(x, fmt).value
    if magnitude > row.max:
        beyond = {"ieee": math.inf, "one-nan": math.nan, "none": row.max}[row.specials]
        magnitude = beyond if overflow == "inf" else row.max
    if magnitude == 0 and not row.sign_bits:
        magnitude = row.smallest_normal
    negative = x < 0 or (x == 0 and math.copysign(1, x) < 0)
    return -float(magnitude) if negative else float(magnitude)


@dataclass(frozen=True)
class Steps:
    """The steps of one rounding: |x| = (kept + rest) ulp, with 0 <= rest < 1, becomes (kept + up) ulp.

    exponent: 2^exponent <= |x| < 2^(exponent + 1); below the smallest normal value, the exponent of that value.
    ulp: the distance between the format's values in this binade, 2^(exponent - fraction_bits).
    kept: the significand as an integer, the bits that fit. rest: the bits after them, a fraction of an ulp.
    up: whether the rounding goes away from zero.
    """

    exponent: int
    ulp: Fraction
    kept: int
    rest: Fraction
    up: bool

    @property
    def guard(self) -> bool:
        """Return the first bit of `rest`, which is worth half an ulp."""
        return self.rest >= _HALF

    @property
    def sticky(self) -> bool:
        """Return whether any bit after the guard bit is 1."""
        return self.rest not in (0, _HALF)

    @property
    def value(self) -> Fraction:
        """Return the rounded magnitude, as if the format had no largest value."""
        return (self.kept + self.up) * self.ulp


def rounding_steps(x: float | Fraction, fmt: str) -> Steps:
    """Round the magnitude of a finite number to the nearest value of `fmt`, step by step.

    A carry needs no line of its own: where all bits of `kept` are 1, one more makes it the power of two with which the next
    binade begins, or the smallest normal value after the largest subnormal one. In e8m0, which has no fraction, `kept` is 1
    and so odd: ties go up.
    """
    row, magnitude = FORMATS[fmt], abs(Fraction(x))
    # The exponent stops at that of the smallest normal value: subnormal values are as far apart as those of its binade.
    exponent = floor_log2(max(magnitude, Fraction(row.smallest_normal)))
    ulp = Fraction(2) ** (exponent - row.fraction_bits)
    kept, rest = divmod(magnitude / ulp, 1)
    tie = rest == _HALF
    up = rest > _HALF or (tie and kept % 2 == 1)
    return Steps(exponent, ulp, kept, rest, up)


def floor_log2(x: Fraction) -> int:
    """Return the integer e with 2^e <= x < 2^(e + 1), for x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()  # 2^(e - 1) < x < 2^(e + 1)
    return e if x >= Fraction(2) ** e else e - 1
