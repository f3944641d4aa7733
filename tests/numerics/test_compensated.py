"""refimpl.numerics.compensated: masters come back to the bit, weights are their nearest BF16, Kahan's sums do not stall."""

from __future__ import annotations

import math

import numpy as np
import pytest

from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.compensated import kahan_update, merge, split

LOWER = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], np.uint32)


def dense() -> np.ndarray:
    """All 65536 upper halves with nine lower ones, and 2^20 random patterns."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    return np.concatenate([(upper | LOWER).reshape(-1), random])


def test_the_master_comes_back_to_the_bit_from_every_pattern() -> None:
    pattern = dense()
    weight, remainder = split(from_bits(pattern, "fp32"))
    assert weight.dtype.name == "bfloat16" and remainder.dtype == np.uint16
    assert np.array_equal(bits_of(merge(weight, remainder)), pattern)


def test_all_lower_halves_of_some_upper_ones() -> None:
    lower = np.arange(1 << 16, dtype=np.uint32)
    for upper in (0x0000, 0x007F, 0x3F80, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0xBF80, 0xFF7F, 0xFFFF):
        pattern = np.uint32(upper << 16) | lower
        assert np.array_equal(bits_of(merge(*split(from_bits(pattern, "fp32")))), pattern)


def test_the_weight_is_the_nearest_but_at_ties_where_it_goes_away_from_zero() -> None:
    pattern = dense()
    finite = (pattern & 0x7F800000) != 0x7F800000
    master = from_bits(pattern[finite], "fp32")
    weight, _ = split(master)
    nearest = cast(master, "bf16")
    differ = bits_of(weight) != bits_of(nearest)
    tie = (bits_of(master) & 0xFFFF) == 0x8000
    assert differ.any() and np.array_equal(differ, tie & ((bits_of(master) >> 16) % 2 == 0))
    assert np.array_equal(bits_of(weight)[tie], (bits_of(master)[tie] >> 16) + 1)


def test_infinities_and_the_nans_of_arithmetic_stay() -> None:
    with np.errstate(invalid="ignore"):
        x = np.array([np.inf, -np.inf, np.inf - np.inf, np.nan, -np.nan], np.float32)
    weight, remainder = split(x)
    assert not remainder.any()
    assert np.array_equal(widen(weight, "fp32"), x, equal_nan=True)
    largest = from_bits(np.array([0x7F7FFFFF], np.uint32), "fp32")
    assert np.isinf(widen(split(largest)[0], "fp32")) and np.isinf(widen(cast(largest, "bf16"), "fp32"))
    # What no arithmetic makes: a NaN with something in the lower half.
    odd = from_bits(np.array([0x7F800001, 0x7FFF8000], np.uint32), "fp32")
    assert list(bits_of(split(odd)[0])) == [0x7F80, 0x8000] and np.array_equal(bits_of(merge(*split(odd))), bits_of(odd))


def test_control_without_the_rounding_the_weight_is_not_the_nearest() -> None:
    master = np.random.default_rng(1).standard_normal(1 << 12).astype(np.float32)
    truncated = from_bits((bits_of(master) >> 16).astype(np.uint16), "bf16")
    assert 0.4 < np.mean(bits_of(truncated) != bits_of(cast(master, "bf16"))) < 0.6


def test_control_merging_without_taking_the_rounding_back_is_wrong() -> None:
    master = np.random.default_rng(1).standard_normal(1 << 12).astype(np.float32)
    weight, remainder = split(master)
    joined = bits_of(weight).astype(np.uint32) << 16 | remainder
    assert 0.4 < np.mean(joined != bits_of(master)) < 0.6


def test_the_split_is_torchs_of_two_views() -> None:
    """The rule of Transformer Engine's kernel, written for torch: int16 halves, the upper one raised where the lower is < 0."""
    torch = pytest.importorskip("torch")
    pattern = dense()
    halves = torch.from_numpy(pattern.view(np.int32)).view(torch.int16).reshape(-1, 2)
    lo, hi = halves[:, 0], halves[:, 1]
    weight, remainder = split(from_bits(pattern, "fp32"))
    assert np.array_equal(bits_of(weight), torch.where(lo < 0, hi + 1, hi).numpy().view(np.uint16))
    assert np.array_equal(remainder, lo.numpy().view(np.uint16))


# ------------------------------------------------------------------------------------------------------------------ Kahan


def test_a_hundred_small_updates() -> None:
    """1 - 100 * 6e-4: bf16 alone stays at 1, with its compensation it is .93992 (algorithms.md, 9.6)."""
    w, c, alone = cast(np.ones(1), "bf16"), cast(np.zeros(1), "bf16"), cast(np.ones(1), "bf16")
    update = np.full(1, -6e-4, np.float32)
    for _ in range(100):
        w, c = kahan_update(w, c, update)
        alone = cast(widen(alone, "fp32") + update, "bf16")
    assert alone[0] == 1
    assert round(float(widen(w, "fp64")[0] + widen(c, "fp64")[0]), 5) == 0.93992


def test_many_updates_of_either_sign_are_kept_to_16_bits() -> None:
    rng = np.random.default_rng(0)
    w = cast(rng.standard_normal(1000), "bf16")
    c, exact = cast(np.zeros(1000), "bf16"), widen(w, "fp64")
    plain = w
    for _ in range(200):
        update = cast(rng.standard_normal(1000) * 1e-4, "fp32")
        w, c = kahan_update(w, c, update)
        plain = cast(widen(plain, "fp32") + update, "bf16")
        exact = exact + widen(update, "fp64")

    def error(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x - exact) ** 2)))

    # c is less than an ulp of w, about 2^-8, and rounded to 8 bits each time: 200 errors of 2^-18 / sqrt(3) as a random walk
    assert error(widen(w, "fp64") + widen(c, "fp64")) < 4 * math.sqrt(200) * 2**-18 / math.sqrt(3)
    assert error(widen(plain, "fp64")) > 10 * error(widen(w, "fp64") + widen(c, "fp64"))


def test_kahan_is_any_precision_adamws_three_lines() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    w, c = cast(rng.standard_normal(4096), "bf16"), cast(rng.standard_normal(4096) * 1e-3, "bf16")
    m, denominator = (cast(np.abs(rng.standard_normal(4096)), "fp32") for _ in range(2))
    update = -np.float32(1e-3) * (m / denominator)
    p, k = (torch.from_numpy(bits_of(x).view(np.int16).copy()).view(torch.bfloat16) for x in (w, c))
    # the buffer takes the update with one rounding; then the parameter takes the buffer, and the buffer the difference
    k.copy_(k.float() + torch.from_numpy(update))
    old = p.clone()
    p.add_(k)
    k.add_(old.sub_(p))
    for ours, theirs in zip(kahan_update(w, c, update), (p, k), strict=True):
        assert np.array_equal(bits_of(ours), theirs.view(torch.int16).numpy().view(np.uint16))


def test_formats_that_differ_are_refused() -> None:
    with pytest.raises(TypeError, match="compensation is fp16"):
        kahan_update(cast(np.ones(1), "bf16"), cast(np.ones(1), "fp16"), np.zeros(1, np.float32))
