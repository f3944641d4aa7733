"""Fast conversions fp32 -> fp16 and fp16 -> fp32 of NumPy arrays: `cast` and `widen` for the NumPy backend.

They return the same bits as NumPy's own conversion (`x.astype(...)`) for every input, NaN payloads included. NumPy converts
FP16 one element at a time, with a branch for each kind of value, and raises the CPU's underflow flag for each inexact
subnormal. Here blocks that fit a cache go through a dozen passes of whole-array arithmetic without such branches. One thread of
an AMD Zen 4, NumPy 2.4:

    ns per element                   fp32 -> fp16               fp16 -> fp32
                                  NumPy      here            NumPy      here
    normal values                   2.5       1.0              1.7       0.4
    half of them subnormal           35       1.0              6.7       0.4
    all of them subnormal            67       1.0              7.1       0.4
    infinities among them           2.5       1.3              1.7       1.0

bf16 is not here: ml_dtypes converts it in fewer passes than integer arithmetic on arrays would take.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import casts
from refimpl.numerics.formats import FORMATS

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 1 << 18  # elements per pass: with fewer, threads would wait for Python's lock between passes
SMALL = 2048  # below so many elements a dozen calls cost more than they save


def _constant(bits: int) -> Array:
    value = np.array(bits, np.uint32)
    value.setflags(write=False)
    return value


# Bit patterns of fp32. All views below are between types of the same size, so byte order does not matter.
_SIGN = _constant(0x8000_0000)
_MAGNITUDE = _constant(0x7FFF_FFFF)
_EXPONENT = _constant(0x7F80_0000)
_INF = 0x7F80_0000
_2_POW_16 = _constant((16 + 127) << 23)
_2_POW_MINUS_14 = _constant((-14 + 127) << 23)  # the smallest normal fp16
_TIMES_2_POW_13_AND_2048_ULPS = _constant((13 << 23) + 2048)
_FOLD = _constant((1 << 16) + (1 << 3))
_16 = _constant(16)

_THIRTEEN = np.array(13, np.int32)
_SIGN_AND_CODE = np.array(-0x7000_2000, np.int32)  # 0x8fffe000: bit 31 and bits 27..13
_2_POW_112 = np.array(2.0**112, np.float32)
_FP16_INF, _FP16_MINUS_INF = 0x7C00, 0xFC00

# All fp16 values in the order of their codes, as NumPy widens them: a table for blocks with an infinity or a NaN.
_WIDENED = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
_WIDENED.setflags(write=False)


def cast(x: Array, fmt: str, out: Array | None = None) -> Array:
    """Return `casts.cast(x, fmt, out)`, to the bit."""
    fast = {(np.float32, "fp16"): fp32_to_fp16, (np.float16, "fp32"): fp16_to_fp32}.get((x.dtype.type, fmt))
    return casts.cast(x, fmt, out) if fast is None or x.size < SMALL else _into(fast, x, fmt, out)


def widen(x: Array, fmt: str, out: Array | None = None) -> Array:
    """Return `casts.widen(x, fmt, out)`, to the bit."""
    fits = x.dtype == np.float16 and fmt == "fp32" and x.size >= SMALL
    return _into(fp16_to_fp32, x, fmt, out) if fits else casts.widen(x, fmt, out)


def _into(fast: Callable[[Array, Array], Array], x: Array, fmt: str, out: Array | None) -> Array:
    """Convert into `out`, or into a new array."""
    return fast(x, np.empty_like(x, FORMATS[fmt].dtype) if out is None else out)


def fp32_to_fp16(x: Array, out: Array) -> Array:
    """Round `x` to fp16, to nearest, ties to even: `out[...] = x`, bit for bit, and at least twice as fast.

    x: fp32, any shape and layout. out: fp16, of the same shape; it may overlap `x`. Returns `out`.
    Values from 65520 on become infinities, without a warning. A block of 2^18 elements that holds a NaN takes NumPy's own
    conversion.
    Errors: TypeError for another dtype, ValueError for another shape or an `out` that is read-only.
    PyTorch: `x.to(torch.float16)`, bit for bit except for NaN payloads.
    """
    return _convert(_round_span, x, out, np.float32, np.float16)


def fp16_to_fp32(x: Array, out: Array) -> Array:
    """Widen `x` to fp32, exactly: `out[...] = x`, bit for bit, NaN payloads included, and about four times as fast.

    x: fp16, any shape and layout. out: fp32, of the same shape; it may overlap `x`. Returns `out`.
    Errors: TypeError for another dtype, ValueError for another shape or an `out` that is read-only.
    """
    return _convert(_widen_span, x, out, np.float16, np.float32)


class _Scratch(threading.local):
    """Two buffers of one block per thread, made at the thread's first use and freed with the thread."""

    def __init__(self) -> None:
        self.a = np.empty(BLOCK, np.uint32)
        self.m = np.empty(BLOCK, np.uint32)


_scratch = _Scratch()


