"""scripts/formats.py: its facts are the libraries' finfo, and what it says of a rounding is what the rounding did.

Facts are held against numpy.finfo, ml_dtypes.finfo and torch.finfo; stored values against NumPy's and ml_dtypes' own
conversions and PyTorch's bits; the words at the boundaries are worked out by hand.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from paths import ROOT
from script_loader import load_script, run_here

from refimpl.errors import UsageError
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS
from refimpl.tools.formats.numbers import read_number, shown
from refimpl.tools.formats.plot import plot_formats, spacing
from refimpl.tools.formats.report import (
    COMMON,
    chosen_formats,
    facts,
    facts_text,
    number_data,
    numbers_text,
    remarks,
    resolution,
    show_formats,
    store,
)

NARROW = [fmt for fmt, row in FORMATS.items() if row.bits <= 8]
IN_TORCH = ["fp64", "fp32", "fp16", "bf16", "e4m3", "e5m2", "e8m0"]


def torch_dtype(torch: ModuleType, fmt: str) -> Any:
    return getattr(torch, FORMATS[fmt].dtype.name)


def run(*words: str) -> None:
    """What the script does with these words, in this process."""
    show_formats(**vars(load_script("formats").arguments(words)))


def rows(text: str) -> dict[str, list[str]]:
    """The words of the lines that begin with a format's name, remarks apart; of the last such line of two tables."""
    lines = text.partition("\n* ")[0].splitlines()
    return {words[0]: words[1:] for line in lines if (words := line.split()) and words[0] in FORMATS}


# ----------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "tf32"])
def test_facts_are_those_of_finfo(fmt: str) -> None:
    theirs, ours = ml_dtypes.finfo(FORMATS[fmt].dtype), facts(fmt)
    assert ours["max"] == float(theirs.max) and ours["min"] == float(theirs.min)
    assert ours["eps"] == float(theirs.eps)
    assert ours["smallest_normal"] == float(theirs.smallest_normal) == float(theirs.tiny)
    if fmt == "e8m0":  # ml_dtypes gives the smallest value, which is a normal one
        assert ours["smallest_subnormal"] is None and float(theirs.smallest_subnormal) == ours["smallest_normal"]
    else:
        assert ours["smallest_subnormal"] == float(theirs.smallest_subnormal)
    assert ours["bits"] == theirs.bits == ours["sign_bits"] + ours["exponent_bits"] + ours["fraction_bits"]
    assert (ours["exponent_bits"], ours["fraction_bits"]) == (theirs.nexp, theirs.nmant)
    assert ours["bytes"] == FORMATS[fmt].dtype.itemsize


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "tf32"])
def test_infinity_and_nan_are_there_where_a_code_holds_them(fmt: str) -> None:
    row = FORMATS[fmt]
    made = np.array([math.inf, math.nan]).astype(np.float32).astype(row.dtype).astype(np.float64)
    assert facts(fmt)["infinity"] == bool(np.isinf(made[0]))
    assert facts(fmt)["nan"] == bool(np.isnan(made[1]))


@pytest.mark.parametrize("fmt", ["fp64", "fp32", "fp16"])
def test_facts_and_resolution_are_those_of_numpy(fmt: str) -> None:
    theirs = np.finfo(FORMATS[fmt].dtype)
    assert (facts(fmt)["max"], facts(fmt)["eps"]) == (float(theirs.max), float(theirs.eps))
    assert facts(fmt)["smallest_subnormal"] == float(theirs.smallest_subnormal)
    assert resolution(fmt) == 10.0**-theirs.precision


def test_resolution_by_hand() -> None:
    digits = {"fp64": 15, "fp32": 6, "tf32": 3, "fp16": 3, "bf16": 2}
    assert {fmt: resolution(fmt) for fmt in FORMATS} == {fmt: 10.0 ** -digits.get(fmt, 0) for fmt in FORMATS}


