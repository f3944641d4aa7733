"""One rounding as a lesson: the steps of `numerics.rounding` for one number, a line for each."""

from __future__ import annotations

import math
from decimal import ROUND_DOWN, Context, Decimal, Inexact
from fractions import Fraction

import numpy as np

from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS, Format
from refimpl.numerics.rounding import Steps, floor_log2, round_to_nearest_even, rounding_steps
from refimpl.tools.formats.numbers import Number, convention, fields, power_of_two, shown
from refimpl.training.columns import table

Line = tuple[str, str]
"""A label and a text."""


def explained(number: Number, fmt: str, overflow: str = "saturate") -> str:
    """Return the steps by which `round_to_nearest_even` rounds a number from its exact value, in at most 80 columns.

    The last line compares with `cast`, which is handed the FP64 number. overflow: as in `report.store`.
    """
    row, overflow = FORMATS[fmt], convention(fmt, overflow)
    x = number.fraction or number.fp64  # of a zero the latter, which has the sign
    lines = [("number", _as_given(number))]
    if reason := _no_steps(number, row):
        lines.append(("steps", f"none: {reason}"))
    else:
        steps = rounding_steps(x, fmt)
        lines += [*_step_lines(Fraction(x), steps, row), *_limit_lines(steps, row, overflow)]
    result = x if x != x else round_to_nearest_even(x, fmt, overflow)
    y = cast(np.array(result), fmt, overflow=overflow)  # one of the format's values: this rounds nothing
    lines += [("stored", shown(float(y), fmt)), ("as bits", fields(y, fmt))]
    if not reason and steps.value <= row.max:
        lines.append(("error", f"{decimal((Fraction(float(y)) - Fraction(x)) / steps.ulp, 12)} ulp, stored minus given"))
    lines.append(("cast", _compared(number, fields(y, fmt), fmt, overflow)))
    return f"{_cut(number.text)} to {fmt}: to nearest, ties to even\n{table((), lines, '  ')}"


def _no_steps(number: Number, row: Format) -> str:
    """Return why there is nothing to round: NaN, infinities and zero, and negative numbers in a format without sign."""
    if math.isnan(number.fp64):
        return "NaN stays NaN" if row.specials != "none" else f"{row.name} has no NaN, and `cast` makes it a zero"
    if not row.sign_bits and number.fp64 <= 0 and not (number.fraction and number.fraction > 0):
        return f"{row.name} has neither zero nor negative numbers"
    if number.fraction is None:
        return "an infinity becomes what numbers become that are too large"
    return f"zero is a value of {row.name}, with its sign" if not number.fraction else ""


def _step_lines(x: Fraction, steps: Steps, row: Format) -> list[Line]:
    """Return the lines from the sign to the rounded value."""
    binade, smallest = floor_log2(abs(x)), floor_log2(Fraction(row.smallest_normal))
    below = f", below 2^{smallest}: {'subnormal' if row.fraction_bits else 'too small'}" if binade < smallest else ""
    reason = f"{row.name} has {row.fraction_bits} fraction bits" if not below else "the ulp of the smallest normal values"
    kept, guard, sticky = steps.kept, int(steps.guard), int(steps.sticky)
    lines = [
        ("sign", f"{int(x < 0)}, {'negative' if x < 0 else 'positive'}" if row.sign_bits else f"{row.name} has none"),
        ("binade", f"2^{binade} <= |x| < 2^{binade + 1}{below}"),
        ("ulp", f"2^({steps.exponent} - {row.fraction_bits}) = {_power(steps.ulp)}, {reason}"),
        ("in ulps", f"|x| = ({kept} + {decimal(steps.rest, 12)}) ulp"),
        ("bits", "kept | guard | after the guard"),
        ("", f"{_binary(kept, row)} | {guard} | {_after_guard(steps, 56 - row.fraction_bits)}"),
        ("sticky", f"{sticky}, there is {'a' if sticky else 'no'} 1 after the guard bit"),
    ]
    if not steps.rest:
        lines.append(("round", "nothing to round: the number is a value of the format"))
    elif not steps.guard:
        lines.append(("round", f"less than half an ulp: down, to {kept} ulp"))
    elif steps.sticky:
        lines.append(("round", f"more than half an ulp: up, to {kept + 1} ulp"))
    elif steps.up:
        lines.append(("round", f"a tie, and {kept} is odd: up, to {kept + 1} ulp"))
    else:
        lines.append(("round", f"a tie, and {kept} is even: down, to {kept} ulp"))
    rounded = kept + steps.up
    if steps.up and rounded == 2 ** (row.fraction_bits + 1):
        lines.append(("carry", "all kept bits were 1: the next binade begins"))
    elif steps.up and rounded == 2**row.fraction_bits > 1:
        lines.append(("carry", "all fraction bits were 1: now it is a normal value"))
    lines.append(("value", f"{rounded} * {_power(steps.ulp)} = {decimal(steps.value)}"))
    return lines


