"""numerics.casts: every rounding is round-to-nearest, ties to even, as worked out here from the sorted table of all values.

The expected side of every tie and every near-tie comes from the codes of a format, decoded in float64 (`test_formats`
checks that decoding), never from astype. Where they are installed there are more witnesses: PyTorch, Berkeley SoftFloat
(softfloatpy) and gfloat; the first two also for the arithmetic that is made of FP32 operations and one cast.
"""

import math

import numpy as np
import pytest
from arrays import bits
from strict_backend import on_host

from refimpl.backends.base import Backend
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, dtype_of

CODE = {2: np.uint16, 1: np.uint8, 4: np.uint32, 8: np.uint64}


def all_codes(fmt: str) -> np.ndarray:
    """Every code of a format of 8 or 16 bits, in its own type."""
    itemsize = FORMATS[fmt].itemsize
    return np.arange(2 ** (8 * itemsize)).astype(CODE[itemsize]).view(dtype_of(fmt))


def decoded(code: np.ndarray, exponent_bits: int, fraction_bits: int) -> np.ndarray:
    """The value of non-negative codes by the formula alone; the top exponent counts as numbers."""
    bias = 2 ** (exponent_bits - 1) - 1
    fraction, exponent = (code & (2**fraction_bits - 1)) / 2**fraction_bits, code >> fraction_bits
    return np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))


def cast_both_ways(x: np.ndarray, fmt: str, overflow: str | None = None) -> np.ndarray:
    """cast, after checking that pieces of 1000 elements give the same bits: large arrays may take another path."""
    whole = cast(x, fmt, overflow=overflow)
    pieces = [cast(x[i : i + 1000], fmt, overflow=overflow) for i in range(0, x.size, 1000)]
    assert np.array_equal(bits(np.concatenate(pieces)), bits(whole))
    return whole


# exponent bits, fraction bits, code of the largest finite value
LAYOUT = {"fp16": (5, 10, 0x7BFF), "bf16": (8, 7, 0x7F7F), "e4m3": (4, 3, 0x7E), "e5m2": (5, 2, 0x7B)}
OVERFLOW = {"fp16": None, "bf16": None, "e4m3": "inf", "e5m2": "inf"}


# --------------------------------------------------------------------------------------------- exhaustive: there and back


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_all_65536_codes_widen_exactly_and_cast_back(fmt: str) -> None:
    exponent_bits, fraction_bits, largest = LAYOUT[fmt]
    x = all_codes(fmt)
    wide = widen(x)
    code = np.arange(65536)
    magnitude, sign = code & 0x7FFF, np.where(code >> 15, -1.0, 1.0)
    finite, infinite = magnitude <= largest, magnitude == largest + 1
    assert wide.dtype == np.float32
    expected = sign * decoded(magnitude, exponent_bits, fraction_bits)
    assert np.array_equal(wide[finite], expected[finite])  # fp32 against exact float64: equal only if nothing was rounded
    assert np.array_equal(np.signbit(wide[finite]), sign[finite] < 0)  # the signs of the zeros too
    assert np.array_equal(wide[infinite], sign[infinite] * math.inf)
    assert np.isnan(wide[~finite & ~infinite]).all()
    assert np.array_equal(bits(np.concatenate([widen(x[i : i + 1000]) for i in range(0, 65536, 1000)])), bits(wide))
    back = cast_both_ways(wide, fmt)
    assert back.dtype == x.dtype
    number = finite | infinite
    assert np.array_equal(bits(back)[number], bits(x)[number])
    assert np.isnan(widen(back)[~number]).all()


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_all_fp8_codes_there_and_back(fmt: str, overflow: str) -> None:
    x = all_codes(fmt)
    wide = widen(x)
    keeps = ~np.isnan(wide) & (np.isfinite(wide) | (overflow == "inf"))  # saturating moves infinities to the maximum
    back = cast(wide, fmt, overflow=overflow)
    assert np.array_equal(bits(back)[keeps], bits(x)[keeps])
    assert np.array_equal(np.isnan(widen(back)), np.isnan(wide))


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3", "e5m2"])
def test_widening_to_fp64_equals_widening_to_fp32(fmt: str) -> None:
    x = all_codes(fmt)
    assert np.array_equal(widen(x, "fp64"), widen(x, "fp32"), equal_nan=True)