def test_the_tables_print_what_torch_prints() -> None:
    torch = pytest.importorskip("torch")
    for fmt in IN_TORCH:
        theirs = torch.finfo(torch_dtype(torch, fmt))
        printed = dict(part.split("=") for part in str(theirs).removeprefix("finfo(").removesuffix(")").split(", "))
        ours = facts(fmt)
        assert theirs.tiny == ours["smallest_normal"]
        for name in ("resolution", "min", "max", "eps", "smallest_normal"):
            assert getattr(theirs, name) == ours[name], (fmt, name)
        cells = rows(facts_text([fmt]))[fmt]
        assert cells[:3] == [printed["max"], printed["min"], printed["smallest_normal"]], fmt
        assert cells[-1] == printed["resolution"] and printed["eps"] in cells


def test_tables_by_hand() -> None:
    text = facts_text(list(FORMATS))
    assert rows(text)["fp16"] == [
        "65504", "-65504", "6.10352e-05", "(2^-14)", "5.96046e-08", "(2^-24)", "0.000976562", "(2^-10)", "0.001",
    ]  # fmt: skip
    assert rows(text)["tf32"][:5] == ["3.40116e+38", "-3.40116e+38", "1.17549e-38", "(2^-126)", "1.14794e-41"]
    assert rows(text)["e8m0"][4:6] == ["-", "1"]
    layouts = rows(text.partition("Numbers")[0])
    assert layouts["bf16"] == ["bfloat16", "1", "8", "7", "16", "2", "yes", "yes"]
    assert layouts["tf32"] == ["float32", "1", "8", "10", "19", "4", "yes", "yes"]
    assert layouts["e2m1"] == ["float4_e2m1fn", "1", "2", "1", "4", "1", "no", "no"]
    assert layouts["e8m0"][1:] == ["0", "8", "0", "8", "1", "no", "yes"]


def test_remarks_are_about_the_chosen_formats_only() -> None:
    assert len(remarks(list(FORMATS))) == 8
    assert remarks(["fp64"]) == [] and not facts_text(["fp64"]).endswith("\n")
    (about,) = remarks(["tf32"])
    assert "stored as fp32, in 4 bytes, of which it uses 19 bits" in about
    together = " ".join(remarks(list(FORMATS)))
    assert "fp32 has 8 exponent bits and ends at 3.40282e+38, fp16 has 5 and ends at 65504." in together
    assert "the 8 exponent bits of fp32, and nearly its range: it ends at 3.38953e+38." in together
    assert "bf16 keeps 7 and tf32 10" in together
    assert "fp16 has eps 0.000976562 and resolution 0.001, bf16 0.0078125 and 0.01." in together
    assert "below 2^-14 fp16 has subnormal values at a distance of 2^-24" in together


def test_what_the_remarks_say_of_others_is_so() -> None:
    large = np.array([1000.0], np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert np.isnan(large.astype(np.float32)).all()
    assert np.isnan(np.array([0.0, -1.0], np.float32).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)).all()
    torch = pytest.importorskip("torch")
    assert torch.tensor([1000.0]).to(torch.float8_e4m3fn).float().tolist() == [448]
    assert torch.tensor([0.0, -4.0]).to(torch.float8_e8m0fnu).float().tolist() == [2.0**-127, 4]


# ------------------------------------------------------------------------------------------------------- reading numbers


