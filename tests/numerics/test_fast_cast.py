"""refimpl.numerics.fast_cast: the bits of NumPy's own conversion, for every input, layout and thread."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from arrays import assert_same_bits, bits

from refimpl.numerics import casts, fast_cast
from refimpl.numerics.fast_cast import BLOCK, SMALL, fp16_to_fp32, fp32_to_fp16
from refimpl.numerics.formats import dtype_of, format_of

ALL_CODES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
SIZES = [0, 1, SMALL - 1, SMALL, SMALL + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK + 1, 3 * BLOCK + 5]

BOTH = pytest.mark.parametrize(
    "convert, source, target",
    [(fp32_to_fp16, np.float32, np.float16), (fp16_to_fp32, np.float16, np.float32)],
    ids=["down", "up"],
)


def by_numpy(x: np.ndarray, target: type) -> np.ndarray:
    with np.errstate(all="ignore"):
        return x.astype(target)


def assert_rounds_as_numpy(patterns: np.ndarray) -> None:
    x = patterns.view(np.float32)
    assert_same_bits(fp32_to_fp16(x, np.empty(x.shape, np.float16)), by_numpy(x, np.float16))


def values(size: int, dtype: type, seed: int = 0) -> np.ndarray:
    """Normal and subnormal fp16 values, zeros of both signs, ties."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 2.0 ** rng.integers(-28, 14, size)
    x[::11] = 0.0
    x[::13] = -0.0
    x[::17] = 2.0**-25 * 3
    return by_numpy(x, dtype)


# ------------------------------------------------------------------------------------------------------ every value


def test_widen_all_codes() -> None:
    """In one block, where the table serves, and without the infinities and NaNs, where the arithmetic does."""
    want = by_numpy(ALL_CODES, np.float32)
    assert_same_bits(fp16_to_fp32(ALL_CODES, np.empty(ALL_CODES.shape, np.float32)), want)
    finite = np.isfinite(ALL_CODES)
    assert_same_bits(fp16_to_fp32(ALL_CODES[finite], np.empty(finite.sum(), np.float32)), want[finite])


def test_round_back_all_codes() -> None:
    finite = ALL_CODES[~np.isnan(ALL_CODES)]
    wide = fp16_to_fp32(finite, np.empty(finite.shape, np.float32))
    assert_same_bits(fp32_to_fp16(wide, np.empty(finite.shape, np.float16)), finite)


@pytest.mark.parametrize("sign", [0, 0x8000_0000], ids=["positive", "negative"])
def test_round_near_every_boundary(sign: int) -> None:
    """All fp32 values within 3 ulps of an fp16 value or of the middle between two, and of 65520, where infinity begins."""
    edges = by_numpy(ALL_CODES[:0x7C00], np.float64)
    edges = np.append(edges, 65536.0)  # what would follow 65504: the middle below it is 65520
    edges = np.concatenate([edges, (edges[1:] + edges[:-1]) / 2])
    near = bits(by_numpy(edges, np.float32)).astype(np.int64)[:, None] + np.arange(-3, 4)
    assert_rounds_as_numpy((near[near >= 0] | sign).astype(np.uint32))


def test_round_extremes() -> None:
    """fp32 subnormals, the largest fp32, infinities: in blocks of their own, since a NaN takes a block to NumPy's code."""
    low, high = np.arange(SMALL, dtype=np.uint32), 0x7F80_0000 - np.arange(SMALL, dtype=np.uint32)
    for patterns in (low, high, low | 0x8000_0000, high | 0x8000_0000):
        assert_rounds_as_numpy(patterns)


def test_round_nans() -> None:
    """The sign of a NaN is kept, and even the payload that NumPy keeps; the neighbors of a NaN are right."""
    fractions = np.arange(1, 1 << 23, 1 << 8, dtype=np.uint32)
    assert_rounds_as_numpy(np.concatenate([fractions | 0x7F80_0000, fractions | 0xFF80_0000]))
    x = values(3 * BLOCK, np.float32)
    x[BLOCK + 7] = np.nan
    assert_rounds_as_numpy(x.view(np.uint32))