def _limit_lines(steps: Steps, row: Format, overflow: str) -> list[Line]:
    """Return what happens beyond the largest and the smallest value."""
    if steps.value > row.max:
        result = round_to_nearest_even(steps.value, row.name, overflow)
        largest = power_of_two(row.max) or shown(row.max, row.name)
        stored = "it" if result == row.max else shown(result, row.name)
        chosen = f" (--overflow {overflow})" * (row.bits <= 8 and row.specials != "none")
        return [("overflow", f"beyond {largest}, the largest value: {stored} is stored{chosen}")]
    if steps.value == 0:
        lost = "the number is lost" if row.sign_bits else f"{row.name} has no zero: its smallest value is stored"
        return [("zero", lost)]
    return []


def _compared(number: Number, bits: str, fmt: str, overflow: str) -> str:
    """Return what `cast` makes of the FP64 number, and by which formats it goes. bits: what one rounding gives."""
    y = cast(np.array(number.fp64), fmt, overflow=overflow)
    way = ["FP64"] * (not number.exact and fmt != "fp64") + ["FP32"] * (FORMATS[fmt].bits < 32)
    through = f" by way of {' and '.join(way)}" * bool(way)
    return f"the same{through}" if fields(y, fmt) == bits else f"{shown(float(y), fmt)}{through}: rounded more than once"


# --------------------------------------------------------------------------------------------------- numbers as text


def _as_given(number: Number) -> str:
    text = _cut(number.text)
    exactly = decimal(number.fraction) if number.fraction else text
    return text if exactly == text else f"{text} = {exactly}"


def _cut(text: str) -> str:
    return text if len(text) <= 32 else text[:29] + "..."


def decimal(x: Fraction, places: int = 20) -> str:
    """Return a fraction in decimal notation: exactly, or its first digits and '...' where it has more than `places`."""
    context = Context(prec=places, rounding=ROUND_DOWN)
    value = context.divide(Decimal(x.numerator), Decimal(x.denominator))
    more = "..." * context.flags[Inexact]
    if not more:
        value = value.normalize(context)
    if -7 <= value.adjusted() <= places:
        return f"{value:f}{more}"
    digits, _, exponent = f"{value:e}".partition("e")
    return f"{digits}{more}e{int(exponent)}"


def _power(ulp: Fraction) -> str:
    return f"2^{floor_log2(ulp)}"


def _binary(significand: int, row: Format) -> str:
    """Return a significand as binary digits with a point before the fraction: 3 as '1.1' in e2m1."""
    whole, fraction = divmod(significand, 2**row.fraction_bits)
    return f"{whole:b}.{fraction:0{row.fraction_bits}b}" if row.fraction_bits else f"{whole:b}"


def _after_guard(steps: Steps, room: int) -> str:
    """Return the bits after the guard bit, those that fit: '0' if there is none."""
    rest, digits = 2 * steps.rest % 1, ""
    while rest and len(digits) < min(room, 16):
        digits += str(int(rest >= Fraction(1, 2)))
        rest = 2 * rest % 1
    return (digits or "0") + "..." * bool(rest)