@pytest.mark.parametrize(
    ("text", "value", "exact"),
    [
        ("0.1", 0.1, False),
        ("-0.1", -0.1, False),
        ("65520", 65520.0, True),
        ("65519.99", 65519.99, False),
        (".5", 0.5, True),
        ("5.", 5.0, True),
        ("+3", 3.0, True),
        ("6E-8", 6e-8, False),
        ("2^-24", 2.0**-24, True),
        ("-2^-24", -(2.0**-24), True),
        ("2^+4", 16.0, True),
        ("0x1p-24", 2.0**-24, True),
        ("-0X1.8P1", -3.0, True),
        ("0x.8", 0.5, True),
        ("0x1.00000000000008p0", 1.0, False),  # a tie at the 53rd bit
        ("1+2^-11+2^-30", 1 + 2**-11 + 2**-30, True),
        ("1-2^-53", 1 - 2**-53, True),
        ("1+2^-60", 1.0, False),
        ("1+2^-53+2^-80", 1 + 2**-52, False),  # rounded once: one after the other would give 1
        ("2^-1074", 5e-324, True),
        ("2^-1075", 0.0, False),
        ("9007199254740993", 9007199254740992.0, False),
        ("1e400", math.inf, False),
        ("-2^1024", -math.inf, False),
        ("1e-400", 0.0, False),
        ("inf", math.inf, True),
        ("-Infinity", -math.inf, True),
    ],
)
def test_numbers_are_read(text: str, value: float, exact: bool) -> None:
    number = read_number(text)
    assert (number.text, number.fp64, number.exact) == (text, value, exact)


def test_the_sign_of_zero_and_nan() -> None:
    signs = {text: math.copysign(1, read_number(text).fp64) for text in ("0", "-0", "-0.0", "-1e-400", "-1+1", "-0x0", "1-1")}
    assert signs == {"0": 1, "-0": -1, "-0.0": -1, "-1e-400": -1, "-1+1": 1, "-0x0": -1, "1-1": 1}
    assert math.isnan(read_number("nan").fp64) and read_number("nan").exact


@pytest.mark.parametrize("value", np.random.default_rng(0).standard_normal(50) * 10.0 ** np.arange(-25, 25))
def test_numbers_are_read_as_python_reads_them(value: float) -> None:
    for text in (repr(float(value)), f"{value:.25e}", f"{value:.3f}"):
        assert read_number(text).fp64 == float(text)
    assert read_number(float(value).hex()).fp64 == value


@pytest.mark.parametrize(
    "text",
    ["abc", "", "1 2", "1_0", "3^2", "2^", "2^-", "0x.", ".", "1e", "1e12345", "1+", "--1", "1+nan", "\u0663", "9" * 9999],
)
def test_what_is_no_number_is_said_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a number; examples: 0\.1, -1e-8, 0x1p-24, 2\^-24"):
        read_number(text)


# ------------------------------------------------------------------------------------------------------- storing numbers

TINY = 1 + 2.0**-40  # times this: just above

