"""A quantized tensor: codes of a small format, and a scale for each block of them.

Schemes differ in the shape of a block; the scales are an array with one element per block:

    block                scales for x (M, K)    scheme
    (M, K)               (1, 1)                 per tensor
    (1, K)               (M, 1)                 per row, or token
    (1, 128), (128, 128)                        DeepSeek-V3: activations, weights
    (1, 32), (1, 16)                            MX, NVFP4

    value = element * scale (* tensor scale)

Where blocks do not divide an axis, the last one is shorter, as if the tensor were padded with zeros. An empty tensor has no
blocks and no scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.stochastic_rounding import stochastic_round


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with their scales.

    codes: uint8, of the tensor's shape. A code of 4 or 6 bits takes a byte here; `nbytes_packed` is what a device needs.
    fmt: the element format: e4m3, e5m2, e3m2, e2m3, e2m1.
    scales: of the shape ceil(shape / block); fp32, or uint8 codes in `scale_fmt`.
    scale_fmt: fp32, e8m0 (MX) or e4m3 (NVFP4).
    block: the shape of a block.
    tensor_scale: fp32, 0-d: multiplies all scales (NVFP4); or None.
    """

    codes: Array
    fmt: str
    scales: Array
    scale_fmt: str
    block: tuple[int, ...]
    tensor_scale: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return tuple(int(n) for n in self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes here, one per code."""
        return sum(int(x.nbytes) for x in (self.codes, self.scales, self.tensor_scale) if x is not None)

    @property
    def nbytes_packed(self) -> int:
        """Return the bytes that it takes on a device: two codes of 4 bits share a byte, four of 6 bits share three."""
        packed: int = -(-self.codes.size * FORMATS[self.fmt].bits // 8)
        return packed + self.nbytes - int(self.codes.nbytes)

    @property
    def bits_per_value(self) -> float:
        """Return bits per value, packed, with scales: 8.25 for MX with e4m3, little more than 4.5 for NVFP4; NaN if empty."""
        return 8 * self.nbytes_packed / self.codes.size if self.codes.size else math.nan

    @property
    def T(self) -> QuantizedTensor:
        """Return the transposed matrix, without a copy. Blocks are transposed too: it is still quantized along K."""
        return replace(self, codes=self.codes.T, scales=self.scales.T, block=self.block[::-1])

    def elements(self) -> Array:
        """Return the values of the codes before scaling: fp32, exact, in the memory order of the codes."""
        if self.codes.T.flags.c_contiguous:
            return np.take(_values(self.fmt), self.codes.T).T
        return np.take(_values(self.fmt), self.codes)

    def scale_values(self) -> Array:
        """Return the values of the scales, one per block, without the tensor scale: fp32, exact."""
        return self.scales if self.scale_fmt == "fp32" else widen(from_bits(self.scales, self.scale_fmt), "fp32")

    def dequantize(self, fmt: str = "fp32") -> Array:
        """Return element * scale * tensor scale, in `fmt`.

        Exact for fp64; otherwise every product is rounded to fp32, and the result to `fmt`. Codes times powers of two are exact
        in fp32 within its range.
        """
        wide = "fp64" if fmt == "fp64" else "fp32"
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values = widen(self.elements(), wide) * spread(widen(self.scale_values(), wide), self.block, self.shape)
            if self.tensor_scale is not None:
                values = values * widen(self.tensor_scale, wide)
        return values if fmt == wide else cast(values, fmt)


@cache
def _values(fmt: str) -> Array:
    """Return the values of all 256 codes: looking codes up is six times as fast as converting each."""
    values: Array = widen(from_bits(np.arange(256, dtype=np.uint8), fmt), "fp32")
    values.setflags(write=False)
    return values


def constant(value: float) -> Array:
    """Round a Python number to a 0-d fp32 array."""
    return cast(np.array(value), "fp32")


def along(axis: int, size: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a block along one axis, no longer than the axis: along(-1, 32, (8, 64)) is (1, 32).

    Errors: IndexError for an axis that does not exist.
    """
    block = [1] * len(shape)
    block[axis] = max(1, min(size, shape[axis]))
    return tuple(block)


def block_amax(x: Array, block: tuple[int, ...]) -> Array:
    """Return the largest magnitude of each block ('amax'), NaN where it holds one: x fp32 -> fp32, ceil(x.shape / block)."""
    for axis, size in enumerate(block):
        if x.shape[axis] and size > 1:
            x = np.maximum.reduceat(abs(x), range(0, x.shape[axis], size), axis=axis)
    return abs(x)


def spread(scales: Array, block: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Repeat each block's scale for its elements: -> an array that broadcasts with `shape`."""
    for axis, size in enumerate(block):
        if scales.shape[axis] > 1 and size > 1:
            scales = scales.repeat(size, axis)[(slice(None),) * axis + (slice(shape[axis]),)]
    return scales


def encode(
    x: Array, factors: Array, block: tuple[int, ...], fmt: str, overflow: str = "saturate", bits: Array | None = None
) -> Array:
    """Return the codes of x times the factor of its block, rounded to `fmt`: uint8, of x's shape.

    The product is formed in fp32 (exactly, for a power of two), then rounded to nearest even or, given 32 random bits per
    element, stochastically.
    overflow: as in `cast`. NaN stays NaN where the format has one, and becomes zero where it has none.
    Errors: ValueError for a format that is not an element format.
    """
    if FORMATS[fmt].bits > 8 or not FORMATS[fmt].sign_bits:
        raise ValueError(f"{fmt} is not an element format: it is e4m3, e5m2, e3m2, e2m3 or e2m1")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = x * spread(factors, block, x.shape)
        if FORMATS[fmt].specials == "none":
            scaled = np.where(np.isnan(scaled), np.float32(0), scaled)
        if bits is None:
            return bits_of(cast(scaled, fmt, overflow=overflow))
        return bits_of(stochastic_round(scaled, fmt, bits, overflow=overflow))
