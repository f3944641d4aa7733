"""What scripts/formats.py shows: the facts of each format, and what becomes of a number that is stored in it."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.bits import bit_string
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS, digits, ulp
from refimpl.tools.formats.plot import plot_formats
from refimpl.tools.precision_report.counts import Effects, effects_of
from refimpl.training.console import json_text, table

COMMON = ("fp32", "tf32", "fp16", "bf16", "e4m3", "e5m2", "e2m1")
"""The formats that numbers are shown in if none are chosen."""


def show_formats(
    values: Sequence[str] = (),
    formats: str | None = None,
    overflow: str = "saturate",
    plot: Path | None = None,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """What scripts/formats.py does: print the facts of the formats, or, given `values`, what each format makes of them.

    values: as `read_number` reads them. formats: names, with commas between them. overflow: of formats of 8 bits and
    fewer, as `cast` takes it. plot: where to draw the formats. Errors: UsageError for what it cannot read or write.
    """
    chosen = chosen_formats(formats) if formats is not None else None
    given = [read_number(text) for text in values]
    if plot is not None:
        shown = chosen or [fmt for fmt in FORMATS if fmt != "fp64"]  # beside fp64 the others would be dots
        print(f"drawn: {plot_formats(plot, shown, overwrite)}", file=sys.stderr)
    if as_json:
        numbers = [number_data(number, chosen or COMMON, overflow) for number in given]
        print(json_text({"formats": {fmt: facts(fmt) for fmt in chosen or FORMATS}, "numbers": numbers}))
    elif given:
        print(numbers_text(given, chosen or COMMON, overflow))
    else:
        print(facts_text(chosen or list(FORMATS)))


def chosen_formats(names: str) -> list[str]:
    """'fp16,bf16' -> ['fp16', 'bf16']. Errors: UsageError for an unknown one."""
    chosen = list(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in FORMATS:
            raise UsageError(f"no format {name!r}; there are {', '.join(FORMATS)}")
    return chosen


# ---------------------------------------------------------------------------------------------------- facts of a format


def facts(fmt: str) -> dict[str, Any]:
    """The facts of one format, as data. `bits` are those of information, `bytes` those of storage in an array."""
    row = FORMATS[fmt]
    return {
        "dtype": row.dtype.name,
        "sign_bits": row.sign_bits,
        "exponent_bits": row.exponent_bits,
        "fraction_bits": row.fraction_bits,
        "bits": row.bits,
        "bytes": row.itemsize,
        "infinity": row.has_inf,
        "nan": row.specials != "none",
        "max": row.max,
        "min": row.min,
        "smallest_normal": row.smallest_normal,
        "smallest_subnormal": row.smallest_subnormal if row.fraction_bits else None,
        "eps": row.eps,
        "resolution": resolution(fmt),
    }


def resolution(fmt: str) -> float:
    """10^-d, where every decimal number of d digits in the normal range can be told again from the value it is rounded to.

        d = floor(fraction_bits * log10(2))

    Source: digits10 of the C++ standard, [numeric.limits.members]. PyTorch: `torch.finfo(dtype).resolution`. Differs from
    ml_dtypes.finfo, which counts another d for 8 bits and fewer.
    """
    return 10.0 ** -math.floor(FORMATS[fmt].fraction_bits * math.log10(2))


def facts_text(chosen: Sequence[str]) -> str:
    """Two tables, layouts and numbers, and the remarks on them."""
    layouts, numbers = [], []
    for fmt in chosen:
        fact = facts(fmt)
        layout = [fact[f"{field}_bits"] for field in ("sign", "exponent", "fraction")]
        kinds = ["yes" if fact[kind] else "no" for kind in ("infinity", "nan")]
        layouts.append([fmt, fact["dtype"], *map(str, [*layout, fact["bits"], fact["bytes"]]), *kinds])
        small = [_with_power(fact[name]) for name in ("smallest_normal", "smallest_subnormal", "eps")]
        numbers.append([fmt, _as_torch(fact["max"]), _as_torch(fact["min"]), *small, _as_torch(fact["resolution"])])
    return "\n\n".join(
        [
            "Layouts: sign, exponent and fraction bits, all bits of a value, and the bytes that it takes in an array.",
            table(["format", "dtype", "sign", "exponent", "fraction", "bits", "bytes", "infinity", "NaN"], layouts),
            "Numbers, as torch.finfo prints them, with powers of two beside.",
            table(["format", "max", "min", "smallest normal", "smallest subnormal", "eps", "resolution"], numbers),
            "\n".join(f"* {remark}" for remark in remarks(chosen)),
        ]
    ).rstrip()


def _as_torch(value: float) -> str:
    """Six digits, as torch.finfo prints its numbers."""
    return f"{value:.6g}"


def _with_power(value: float | None) -> str:
    return "-" if value is None else f"{_as_torch(value)} ({_power_of_two(value)})"


def _power_of_two(value: float) -> str:
    """'2^-24' for 2^-24, '-2^3' for -8, and nothing for a value that is no power of two."""
    significand, exponent = math.frexp(value)
    return f"{'-' * (value < 0)}2^{exponent - 1}" if abs(significand) == 0.5 else ""


def remarks(chosen: Sequence[str]) -> list[str]:
    """What is often told wrong of these formats: the remarks that are about the chosen ones only."""
    fp32, tf32, fp16, bf16, e2m1 = (FORMATS[fmt] for fmt in ("fp32", "tf32", "fp16", "bf16", "e2m1"))
    every = [
        (
            {"fp32", "fp16", "bf16"},
            f"fp32 and fp16 do not share a range: fp32 has {fp32.exponent_bits} exponent bits and ends at"
            f" {_as_torch(fp32.max)}, fp16 has {fp16.exponent_bits} and ends at {_as_torch(fp16.max)}."
            f"\n  It is bf16 that has the {bf16.exponent_bits} exponent bits of fp32, and nearly its range: it ends at"
            f" {_as_torch(bf16.max)}.",
        ),
        (
            {"fp32", "tf32", "bf16"},
            f"There is no 'bf32'. Of fp32's {fp32.fraction_bits} fraction bits bf16 keeps {bf16.fraction_bits} and tf32"
            f" {tf32.fraction_bits}; both keep its exponent bits.",
        ),
        (
            {"tf32"},
            "tf32 is a mode of matrix units and no array type: its values are stored as fp32,"
            f" in {tf32.itemsize} bytes, of which it uses {tf32.bits} bits.",
        ),
        (
            {"fp16", "bf16"},
            "eps is the distance from 1 to the next value; from 2^e to 2^(e+1) it is eps * 2^e, down to the smallest normal."
            "\n  It is not `resolution`, which is 10^-d for the d decimal digits that a format always keeps:"
            f"\n  fp16 has eps {_as_torch(fp16.eps)} and resolution {_as_torch(resolution('fp16'))},"
            f" bf16 {_as_torch(bf16.eps)} and {_as_torch(resolution('bf16'))}.",
        ),
        (
            {"fp16"},
            "`tiny` of torch.finfo is the smallest normal value, not the smallest one: below"
            f" {_power_of_two(fp16.smallest_normal)} fp16 goes on with"
            f"\n  subnormal values, {_power_of_two(fp16.smallest_subnormal)} apart, down to that.",
        ),
        (
            {"e4m3"},
            "e4m3 has no infinity. What is too large for it becomes NaN in ml_dtypes, and the largest value in PyTorch 2.13.",
        ),
        (
            {"e2m1"},
            f"An array of e2m1 takes a byte a value, though it has {e2m1.bits} bits; packed, {8 // e2m1.bits} fill a byte.",
        ),
        (
            {"e8m0"},
            "e8m0 is for scales: powers of two without sign, zero or subnormals. 0 and negative numbers become NaN here and"
            "\n  in ml_dtypes; PyTorch takes the magnitude, and for 0 the smallest value.",
        ),
    ]
    return [remark for about, remark in every if about <= set(chosen)]


# ---------------------------------------------------------------------------------------------------- numbers as written

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
    """A number as a person wrote it, as FP64 holds it, and whether that is what was written."""

    text: str
    fp64: float
    exact: bool


def read_number(text: str) -> Number:
    """'0.1', '-1e-8', '0x1p-24', '2^-24', sums of them such as '1+2^-11+2^-30', 'inf' or 'nan', rounded to FP64 once.

    Errors: UsageError for anything else.
    """
    if _WORD.fullmatch(text):
        return Number(text, float(text), True)
    try:
        if not _SUM.fullmatch(text):
            raise ValueError
        terms = [_term(term) for term in _TERM.findall(text)]
    except ValueError:
        raise UsageError(
            f"{text[:60] + ' ...' * (len(text) > 60)!r} is no number; these are: "
            f"0.1, -1e-8, 0x1p-24, 2^-24, 1+2^-11, inf, nan (exponents of up to four digits)"
        ) from None
    exactly = sum(terms, Fraction(0))
    try:
        fp64 = float(exactly)
    except OverflowError:
        fp64 = math.inf if exactly > 0 else -math.inf
    if fp64 == 0 and len(terms) == 1 and text.startswith("-"):
        fp64 = -0.0
    return Number(text, fp64, math.isfinite(fp64) and Fraction(fp64) == exactly)


def _term(text: str) -> Fraction:
    """One term of a sum, exactly. Errors: ValueError for more digits than Python reads."""
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-").lower()
    if text.startswith("2^"):
        return sign * Fraction(2) ** int(text[2:])
    if text.startswith("0x"):
        significand, _, power = text[2:].partition("p")
        whole, _, fraction = significand.partition(".")
        return sign * int(whole + fraction, 16) * Fraction(2) ** (int(power or 0) - 4 * len(fraction))
    return sign * Fraction(text)


# ---------------------------------------------------------------------------------------------------- numbers as stored


@dataclass(frozen=True)
class Stored:
    """One number in one format.

    bits: sign|exponent|fraction. value: what is stored; shown: the same for the eye. happened: what the rounding did.
    error_ulps: (value - number) / ulp, signed, from the FP64 number; None where the number is beyond the format.
    """

    bits: str
    value: float
    shown: str
    error_ulps: float | None
    happened: str


def store(number: float, fmt: str, overflow: str = "saturate") -> Stored:
    """Round an FP64 number to a format by `cast`, and say what happened.

    overflow: 'saturate' or 'inf', for formats of 8 bits and fewer; the wider ones always overflow to infinity.
    """
    y = _cast(number, fmt, overflow)
    value = float(y)
    effects = effects_of(np.array(number), y, fmt)
    happened = _what_happened(number, value, fmt, effects)
    once = float(_cast(rounded_once(number, fmt), fmt, overflow))
    if once != value and not (math.isnan(once) and math.isnan(value)):
        happened += f", {_TWICE}; one rounding gives {shown(once, fmt)}"
    other_way = "inf" if overflow == "saturate" else "saturate"
    other = _cast(number, fmt, other_way)
    if bit_string(other) != bit_string(y):
        happened += f" (--overflow {other_way}: {shown(float(other), fmt)})"
    within = math.isfinite(number) and math.isfinite(value) and not effects.saturated
    error = (value - number) / ulp(fmt, number) if within else None
    return Stored(_fields(y, fmt), value, shown(value, fmt), error, happened)


_TWICE = "by way of fp32"


def _cast(number: float, fmt: str, overflow: str) -> Any:
    return cast(np.array(number), fmt, overflow=overflow if FORMATS[fmt].bits <= 8 else None)


def _fields(y: Any, fmt: str) -> str:
    """`bits`; for TF32 without the last 13, which are zero: it has 10 of the 23 fraction bits of the fp32 that stores it."""
    dropped = FORMATS["fp32"].fraction_bits - FORMATS["tf32"].fraction_bits
    return bit_string(y)[:-dropped] if fmt == "tf32" else bit_string(y)


def rounded_once(number: float, fmt: str) -> float:
    """The nearest value of a format without a largest one, in a single rounding from FP64.

        round(|number| / ulp) * ulp        round: to the nearest integer, ties to the even one

    `cast` goes by way of fp32 instead, as PyTorch does: where the first rounding lands on a tie, the second can differ.
    e8m0 has no zero: what would round to it becomes the smallest value. Infinities and NaN are returned as they are.
    Source: IEEE 754-2019 section 4.3.1 (roundTiesToEven); Figueroa 1995, 'When is double rounding innocuous?'.
    """
    if not math.isfinite(number):
        return number
    step = ulp(fmt, number)
    nearest = math.copysign(round(abs(number) / step) * step, number)
    return max(nearest, FORMATS[fmt].smallest_normal) if not FORMATS[fmt].sign_bits and number > 0 else nearest


def _what_happened(number: float, value: float, fmt: str, effects: Effects) -> str:
    row = FORMATS[fmt]
    if math.isnan(number):
        return "NaN" if math.isnan(value) else f"no NaN in this format: becomes {value:g}"
    if value == number:
        return "exact" + ", subnormal" * bool(effects.subnormal)
    if not row.sign_bits and number < row.smallest_normal:  # e8m0 has no sign and no zero
        return "no such value: becomes NaN" if math.isnan(value) else "below the smallest value: raised to it"
    if not math.isfinite(value):
        return f"overflow to {shown(value, fmt)}"
    if effects.saturated or math.isinf(number):
        return "saturated" + ", for there is no infinity and no NaN" * (row.specials == "none")
    tie = "tie to even" if row.fraction_bits else "tie, goes up"  # e8m0 has no fraction that could be even
    if effects.flushed:
        return "flushed to zero" + f", a {tie}" * bool(effects.tie)
    return (tie if effects.tie else "rounded") + ", subnormal" * bool(effects.subnormal)


def shown(value: float, fmt: str) -> str:
    """A value of a format for the eye: exactly if 12 digits can, otherwise as many digits as tell it apart."""
    if math.isnan(value):
        return "NaN"
    exactly = f"{value:.12g}"
    if float(exactly) == value:
        return exactly
    power = _power_of_two(value)
    return digits(value, fmt) + f" ({power})" * bool(power)


def numbers_text(numbers: Sequence[Number], chosen: Sequence[str], overflow: str) -> str:
    """A table for each number, a row a format, and the key to them."""
    header = ["format", "bits", "stored", "error, ulps", "what happened"]
    parts = []
    for number in numbers:
        rows = []
        for fmt in chosen:
            y = store(number.fp64, fmt, overflow)
            error = "-" if y.error_ulps is None else f"{y.error_ulps:+.4g}" if y.error_ulps else "0"
            rows.append([fmt, y.bits, y.shown, error, y.happened])
        parts.append(f"{_as_fp64(number)}\n{table(header, rows, '  ')}")
    key = [
        "bits: sign|exponent|fraction. error: stored less given (the FP64 number), in ulps, the distance between the values of",
        "the format around the given one; '-' where it is beyond the format.",
    ]
    if any(FORMATS[fmt].bits <= 8 for fmt in chosen):
        key.append(f"Formats of 8 bits and fewer: --overflow {overflow}. {_CONVENTIONS[overflow]}")
    if any(_TWICE in part for part in parts):
        key.append(f"{_TWICE}: rounded twice, from FP64 to fp32 and from there to the format, as PyTorch does it.")
    return "\n\n".join([*parts, "\n".join(key)])


_CONVENTIONS = {
    "saturate": "What is too large becomes the largest value, as in PyTorch 2.13's .to(float8_e4m3fn).",
    "inf": "What is too large becomes an infinity or NaN where the format has one, as in ml_dtypes.",
}


def _as_fp64(number: Number) -> str:
    if number.exact:
        return number.text + " (exact in FP64)" * math.isfinite(number.fp64)
    return f"{number.text} is not an FP64 number: it is read as {number.fp64:.25g}, and rounded from there"


def number_data(number: Number, chosen: Sequence[str], overflow: str) -> dict[str, Any]:
    """One number in the chosen formats, as data; fp64 is null for infinities and NaN, which `text` tells."""
    stored = {fmt: asdict(store(number.fp64, fmt, overflow)) for fmt in chosen}
    return {"text": number.text, "fp64": number.fp64, "exact_in_fp64": number.exact, "overflow": overflow, "stored": stored}