# number, format, stored value, what happened; what is too large for 8 bits and fewer saturates
AT_BOUNDARIES = [
    (1.0, "fp16", 1.0, "exact"),
    (0.1, "fp16", 0.0999755859375, "rounded"),
    (65504.0, "fp16", 65504.0, "exact"),
    (65519.99, "fp16", 65504.0, "rounded"),
    (65520.0, "fp16", math.inf, "overflow to inf"),
    (-65520.0, "fp16", -math.inf, "overflow to -inf"),
    (math.inf, "fp16", math.inf, "exact"),
    (1 + 2**-11, "fp16", 1.0, "tie to even"),
    (1 + 3 * 2**-11, "fp16", 1 + 2**-9, "tie to even"),
    (2.0**-14, "fp16", 2.0**-14, "exact"),
    (2.0**-14 - 2.0**-24, "fp16", 2.0**-14 - 2.0**-24, "exact, subnormal"),
    (2.0**-24, "fp16", 2.0**-24, "exact, subnormal"),
    (1.5 * 2.0**-24, "fp16", 2.0**-23, "tie to even, subnormal"),
    (6e-8, "fp16", 2.0**-24, "rounded, subnormal"),
    (2.0**-25, "fp16", 0.0, "flushed to zero, a tie to even"),
    (2.0**-25 * (1 + 2**-23), "fp16", 2.0**-24, "rounded, subnormal"),
    (-(2.0**-26), "fp16", -0.0, "flushed to zero"),
    (0.0, "fp16", 0.0, "exact"),
    (math.nan, "fp16", math.nan, "NaN"),
    (1 + 2**-8, "bf16", 1.0, "tie to even"),
    (1 + 3 * 2**-8, "bf16", 1 + 2**-6, "tie to even"),
    (FORMATS["bf16"].max, "bf16", FORMATS["bf16"].max, "exact"),
    (FORMATS["fp32"].max, "bf16", math.inf, "overflow to inf"),
    (2.0**-133, "bf16", 2.0**-133, "exact, subnormal"),
    (2.0**-134, "bf16", 0.0, "flushed to zero, a tie to even"),
    (2.0**-134 * 1.25, "bf16", 2.0**-133, "rounded, subnormal"),
    (65520.0, "tf32", 65536.0, "tie to even"),
    (1 + 2**-11 + 2**-20, "tf32", 1 + 2**-10, "rounded"),
    (2.0**-136, "tf32", 2.0**-136, "exact, subnormal"),
    (1e39, "tf32", math.inf, "overflow to inf"),
    (1 + 2**-24, "fp32", 1.0, "tie to even"),
    (2.0**-149, "fp32", 2.0**-149, "exact, subnormal"),
    (2.0**-150, "fp32", 0.0, "flushed to zero, a tie to even"),
    (1e300, "fp32", math.inf, "overflow to inf"),
    (0.1, "fp64", 0.1, "exact"),
    (5e-324, "fp64", 5e-324, "exact, subnormal"),
    (448.0, "e4m3", 448.0, "exact"),
    (464.0, "e4m3", 448.0, "tie to even"),
    (464.1, "e4m3", 448.0, "saturated (--overflow inf: NaN)"),
    (-1e9, "e4m3", -448.0, "saturated (--overflow inf: NaN)"),
    (math.inf, "e4m3", 448.0, "saturated (--overflow inf: NaN)"),
    (2.0**-9, "e4m3", 2.0**-9, "exact, subnormal"),
    (2.0**-10, "e4m3", 0.0, "flushed to zero, a tie to even"),
    (math.nan, "e4m3", math.nan, "NaN"),
    (57344.0, "e5m2", 57344.0, "exact"),
    (61439.0, "e5m2", 57344.0, "rounded"),
    (61440.0, "e5m2", 57344.0, "saturated (--overflow inf: inf)"),
    (-math.inf, "e5m2", -57344.0, "saturated (--overflow inf: -inf)"),
    (2.0**-17, "e5m2", 0.0, "flushed to zero, a tie to even"),
    (28.0, "e3m2", 28.0, "exact"),
    (30.0, "e3m2", 28.0, "saturated: the format has no infinity and no NaN"),
    (7.5, "e2m3", 7.5, "exact"),
    (0.0625, "e2m3", 0.0, "flushed to zero, a tie to even"),
    (6.0, "e2m1", 6.0, "exact"),
    (5.0, "e2m1", 4.0, "tie to even"),
    (7.0, "e2m1", 6.0, "saturated: the format has no infinity and no NaN"),
    (-100.0, "e2m1", -6.0, "saturated: the format has no infinity and no NaN"),
    (math.nan, "e2m1", -0.0, "the format has no NaN: becomes -0"),
    (2.0, "e8m0", 2.0, "exact"),
    (2.9, "e8m0", 2.0, "rounded"),
    (1.5, "e8m0", 2.0, "tie, rounded up"),
    (3.0, "e8m0", 4.0, "tie, rounded up"),
    (2.0**-127, "e8m0", 2.0**-127, "exact"),
    (2.0**-129, "e8m0", 2.0**-127, "below the smallest value: raised to it"),
    (1e39, "e8m0", 2.0**127, "saturated (--overflow inf: NaN)"),
    (0.0, "e8m0", math.nan, "no such value: becomes NaN"),
    (-1.0, "e8m0", math.nan, "no such value: becomes NaN"),
    (-math.inf, "e8m0", math.nan, "no such value: becomes NaN"),
    (math.nan, "e8m0", math.nan, "NaN"),
]


