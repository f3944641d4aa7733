"""numerics.philox, stochastic_rounding: published vectors of Philox, bits that depend on the index alone, unbiased rounding.

Where probabilities are exact they are counted: all 2^16 draws that bf16 can tell apart. Where they are sampled, the mean of
n draws of a value with variance s^2 lies within 4 s / sqrt(n) of the expected one, but for one seed in 16000; seeds are fixed.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from refimpl.numerics.bits import bits_of, from_bits, resized
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, dtype_of
from refimpl.numerics.philox import philox4x32, random_bits
from refimpl.numerics.stochastic_rounding import round_exactly, stochastic_round

SMALL = ("bf16", "fp16", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
N = 1 << 20


def fp32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# ------------------------------------------------------------------------------------------------------------------- bits

KNOWN = [  # Random123's kat_vectors: philox4x32, 10 rounds
    ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter: list[int], key: tuple[int, int], expected: str) -> None:
    words = philox4x32(np.array([counter], np.uint32), key)
    assert " ".join(f"{word:08x}" for word in words[0]) == expected


def test_philox_of_many_counters_is_philox_of_each() -> None:
    counters = np.random.default_rng(0).integers(0, 1 << 32, (40_000, 4), dtype=np.uint32)
    together = philox4x32(counters, (1, 2))
    for i in (0, 1, 16_383, 16_384, 39_999):
        assert np.array_equal(together[i], philox4x32(counters[i : i + 1], (1, 2))[0])


def test_bits_do_not_depend_on_the_blocks() -> None:
    whole = random_bits(7, 3, 0, 1000)
    cuts = [0, 1, 3, 4, 5, 130, 131, 512, 999, 1000]
    parts = [random_bits(7, 3, start, stop - start) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert random_bits(7, 3, 5, 0).shape == (0,)


def test_bits_are_the_words_of_the_documented_counter() -> None:
    seed, step, stream, start = 0x299F31D0_A4093822, 0x13198A2E, 0x03707344, (0x85A308D3_243F6A88 & (1 << 61) - 1) * 4
    low, high = (start // 4) & 0xFFFFFFFF, start // 4 >> 32
    expected = philox4x32(np.array([[low, high, step, stream]], np.uint32), (seed & 0xFFFFFFFF, seed >> 32))[0]
    assert np.array_equal(random_bits(seed, step, start, 4, stream), expected)


def test_seed_step_and_stream_all_count() -> None:
    draws = [random_bits(*key, 0, 64, stream) for *key, stream in ((0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({bytes(d) for d in draws}) == len(draws)


def test_bits_are_even() -> None:
    words = random_bits(0, 0, 0, N)
    for i in range(32):
        assert abs(np.mean((words >> i) & 1) - 0.5) < 4 * 0.5 / math.sqrt(N), i


@pytest.mark.parametrize("bad", [(-1, 0, 0, 1), (1 << 64, 0, 0, 1), (0, 1 << 32, 0, 1), (0, 0, -1, 1), (0, 0, 0, -1)])
def test_numbers_that_do_not_fit_are_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="not in 0"):
        random_bits(*bad)


# --------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("fmt", SMALL)
def test_values_of_the_format_stay(fmt: str) -> None:
    row = FORMATS[fmt]
    codes = np.arange(1 << row.bits).astype(f"u{row.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = widen(from_bits(codes, fmt), "fp32")
    for bits in (np.zeros(x.shape, np.uint32), np.full(x.shape, 0xFFFFFFFF, np.uint32), random_bits(0, 0, 0, x.size)):
        y = stochastic_round(x, fmt, bits, overflow="inf")
        number = ~np.isnan(x)
        assert np.array_equal(bits_of(y)[number], codes[number])  # zeros keep their sign, infinities stay
        assert np.isnan(widen(y, "fp32"))[~number].all()


@pytest.mark.parametrize("fmt", SMALL)
def test_the_result_is_one_of_the_two_neighbors(fmt: str) -> None:
    row = FORMATS[fmt]
    values = widen(from_bits(np.arange(1 << row.bits).astype(f"u{row.itemsize}"), fmt), "fp64")
    values = np.unique(values[np.isfinite(values)])
    x = random_values(fmt, 1 << 16)
    y = widen(stochastic_round(x, fmt, random_bits(1, 0, 0, x.size), overflow="saturate"), "fp64")
    above = np.searchsorted(values, widen(x, "fp64"))
    up, down = values[above.clip(0, values.size - 1)], values[(above - 1).clip(0)]
    assert ((y == up) | (y == down)).all()
    assert 0.3 < np.mean(y == up) < 0.7


def random_values(fmt: str, n: int) -> np.ndarray:
    """Of all binades of the format, its subnormals included, and one below."""
    row, rng = FORMATS[fmt], np.random.default_rng(5)
    lowest, highest = math.log2(row.smallest_subnormal) - 1, math.log2(row.max)
    return cast(np.exp2(rng.uniform(lowest, highest, n)) * rng.choice([-1.0, 1.0], n), "fp32")


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.5, 0.75, 0.9375])
@pytest.mark.parametrize(
    ("fmt", "at"),
    [("bf16", 1.0), ("bf16", -(2.0**-130)), ("fp16", 3.0), ("fp16", 2.0**-23), ("e4m3", -96.0), ("e4m3", 2.0**-8),
     ("e2m1", 0.0), ("e2m1", -3.0)],
)  # fmt: skip
def test_the_mean_is_the_value(fmt: str, at: float, fraction: float) -> None:
    """x = at + fraction ulp: of 2^20 results a share of `fraction` is one ulp farther away, up to 4 standard errors."""
    row = FORMATS[fmt]
    ulp = math.ldexp(row.eps, math.frexp(max(abs(at), row.smallest_normal))[1] - 1)
    x = np.float32(math.copysign(abs(at) + fraction * ulp, at or 1.0))
    exact = (abs(float(x)) - abs(at)) / ulp  # what fp32 keeps of the fraction
    y = stochastic_round(np.full(N, x), fmt, random_bits(11, 0, 0, N), overflow="inf")
    moved = np.abs(widen(y, "fp64") - at) / ulp
    assert np.isin(moved, (0.0, 1.0)).all()
    assert abs(moved.mean() - exact) <= 4 * math.sqrt(exact * (1 - exact) / N)


def test_control_nearest_rounding_and_a_draw_that_reads_too_few_bits_are_biased() -> None:
    x = np.full(N, 1 + 0.25 * 2**-7, np.float32)
    assert np.mean(widen(cast(x, "bf16"), "fp64")) - x[0] < -0.2 * 2**-7
    coarse = random_bits(11, 0, 0, N) & np.uint32(0x80000000)  # one bit: away half of the time
    moved = (widen(stochastic_round(x, "bf16", coarse), "fp64") - 1) * 2**7
    assert abs(moved.mean() - 0.25) > 4 * math.sqrt(0.25 * 0.75 / N)


def test_bf16_is_exactly_unbiased_over_all_draws() -> None:
    draws = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0, 1, 0x1234, 0x8000, 0xFFFF):
        x = from_bits(np.full(draws.shape, 0xC0490000 | low, np.uint32), "fp32")  # about -3.1
        y = bits_of(stochastic_round(x, "bf16", draws))
        assert np.count_nonzero(y == 0xC04A) == low and np.count_nonzero(y == 0xC049) == (1 << 16) - low


def test_bf16_by_integers_is_the_definition() -> None:
    pattern = np.random.default_rng(2).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    pattern[:8] = (0, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x0000FFFF, 0x007FFFFF, 0x7F800000)
    x, bits = from_bits(pattern, "fp32"), random_bits(3, 0, 0, pattern.size)
    with np.errstate(invalid="ignore"):
        expected = bits_of(cast(round_exactly(x, "bf16", bits), "bf16"))
        ours = bits_of(stochastic_round(x, "bf16", bits))
    number = ~np.isnan(x)
    assert np.array_equal(ours[number], expected[number])


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3", "e2m1"])
def test_it_agrees_with_gfloat(fmt: str) -> None:
    """gfloat rounds away where floor(fraction 2^n) + bits >= 2^n, so its draw is ours from the other end."""
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    info = {"bf16": "bfloat16", "fp16": "binary16", "e4m3": "ocp_e4m3", "e2m1": "ocp_e2m1"}[fmt]
    n = 8
    x = random_values(fmt, 1 << 14)
    draws = np.random.default_rng(8).integers(0, 1 << n, x.size, dtype=np.uint32)
    x = cut_fraction(x, fmt, n)  # so that n bits of draw are exact in both
    theirs = ((1 << n) - 1 - draws).astype(np.int64)
    target, mode = getattr(formats, f"format_info_{info}"), gfloat.RoundMode.Stochastic
    expected = gfloat.round_ndarray(target, widen(x, "fp64"), mode, True, theirs, n)
    ours = stochastic_round(x, fmt, draws << np.uint32(32 - n), overflow="saturate")
    assert np.array_equal(widen(ours, "fp64"), expected)


def cut_fraction(x: np.ndarray, fmt: str, n: int) -> np.ndarray:
    """x with no more than n bits below the last place of the format."""
    row = FORMATS[fmt]
    exponent = np.maximum(np.frexp(np.abs(x))[1] - 1, 1 - row.bias) - row.fraction_bits - n
    return np.ldexp(np.trunc(np.ldexp(x, -exponent)), exponent)


def test_overflow() -> None:
    zeros, ones = np.zeros(1, np.uint32), np.full(1, 0xFFFFFFFF, np.uint32)
    for fmt, x, largest, beyond in (("fp16", 65510.0, 65504, math.inf), ("e5m2", -60000.0, -57344, -math.inf),
                                    ("e4m3", 460.0, 448, math.nan), ("e2m1", 7.0, 6, 6)):  # fmt: skip

        def rounded(bits: np.ndarray, overflow: str, fmt: str = fmt, x: float = x) -> float:
            return float(widen(stochastic_round(fp32(x), fmt, bits, overflow=overflow), "fp64")[0])

        assert rounded(ones, "inf") == largest  # down, by chance
        assert rounded(zeros, "inf") == pytest.approx(beyond, nan_ok=True)
        assert rounded(zeros, "saturate") == largest
    almost = from_bits(np.array([0x7F7FFFFF], np.uint32), "fp32")
    assert np.isinf(widen(stochastic_round(almost, "bf16", zeros), "fp32"))[0]
    assert not np.isinf(widen(stochastic_round(almost, "bf16", ones), "fp32"))[0]


@pytest.mark.parametrize("fmt", ["bf16", "e4m3"])
def test_blocks_and_out_change_nothing(fmt: str) -> None:
    x = random_values(fmt, 1000)
    whole = stochastic_round(x, fmt, random_bits(4, 9, 100, x.size), overflow="saturate")
    out = np.empty(x.shape, dtype_of(fmt))
    for start in range(0, x.size, 37):
        part = slice(start, min(start + 37, x.size))
        bits = random_bits(4, 9, 100 + start, part.stop - start)
        result = stochastic_round(x[part], fmt, bits, out=out[part], overflow="saturate")
        assert np.shares_memory(result, out)
    assert np.array_equal(bits_of(out), bits_of(whole))


def test_a_hundred_small_updates() -> None:
    """1 - 100 * 6e-4 = 0.94: bf16 stays at 1, its stochastic rounding comes out right on average (algorithms.md, 9.6)."""
    w, n = cast(np.ones(4096), "bf16"), 4096
    for step in range(100):
        w = stochastic_round(widen(w, "fp32") - np.float32(6e-4), "bf16", random_bits(0, step, 0, n))
    values = widen(w, "fp64")
    assert abs(values.mean() - 0.94) < 4 * values.std() / math.sqrt(n)
    assert 0.010 < values.std() < 0.018  # 0.014: 100 draws of 0.15 ulps, ulp 2^-8, have sqrt(100 * 0.15 * 0.85) 2^-8 = 0.0139


def test_what_is_wrong_is_refused() -> None:
    x = fp32(1.0, 2.0)
    with pytest.raises(TypeError, match="uint32"):
        stochastic_round(x, "bf16", np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="shape"):
        stochastic_round(x, "bf16", np.zeros(1, np.uint32))
    with pytest.raises(TypeError, match="overflow"):
        stochastic_round(x, "e4m3", np.zeros(2, np.uint32))
    with pytest.raises(TypeError, match="would round"):
        stochastic_round(np.zeros(2), "bf16", np.zeros(2, np.uint32))
    with pytest.raises(TypeError, match="bit patterns of bf16 are uint16"):
        from_bits(np.zeros(2, np.uint32), "bf16")
    for other in (np.float32, np.int16, np.bool_):
        with pytest.raises(TypeError, match="not a type of unsigned integers"):
            resized(np.zeros(2, other), 2)


def test_resized_keeps_the_low_bits() -> None:
    wide = np.array([0, 1, 0x7FFF, 0x8000, 0x12345678, 0xFFFFFFFF], np.uint32)
    narrow = resized(wide, 2)
    assert narrow.dtype == np.uint16 and narrow.tolist() == [0, 1, 0x7FFF, 0x8000, 0x5678, 0xFFFF]
    assert resized(narrow, 4).dtype == np.uint32 and resized(narrow, 4).tolist() == narrow.tolist() and resized(wide, 4) is wide
