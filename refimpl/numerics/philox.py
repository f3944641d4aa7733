"""Random bits from a counter: a function of (seed, step, stream, index of the element) and of nothing else.

No generator has a state that a checkpoint would have to keep, and results depend neither on blocks, threads, ranks or the order
of elements, nor on the backend: all is integer arithmetic.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key in each round: the golden ratio, and sqrt(3) - 1
ROUNDS = 10

STREAMS = {use: i for i, use in enumerate(("weights", "signs", "grads", "main_grads", "master", "m", "v"))}
"""Streams by use, so that no two uses share random bits: each kind of state that is rounded stochastically, and the signs of
the Hadamard transform. Tensors that are quantized stochastically have streams by their names: `tensor_stream`."""

FIRST_OF_TENSORS = 16

_LOW = (1 << 32) - 1
_PIECE = 1 << 14  # counters at a time: a few arrays of them fit a cache


def philox4x32(counter: Array, key: tuple[int, int], xp: Any = np) -> Array:
    """Return 4 random words for each counter of 4 words: ten rounds of multiplying, and mixing with the key.

        (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0));   k += W

    hi and lo are the halves of a 64-bit product. counter: uint32 (n, 4). key: two integers below 2^32. -> uint32 (n, 4).
    xp: the array library of the counters.
    Source: Philox4x32-10 of Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3' (Random123).
    PyTorch: the generator of its CUDA kernels.
    """
    words = xp.empty(counter.shape, np.uint32)
    piece = _PIECE if xp is np else max(1, len(counter))  # a device takes all at once
    for start in range(0, len(counter), piece):
        # 64-bit words whose upper half is zero leave room for the products.
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
    """Return 32 random bits for each of the elements start, ..., start + n - 1 of a global index: uint32 (n,).

    Element i gets word i mod 4 of philox4x32(counter = (i div 4, in two words; step; stream), key = seed, in two words).
    stream: one of STREAMS, or of `tensor_stream`. xp: the array library of the result; on a device `step` is a 0-d array of it.
    Errors: ValueError for a number that is negative or too large for its words.
    """
    sizes = {"seed": (seed, 64), "stream": (stream, 32), "start": (start, 63), "n": (n, 63)}
    if xp is np:  # on a device reading the step would wait
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
    words = philox4x32(counter, (seed & _LOW, seed >> 32), xp).reshape(-1)
    return words[start - 4 * first :][:n]


def tensor_stream(name: str) -> int:
    """Return the stream of a tensor: the CRC-32 of its name. Two names may share a stream; `ScalingState` checks for that."""
    crc = zlib.crc32(name.encode())
    return crc if crc >= FIRST_OF_TENSORS else crc + FIRST_OF_TENSORS
