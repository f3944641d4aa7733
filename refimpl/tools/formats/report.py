"""The `formats` command: the facts of each format, and how it stores a given number. Lessons: `explain.py`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError, unknown
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS, ulp
from refimpl.numerics.rounding import round_to_nearest_even
from refimpl.numerics.rounding_effects import Effects, effects_of
from refimpl.tools.formats.explain import explained
from refimpl.tools.formats.numbers import Number, convention, fields, power_of_two, read_number, shown
from refimpl.tools.formats.plot import plot_formats
from refimpl.training.columns import table
from refimpl.training.console import json_text

COMMON = ("fp32", "tf32", "fp16", "bf16", "e4m3", "e5m2", "e2m1")
"""The formats in which numbers are shown by default."""


def show_formats(
    values: Sequence[str] = (),
    formats: str | None = None,
    overflow: str = "saturate",
    plot: Path | None = None,
    overwrite: bool = False,
    as_json: bool = False,
    explain: str | None = None,
) -> None:
    """Print the facts of the formats or, if there are `values`, how each format stores them.

    values: texts for `read_number`. formats: comma-separated names. overflow: argument of `cast` for formats of 8 bits and
    fewer. plot: a file to draw the formats in. explain: formats, as `formats`, in which to show each rounding step by step.
    Errors: UsageError for arguments that cannot be read or do not go together, or a file that cannot be written.
    """
    chosen = chosen_formats(formats) if formats is not None else None
    given = [read_number(text) for text in values]
    if explain is not None:
        if not given or chosen or as_json or plot:
            wrong = "instead of --format, --json and --plot" if given else "with a number: formats.py 0.1 --explain fp16"
            raise UsageError(f"--explain prints how a number is rounded: give it {wrong}")
        print("\n\n".join(explained(number, fmt, overflow) for number in given for fmt in chosen_formats(explain)))
        return
    if plot is not None:
        shown = chosen or [fmt for fmt in FORMATS if fmt != "fp64"]  # on fp64's scale the others would be dots
        print(f"drawn: {plot_formats(plot, shown, overwrite)}", file=sys.stderr)
    if as_json:
        numbers = [number_data(number, chosen or COMMON, overflow) for number in given]
        print(json_text({"formats": {fmt: facts(fmt) for fmt in chosen or FORMATS}, "numbers": numbers}))
    elif given:
        print(numbers_text(given, chosen or COMMON, overflow))
    else:
        print(facts_text(chosen or list(FORMATS)))


def chosen_formats(names: str) -> list[str]:
    """Return the names of formats: 'fp16,bf16' -> ['fp16', 'bf16']. Errors: UsageError for an unknown name."""
    chosen = list(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in FORMATS:
            raise UsageError(unknown("format", name, FORMATS))
    return chosen


# ---------------------------------------------------------------------------------------------------- facts of a format


def facts(fmt: str) -> dict[str, Any]:
    """Return the facts of a format as data. `bits` counts the bits of a value, `bytes` its size in an array."""
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
    """Return 10^-d, where d decimal digits in the normal range survive the conversion to the format and back.

        d = floor(fraction_bits * log10(2))

    Source: digits10 of the C++ standard, [numeric.limits.members]. PyTorch: `torch.finfo(dtype).resolution`. Differs from
    ml_dtypes.finfo, which counts another d for 8 bits and fewer.
    """
    return 10.0 ** -math.floor(FORMATS[fmt].fraction_bits * math.log10(2))


def facts_text(chosen: Sequence[str]) -> str:
    """Return two tables, layouts and numbers, with remarks."""
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
            "Layouts: sign, exponent, fraction and all bits of a value, and its bytes in an array.",
            table(["format", "dtype", "sign", "exponent", "fraction", "bits", "bytes", "infinity", "NaN"], layouts),
            "Numbers, as torch.finfo prints them, with powers of two.",
            table(["format", "max", "min", "smallest normal", "smallest subnormal", "eps", "resolution"], numbers),
            "\n".join(f"* {remark}" for remark in remarks(chosen)),
        ]
    ).rstrip()


def _as_torch(value: float) -> str:
    """Return a number with six digits, as torch.finfo prints it."""
    return f"{value:.6g}"


def _with_power(value: float | None) -> str:
    return "-" if value is None else f"{_as_torch(value)} ({power_of_two(value)})"


def remarks(chosen: Sequence[str]) -> list[str]:
    """Return remarks on common errors about the chosen formats."""
    fp32, tf32, fp16, bf16, e2m1 = (FORMATS[fmt] for fmt in ("fp32", "tf32", "fp16", "bf16", "e2m1"))
    every = [
        (
            {"fp32", "fp16", "bf16"},
            f"fp32 and fp16 do not share a range: fp32 has {fp32.exponent_bits} exponent bits and ends at"
            f" {_as_torch(fp32.max)}, fp16 has {fp16.exponent_bits} and ends at {_as_torch(fp16.max)}."
            f" bf16 has the {bf16.exponent_bits} exponent bits of fp32, and nearly its range: it ends at"
            f" {_as_torch(bf16.max)}.",
        ),
        (
            {"fp32", "tf32", "bf16"},
            f"There is no 'bf32'. Of fp32's {fp32.fraction_bits} fraction bits bf16 keeps {bf16.fraction_bits} and tf32"
            f" {tf32.fraction_bits}; both keep its exponent bits.",
        ),
        (
            {"tf32"},
            "tf32 is a mode of matrix units, not an array type: its values are stored as fp32,"
            f" in {tf32.itemsize} bytes, of which it uses {tf32.bits} bits.",
        ),
        (
            {"fp16", "bf16"},
            "eps is the distance from 1 to the next value; from 2^e to 2^(e+1) it is eps * 2^e, down to the smallest normal."
            " It differs from `resolution`, which is 10^-d for the d decimal digits that a format always keeps:"
            f" fp16 has eps {_as_torch(fp16.eps)} and resolution {_as_torch(resolution('fp16'))},"
            f" bf16 {_as_torch(bf16.eps)} and {_as_torch(resolution('bf16'))}.",
        ),
        (
            {"fp16"},
            "`tiny` of torch.finfo is the smallest normal value, not the smallest value: below"
            f" {power_of_two(fp16.smallest_normal)} fp16 has"
            f" subnormal values at a distance of {power_of_two(fp16.smallest_subnormal)}.",
        ),
        (
            {"e4m3"},
            "e4m3 has no infinity. Larger numbers become NaN in ml_dtypes, and the largest value in PyTorch 2.13.",
        ),
        (
            {"e2m1"},
            f"An array of e2m1 takes one byte per value, not {e2m1.bits} bits; packed, {8 // e2m1.bits} values fill a byte.",
        ),
        (
            {"e8m0"},
            "e8m0 is for scales: powers of two without sign, zero or subnormals. 0 and negative numbers become NaN here and"
            " in ml_dtypes; PyTorch uses the magnitude, and for 0 the smallest value.",
        ),
    ]
    return [remark for about, remark in every if about <= set(chosen)]


# ---------------------------------------------------------------------------------------------------- numbers as stored


@dataclass(frozen=True)
class Stored:
    """One number in one format.

    bits: sign|exponent|fraction. value: the stored value; shown: its text. happened: what the rounding did.
    error_ulps: (value - number) / ulp, signed, from the FP64 number; None if the number is beyond the format.
    """

    bits: str
    value: float
    shown: str
    error_ulps: float | None
    happened: str


def store(number: float, fmt: str, overflow: str = "saturate") -> Stored:
    """Round an FP64 number to a format by `cast`, and describe the result.

    `cast` rounds FP64 numbers to FP32 first if the format is narrower, which is said where it changes the result.
    overflow: 'saturate' or 'inf', for formats of 8 bits and fewer; wider ones always overflow to infinity.
    Source: Figueroa 1995, 'When is double rounding innocuous?'.
    """
    y = _cast(number, fmt, overflow)
    value = float(y)
    effects = effects_of(np.array(number), y, fmt)
    happened = _what_happened(number, value, fmt, effects)
    once = value if math.isnan(number) else round_to_nearest_even(number, fmt, convention(fmt, overflow))
    if once != value and not (math.isnan(once) and math.isnan(value)):
        happened += f", {_TWICE}; one rounding gives {shown(once, fmt)}"
    other_way = "inf" if overflow == "saturate" else "saturate"
    other = _cast(number, fmt, other_way)
    if fields(other, fmt) != fields(y, fmt):
        happened += f" (--overflow {other_way}: {shown(float(other), fmt)})"
    within = math.isfinite(number) and math.isfinite(value) and not effects.saturated
    error = (value - number) / ulp(fmt, number) if within else None
    return Stored(fields(y, fmt), value, shown(value, fmt), error, happened)


_TWICE = "through fp32"


def _cast(number: float, fmt: str, overflow: str) -> Any:
    return cast(np.array(number), fmt, overflow=convention(fmt, overflow))


def _what_happened(number: float, value: float, fmt: str, effects: Effects) -> str:
    row = FORMATS[fmt]
    if math.isnan(number):
        return "NaN" if math.isnan(value) else f"the format has no NaN: becomes {value:g}"
    if value == number:
        return "exact" + ", subnormal" * bool(effects.subnormal)
    if not row.sign_bits and number < row.smallest_normal:  # e8m0 has no sign and no zero
        return "no such value: becomes NaN" if math.isnan(value) else "below the smallest value: raised to it"
    if not math.isfinite(value):
        return f"overflow to {shown(value, fmt)}"
    if effects.saturated or math.isinf(number):
        return "saturated" + ": the format has no infinity and no NaN" * (row.specials == "none")
    tie = "tie to even" if row.fraction_bits else "tie, rounded up"  # e8m0 has no fraction that could be even
    if effects.flushed:
        return "flushed to zero" + f", a {tie}" * bool(effects.tie)
    return (tie if effects.tie else "rounded") + ", subnormal" * bool(effects.subnormal)


def numbers_text(numbers: Sequence[Number], chosen: Sequence[str], overflow: str) -> str:
    """Return one table per number, with one row per format, and a key."""
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
        "bits: sign|exponent|fraction. error: stored minus given (the FP64 number), in ulps, the distance between values of",
        "the format around the given number; '-': the number is beyond the format.",
    ]
    if any(FORMATS[fmt].bits <= 8 for fmt in chosen):
        key.append(f"Formats of 8 bits and fewer: --overflow {overflow}. {_CONVENTIONS[overflow]}")
    if any(_TWICE in part for part in parts):
        key.append(f"{_TWICE}: rounded twice, from FP64 to fp32 and from there to the format, as in PyTorch.")
    return "\n\n".join([*parts, "\n".join(key)])


_CONVENTIONS = {
    "saturate": "Numbers that are too large become the largest value, as in PyTorch 2.13's .to(float8_e4m3fn).",
    "inf": "Numbers that are too large become an infinity or NaN if the format has one, as in ml_dtypes.",
}


def _as_fp64(number: Number) -> str:
    if number.exact:
        return number.text + " (exact in FP64)" * math.isfinite(number.fp64)
    return f"{number.text} is not an FP64 number: it is read as {number.fp64:.25g}, and rounded from there"


def number_data(number: Number, chosen: Sequence[str], overflow: str) -> dict[str, Any]:
    """Return a number in the chosen formats as data; fp64 is null for infinities and NaN, which `text` identifies."""
    stored = {fmt: asdict(store(number.fp64, fmt, overflow)) for fmt in chosen}
    return {"text": number.text, "fp64": number.fp64, "exact_in_fp64": number.exact, "overflow": overflow, "stored": stored}
