"""Bit patterns: views of floating-point arrays as unsigned integers, and of integers as floating-point arrays.

Codes of 8 bits and fewer are stored as unsigned integers, since only ml_dtypes has array types for them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import FORMATS, format_of

_UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


def bits_of(x: Array) -> Array:
    """Return a view of an array of floats as unsigned integers of the same size.

    A format of 4 or 6 bits has its code in the low bits of a byte. Errors: TypeError for an array that holds no floats.
    PyTorch: `x.view(torch.uint16)`.
    """
    return x.view(_UNSIGNED[FORMATS[format_of(x)].itemsize])


def from_bits(bits: Array, fmt: str) -> Array:
    """Return a view of bit patterns as values of format `fmt`.

    Errors: TypeError for integers that are signed or of another size than the format's.
    PyTorch: `bits.view(torch.float8_e4m3fn)`.
    """
    row = FORMATS[fmt]
    if bits.dtype != _UNSIGNED[row.itemsize]:
        raise TypeError(f"bit patterns of {fmt} are {_UNSIGNED[row.itemsize]}, not {bits.dtype}")
    return bits.view(row.dtype)


def resized(bits: Array, size: int) -> Array:
    """Convert unsigned integers to a type of `size` bytes; a narrower one keeps the low bits. Errors: TypeError for others."""
    if bits.dtype.kind != "u":
        raise TypeError(f"resized: {bits.dtype} is not a type of unsigned integers")
    return bits.astype(_UNSIGNED[size], copy=False)


def bytes_of(x: Array) -> Array:
    """Return a view of a flat array as bytes, which is what ranks exchange.

    Errors: TypeError for an array that is not 1-d and contiguous.
    """
    if x.ndim != 1 or not x.flags.c_contiguous:
        raise TypeError(f"bytes_of: a flat array in C order, not one of shape {x.shape}")
    return x.view(np.uint8)


def bit_string(x: Any) -> str:
    """Return the bits of one value as sign|exponent|fraction, e.g. '0|01111|0000000000' for 1 in fp16.

    x: a 0-d array of any format that has an array type of its own (TF32, stored in fp32, shows as fp32).
    """
    fmt = FORMATS[format_of(x)]
    code = f"{int.from_bytes(x.tobytes(), sys.byteorder):0{8 * fmt.itemsize}b}"[-fmt.bits :]
    ends = (fmt.sign_bits, fmt.sign_bits + fmt.exponent_bits)
    return "|".join(part for part in (code[: ends[0]], code[ends[0] : ends[1]], code[ends[1] :]) if part)
