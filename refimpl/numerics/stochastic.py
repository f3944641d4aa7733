"""Stochastic rounding: up or down by chance, in proportion to the distance, so that the mean error is zero.

The random bits are a function of (seed, step, stream, index of the element) and nothing else: no generator has a state
that a checkpoint would have to keep, and it makes no difference in which blocks, on how many threads or ranks, or in
which order the elements are rounded. Nor on which backend: all is arithmetic with integers, which is the same everywhere.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS

# -- random bits -------------------------------------------------------------------------------------------------------

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by each round: the golden ratio, and sqrt(3) - 1
ROUNDS = 10

STREAMS = {use: i for i, use in enumerate(("weights", "signs", "grads", "main_grads", "master", "m", "v"))}
"""The stream of each use of chance in a run, so that no two draw the same bits: each kind of state that is rounded by
chance, and the signs of a Hadamard transform. Tensors that are quantized by chance have others, by name: `tensor_stream`."""

FIRST_OF_TENSORS = 16

_LOW = (1 << 32) - 1
_PIECE = 1 << 14  # counters at a time: a few arrays of them fit a cache


def philox(counter: Array, key: tuple[int, int], xp: Any = np) -> Array:
    """Philox4x32-10: each counter of 4 words becomes 4 random words, by ten rounds of multiplying and mixing with the key.

        (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0));   k += W

    hi and lo are the halves of a 64-bit product. counter: uint32 (n, 4). key: two integers below 2^32. -> uint32 (n, 4).
    xp: the array library that the counters are of. The host takes them in pieces; a device has no such cache, and all at once.
    Source: Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3' (Random123). PyTorch: the generator of its
    CUDA kernels.
    """
    words = xp.empty(counter.shape, np.uint32)
    piece = _PIECE if xp is np else max(1, len(counter))
    for start in range(0, len(counter), piece):
        # 64-bit words of which the upper half is zero, so that products have room
        c0, c1, c2, c3 = xp.ascontiguousarray(counter[start : start + piece].T, dtype=np.uint64)
        k0, k1 = key
        for _ in range(ROUNDS):
            product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
            c0, c1 = (product1 >> 32) ^ c1 ^ np.uint64(k0), product1 & _LOW
            c2, c3 = (product0 >> 32) ^ c3 ^ np.uint64(k1), product0 & _LOW
            k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
        for i, word in enumerate((c0, c1, c2, c3)):
            words[start : start + piece, i] = word
    return words


def random_bits(seed: int, step: Array | int, start: int, n: int, stream: int = 0, xp: Any = np) -> Array:
    """32 random bits for each of the elements start, start + 1, ..., start + n - 1 of a global index. -> uint32 (n,)

    Element i has word i mod 4 of philox(counter = (i div 4, in two words; step; stream), key = seed, in two words).
    stream: tells apart what draws in one step under one seed: one of STREAMS, or `tensor_stream`.
    xp: the array library of the result; on a device `step` is a 0-d array there, whose value nobody on the host asks for.
    Errors: ValueError for a number that is negative or too large for its words.
    """
    sizes = {"seed": (seed, 64), "stream": (stream, 32), "start": (start, 63), "n": (n, 63)}
    if xp is np:
        step = int(step)
        sizes["step"] = step, 32
    for name, (value, size) in sizes.items():
        if not 0 <= value < 1 << size:
            raise ValueError(f"random_bits: {name} is {value}, not in 0..2^{size} - 1")
    first, last = start // 4, -(-(start + n) // 4)
    index = xp.arange(first, last, dtype=np.uint64)
    counter = xp.empty((index.size, 4), np.uint32)
    counter[:, 0], counter[:, 1] = index & _LOW, index >> 32
    counter[:, 2], counter[:, 3] = step, stream
    words = philox(counter, (seed & _LOW, seed >> 32), xp).reshape(-1)
    return words[start - 4 * first :][:n]


def tensor_stream(name: str) -> int:
    """The stream of a tensor of that name, the CRC-32 of it. Two names may share one: who draws for many checks that."""
    crc = zlib.crc32(name.encode())
    return crc if crc >= FIRST_OF_TENSORS else crc + FIRST_OF_TENSORS


# -- rounding ----------------------------------------------------------------------------------------------------------


def stochastic_round(x: Array, fmt: str, bits: Array, out: Array | None = None, overflow: str | None = None) -> Array:
    """Round each value to one of its two neighbors in `fmt`, to the farther from zero with the probability

        P(away from zero) = (|x| - |down|) / (|up| - |down|),     so that the mean of the result is x

    up to 2^-32, the size of a draw: away where bits < P 2^32. Values of the format stay as they are, zeros with their sign,
    infinities and NaN too. Subnormals are values like others: what nearest rounding would flush is kept now and then.

    x: fp32, or a format that fp32 holds; an array of a device can be rounded to bf16 only. bits: uint32, the shape of x. out:
    an array of `fmt` to write to, or x's own memory where `fmt` is fp32. overflow: as in `cast`. Above the format's largest
    value lies what the format would have there with one more exponent; a value that is rounded to that has overflowed:
    'saturate' makes it the largest value, 'inf' what `cast` makes of it. So with 'inf' a value above the largest becomes an
    infinity by chance; with 'saturate' its mean is too small.

    Errors: TypeError when `overflow` is missing for a format of 8 bits or fewer, or `bits` is not uint32; ValueError when
      its shape is not that of x.
    Source: Gupta et al. 2015, arXiv 1502.02551, section 3.  PyTorch: none; torchao's `_fp32_to_bf16_sr` has it for bf16.
    Differs from the source: torchao and llm.c use 16 bits a value, whose P for bf16 is exact as well; here bf16 reads the
      upper 16 of 32, in the other direction (away where bits < P, not where bits + P carries).
    """
    x = widen(x, "fp32")
    if bits.dtype != np.uint32:
        raise TypeError(f"stochastic_round: bits are {bits.dtype}, not uint32")
    if bits.shape != x.shape:
        raise ValueError(f"stochastic_round: bits have the shape {bits.shape}, x {x.shape}")
    rounded = _round_to_bf16(x, bits) if fmt == "bf16" else round_exactly(x, fmt, bits)
    return cast(rounded, fmt, out=out, overflow=overflow)


def round_exactly(x: Array, fmt: str, bits: Array) -> Array:
    """The definition, for any format: t = |x| / u is a whole number of ulps u and a fraction; away where the draw is below it.

    Every line is exact: u is a power of two, the whole number has the format's bits, the draw is compared in fp64. -> fp32,
    where every finite value is one of `fmt` but for its largest exponent.
    """
    row = FORMATS[fmt]
    finite = np.isfinite(x)
    magnitude = np.where(finite, abs(x), 0)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, 1 - row.bias) - row.fraction_bits  # that of u
    t = np.ldexp(magnitude, -exponent)
    whole = np.floor(t)
    away = bits < np.ldexp(widen(t - whole, "fp64"), 32)
    with np.errstate(over="ignore"):
        return np.where(finite, np.copysign(np.ldexp(whole + away, exponent), x), x)


def _round_to_bf16(x: Array, bits: Array) -> Array:
    """`round_exactly(x, 'bf16', bits)`, to the bit, in a few passes over integers, by operators that any array library has.

    The lower half of the pattern is P 2^16. It exceeds the draw d, 16 bits, exactly where adding 0xffff - d carries into
    the upper half; and a carry is a step away from zero, into the next exponent if need be, and from the largest to infinity.
    """
    pattern = bits_of(x)
    stepped = (pattern + (0xFFFF - (bits >> 16))) & 0xFFFF0000
    finite = (pattern & _EXPONENT) != _EXPONENT
    return from_bits(stepped * finite + pattern * ~finite, "fp32")


_EXPONENT = 0x7F800000  # of FP32; all ones in infinities and NaN