@pytest.mark.parametrize(("number", "fmt", "value", "happened"), AT_BOUNDARIES)
def test_what_happened_at_the_boundaries(number: float, fmt: str, value: float, happened: str) -> None:
    stored = store(number, fmt)
    assert stored.happened == happened
    assert stored.value == value or (math.isnan(stored.value) and math.isnan(value))
    assert math.isnan(value) or math.copysign(1, stored.value) == math.copysign(1, value)


@pytest.mark.parametrize(
    ("number", "fmt", "value", "happened"),
    [
        (464.0, "e4m3", 448.0, "tie to even"),
        (464.1, "e4m3", math.nan, "overflow to NaN (--overflow saturate: 448)"),
        (61440.0, "e5m2", math.inf, "overflow to inf (--overflow saturate: 57344)"),
        (-math.inf, "e5m2", -math.inf, "exact (--overflow saturate: -57344)"),
        (7.0, "e2m1", 6.0, "saturated: the format has no infinity and no NaN"),
        (1e39, "e8m0", math.nan, "overflow to NaN (--overflow saturate: 1.7e+38 (2^127))"),
        (70000.0, "fp16", math.inf, "overflow to inf"),
    ],
)
def test_what_happened_with_the_other_convention(number: float, fmt: str, value: float, happened: str) -> None:
    stored = store(number, fmt, "inf")
    assert stored.happened == happened
    assert stored.value == value or (math.isnan(stored.value) and math.isnan(value))


@pytest.mark.parametrize(
    ("number", "fmt", "happened"),
    [
        (1 + 2**-11 + 2**-30, "fp16", "rounded, through fp32; one rounding gives 1.0009765625"),
        (1 + 2**-8 + 2**-30, "bf16", "rounded, through fp32; one rounding gives 1.0078125"),
        (1 + 2**-11 + 2**-30, "tf32", "rounded, through fp32; one rounding gives 1.0009765625"),
        (1 + 2**-4 + 2**-30, "e4m3", "rounded, through fp32; one rounding gives 1.125"),
        (65520 - 2**-20, "fp16", "overflow to inf, through fp32; one rounding gives 65504"),
        (2**-25 + 2**-60, "fp16", "flushed to zero, through fp32; one rounding gives 5.9605e-08 (2^-24)"),
        (464 + 2**-30, "e4m3", "saturated"),  # through fp32 and 464, which the other convention takes down to 448 too
        (1e-300, "e8m0", "no such value: becomes NaN, through fp32; one rounding gives 5.9e-39 (2^-127)"),
    ],
)
def test_rounding_twice_is_told_where_it_changes_the_result(number: float, fmt: str, happened: str) -> None:
    assert store(number, fmt).happened == happened


def test_rounding_twice_can_hide_an_overflow() -> None:
    assert store(464 + 2**-30, "e4m3", "inf").happened == "saturated, through fp32; one rounding gives NaN"


def samples(seed: int) -> list[float]:
    """FP64 numbers of all magnitudes that the formats have, many of them close to middles of narrow formats."""
    rng = np.random.default_rng(seed)
    anywhere = rng.standard_normal(300) * 2.0 ** rng.integers(-152, 130, 300)
    middles = (1 + rng.integers(0, 2**12, 300) / 2.0**12) * 2.0 ** rng.integers(-30, 18, 300)
    aside = middles * (1 + rng.choice([-1, 0, 1], 300) * 2.0 ** rng.integers(-50, -8, 300))
    return [float(x) for x in np.concatenate([anywhere, aside, -aside[:50]])]


@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_stored_is_what_cast_stores_and_off_by_half_an_ulp_at_most(fmt: str, overflow: str) -> None:
    for number in samples(1):
        stored = store(number, fmt, overflow)
        theirs = float(cast(np.array(number), fmt, overflow=overflow if fmt in NARROW else None))
        assert stored.value == theirs or (math.isnan(stored.value) and math.isnan(theirs))
        ended = any(word in stored.happened.partition(" (")[0] for word in ("overflow", "saturated", "no such value"))
        assert (stored.error_ulps is None) == ended
        if not ended:
            limit = 0.5 + ("through fp32" in stored.happened) * 2.0**-14  # half an ulp of fp32 in ulps of 10 fraction bits
            assert abs(stored.error_ulps) <= limit or "raised" in stored.happened
            assert (stored.error_ulps == 0) == stored.happened.startswith("exact")
            assert (stored.error_ulps > 0) == (stored.value > number)