def _round_span(x: Array, out: Array) -> None:
    """Convert fp32 -> fp16 for flat, contiguous arrays.

    Let a = |x|, e = max(floor(log2 a), -14) its exponent in fp16, and u = 2^(e-10) the distance between fp16 values there.
    Then r = a / u, rounded to an integer, lies in 0..2048, and the fp16 code of a is (e+14) * 1024 + r. In a normal value r
    contains the hidden bit, which turns the exponent field from e+14 into e+15. In a subnormal value e = -14, and the code is
    r. Where r is rounded up to 2048, the carry gives the next exponent, and beyond the largest value infinity.

    The CPU's addition rounds: m = 2^(e+13) + 2048 u has an ulp of u, so a + m is rounded to a multiple of u, to nearest, ties
    to even. The fraction field of the sum is f = 2048 + r <= 4096, so its exponent field stays e+140; and f is even where r is,
    so ties go the right way. As a bit pattern the sum is t = (e+140) * 2^23 + f.

    The code is the upper half of t * (2^16 + 8) modulo 2^32: t * 2^16 puts f there, and t * 8 adds (e+140) * 1024 (its lower
    half, 8 f <= 2^15, gives no carry). Modulo 2^16 that is r + 2048 + (e+140) * 1024 = r + (e+14) * 1024.
    """
    for start in range(0, x.size, BLOCK):
        values, halves = x[start : start + BLOCK], out[start : start + BLOCK]
        bits, codes = values.view(np.uint32), halves.view(np.uint16)
        a, m = _scratch.a[: values.size], _scratch.m[: values.size]
        np.bitwise_and(bits, _MAGNITUDE, out=a)
        top = int(np.maximum.reduce(a))  # fp32 magnitudes are in the order of their bits; NaNs come last
        if top > _INF:
            _assign(values, halves)
            continue
        if top >= int(_2_POW_16):
            np.minimum(a, _2_POW_16, out=a)  # by the formula the code of 2^16, e = 16 and r = 1024, is 31 * 1024: infinity
        np.bitwise_and(a, _EXPONENT, out=m)
        m.clip(_2_POW_MINUS_14, _2_POW_16, out=m)  # faster than np.maximum, which has no vector loop for a constant
        np.add(m, _TIMES_2_POW_13_AND_2048_ULPS, out=m)
        np.add(a.view(np.float32), m.view(np.float32), out=a.view(np.float32))
        np.multiply(a, _FOLD, out=a)
        np.bitwise_and(bits, _SIGN, out=m)
        np.bitwise_or(a, m, out=a)  # codes end at 0x7c00: bit 31 was clear
        np.right_shift(a, _16, out=a)
        codes[...] = a


def _widen_span(x: Array, out: Array) -> None:
    """Convert fp16 -> fp32 for flat, contiguous arrays.

    Shifted up by 13, the 15 bits below the sign have both fields where fp32 has them: read as fp32 this is the value times
    2^(15-127), for normal and subnormal fp16 values. Multiplying by 2^112 corrects the exponent, exactly. The largest exponent,
    infinities and NaNs, would come out as numbers, so a block with one of them is looked up in the table of all 65,536 values.
    """
    smallest = np.uint32(1 << 13).view(np.float32)
    # Some libraries (built with -ffast-math) make the CPU flush subnormals to zero; then everything is looked up.
    flushes = bool(smallest * _2_POW_112 != np.float32(2.0**-24))
    for start in range(0, x.size, BLOCK):
        signed, values = x[start : start + BLOCK].view(np.int16), out[start : start + BLOCK]
        codes, bits = signed.view(np.uint16), values.view(np.int32)
        if flushes or np.maximum.reduce(signed) >= _FP16_INF or np.maximum.reduce(codes) >= _FP16_MINUS_INF:
            np.take(_WIDENED, codes, out=values, mode="clip")  # any mode but 'raise', which would copy `out`
            continue
        bits[...] = signed  # copies of the sign fill the upper half; the mask below leaves one
        np.left_shift(bits, _THIRTEEN, out=bits)
        np.bitwise_and(bits, _SIGN_AND_CODE, out=bits)
        np.multiply(values, _2_POW_112, out=values)


def _convert(span: Callable[[Array, Array], None], x: Array, out: Array, source: type, target: type) -> Array:
    """Check the arguments, turn them into two flat arrays that share no memory, and run `span` over these."""
    if x.dtype != source or out.dtype != target:
        raise TypeError(f"{x.dtype} -> {out.dtype}: only {source.__name__} -> {target.__name__} is supported")
    if x.shape != out.shape:
        raise ValueError(f"x has the shape {x.shape}, out {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if np.may_share_memory(x, out):
        x = x.copy()  # between different item sizes NumPy's assignment would overwrite elements that it has yet to read
    if x.size < SMALL:
        _assign(x, out)
    elif x.flags.fnc and out.flags.fnc:  # both in column order: their transposes are in row order
        _convert(span, x.T, out.T, source, target)
    elif not out.flags.carray:  # not flat, or not aligned
        out[...] = _convert(span, x, np.empty(out.shape, target), source, target)
    else:
        x = np.require(x, requirements=["C", "ALIGNED"])  # itself, or a copy
        span(x.reshape(-1), out.reshape(-1))
    return out


def _assign(x: Array, out: Array) -> None:
    """Convert with NumPy; an overflow is a result here, not a warning."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out[...] = x