# --------------------------------------------------------------------------- exhaustive: both sides of every midpoint


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize("source", ["fp32", "fp64"])
@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3", "e5m2"])
def test_every_midpoint_and_its_neighbors(fmt: str, source: str, sign: float) -> None:
    exponent_bits, fraction_bits, largest = LAYOUT[fmt]
    # Non-negative codes are in the order of their values. One more value follows the largest: what the next code would
    # be worth; a result there is an overflow. All of this is exact in float64.
    code = np.arange(largest + 2)
    value = decoded(code, exponent_bits, fraction_bits)
    assert (np.diff(value) > 0).all()
    below, above = code[:-1], code[1:]
    middle = (value[:-1] + value[1:]) / 2
    tie = np.float32(middle)
    assert np.array_equal(tie, middle)  # a midpoint needs one more bit, which fp32 has
    even = np.where(below % 2 == 0, below, above)
    cases = [
        (tie, even),
        (np.nextafter(tie, np.float32(-math.inf)), below),
        (np.nextafter(tie, np.float32(math.inf)), above),
        (np.float32(value[:-1]), below),
    ]
    for x, expected in cases:
        y = cast_both_ways((sign * x).astype(dtype_of(source)), fmt, OVERFLOW[fmt])
        overflown = expected == largest + 1
        expected_bits = expected | (1 << (8 * y.dtype.itemsize - 1) if sign < 0 else 0)
        assert np.array_equal(bits(y)[~overflown], expected_bits[~overflown])
        beyond = widen(y[overflown])
        if fmt == "e4m3":
            assert np.isnan(beyond).all()
        else:
            assert np.array_equal(beyond, np.full(beyond.shape, sign * math.inf))


def test_the_midpoint_table_can_tell_a_wrong_rounding() -> None:
    # negative control: truncation and round-half-up disagree with the table where it matters
    tie = np.float32(1 + 2**-11)  # between fp16 1 (even) and 1 + 2^-10 (odd)
    assert bits(cast(np.array([tie]), "fp16"))[0] == 0x3C00
    assert bits(cast(np.array([np.float32(1 + 3 * 2**-11)]), "fp16"))[0] == 0x3C02  # truncation would say 0x3C01
    assert bits(cast(np.nextafter(np.array([tie]), np.float32(2)), "fp16"))[0] == 0x3C01


# --------------------------------------------------------------------------------------- overflow, zeros, subnormals, NaN


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (65504.0, 65504.0),
        (65519.99, 65504.0),
        (65520.0, math.inf),
        (1e30, math.inf),
        (math.inf, math.inf),
        (2.0**-24, 2.0**-24),
        (2.0**-25, 0.0),  # half of the smallest subnormal: a tie, zero is even
        (2.0**-25 * (1 + 2**-23), 2.0**-24),
        (3 * 2.0**-26, 2.0**-24),
        (1e-30, 0.0),
        (0.0, 0.0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_fp16_boundaries(x: float, expected: float, sign: int) -> None:
    y = widen(cast(np.array([sign * x], np.float32), "fp16"))[0]
    assert y == sign * expected
    assert np.signbit(y) == (sign < 0)  # zeros keep the sign of what vanished


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0x7F7F7FFF, 255 * 2.0**120),  # the last fp32 below the midpoint of bf16's maximum and 2^128
        (0x7F7F8000, math.inf),
        (0x7F7FFFFF, math.inf),  # fp32's own maximum is beyond bf16's
        (0x00004000, 0.0),  # 2^-135 < half of 2^-133
        (0x00008000, 0.0),  # 2^-134: the tie
        (0x00008001, 2.0**-133),
        (0x80000000, -0.0),
        (0xFF800000, -math.inf),
    ],
)
def test_bf16_boundaries(x: int, expected: float) -> None:
    y = widen(cast(np.array([x], np.uint32).view(np.float32), "bf16"))[0]
    assert y == expected and np.signbit(y) == np.signbit(expected)


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3", "e5m2", "tf32", "fp32"])
@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_nan_stays_nan(fmt: str, overflow: str) -> None:
    for pattern in (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF):  # quiet, signalling, all payload bits
        x = np.array([pattern, 0x3F800000], np.uint32).view(np.float32)
        y = widen(cast(x, fmt, overflow=overflow), "fp64")
        assert np.isnan(y[0]) and y[1] == 1.0


