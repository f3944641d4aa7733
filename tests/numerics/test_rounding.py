"""numerics.rounding: `round_to_nearest_even` is the definition by a search among all values, and `cast` computes it.

Around a code means: its value, the midpoint to the next value, and the FP32 (or FP64) numbers just beside the midpoint. The
plain run takes some of the 16-bit codes and all that are special; `-m slow` takes all 65,536.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from refimpl.numerics.bits import from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, dtype_of, ulp
from refimpl.numerics.rounding import floor_log2, round_to_nearest_even, rounding_steps
from refimpl.numerics.stochastic_rounding import round_exactly

NARROW = [fmt for fmt, row in FORMATS.items() if row.bits <= 8]
SIXTEEN = ["fp16", "bf16"]
NARROWER_THAN_FP32 = [fmt for fmt, row in FORMATS.items() if row.bits < 32]


def magnitudes(fmt: str) -> np.ndarray:
    """Every finite value of a format of 16 bits or fewer that has no minus sign, in FP64, in the order of the codes.

    test_formats.py holds that the array types have the values of the formats. One more follows: what the next code would be.
    """
    row = FORMATS[fmt]
    code = np.arange(2 ** (row.bits - row.sign_bits)).astype(f"u{row.itemsize}")
    with np.errstate(invalid="ignore"):  # signaling NaNs
        value = widen(from_bits(code, fmt), "fp64")
    value = value[np.isfinite(value)]
    assert (np.diff(value) > 0).all()
    return np.append(value, value[-1] + ulp(fmt, value[-1]))


def around(value: np.ndarray, above: np.ndarray, source: str) -> np.ndarray:
    """Values, the midpoints to the next values, and the numbers of the format `source` beside those midpoints; both signs."""
    with np.errstate(over="ignore"):
        middle = (value / 2 + above / 2).astype(dtype_of(source))
        near = [np.nextafter(middle, dtype_of(source).type(side)) for side in (-math.inf, math.inf)]
        points = np.concatenate([value.astype(dtype_of(source)), middle, *near])
    return np.concatenate([points, -points])


def assert_equal(ours: np.ndarray, expected: Sequence[float], x: np.ndarray) -> None:
    """The same numbers, signs of zeros included; NaN is NaN."""
    got, wanted = widen(ours, "fp64"), np.array(expected)
    same = ((got == wanted) & (np.signbit(got) == np.signbit(wanted))) | (np.isnan(got) & np.isnan(wanted))
    assert same.all(), [(float(x[i]), float(got[i]), float(wanted[i])) for i in np.flatnonzero(~same)[:5]]


def expected_of_cast(x: np.ndarray, fmt: str, overflow: str) -> list[float]:
    """What `cast` promises: one rounding; two from FP64 to a format narrower than FP32, the first of them to FP32."""
    numbers = x.tolist()
    if x.dtype == np.float64 and FORMATS[fmt].bits < 32:
        numbers = [round_to_nearest_even(number, "fp32") for number in numbers]
    return [round_to_nearest_even(number, fmt, overflow) for number in numbers]


# ------------------------------------------------------------------------------------------------------ the definition


def nearest_by_search(x: Fraction, value: list[Fraction]) -> Fraction:
    """The nearest of all values; of two the one with the even code. The code of a value is its place in the list."""
    return min(enumerate(value), key=lambda item: (abs(item[1] - x), item[0] % 2))[1]


@pytest.mark.parametrize("fmt", [fmt for fmt in NARROW if fmt != "e8m0"])
def test_it_is_the_nearest_of_all_values(fmt: str) -> None:
    value = [Fraction(v) for v in magnitudes(fmt).tolist()]
    quarters = [a + (b - a) * Fraction(i, 8) for a, b in itertools.pairwise(value) for i in (0, 1, 3, 4, 5, 7)]
    hair = Fraction(1, 2**200)  # far below the last bit of FP64: nothing is rounded on the way
    ties = [(a + b) / 2 for a, b in itertools.pairwise(value)]
    for x in [*quarters, *(tie - hair for tie in ties), *(tie + hair for tie in ties)]:
        nearest = nearest_by_search(x, value)
        wanted = min(float(nearest), FORMATS[fmt].max)
        assert round_to_nearest_even(x, fmt, "saturate") == wanted, x
        assert round_to_nearest_even(-x, fmt, "saturate") == -wanted, x
        overflown = nearest > FORMATS[fmt].max and FORMATS[fmt].specials != "none"
        assert math.isfinite(round_to_nearest_even(x, fmt)) != overflown, x


def test_e8m0_rounds_in_its_own_binade_and_never_to_zero() -> None:
    for e in (-127, -1, 0, 126):
        at = Fraction(2) ** e
        below, tie, above = at * Fraction(149, 100), at * Fraction(3, 2), at * Fraction(151, 100)
        assert [round_to_nearest_even(x, "e8m0") for x in (at, below, tie, above)] == [at, at, 2 * at, 2 * at]
    assert [round_to_nearest_even(x, "e8m0") for x in (2.0**-127, 2.0**-128, 2.0**-1000)] == [2.0**-127] * 3
    for x, overflow in itertools.product((0, -0.0, -1, -math.inf), ("inf", "saturate")):
        assert math.isnan(round_to_nearest_even(x, "e8m0", overflow))
    assert math.isnan(round_to_nearest_even(2.0**127 * 1.5, "e8m0"))
    assert round_to_nearest_even(2.0**127 * 1.5, "e8m0", "saturate") == 2.0**127


def test_fp64_is_pythons_own_reading_of_a_fraction() -> None:
    rng = np.random.default_rng(0)
    for exponent in rng.integers(-1100, 1020, 3000).tolist():
        x = Fraction(int(rng.integers(1, 2**62)), int(rng.integers(1, 2**62))) * Fraction(2) ** exponent
        assert round_to_nearest_even(x, "fp64") == float(x)
        tie = Fraction(float(x)) + Fraction(math.ulp(float(x))) / 2
        assert round_to_nearest_even(tie, "fp64") == float(tie)


@pytest.mark.parametrize("fmt", ["fp16", "fp32"])
def test_it_is_numpys_own_conversion_from_fp64(fmt: str) -> None:
    """NumPy rounds FP64 to FP16 once, not by way of FP32."""
    rng = np.random.default_rng(4)
    anywhere = rng.standard_normal(1000) * 2.0 ** rng.integers(-152, 130, 1000)
    ties = (1 + rng.integers(0, 2**12, 500) / 2.0**12) * 2.0 ** rng.integers(-30, 18, 500)
    x = np.concatenate([anywhere, ties, ties * (1 + 2.0**-45), -ties * (1 - 2.0**-45)])
    with np.errstate(over="ignore"):
        theirs = x.astype(dtype_of(fmt)).tolist()
    assert [round_to_nearest_even(number, fmt) for number in x.tolist()] == theirs


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_steps_are_the_number(fmt: str) -> None:
    rng = np.random.default_rng(1)
    for x in (rng.standard_normal(300) * 2.0 ** rng.integers(-160, 130, 300)).tolist():
        steps = rounding_steps(x, fmt)
        assert (steps.kept + steps.rest) * steps.ulp == abs(Fraction(x)) and 0 <= steps.rest < 1
        assert steps.ulp == Fraction(ulp(fmt, x))  # the same in floats
        assert abs(steps.value - abs(Fraction(x))) <= steps.ulp / 2
        assert steps.kept < 2 ** (FORMATS[fmt].fraction_bits + 1)
        assert steps.up == (steps.guard and (steps.sticky or steps.kept % 2 == 1))  # as hardware decides it


def test_a_carry_ends_in_the_next_binade() -> None:
    steps = rounding_steps(2 - Fraction(1, 2**12), "fp16")
    assert (steps.exponent, steps.kept, steps.rest, steps.up, steps.value) == (0, 2047, Fraction(3, 4), True, 2)
    steps = rounding_steps(Fraction(2) ** -14 - Fraction(2) ** -26, "fp16")  # from the subnormal values to the normal ones
    assert (steps.exponent, steps.kept, steps.rest, steps.value) == (-14, 1023, Fraction(3, 4), Fraction(2) ** -14)


def test_floor_log2() -> None:
    for e in (-1100, -3, 0, 1, 52, 2000):
        power = Fraction(2) ** e
        assert floor_log2(power) == floor_log2(power * Fraction(199, 100)) == e == floor_log2(power * Fraction(99, 100)) + 1


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_infinity_nan_and_zero(fmt: str, overflow: str) -> None:
    row = FORMATS[fmt]
    beyond = {"ieee": math.inf, "one-nan": math.nan, "none": row.max}[row.specials] if overflow == "inf" else row.max
    for large in (math.inf, Fraction(10) ** 400, 10**400):
        assert str(round_to_nearest_even(large, fmt, overflow)) == str(beyond)
    if row.specials == "none":
        with pytest.raises(ValueError, match=f"{fmt} has no NaN"):
            round_to_nearest_even(math.nan, fmt, overflow)
    else:
        assert math.isnan(round_to_nearest_even(math.nan, fmt, overflow))
    if row.sign_bits:
        for large in (-math.inf, -(Fraction(10) ** 400), -(10**400)):
            assert str(round_to_nearest_even(large, fmt, overflow)) == str(-beyond)
        tiny = Fraction(row.smallest_subnormal) / 4
        zeros = [round_to_nearest_even(x, fmt, overflow) for x in (0, 0.0, Fraction(0), tiny, -0.0, -tiny)]
        assert [str(zero) for zero in zeros] == ["0.0"] * 4 + ["-0.0"] * 2


def test_arguments() -> None:
    for x in (np.float32(1.1), np.float16(1.1), cast(np.array(1.1), "bf16"), np.array(1.1)):
        assert round_to_nearest_even(x, "fp64") == float(x)
    with pytest.raises(TypeError, match="overflow is 'saturated'; it is 'inf' or 'saturate'"):
        round_to_nearest_even(1.0, "fp16", "saturated")


# --------------------------------------------------------------------------------------------------- cast computes it


def special_codes(fmt: str) -> np.ndarray:
    """The first and the last codes of every binade, the 50 at both ends, and every 13th."""
    row, last = FORMATS[fmt], len(magnitudes(fmt)) - 2
    binades = np.arange(0, last + 2, 2**row.fraction_bits)
    chosen = [np.arange(0, last + 1, 13), np.arange(50), np.arange(last - 50, last + 1), binades - 2, binades - 1, binades]
    codes = np.unique(np.concatenate([*chosen, binades + 1]))
    return codes[(codes >= 0) & (codes <= last)]


@pytest.mark.parametrize("fmt", SIXTEEN)
def test_cast_around_16_bit_codes(fmt: str) -> None:
    value, codes = magnitudes(fmt), special_codes(fmt)
    x = around(value[codes], value[codes + 1], "fp32")
    assert_equal(cast(x, fmt), expected_of_cast(x, fmt, "inf"), x)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", SIXTEEN)
def test_cast_around_all_65536_codes(fmt: str) -> None:
    value = magnitudes(fmt)
    for source in ("fp32", "fp64"):
        x = around(value[:-1], value[1:], source)
        for overflow in ("inf", "saturate"):
            assert_equal(cast(x, fmt, overflow=overflow), expected_of_cast(x, fmt, overflow), x)


@pytest.mark.parametrize("source", ["fp32", "fp64"])
@pytest.mark.parametrize("fmt", NARROW)
def test_cast_around_all_codes_of_8_bits_and_fewer(fmt: str, source: str) -> None:
    value = magnitudes(fmt)
    x = around(value[:-1], value[1:], source)
    far = np.array([0.0, 1e-45, 1e-40, 1e30, 3e38, math.inf], dtype_of(source))
    x = np.concatenate([x, far, -far])
    for overflow in ("inf", "saturate"):
        assert_equal(cast(x, fmt, overflow=overflow), expected_of_cast(x, fmt, overflow), x)


@pytest.mark.parametrize(("fmt", "source"), [("fp32", "fp64"), ("tf32", "fp64"), ("tf32", "fp32")])
def test_cast_to_fp32_and_tf32(fmt: str, source: str) -> None:
    step = 2 ** (FORMATS["fp32"].fraction_bits - FORMATS[fmt].fraction_bits)  # fp32 codes from one value to the next
    binades = np.arange(0, 256, 5) << 23  # 0xFF << 23 would be infinity: the largest value is one step below
    drawn = np.random.default_rng(2).integers(0, (0xFF << 23) // step, 500) * step
    codes = np.concatenate([binades, binades - step, binades + step, [1 << 23, (1 << 23) - step], drawn])
    codes = np.unique(codes[(codes >= 0) & (codes < 0xFF << 23)])
    value, above = (code.astype(np.uint32).view(np.float32).astype(np.float64) for code in (codes, codes + step))
    above[np.isinf(above)] = 2.0**128
    x = np.append(around(value, above, source), np.array([-0.0, math.inf], dtype_of(source)))
    for overflow in ("inf", "saturate"):
        assert_equal(cast(x, fmt, overflow=overflow), expected_of_cast(x, fmt, overflow), x)


@pytest.mark.parametrize("fmt", NARROWER_THAN_FP32)
def test_fp64_numbers_are_rounded_twice(fmt: str) -> None:
    """Beside a tie by less than an FP32 number can be: one rounding goes to the nearer value, `cast` by way of the tie."""
    half = FORMATS[fmt].eps / 2
    x = np.array([1 + half + 2.0**-40, 1 + 3 * half - 2.0**-40])  # e8m0: 1.5 and 2.5, of which only the first is a tie
    once = [round_to_nearest_even(number, fmt, "inf") for number in x.tolist()]
    assert_equal(cast(x, fmt, overflow="inf"), expected_of_cast(x, fmt, "inf"), x)
    if fmt != "e8m0":
        assert once == [1 + 2 * half, 1 + 2 * half] and expected_of_cast(x, fmt, "inf") == [1.0, 1 + 4 * half]


@pytest.mark.parametrize("fmt", [fmt for fmt, row in FORMATS.items() if row.specials != "none"])
def test_cast_of_nan(fmt: str) -> None:
    for source in ("fp32", "fp64"):
        x = np.array([math.nan, -math.nan], dtype_of(source))
        for overflow in ("inf", "saturate"):
            assert_equal(cast(x, fmt, overflow=overflow), expected_of_cast(x, fmt, overflow), x)


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "tf32", "e4m3", "e2m1"])
def test_other_ways_to_round_are_seen(fmt: str) -> None:
    """A control: the chosen numbers tell truncation, ties away from zero, and ties toward zero from `cast`."""
    value = 1 + FORMATS[fmt].eps * np.arange(3)
    points = around(value[:-1], value[1:], "fp32")
    rounded = widen(cast(points, fmt, overflow="inf"), "fp64").tolist()
    seen = [rounding_steps(x, fmt) for x in points.tolist()]
    other = {
        "truncated": [s.kept * s.ulp for s in seen],
        "ties away": [(s.kept + s.guard) * s.ulp for s in seen],
        "ties toward zero": [(s.kept + (s.guard and s.sticky)) * s.ulp for s in seen],
    }
    assert [float(s.value) for s in seen] == [abs(y) for y in rounded]
    for way, values in other.items():
        assert [float(v) for v in values] != [abs(y) for y in rounded], way


# --------------------------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3", "e2m1"])
def test_stochastic_rounding_takes_the_same_steps_but_for_the_last(fmt: str) -> None:
    """Of the same kept part and rest it goes away from zero where bits / 2^32 < rest."""
    rng = np.random.default_rng(3)
    low, high = math.log2(FORMATS[fmt].smallest_subnormal) - 2, math.log2(FORMATS[fmt].max) - 1
    x = cast(np.exp2(rng.uniform(low, high, 500)), "fp32")
    bits = rng.integers(0, 2**32, 500, dtype=np.uint32)
    for number, draw, rounded in zip(x.tolist(), bits.tolist(), round_exactly(x, fmt, bits).tolist(), strict=True):
        steps = rounding_steps(number, fmt)
        assert rounded == (steps.kept + (draw < steps.rest * 2**32)) * steps.ulp
