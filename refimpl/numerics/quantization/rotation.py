"""The random Hadamard transform: a rotation of each 16 elements that spreads an outlier over all of them.

NVFP4 training rotates both operands of the weight gradient, dw = dy^T x, along the tokens that it sums over. The rotation R is
orthonormal, so (R dy)^T (R x) = dy^T x: it changes nothing but what quantization then sees.

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
    """The orthonormal Hadamard matrix, fp32 (n, n): entries +-1 / sqrt(n); symmetric, its own inverse.

        H(1) = 1,   H(2n) = [[H, H], [H, -H]] / sqrt(2)

    For n = 16 its entries are +-1/4, exact. Errors: ValueError where n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: {n} is not a power of two")
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return cast(h / math.sqrt(n), "fp32")


def random_signs(seed: int, n: int = BLOCK) -> Array:
    """n random signs, +1 or -1: fp32 (n,). One vector serves all blocks, layers and steps.

    Differs from the source: Transformer Engine has 16 fixed signs, +++-+------+-+--; `rotate` takes those as well.
    """
    return np.where(random_bits(seed, 0, 0, n, STREAMS["signs"]) >> 31, -np.float32(1), np.float32(1))


def rotate(x: Array, signs: Array, axis: int = -1) -> Array:
    """Each block of len(signs) elements v along `axis` becomes H (signs v): fp32, of the shape of x.

    x: fp32 or a format that it holds. Without signs, a block of equal elements would become one outlier.
    Errors: ValueError where the block does not divide the axis.
    Source: Transformer Engine, hadamard_transform.
    """
    return _by_block(x, axis, lambda v: _transform(v * signs), len(signs))


def rotate_back(x: Array, signs: Array, axis: int = -1) -> Array:
    """The inverse of `rotate`: signs (H v), since H is its own inverse. fp32, up to its rounding."""
    return _by_block(x, axis, lambda v: _transform(v) * signs, len(signs))


def _transform(v: Array) -> Array:
    """v (..., n) H(n): sums and differences of its halves, of theirs, and so on, in FP32; then divided by sqrt(n).

    For n = 16 this division is exact, so each result has log2(n) roundings, in an order that no BLAS chooses.
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
        raise ValueError(f"rotate: the axis has {x.shape[-1]} elements, no multiple of {size}")
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return np.moveaxis(f(blocks).reshape(x.shape), -1, axis)