@pytest.mark.parametrize("fmt", ["fp64", "fp32", "fp16", "bf16", "e4m3", "e5m2"])
def test_bits_are_pytorchs(fmt: str) -> None:
    torch = pytest.importorskip("torch")
    row, dtype = FORMATS[fmt], torch_dtype(torch, fmt)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[row.itemsize]
    # PyTorch saturates float8_e4m3fn, and gives float8_e5m2 an infinity
    overflow = "saturate" if fmt == "e4m3" else "inf"
    for number in [*samples(4), 0.0, -0.0, math.inf, -math.inf, 464.0, 464.1, 61440.0, 65520.0, 1 + 2**-11 + 2**-30]:
        code = torch.tensor(number, dtype=torch.float64).to(dtype).view(whole).item() % 2**row.bits
        fields = store(number, fmt, overflow).bits
        assert int(fields.replace("|", ""), 2) == code, number
        assert [len(field) for field in fields.split("|")] == [1, row.exponent_bits, row.fraction_bits]


def test_tf32_shows_its_own_nineteen_bits() -> None:
    assert store(1.0, "tf32").bits == "0|01111111|0000000000"
    assert store(-0.1, "tf32").bits == "1|01111011|1001100110"
    for number in samples(5):
        stored, code = store(number, "tf32"), np.array(store(number, "tf32").value, np.float32).view(np.uint32)
        assert int(stored.bits.replace("|", ""), 2) << 13 == int(code)


def test_a_value_is_shown_exactly_if_that_is_short() -> None:
    assert shown(0.0999755859375, "fp16") == "0.0999755859375"
    assert shown(float(np.float32(0.1)), "fp32") == "0.100000001"
    assert shown(-(2.0**-24), "fp16") == "-5.9605e-08 (-2^-24)"
    assert shown(-0.0, "fp16") == "-0" and shown(65504.0, "fp16") == "65504"
    assert [shown(x, "e5m2") for x in (math.inf, -math.inf, math.nan)] == ["inf", "-inf", "NaN"]


# ------------------------------------------------------------------------------------------------------- the command line


def test_text_of_a_number() -> None:
    text = numbers_text([read_number(word) for word in ("0.1", "65520", "1e400", "nan")], COMMON, "saturate")
    assert text.startswith("0.1 is not an FP64 number: it is read as 0.1000000000000000055511151, and rounded from there\n")
    assert "\n65520 (exact in FP64)\n" in text and "\n1e400 is not an FP64 number: it is read as inf" in text
    assert "\nnan\n" in text
    first = rows(text.partition("65520 (")[0])
    assert list(first) == list(COMMON)
    assert first["bf16"] == ["0|01111011|1001101", "0.10009765625", "+0.2", "rounded"]
    assert first["e2m1"] == ["0|00|0", "0", "-0.2", "flushed", "to", "zero"]
    assert "--overflow saturate" in text and "--overflow inf." in numbers_text([read_number("1")], COMMON, "inf")
    assert "--overflow" not in numbers_text([read_number("1")], ["fp16"], "saturate")
    assert "through fp32" not in text
    assert numbers_text([read_number("1+2^-11+2^-30")], ["fp16"], "saturate").count("through fp32") == 2  # row and key


@pytest.mark.parametrize("word", ["-0.1", "-1e-8", "-.5", "-2^-24", "-0x1p-24", "-inf", "-NaN", "-Infinity", "-1+2^-11"])
def test_negative_numbers_on_the_command_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(word, "--format", "fp16", "1", word)
    text = capsys.readouterr().out
    assert text.count(f"{word} is not an FP64 number") + text.count(f"{word} (exact in FP64)\n") + text.count(f"{word}\n") == 2
    assert rows(text)["fp16"][0].startswith("1|") or word == "-NaN"


