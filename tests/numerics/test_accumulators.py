"""numerics.accumulators: sums of every named accumulator, against sums written out one by one, and their errors as derived."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refimpl.numerics.accumulators import Accumulator, accumulator, matmul
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS

K = 4096


def uniform_fp8(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Positive e4m3 values, evenly distributed over (0, 448)."""
    return widen(cast(np.random.default_rng(seed).uniform(0, 448, shape), "e4m3", overflow="saturate"), "fp32")


def relative_errors(acc: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    exact = widen(a, "fp64") @ widen(b, "fp64")
    return np.abs(matmul(a, b, acc) - exact) / np.abs(exact)


# ------------------------------------------------------------------------------------------------------------ definitions


def one_by_one(a: np.ndarray, b: np.ndarray, kind: Accumulator) -> float:
    """The sum of the products of two vectors in Python's numbers: R(s + p) for each, chunk by chunk."""

    def keep(s: float, name: str) -> float:
        s = float(np.float32(s))  # a sum is first one of fp32
        if name in FORMATS:
            return float(widen(cast(np.float32(s).reshape(1), name), "fp64")[0])
        m, e = math.frexp(s)
        bits = int(name.removeprefix("e8m")) + 1
        return math.ldexp(math.trunc(math.ldexp(m, bits)), e - bits)

    total, every = 0.0, kind.every or len(a)
    for start in range(0, len(a), every):
        s = 0.0
        for x, y in zip(a[start : start + every], b[start : start + every], strict=True):
            s = keep(s + float(x) * float(y), kind.inner)
        total = keep(total + s, kind.outer)
    return total


@pytest.mark.parametrize(
    "acc", ["fp16", "bf16", "tf32", "e8m13", "e8m10", "e8m13/16", "e8m7/5", "fp16/16/fp16", "bf16/8/e8m9", "fp32/99/bf16"]
)
@pytest.mark.parametrize("fmt", ["e4m3", "fp16"])
def test_it_is_the_sum_one_by_one(acc: str, fmt: str) -> None:
    rng = np.random.default_rng(1)
    a, b = (widen(cast(rng.standard_normal(shape), fmt, overflow="saturate"), "fp32") for shape in ((3, 50), (50, 4)))
    result = matmul(a, b, acc)
    for i, j in np.ndindex(result.shape):
        assert result[i, j] == one_by_one(a[i], b[:, j], accumulator(acc)), (i, j)


def test_fp32_is_the_plain_product_and_chunks_add_up_in_fp32() -> None:
    rng = np.random.default_rng(2)
    a, b = cast(rng.standard_normal((5, 300)), "fp32"), cast(rng.standard_normal((300, 7)), "fp32")
    assert np.array_equal(matmul(a, b), a @ b)
    chunks = np.zeros((5, 7), np.float32)
    for start in range(0, 300, 128):
        chunks += a[:, start : start + 128] @ b[start : start + 128]
    assert np.array_equal(matmul(a, b, "fp32/128"), chunks)


@pytest.mark.parametrize("acc", ["fp32", "fp16", "e8m13/128"])
def test_leading_axes_and_pieces_of_rows_change_nothing(acc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    a, b = cast(rng.standard_normal((2, 3, 9, 150)), "bf16"), cast(rng.standard_normal((2, 3, 150, 5)), "bf16")
    together = matmul(a, b, acc)
    assert together.shape == (2, 3, 9, 5) and together.dtype == np.float32
    monkeypatch.setattr("refimpl.numerics.accumulators._SUMS", 100)
    again = matmul(a, b, acc)
    for i, j in np.ndindex(2, 3):
        alone = matmul(a[i, j], b[i, j], acc)
        assert np.array_equal(again[i, j], together[i, j])
        assert acc == "fp32" or np.array_equal(alone, together[i, j])


def test_nothing_to_sum_is_zero() -> None:
    for acc in ("fp32", "fp16", "e8m13/128"):
        assert np.array_equal(matmul(np.zeros((2, 0), np.float32), np.zeros((0, 3), np.float32), acc), np.zeros((2, 3)))
        assert matmul(np.zeros((0, 4), np.float32), np.zeros((4, 3), np.float32), acc).shape == (0, 3)


def test_infinities_and_nan_stay() -> None:
    a = np.array([[np.inf, 1.0], [np.nan, 1.0], [-3e38, -3e38]], np.float32)
    with np.errstate(over="ignore"):
        result = matmul(a, np.ones((2, 1), np.float32), "e8m13")[:, 0]
    assert result[0] == np.inf and np.isnan(result[1]) and result[2] == -np.inf
    assert matmul(np.full((1, 2), 256.0, np.float32), np.full((2, 1), 256.0, np.float32), "fp16")[0, 0] == np.inf


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("f", [13, 14, 15])
def test_a_cut_loses_what_the_formula_says(f: int) -> None:
    """K 2^-f / 6 for sums that end at a power of two: here of K fp32 products of mean 1/4, that is at 1024. The mean of a
    cut is half an ulp if what is cut off is evenly distributed, as in fp32 products; sums end a little below, by that loss."""
    rng = np.random.default_rng(f)
    a, b = cast(rng.random((8, K)), "fp32"), cast(rng.random((K, 8)), "fp32")
    loss = K * 2.0**-f / 6
    errors = relative_errors(f"e8m{f}", a, b)
    assert loss * (1 - 2 * loss) * 0.95 < errors.mean() < loss * 1.05


def test_the_whole_table_of_the_reference() -> None:
    """algorithms.md 9.10b: 13/14/15 bits lose 8.54/4.40/2.20 % at most, promoted .29/.14/.07 %. They are fraction bits."""
    rng = np.random.default_rng(0)
    a, b = cast(rng.random((16, K)), "fp32"), cast(rng.random((K, 16)), "fp32")
    for f, whole, promoted in ((13, 0.0854, 0.0029), (14, 0.0440, 0.0014), (15, 0.0220, 0.0007)):
        assert relative_errors(f"e8m{f}", a, b).max() == pytest.approx(whole, rel=0.1)
        assert relative_errors(f"e8m{f}/128", a, b).max() == pytest.approx(promoted, rel=0.1)


def test_14_bits_at_4096_and_promoted_every_128() -> None:
    """DeepSeek-V3 3.3.2: 'nearly 2 %' at K = 4096, healed by promotion every 128."""
    a, b = uniform_fp8((16, K), 0), uniform_fp8((K, 16), 1)
    assert 0.02 < relative_errors("e8m14", a, b).max() < 0.05
    assert 0.04 < relative_errors("e8m13", a, b).max() < 0.09
    assert relative_errors("e8m13/128", a, b).max() < 0.003
    assert relative_errors("e8m14/128", a, b).max() < 0.003
    assert relative_errors("fp32", a, b).max() < 1e-6


def test_control_promotion_that_comes_too_late_does_not_heal() -> None:
    a, b = uniform_fp8((4, K), 0), uniform_fp8((K, 4), 1)
    assert relative_errors("e8m13/2048", a, b).max() > 0.01
    assert np.array_equal(matmul(a, b, "e8m13/4096"), matmul(a, b, "e8m13"))


def test_control_a_14_bit_sum_in_the_outer_place_loses_what_promotion_saved() -> None:
    a, b = uniform_fp8((4, K), 0), uniform_fp8((K, 4), 1)
    assert relative_errors("e8m13/128/e8m7", a, b).max() > 10 * relative_errors("e8m13/128", a, b).max()


def test_fp16_sums_stop_growing_and_chunks_go_on() -> None:
    """Adding 1 to 2048 in fp16 is a tie that goes to 2048 (Wang et al. 2018 call it swamping); chunks of 64 reach 4096."""
    ones = np.ones((1, K), np.float32)
    assert matmul(ones, ones.T, "fp16")[0, 0] == 2048
    assert matmul(ones, ones.T, "fp16/64/fp16")[0, 0] == 4096
    assert matmul(ones, ones.T, "bf16")[0, 0] == 256


# ------------------------------------------------------------------------------------------------------------------ names


def test_names() -> None:
    assert accumulator("fp32") == Accumulator("fp32", 0, "fp32")
    assert accumulator("e8m13/128") == Accumulator("e8m13", 128, "fp32")
    assert accumulator("fp16/64/fp16") == Accumulator("fp16", 64, "fp16")


WRONG = ("", "fp64", "fp8", "e4m3", "e8m0", "e8m24", "e8m", "fp32/", "fp32/0", "fp32/-1", "fp32/x", "fp32/8/", "fp32/8/fp64")


@pytest.mark.parametrize("bad", [*WRONG, "fp32/8/fp32/8", "fp32 /8", "/128"])
def test_unknown_names_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="accumulator"):
        matmul(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), bad)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        matmul(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), "fp16")