@pytest.mark.parametrize(
    ("fmt", "x", "as_inf", "saturated"),
    [
        ("e4m3", 448.0, 448.0, 448.0),
        ("e4m3", 464.0, 448.0, 448.0),
        ("e4m3", 464.1, math.nan, 448.0),
        ("e4m3", 1000.0, math.nan, 448.0),
        ("e4m3", math.inf, math.nan, 448.0),
        ("e5m2", 57344.0, 57344.0, 57344.0),
        ("e5m2", 61439.9, 57344.0, 57344.0),
        ("e5m2", 61440.0, math.inf, 57344.0),
        ("e5m2", math.inf, math.inf, 57344.0),
        ("e3m2", 1000.0, 28.0, 28.0),  # neither infinity nor NaN: the largest value in both conventions
        ("e2m3", 1000.0, 7.5, 7.5),
        ("e2m1", 1000.0, 6.0, 6.0),
        ("fp16", 1e6, math.inf, 65504.0),
        ("fp16", math.inf, math.inf, 65504.0),
        ("bf16", math.inf, math.inf, 255 * 2.0**120),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("source", ["fp32", "fp64"])
def test_overflow_conventions(fmt: str, x: float, as_inf: float, saturated: float, sign: int, source: str) -> None:
    given = np.array([sign * x], dtype_of(source))
    for overflow, expected in (("inf", as_inf), ("saturate", saturated)):
        y = np.float64(cast(given, fmt, overflow=overflow)[0])
        assert y == sign * expected or (math.isnan(y) and math.isnan(expected)), overflow


def test_saturating_from_16_bits() -> None:
    for fmt in ("fp16", "bf16"):
        x = cast(np.array([1000, -1000, 460, 1, math.inf, math.nan], np.float32), fmt)
        y = widen(cast(x, "e4m3", overflow="saturate"))
        assert np.array_equal(y, np.float32([448, -448, 448, 1, 448, math.nan]), equal_nan=True)


@pytest.mark.parametrize(("source", "fmt"), [("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "tf32"), ("fp32", "fp64")])
def test_saturate_moves_infinities_whatever_the_source(source: str, fmt: str) -> None:
    x = np.array([math.inf, -math.inf, 1], dtype_of(source))
    with np.errstate(over="ignore"):
        y = cast(x, fmt, overflow="saturate")
    assert np.array_equal(np.float64(y), [FORMATS[fmt].max, -FORMATS[fmt].max, 1])


def test_an_unknown_overflow_is_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        cast(np.ones(2, np.float32), "e4m3", overflow="saturated")


def test_widening_a_signalling_nan_to_out_does_not_warn() -> None:
    signalling = np.array([0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(widen(signalling, "fp64")[0])
    assert np.isnan(widen(signalling, "fp64", out=np.empty(1))[0])


def test_out_of_another_format_is_refused() -> None:
    # Rounding is not skipped in silence: fp32 values written to an fp32 `out` under the name fp16 would not be rounded.
    # (From 4096 elements on, the fast path does refuse: what happens should not depend on the size.)
    with pytest.raises((TypeError, ValueError)):
        cast(np.float32([1 + 2**-12]), "fp16", out=np.empty(1, np.float32))


def test_widen_to_out_of_a_narrower_format_is_refused() -> None:
    # The exact direction: an `out` that cannot hold the values would round behind the name widen.
    with pytest.raises((TypeError, ValueError)):
        widen(np.float16([1 + 2**-10]), "fp32", out=np.empty(1, dtype_of("bf16")))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e8m0"])
def test_narrow_formats_have_no_default_overflow(fmt: str) -> None:
    with pytest.raises(TypeError, match=f"cast to {fmt}: say overflow"):
        cast(np.ones(2, np.float32), fmt)


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("source", ["fp16", "bf16", "fp32", "fp64"])
def test_saturation_anywhere(source: str, fmt: str, backend: Backend) -> None:
    """On a device too, where BF16 arrays cannot be clipped. 1.001 times the largest value rounds to one beyond it, or to it."""
    largest = FORMATS[fmt].max
    with np.errstate(over="ignore"):
        x = cast(np.array([1.5, -1.5, 1.001 * largest, -1.001 * largest, np.inf, -np.inf, np.nan, -0.0]), source)
    y = on_host(cast(backend.from_host(x), fmt, overflow="saturate"))
    assert y.dtype == dtype_of(fmt)
    expected = cast(np.clip(widen(x, "fp64"), -largest, largest), fmt)  # one rounding, of a value that is no larger than any
    assert np.array_equal(bits(y[[0, 1, 2, 3, 4, 5, 7]]), bits(expected[[0, 1, 2, 3, 4, 5, 7]])) and np.isnan(y[6])


@pytest.mark.parametrize("fmt", [fmt for fmt, row in FORMATS.items() if row.bits <= 8])
def test_narrow_formats_are_for_numpys_arrays(fmt: str, backend: Backend) -> None:
    x = backend.from_host(np.array([1.0, -0.0], np.float32))
    if backend.on_host:
        assert widen(cast(x, fmt, overflow="saturate")).size == 2
    else:
        with pytest.raises(TypeError, match=f"cast to {fmt}: CuPy has no such arrays"):
            cast(x, fmt, overflow="saturate")


def test_no_warning_escapes() -> None:
    # an overflow, an underflow and a NaN are results; setup.cfg turns warnings into errors
    x = np.array([1e38, 1e-45, math.nan, -1e38], np.float32)
    with np.errstate(all="raise"):
        for fmt in ("fp16", "bf16"):
            out = np.empty(4, dtype_of(fmt))
            assert cast(x, fmt, out=out) is out
            assert np.array_equal(bits(cast(x, fmt))[[0, 1, 3]], bits(out)[[0, 1, 3]])
        assert np.isinf(cast(np.array([1e300]), "fp32"))[0]


# ------------------------------------------------------------------------------------------------------------------ TF32


def tf32_by_frexp(x: np.ndarray) -> np.ndarray:
    """TF32 restated without bit tricks: scale so that the last of 11 significant bits is 1, round to an integer, scale back.

    All in float64, where each step is exact; np.rint rounds halves to even. Below 2^-126 the place stays 2^-136.
    """
    with np.errstate(invalid="ignore"):  # signalling NaNs among random patterns
        wide = x.astype(np.float64)
    exponent = np.frexp(wide)[1]  # |x| = m 2^exponent, m in [0.5, 1); 2^-126 has exponent -125
    place = np.ldexp(1.0, np.maximum(exponent, -125) - 11)
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.rint(wide / place) * place
        result = np.where(np.abs(rounded) >= 2.0**128, np.copysign(math.inf, wide), rounded)
    return np.where(np.isfinite(wide), result, wide)


def test_tf32_is_the_restatement() -> None:
    rng = np.random.default_rng(1)
    pattern = rng.integers(0, 2**32, 400_000, dtype=np.uint32)
    ties = (rng.integers(0, 2**19, 100_000, dtype=np.uint32) << 13) | np.uint32(0x1000)
    edges = np.uint32([0, 0x80000000, 1, 0x7F7FFFFF, 0x7F7FEFFF, 0x7F7FF000, 0x7F800000, 0xFF800000, 0x007FFFFF, 0x00001000])
    x = np.concatenate([pattern, ties, ties - 1, ties + 1, edges]).view(np.float32)
    y, expected = cast(x, "tf32"), tf32_by_frexp(x)
    assert y.dtype == np.float32
    number = ~np.isnan(expected)
    assert np.array_equal(y[number], expected[number])
    assert np.array_equal(np.signbit(y[number]), np.signbit(x[number]))
    assert np.isnan(y[~number]).all()
    assert not (bits(y)[np.isfinite(y)] & 0x1FFF).any()
    assert np.array_equal(bits(cast(y, "tf32"))[number], bits(y)[number])  # idempotent


def test_tf32_leaves_its_argument_alone_and_writes_out() -> None:
    x = np.linspace(-3, 3, 101, dtype=np.float32)
    kept = x.copy()
    out = np.empty_like(x)
    assert cast(x, "tf32", out=out) is out
    assert np.array_equal(out, cast(x, "tf32")) and not np.array_equal(out, x)
    assert np.array_equal(x, kept)


def test_tf32_from_16_bits_is_exact() -> None:
    x = all_codes("fp16")
    assert np.array_equal(cast(x, "tf32"), widen(x), equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------- double


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
@pytest.mark.parametrize("with_out", [False, True])
def test_fp64_is_rounded_twice_by_way_of_fp32(fmt: str, with_out: bool) -> None:
    half_place = FORMATS[fmt].eps / 2
    x = np.array([1 + half_place + 2.0**-40, 1 + 3 * half_place - 2.0**-40])
    # The correct single rounding is up for the first and down for the second (both odd). By way of fp32 both become ties
    # first, and ties go to even: 1 and 1 + 2 eps. This is PyTorch's answer.
    out = np.empty(2, dtype_of(fmt)) if with_out else None
    y = cast(x, fmt, out=out)
    assert np.array_equal(widen(y, "fp64"), [1.0, 1 + 2 * FORMATS[fmt].eps])


# --------------------------------------------------------------------------------------- out=, identity, shapes, layout


@pytest.mark.parametrize("fmt", ["fp64", "fp32", "fp16", "bf16"])
def test_what_has_the_format_already_is_returned_itself(fmt: str) -> None:
    x = np.zeros(4, dtype_of(fmt))
    assert cast(x, fmt) is x
    assert cast(x, fmt, out=x) is x
    assert widen(x, fmt) is x
    assert widen(x, fmt, out=x) is x


@pytest.mark.parametrize("function", [cast, widen])
def test_out_of_the_same_format_is_a_copy(function: object) -> None:
    x, out = np.arange(4, dtype=np.float32), np.empty(4, np.float32)
    y = function(x, "fp32", out=out)
    assert y is out and not np.shares_memory(y, x) and np.array_equal(y, x)


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3", "e5m2"])
@pytest.mark.parametrize("source", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_writing_to_out_equals_returning(fmt: str, source: str, overflow: str) -> None:
    rng = np.random.default_rng(2)
    x = cast(rng.standard_normal(5000) * 10.0 ** rng.integers(-9, 7, 5000), source)
    returned = cast(x, fmt, overflow=overflow)
    out = np.zeros(5000, dtype_of(fmt))
    assert cast(x, fmt, out=out, overflow=overflow) is out
    assert np.array_equal(bits(out), bits(returned))


def test_out_may_be_a_strided_view_and_its_surroundings_stay() -> None:
    x = np.float32([1.5, 2.5, 1 + 2**-12])
    buffer = np.full((3, 2), 7.0, np.float16)
    y = cast(x, "fp16", out=buffer[:, 0])
    assert np.shares_memory(y, buffer)
    assert np.array_equal(buffer, np.float16([[1.5, 7], [2.5, 7], [1.0, 7]]))
    back = np.full((3, 2), 9.0, np.float32)
    widen(buffer[:, 0], out=back[:, 1])
    assert np.array_equal(back, np.float32([[9, 1.5], [9, 2.5], [9, 1.0]]))


@pytest.mark.parametrize("shape", [(6, 8), (120, 150)])  # the second is large enough for the fast path
@pytest.mark.parametrize("fmt", ["fp16", "bf16", "tf32"])
def test_non_contiguous_arrays(fmt: str, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    for view in (x.T, x[::2, 1::3], x[::-1], x[:, ::-2].T):
        assert np.array_equal(cast(view, fmt), cast(np.ascontiguousarray(view), fmt))
        assert cast(view, fmt).shape == view.shape
    half = cast(x, "bf16")
    assert np.array_equal(widen(half.T[1::2]), widen(half).T[1::2])


@pytest.mark.parametrize("fmt", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("make", [np.float32, lambda v: np.array(v, np.float32)], ids=["scalar", "0-d"])
def test_zero_dimensional(fmt: str, make: object) -> None:
    x = make(1 + 2**-9)
    y = cast(x, fmt)
    assert y.shape == () and y.dtype == dtype_of(fmt)
    assert float(y) == {"bf16": 1.0}.get(fmt, 1 + 2**-9)
    assert float(widen(y, "fp64")) == float(y)


@pytest.mark.parametrize("make", [np.float32, lambda v: np.array(v, np.float32)], ids=["scalar", "0-d"])
def test_zero_dimensional_tf32(make: object) -> None:
    assert float(cast(make(1 + 2**-12), "tf32")) == 1.0


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    for fmt in ("fp16", "bf16", "tf32", "e4m3"):
        assert cast(np.empty(shape, np.float32), fmt, overflow="inf").shape == shape
    assert widen(np.empty(shape, np.float16)).shape == shape


@pytest.mark.parametrize(
    ("source", "target"),
    [("fp32", "fp16"), ("fp32", "bf16"), ("fp64", "fp32"), ("fp16", "bf16"), ("bf16", "fp16"), ("fp16", "e4m3")],
)
def test_widen_refuses_to_round(source: str, target: str) -> None:
    with pytest.raises(TypeError, match=f"widen: {source} -> {target} would round"):
        widen(np.ones(2, dtype_of(source)), target)


def test_widen_refuses_integers() -> None:
    with pytest.raises(TypeError, match="int64 holds no floating-point format"):
        widen(np.arange(3))


# --------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e5m2", "e4m3"])
def test_equal_to_torch(fmt: str) -> None:
    torch = pytest.importorskip("torch")
    twin = {"bf16": "bfloat16", "fp16": "float16", "e5m2": "float8_e5m2", "e4m3": "float8_e4m3fn"}[fmt]
    target = getattr(torch, twin)
    overflow = OVERFLOW[fmt]
    if fmt == "e4m3" and torch.tensor([1000.0]).to(target).float().item() == 448:
        overflow = "saturate"  # since torch 2.13; NaN before
    rng = np.random.default_rng(4)
    decodes = widen(all_codes(fmt))
    near = (rng.integers(0, 2**16, 200_000, dtype=np.uint32) << 16) + rng.integers(0x7FFE, 0x8003, 200_000, dtype=np.uint32)
    patterns = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32)
    x = np.concatenate([decodes, patterns.view(np.float32), near.view(np.float32)])
    ours = cast(x, fmt, overflow=overflow)
    theirs = torch.from_numpy(x).to(target)
    is_nan = torch.isnan(theirs.float()).numpy()
    codes = theirs.view(torch.int16 if ours.dtype.itemsize == 2 else torch.uint8).numpy().view(CODE[ours.dtype.itemsize])
    assert np.array_equal(np.isnan(widen(ours)), is_nan)  # payloads of NaNs are each library's own
    assert np.array_equal(bits(ours)[~is_nan], codes[~is_nan])


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_fp64_equal_to_torch(fmt: str) -> None:
    torch = pytest.importorskip("torch")
    target = {"bf16": torch.bfloat16, "fp16": torch.float16}[fmt]
    rng = np.random.default_rng(5)
    # values a hair beside ties of the target, where one rounding and two differ
    steps = rng.integers(-(2**11), 2**11, 100_000) + 0.5
    x = (1 + steps * FORMATS[fmt].eps) * (1 + rng.choice([-1, 0, 1], 100_000) * 2.0**-45)
    theirs = torch.from_numpy(x).to(target).double().numpy()
    assert np.array_equal(widen(cast(x, fmt), "fp64"), theirs)


# --------------------------------------------------------------------------------------------------- arithmetic in 16 bits

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


def operand_pairs(fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """Every code with each of a few (zeros, ones, subnormals, the largest, specials), both ways, and random pairs of codes."""
    codes, rng = all_codes(fmt), np.random.default_rng(6)
    largest = LAYOUT[fmt][2]
    chosen = np.array([0, 0x8000, 1, 0x8003, 0x0155, 0x3C00, 0xBF80, 0x3555, 0x4248, largest, largest + 1, 0x7FFF], np.uint16)
    a, b = np.meshgrid(codes, chosen.view(dtype_of(fmt)))
    x, y = rng.integers(0, 65536, (2, 300_000)).astype(np.uint16).view(dtype_of(fmt))
    return np.concatenate([a.ravel(), b.ravel(), x]), np.concatenate([b.ravel(), a.ravel(), y])


def by_way_of_fp32(operation: str, a: np.ndarray, b: np.ndarray, fmt: str) -> np.ndarray:
    """What every operation here does: widen, compute in FP32, round. Two roundings, but the first is harmless: FP32 has 24
    bits, and 2 * 11 + 2 are enough for + - * / of 11-bit numbers (Figueroa 1995, 'When is double rounding innocuous?')."""
    with np.errstate(all="ignore"):
        return cast(ARITHMETIC[operation](widen(a), widen(b)), fmt)


def assert_same_numbers(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Codes are equal, but those of NaNs, whose payload and sign are each library's own."""
    is_nan = np.isnan(widen(theirs))
    assert np.array_equal(np.isnan(widen(ours)), is_nan)
    assert np.array_equal(bits(ours)[~is_nan], bits(theirs)[~is_nan])


@pytest.mark.parametrize("operation", ARITHMETIC)
@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_fp32_arithmetic_and_one_cast_is_torchs_16_bit_arithmetic(fmt: str, operation: str) -> None:
    torch = pytest.importorskip("torch")
    target = {"fp16": torch.float16, "bf16": torch.bfloat16}[fmt]
    a, b = operand_pairs(fmt)
    there = [torch.from_numpy(x.view(np.int16).copy()).view(target) for x in (a, b)]
    theirs = getattr(torch, operation)(*there).view(torch.int16).numpy().view(dtype_of(fmt))
    assert_same_numbers(by_way_of_fp32(operation, a, b, fmt), theirs)


# ------------------------------------------------------------------------------------- other libraries of number formats


def around_every_boundary(fmt: str) -> np.ndarray:
    """FP32 numbers: all values of a format, the midpoints between neighbors (the last one is where overflow begins), and
    the FP32 neighbors of each; both signs; then what is far outside."""
    exponent_bits, fraction_bits, largest = LAYOUT[fmt]
    value = decoded(np.arange(largest + 2), exponent_bits, fraction_bits)
    middle = np.float32((value[:-1] + value[1:]) / 2)
    grid = np.concatenate([np.float32(value[:-1]), middle])
    near = np.concatenate([grid, np.nextafter(grid, np.float32(-math.inf)), np.nextafter(grid, np.float32(math.inf))])
    far = np.uint32([1, 0x00400000, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001]).view(np.float32)
    x = np.concatenate([near, far])
    return np.concatenate([x, -x])


class SoftFloat:
    """Berkeley SoftFloat: IEEE 754 in integers. Arrays go through it number by number, as big-endian bytes."""

    def __init__(self) -> None:
        self.library = pytest.importorskip("softfloatpy")
        self.type = {"fp32": self.library.Float32, "fp16": self.library.Float16, "bf16": self.library.BFloat16}
        assert self.library.get_rounding_mode() == self.library.RoundingMode.NEAR_EVEN

    def numbers(self, x: np.ndarray, fmt: str) -> list[object]:
        size, raw, make = x.dtype.itemsize, bits(x).byteswap().tobytes(), self.type[fmt].from_bytes
        return [make(raw[i : i + size]) for i in range(0, len(raw), size)]

    def array(self, numbers: list, fmt: str) -> np.ndarray:
        code = CODE[FORMATS[fmt].itemsize]
        return np.frombuffer(b"".join(x.to_bytes() for x in numbers), code).byteswap().view(dtype_of(fmt))

    def convert(self, x: np.ndarray, source: str, target: str) -> np.ndarray:
        name = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
        function = getattr(self.library, f"{name[source]}_to_{name[target]}")
        return self.array([function(number) for number in self.numbers(x, source)], target)


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_equal_to_softfloat_at_every_boundary(fmt: str) -> None:
    softfloat = SoftFloat()
    x = around_every_boundary(fmt)
    assert_same_numbers(cast(x, fmt), softfloat.convert(x, "fp32", fmt))
    codes = all_codes(fmt)
    there = softfloat.convert(codes, fmt, "fp32")
    is_nan = np.isnan(there)
    assert np.array_equal(np.isnan(widen(codes)), is_nan)
    assert np.array_equal(bits(widen(codes))[~is_nan], bits(there)[~is_nan])


@pytest.mark.parametrize("operation", ARITHMETIC)
def test_fp32_arithmetic_and_one_cast_is_softfloats_fp16_arithmetic(operation: str) -> None:
    softfloat = SoftFloat()  # its fp16 operations never see FP32
    a, b = (x[::17] for x in operand_pairs("fp16"))
    function = getattr(softfloat.library, f"f16_{operation}")
    pairs = zip(softfloat.numbers(a, "fp16"), softfloat.numbers(b, "fp16"), strict=True)
    assert_same_numbers(by_way_of_fp32(operation, a, b, "fp16"), softfloat.array([function(*pair) for pair in pairs], "fp16"))


GFLOAT = {"fp16": "binary16", "bf16": "bfloat16", "e4m3": "ocp_e4m3", "e5m2": "ocp_e5m2"}


@pytest.mark.parametrize("overflow", ["inf", "saturate"])
@pytest.mark.parametrize("fmt", GFLOAT)
def test_equal_to_gfloat_at_every_boundary(fmt: str, overflow: str) -> None:
    gfloat = pytest.importorskip("gfloat")
    info = getattr(pytest.importorskip("gfloat.formats"), f"format_info_{GFLOAT[fmt]}")
    x = around_every_boundary(fmt)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        theirs = gfloat.round_ndarray(info, x.astype(np.float64), sat=overflow == "saturate")
    ours = widen(cast(x, fmt, overflow=overflow), "fp64")
    assert np.array_equal(ours, theirs, equal_nan=True)
    number = ~np.isnan(theirs)
    assert np.array_equal(np.signbit(ours)[number], np.signbit(theirs)[number])


@pytest.mark.parametrize("fmt", ["e3m2", "e2m3", "e2m1"])
def test_the_narrowest_formats_are_gfloats(fmt: str) -> None:
    # They have neither Inf nor NaN: what is too large saturates.
    gfloat = pytest.importorskip("gfloat")
    info = getattr(pytest.importorskip("gfloat.formats"), f"format_info_ocp_{fmt}")
    values = np.unique(np.float64(FORMATS[fmt].max) * np.linspace(-1.5, 1.5, 200_001))
    grid = np.arange(-2048, 2049) / 64  # up to 32, by less than half the smallest subnormal of each: all ties are among them
    x = np.concatenate([np.float32(values), np.float32(grid), np.nextafter(np.float32(grid), np.float32(math.inf))])
    theirs = gfloat.round_ndarray(info, x.astype(np.float64), sat=True)
    assert np.array_equal(widen(cast(x, fmt, overflow="saturate"), "fp64"), theirs)


def test_the_other_libraries_can_disagree() -> None:
    # negative control: told to round toward zero, both agree with one another, and with cast in all but these of the
    # 12 kinds (value or midpoint; itself, below, above; next to an even or an odd code): just below a value (2), just above
    # a midpoint (2), and the midpoints whose even neighbor is the larger (1)
    softfloat, gfloat = SoftFloat(), pytest.importorskip("gfloat")
    modes, x = softfloat.library.RoundingMode, around_every_boundary("fp16")
    x = x[np.abs(x) < FORMATS["fp16"].max]
    softfloat.library.set_rounding_mode(modes.MIN_MAG)
    try:
        first = softfloat.convert(x, "fp32", "fp16")
    finally:
        softfloat.library.set_rounding_mode(modes.NEAR_EVEN)
    info = pytest.importorskip("gfloat.formats").format_info_binary16
    second = gfloat.round_ndarray(info, x.astype(np.float64), rnd=gfloat.RoundMode.TowardZero)
    assert np.array_equal(widen(first, "fp64"), second)
    assert (bits(first) != bits(cast(x, "fp16"))).mean() == pytest.approx(5 / 12, rel=1e-3)
