"""scripts/formats.py --explain: the lines of a lesson are the steps of the rounding, and its result is that of the rounding."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from paths import ROOT
from script_loader import load_script

from refimpl.errors import UsageError
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.rounding import round_to_nearest_even, rounding_steps
from refimpl.tools.formats.explain import decimal, explained
from refimpl.tools.formats.numbers import read_number
from refimpl.tools.formats.report import show_formats, store


def run(*words: str) -> None:
    """What the script does with these words, in this process."""
    show_formats(**vars(load_script("formats").arguments(words)))


def lesson(text: str, fmt: str, overflow: str = "saturate") -> dict[str, str]:
    """The lines of a lesson by label; the line without a label, the bits, is 'fields'."""
    lines = explained(read_number(text), fmt, overflow).splitlines()[1:]
    width = re.match(r"  \w[\w ]*?  +", lines[0]).end()
    return {line[:width].strip() or "fields": line[width:] for line in lines}


def test_a_lesson() -> None:
    assert explained(read_number("-0.1"), "fp16") == """\
-0.1 to fp16: to nearest, ties to even
  number   -0.1
  sign     1, negative
  binade   2^-4 <= |x| < 2^-3
  ulp      2^(-4 - 10) = 2^-14, fp16 has 10 fraction bits
  in ulps  |x| = (1638 + 0.4) ulp
  bits     kept | guard | after the guard
           1.1001100110 | 0 | 1100110011001100...
  sticky   1, there is a 1 after the guard bit
  round    less than half an ulp: down, to 1638 ulp
  value    1638 * 2^-14 = 0.0999755859375
  stored   -0.0999755859375
  as bits  1|01011|1001100110
  error    0.4 ulp, stored minus given
  cast     the same by way of FP64 and FP32"""


LINES = [
    ("1", "fp16", "round", "nothing to round: the number is a value of the format"),
    ("1", "fp16", "fields", "1.0000000000 | 0 | 0"),
    ("1", "fp16", "sticky", "0, there is no 1 after the guard bit"),
    ("1", "fp32", "cast", "the same"),
    ("1+2^-11", "fp16", "round", "a tie, and 1024 is even: down, to 1024 ulp"),
    ("1+2^-10+2^-11", "fp16", "round", "a tie, and 1025 is odd: up, to 1026 ulp"),
    ("1+2^-10+2^-11", "fp16", "fields", "1.0000000001 | 1 | 0"),
    ("1+2^-10+2^-11", "fp16", "error", "0.5 ulp, stored minus given"),
    ("1+2^-11+2^-60", "fp16", "round", "more than half an ulp: up, to 1025 ulp"),
    ("1+2^-11+2^-60", "fp16", "in ulps", "|x| = (1024 + 0.500000000000...) ulp"),
    ("1+2^-11+2^-60", "fp16", "fields", "1.0000000000 | 1 | 0000000000000000..."),
    ("1+2^-11+2^-60", "fp16", "cast", "1 by way of FP64 and FP32: rounded more than once"),
    ("1+2^-11+2^-30", "fp16", "cast", "1 by way of FP32: rounded more than once"),
    ("2-2^-12", "fp16", "carry", "all kept bits were 1: the next binade begins"),
    ("2^-14-2^-26", "fp16", "carry", "all fraction bits were 1: now it is a normal value"),
    ("2^-14-2^-26", "fp16", "ulp", "2^(-14 - 10) = 2^-24, the ulp of the smallest normal values"),
    ("6e-8", "fp16", "binade", "2^-24 <= |x| < 2^-23, below 2^-14: subnormal"),
    ("2^-25", "fp16", "number", "2^-25 = 2.98023223876953125e-8"),
    ("2^-25", "fp16", "zero", "the number is lost"),
    ("-2^-25", "fp16", "stored", "-0"),
    ("65520", "fp16", "overflow", "beyond 65504, the largest value: inf is stored"),
    ("1e400", "fp64", "overflow", "beyond 1.7976931348623157e+308, the largest value: inf is stored"),
    ("465", "e4m3", "overflow", "beyond 448, the largest value: it is stored (--overflow saturate)"),
    ("7", "e2m1", "overflow", "beyond 6, the largest value: it is stored"),
    ("3", "e8m0", "carry", "all kept bits were 1: the next binade begins"),
    ("3", "e8m0", "sign", "e8m0 has none"),
    ("2^-129", "e8m0", "zero", "e8m0 has no zero: its smallest value is stored"),
    ("0.1", "fp64", "error", "0.4 ulp, stored minus given"),
    ("0.1", "tf32", "as bits", "0|01111011|1001100110"),
    ("nan", "fp16", "steps", "none: NaN stays NaN"),
    ("nan", "e2m1", "steps", "none: e2m1 has no NaN, and `cast` makes it a zero"),
    ("-0", "fp16", "steps", "none: zero is a value of fp16, with its sign"),
    ("-0", "fp16", "as bits", "1|00000|0000000000"),
    ("-inf", "fp16", "steps", "none: an infinity becomes what numbers become that are too large"),
    ("-inf", "e4m3", "stored", "-448"),
    ("-1", "e8m0", "steps", "none: e8m0 has neither zero nor negative numbers"),
    ("0", "e8m0", "stored", "NaN"),
]


@pytest.mark.parametrize(("text", "fmt", "label", "expected"), LINES)
def test_lines(text: str, fmt: str, label: str, expected: str) -> None:
    assert lesson(text, fmt)[label] == expected


def test_overflow_by_the_other_convention() -> None:
    assert lesson("465", "e4m3", "inf")["overflow"] == "beyond 448, the largest value: NaN is stored (--overflow inf)"
    assert lesson("1e39", "e8m0", "inf")["overflow"] == "beyond 2^127, the largest value: NaN is stored (--overflow inf)"
    assert lesson("-inf", "e5m2", "inf")["stored"] == "-inf"


def samples() -> list[str]:
    rng = np.random.default_rng(0)
    numbers = [float(x) for x in rng.standard_normal(40) * 2.0 ** rng.integers(-160, 140, 40)]
    sums = [f"2^{e}+2^{e - d}+2^{e - d - k}" for e, d, k in rng.integers((-30, 1, 1), (18, 60, 60), (40, 3)).tolist()]
    ties = [f"-2^{e}-2^{e - bits}" for e, bits in itertools.product((-133, -15, 0, 8, 1023), (2, 3, 4, 8, 11, 24, 53))]
    odd = ["0", "-0", "inf", "-inf", "nan", "1e400", "-1e-400", "9" * 100, "1e9999", "2^-9999", "1-2^-54"]
    return [*(repr(x) for x in numbers), *sums, *ties, *odd, "0." + "123456789" * 30]


@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_lesson_says_what_the_rounding_does(fmt: str, overflow: str) -> None:
    row = FORMATS[fmt]
    how = overflow if row.bits <= 8 else "inf"
    for text in samples():
        number = read_number(text)
        lines, by_cast = lesson(text, fmt, overflow), store(number.fp64, fmt, overflow)
        assert max(map(len, explained(number, fmt, overflow).splitlines())) <= 80, text
        assert lines["cast"].startswith("the same") == (lines["as bits"] == by_cast.bits), text
        x = number.fraction or number.fp64
        if math.isnan(number.fp64):
            continue
        result = round_to_nearest_even(x, fmt, how)
        assert float(lines["stored"].split()[0]) == pytest.approx(result, rel=2.0**-row.fraction_bits, nan_ok=True), text
        if "value" not in lines:
            assert not number.fraction or (x < 0 and fmt == "e8m0")
        else:
            kept, ulp = re.match(r"(\d+) \* 2\^(-?\d+) = ", lines["value"]).groups()
            steps = rounding_steps(x, fmt)
            assert int(kept) * Fraction(2) ** int(ulp) == steps.value, text
            assert ("overflow" in lines) == (steps.value > row.max) and ("zero" in lines) == (steps.value == 0), text
            fields = re.match(r"([01.]+) \| ([01]) \| ([01]+)(\.\.\.)?$", lines["fields"]).groups()
            assert int(fields[0].replace(".", ""), 2) == steps.kept, text
            assert (int(fields[1]), ("1" in fields[2]) or bool(fields[3])) == (steps.guard, steps.sticky), text


def test_decimals() -> None:
    assert [decimal(Fraction(*x)) for x in ((1, 10), (5, 2), (-1, 4), (0, 1), (10, 1))] == ["0.1", "2.5", "-0.25", "0", "10"]
    assert decimal(Fraction(1, 3), 5) == "0.33333..." and decimal(Fraction(-2, 3), 5) == "-0.66666..."
    assert decimal(Fraction(10) ** 30) == "1e30" and decimal(Fraction(1, 3) / 10**30, 5) == "3.3333...e-31"


# ------------------------------------------------------------------------------------------------------- the command line


def test_every_number_in_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    run("0.1", "-465", "--explain", "fp16,e4m3", "--overflow", "inf")
    expected = [explained(read_number(text), fmt, "inf") for text in ("0.1", "-465") for fmt in ("fp16", "e4m3")]
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--explain", "fp16"], "give it with a number: formats.py 0.1 --explain fp16"),
        (["1", "--explain", "fp17"], "unknown format 'fp17': choose one of fp64, fp32"),
        (["one", "--explain", "fp16"], "'one' is not a number"),
        (["1", "--explain", "fp16", "--json"], "instead of --format, --json and --plot"),
        (["1", "--explain", "fp16", "--format", "bf16"], "instead of --format, --json and --plot"),
        (["1", "--explain", "fp16", "--plot"], "instead of --format, --json and --plot"),
    ],
)
def test_errors_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        run(*words)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


def test_docs_show_what_is_printed() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    ((command, block),) = re.findall(r"    python scripts/formats.py ([^\n]+ --explain \w+)\n\n```\n(.+?)\n```", page, re.S)
    text, _, fmt = command.split()
    assert block == explained(read_number(text), fmt)