def test_the_facts_are_printed_without_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr().out == facts_text(list(FORMATS)) + "\n"
    run("--format", "bf16,fp16,bf16")
    assert capsys.readouterr().out == facts_text(["bf16", "fp16"]) + "\n"


def test_overflow_and_the_chosen_formats_are_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    run("464.1", "--format", "e4m3", "--overflow", "inf")
    shown_rows = rows(capsys.readouterr().out)
    assert list(shown_rows) == ["e4m3"]
    assert shown_rows["e4m3"][:4] == ["0|1111|111", "NaN", "-", "overflow"]


def test_json_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    run("--json")
    assert json.loads(capsys.readouterr().out) == {"formats": {fmt: facts(fmt) for fmt in FORMATS}, "numbers": []}
    run("--json", "0.1", "-2^-25", "--format", "fp16,e4m3")
    data = json.loads(capsys.readouterr().out)
    assert data["formats"] == {fmt: facts(fmt) for fmt in ("fp16", "e4m3")}
    assert data["numbers"] == [number_data(read_number(text), ["fp16", "e4m3"], "saturate") for text in ("0.1", "-2^-25")]
    assert (data["numbers"][0]["fp64"], data["numbers"][0]["exact_in_fp64"]) == (0.1, False)
    assert data["numbers"][1]["stored"]["fp16"]["happened"] == "flushed to zero, a tie to even"
    run("--json", "inf", "--format", "fp16")
    (number,) = json.loads(capsys.readouterr().out)["numbers"]
    assert number["fp64"] is None and number["stored"]["fp16"]["value"] is None
    assert number["stored"]["fp16"]["shown"] == "inf" and number["stored"]["fp16"]["error_ulps"] is None


@pytest.mark.parametrize("names", ["fp17", "", "fp16,", "fp16, bf16", "FP16"])
def test_an_unknown_format_lists_the_names(names: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen_formats(names)
    assert ", ".join(FORMATS) in str(caught.value) and "\n" not in str(caught.value)


def test_the_script_in_a_process_of_its_own() -> None:
    command = [sys.executable, "scripts/formats.py", "65520", "-1e-8", "--format", "fp16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "inf     -            overflow to inf\n" in done.stdout
    assert "-1e-8 is not an FP64 number" in done.stdout
    done = run_here("formats", "0.1", "abc")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 'abc' is not a number") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if FORMATS[fmt].bits <= 8])
def test_spacing_is_the_distance_of_the_values(fmt: str) -> None:
    row = FORMATS[fmt]
    values = np.arange(2 ** (row.bits - row.sign_bits), dtype=np.uint8).view(row.dtype).astype(np.float64)
    values = np.sort(values[np.isfinite(values) & (values > 0)])
    magnitudes, distances = (2.0 ** np.array(x) for x in spacing(fmt))
    assert magnitudes[0] == values[0] and magnitudes[-1] == pytest.approx(values[-1])
    assert len(magnitudes) == len(distances)
    inside = np.searchsorted(magnitudes[:-1], values[:-1], side="right") - 1
    assert np.array_equal(np.diff(values), distances[inside])


@pytest.mark.parametrize("chosen", [[], ["--format", "fp64"], ["--format", "fp32,bf16"], ["--format", "e8m0"]])
def test_the_picture_is_written(chosen: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    run("--plot", str(path), *chosen)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert capsys.readouterr().err == f"drawn: {path}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_the_picture_is_named_formats_png_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run("0.1", "--format", "fp16", "--json", "--plot")
    assert (tmp_path / "formats.png").is_file()
    assert json.loads(capsys.readouterr().out)["numbers"][0]["text"] == "0.1"


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        plot_formats(tmp_path / "x.png", ["fp16"])


def test_a_number_is_not_taken_for_the_pictures_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"end in \.png"):
        run("--plot", "0.1")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="its folder cannot be created"):
        run("--plot", str(tmp_path / "file" / "x.png"))