@pytest.mark.parametrize("special", [0x7F80_0000, 0x7F80_0001, 0x477F_F000, 0x4780_0000, 0x7F7F_FFFF], ids=hex)
def test_round_one_special_in_a_block(special: int) -> None:
    """One infinity, NaN with the smallest payload, 65520, 65536 or the largest fp32 decides how its block is done."""
    for pattern in (special, special | 0x8000_0000):
        x = values(SMALL, np.float32)
        x.view(np.uint32)[100] = pattern
        assert_rounds_as_numpy(x.view(np.uint32))


@pytest.mark.parametrize("special", [0x7C00, 0x7C01, 0xFC00, 0xFC01, 0x7BFF, 0xFBFF], ids=hex)
def test_widen_one_special_in_a_block(special: int) -> None:
    x = values(SMALL, np.float16)
    x.view(np.uint16)[100] = special
    assert_same_bits(fp16_to_fp32(x, np.empty(x.shape, np.float32)), by_numpy(x, np.float32))


def test_round_random_patterns() -> None:
    """4M random bit patterns; the NaNs, 1 in 256, are taken out of one half, so that the arithmetic sees the rest."""
    patterns = np.random.default_rng(1).integers(0, 1 << 32, 1 << 22, dtype=np.uint32)
    some, rest = np.split(patterns, 2)
    assert_rounds_as_numpy(some)
    assert_rounds_as_numpy(rest[~np.isnan(rest.view(np.float32))])


@pytest.mark.slow
def test_round_all_patterns() -> None:
    """All 2^32 inputs. The arithmetic sees each but the NaNs, which fill whole chunks: a chunk here has one exponent."""
    chunk = 1 << 23
    patterns, got = np.arange(chunk, dtype=np.uint32), np.empty(chunk, np.float16)
    for start in range(0, 1 << 32, chunk):
        x = (patterns | np.uint32(start)).view(np.float32)
        assert_same_bits(fp32_to_fp16(x, got), by_numpy(x, np.float16))


def test_no_warning_whatever_errstate() -> None:
    """pytest turns warnings into errors here; and a caller who made NumPy raise sees no difference either."""
    x = values(2 * BLOCK, np.float32)
    x[5], x[BLOCK + 5] = 1e30, np.nan
    with np.errstate(all="raise"):
        half = fp32_to_fp16(x, np.empty(x.shape, np.float16))
        fp32_to_fp16(x[:9], np.empty(9, np.float16))
        fp16_to_fp32(half, np.empty(x.shape, np.float32))
    assert half[5] == np.inf and np.isnan(half[BLOCK + 5])


