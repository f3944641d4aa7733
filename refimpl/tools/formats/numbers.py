"""Numbers as users write them, and values of the formats as text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from refimpl.errors import UsageError
from refimpl.numerics.bits import bit_string
from refimpl.numerics.formats import FORMATS, digits

_UNSIGNED = r"""(?:
    2\^[+-]?\d{1,4}                                                        # a power of two: 2^-24
    | 0x(?:[\da-f]+\.?[\da-f]*|\.[\da-f]+)(?:p[+-]?\d{1,4})?               # a hexadecimal float: 0x1.8p-24
    | (?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,4})?                                # a decimal: 6e-8
)"""
_FLAGS = re.VERBOSE | re.IGNORECASE | re.ASCII
_TERM = re.compile(rf"[+-]?{_UNSIGNED}", _FLAGS)
_SUM = re.compile(rf"[+-]?{_UNSIGNED}(?:[+-]{_UNSIGNED})*", _FLAGS)
_WORD = re.compile(r"[+-]?(inf|infinity|nan)", _FLAGS)


@dataclass(frozen=True)
class Number:
    """A number as text, as an exact fraction (None for infinities and NaN), and rounded to FP64."""

    text: str
    fraction: Fraction | None
    fp64: float

    @property
    def exact(self) -> bool:
        """Return whether FP64 holds the number."""
        return self.fraction is None or (math.isfinite(self.fp64) and Fraction(self.fp64) == self.fraction)


def read_number(text: str) -> Number:
    """Return a number from its text, rounded once to FP64.

    The text may be '0.1', '-1e-8', '0x1p-24', '2^-24', a sum such as '1+2^-11+2^-30', 'inf' or 'nan'. Errors: UsageError.
    """
    if _WORD.fullmatch(text):
        return Number(text, None, float(text))
    try:
        if not _SUM.fullmatch(text):
            raise ValueError
        terms = [_term(term) for term in _TERM.findall(text)]
    except ValueError:
        raise UsageError(
            f"{text[:60] + ' ...' * (len(text) > 60)!r} is not a number; examples: "
            f"0.1, -1e-8, 0x1p-24, 2^-24, 1+2^-11, inf, nan (exponents of up to four digits)"
        ) from None
    exactly = sum(terms, Fraction(0))
    try:
        fp64 = float(exactly)
    except OverflowError:
        fp64 = math.inf if exactly > 0 else -math.inf
    if fp64 == 0 and len(terms) == 1 and text.startswith("-"):
        fp64 = -0.0
    return Number(text, exactly, fp64)


def _term(text: str) -> Fraction:
    """Return one term of a sum exactly. Errors: ValueError for more digits than Python reads."""
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-").lower()
    if text.startswith("2^"):
        return sign * Fraction(2) ** int(text[2:])
    if text.startswith("0x"):
        significand, _, power = text[2:].partition("p")
        whole, _, fraction = significand.partition(".")
        return sign * int(whole + fraction, 16) * Fraction(2) ** (int(power or 0) - 4 * len(fraction))
    return sign * Fraction(text)


def convention(fmt: str, overflow: str) -> str:
    """Return the argument `overflow` of `cast` for a format: the given one for 8 bits and fewer, 'inf' for wider formats."""
    return overflow if FORMATS[fmt].bits <= 8 else "inf"


def shown(value: float, fmt: str) -> str:
    """Return a value as text: exactly if 12 digits suffice, otherwise with as many digits as identify it in its format."""
    if math.isnan(value):
        return "NaN"
    exactly = f"{value:.12g}"
    if float(exactly) == value:
        return exactly
    power = power_of_two(value)
    return digits(value, fmt) + f" ({power})" * bool(power)


def power_of_two(value: float) -> str:
    """Return '2^-24' for 2^-24, '-2^3' for -8, and '' for a value that is not a power of two."""
    significand, exponent = math.frexp(value)
    return f"{'-' * (value < 0)}2^{exponent - 1}" if abs(significand) == 0.5 else ""


def fields(y: Any, fmt: str) -> str:
    """Return a value's bits; for TF32 without the last 13, which are zero: it has 10 of the 23 fraction bits of fp32."""
    dropped = FORMATS["fp32"].fraction_bits - FORMATS["tf32"].fraction_bits
    return bit_string(y)[:-dropped] if fmt == "tf32" else bit_string(y)
