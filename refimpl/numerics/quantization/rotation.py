"""The random Hadamard transform: a rotation of 16 elements at a time that spreads an outlier over all of them.

NVFP4 training rotates both operands of the weight gradient, dw = dy^T x, along the tokens, which the product sums over. The
rotation R is orthonormal: (R dy)^T (R x) = dy^T x, so only the quantization error changes.

Source: NVIDIA 2025, arXiv 2509.25149 (blocks of 16, weight gradients only); Tseng et al. 2024, arXiv 2402.04396.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.philox import STREAMS, random_bits

BLOCK = 16


def hadamard(n: int = BLOCK) -> Array:
    """Return the orthonormal Hadamard matrix, fp32 (n, n): entries +-1 / sqrt(n); symmetric, and its own inverse.

        H(1) = 1,   H(2n) = [[H, H], [H, -H]] / sqrt(2)

    For n = 16 the entries are +-1/4, exactly. Errors: ValueError where n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: {n} is not a power of two")
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return cast(h / math.sqrt(n), "fp32")


def random_signs(seed: int, n: int = BLOCK) -> Array:
    """Return n random signs, +1 or -1: fp32 (n,). One vector serves all blocks, layers and steps.

    Differs from the source: Transformer Engine has 16 fixed signs, +++-+------+-+--; `rotate` takes those as well.
    """
    return np.where(random_bits(seed, 0, 0, n, STREAMS["signs"]) >> 31, -np.float32(1), np.float32(1))


def rotate(x: Array, signs: Array, axis: int = -1) -> Array:
    """Replace each block v of len(signs) elements along `axis` by H (signs v): fp32, of the shape of x.

    x: fp32 or a format that fp32 holds. Without signs a block of equal elements would become one outlier.
    Errors: ValueError where the length of the axis is not a multiple of len(signs).
    Source: Transformer Engine, hadamard_transform.
    """
    return _by_block(x, axis, lambda v: _transform(v * signs), len(signs))


def rotate_back(x: Array, signs: Array, axis: int = -1) -> Array:
    """Undo `rotate`, up to rounding: signs (H v), since H is its own inverse. fp32."""
    return _by_block(x, axis, lambda v: _transform(v) * signs, len(signs))


def _transform(v: Array) -> Array:
    """Return v (..., n) times H(n): sums and differences of the halves, of their halves, and so on, divided by sqrt(n); FP32.

    Unlike a matrix product its order of additions is fixed: log2(n) roundings, and for n = 16 an exact division.
    """
    n = v.shape[-1]
    half, sums = n // 2, v.reshape(-1, n)
    while half:
        pairs = sums.reshape(-1, 2, half)
        sums = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
        half //= 2
    return sums.reshape(v.shape) * hadamard(n)[0, 0]


def _by_block(x: Array, axis: int, f: Any, size: int) -> Array:
    x = np.moveaxis(widen(x, "fp32"), axis, -1)
    if x.shape[-1] % size:
        raise ValueError(f"rotate: the axis has {x.shape[-1]} elements, not a multiple of {size}")
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return np.moveaxis(f(blocks).reshape(x.shape), -1, axis)