def test_widen_where_the_cpu_flushes_subnormals(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the product of a subnormal and 2^112 were zero: everything comes from the table."""
    monkeypatch.setattr(fast_cast, "_2_POW_112", np.array(0.0, np.float32))
    x = ALL_CODES[np.isfinite(ALL_CODES)]
    assert_same_bits(fp16_to_fp32(x, np.empty(x.shape, np.float32)), by_numpy(x, np.float32))


# ----------------------------------------------------------------------------------------- sizes, layouts, overlap


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_sizes(convert: Callable, source: type, target: type, size: int) -> None:
    """The result is right, it is `out`, and nothing is written past its end."""
    x = values(size, source)
    room = np.full(size + 8, 7.0, target)
    out = room[:size]
    assert convert(x, out) is out
    assert_same_bits(out, by_numpy(x, target))
    assert (room[size:] == 7.0).all()


@BOTH
def test_scalar_and_empty_shapes(convert: Callable, source: type, target: type) -> None:
    for shape in ((), (0,), (0, 5), (1, 1, 1)):
        x = np.full(shape, -1.5, source)
        assert_same_bits(convert(x, np.empty(shape, target)), by_numpy(x, target))


LAYOUTS = {
    "rows": lambda a: a,
    "columns": lambda a: np.asfortranarray(a),
    "slice": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "unaligned": lambda a: np.frombuffer(bytearray(b"?" + a.tobytes()), a.dtype, offset=1).reshape(a.shape),
}


@BOTH
@pytest.mark.parametrize("layout_out", LAYOUTS)
@pytest.mark.parametrize("layout_x", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7), (300, 301)])
def test_layouts(convert: Callable, source: type, target: type, layout_x: str, layout_out: str, shape: tuple) -> None:
    x = LAYOUTS[layout_x](values(shape[0] * shape[1], source).reshape(shape))
    out = LAYOUTS[layout_out](np.zeros(shape, target))
    want = by_numpy(x, target).copy("C")
    assert convert(x, out) is out
    assert_same_bits(out.copy("C"), want)


@BOTH
def test_three_axes_in_any_order(convert: Callable, source: type, target: type) -> None:
    x = values(30 * 40 * 50, source).reshape(30, 40, 50)
    for axes in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        y = x.transpose(axes)
        assert_same_bits(convert(y, np.empty(y.shape, target)), by_numpy(y, target).copy("C"))
    row = np.broadcast_to(x[0, 0], (100, 50))
    assert_same_bits(convert(row, np.empty(row.shape, target)), by_numpy(row, target))


@BOTH
@pytest.mark.parametrize("offset", [0, 2, 64])
@pytest.mark.parametrize("size", [100, BLOCK + 100])
def test_overlapping_memory(convert: Callable, source: type, target: type, offset: int, size: int) -> None:
    """`out` may lie over `x`, in either direction: the result is that of separate arrays."""
    for shift_x, shift_out in ((0, offset), (offset, 0)):
        memory = np.zeros(size * 4 + offset, np.uint8)
        x = memory[shift_x : shift_x + size * np.dtype(source).itemsize].view(source)
        out = memory[shift_out : shift_out + size * np.dtype(target).itemsize].view(target)
        x[...] = values(size, source)
        want = by_numpy(x, target)
        assert_same_bits(convert(x, out), want)


@BOTH
@pytest.mark.parametrize("size", [10, BLOCK])
def test_refusals(convert: Callable, source: type, target: type, size: int) -> None:
    x, out = np.ones(size, source), np.zeros(size, target)
    other_order = np.dtype(source).newbyteorder()
    for wrong in (np.float64, np.int32, target, other_order):
        with pytest.raises(TypeError, match="only float"):
            convert(x.astype(wrong), out)
    with pytest.raises(TypeError, match="only float"):
        convert(x, np.zeros(size, source))
    for shape in ((size + 1,), (1, size), (1,)):
        with pytest.raises(ValueError, match="shape"):
            convert(x, np.zeros(shape, target))
    out.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        convert(x, out)
    assert not out.any()


# ---------------------------------------------------------------------------------------------------------- threads


@BOTH
def test_threads_at_once(convert: Callable, source: type, target: type) -> None:
    """Two threads convert different arrays at the same time, again and again: neither sees the other's scratch."""
    inputs = [values(2 * BLOCK + 3, source, seed) for seed in (1, 2)]
    wants = [by_numpy(x, target) for x in inputs]
    start = threading.Barrier(2)

    def work(i: int) -> int:
        start.wait()
        out = np.empty(inputs[i].shape, target)
        return sum(not np.array_equal(bits(convert(inputs[i], out)), bits(wants[i])) for _ in range(40))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [0, 0]


# ---------------------------------------------------------------------------------------------- as the backend calls them

WIDE_FORMATS = ("fp64", "fp32", "fp16", "bf16")


@pytest.mark.parametrize("size", [SMALL - 1, SMALL])
@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("target", WIDE_FORMATS)
@pytest.mark.parametrize("source", WIDE_FORMATS)
def test_cast_and_widen_are_those_of_casts(source: str, target: str, into: bool, size: int) -> None:
    """Their results in every pair of formats, and their refusals."""
    x = casts.cast(values(size, np.float32), source)
    for name in ("cast", "widen"):
        found = []
        for module in (casts, fast_cast):
            out = np.empty(size, dtype_of(target)) if into else None
            try:
                y = getattr(module, name)(x, target, out)
            except TypeError as error:
                found.append(str(error))
                continue
            assert format_of(y) == target and (out is None or y is out)
            found.append(y.tobytes())
        assert found[0] == found[1], name


def test_what_is_written_to_must_have_the_format_and_the_shape() -> None:
    x = values(SMALL, np.float32)
    for out, error in ((np.empty(SMALL, np.float32), TypeError), (np.empty(SMALL + 1, np.float16), ValueError)):
        with pytest.raises(error):
            fast_cast.cast(x, "fp16", out)
