"""Conversions between number formats: `cast` rounds to nearest, `widen` is exact and refuses any other conversion.

On the host all rounding to nearest, ties to even, is done by `cast`, or in the NumPy backend by `fast_cast.cast`, with the same
bits. The package's docstring lists the other ways to round.
"""

from __future__ import annotations

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import FORMATS, dtype_of, format_of, widens_to


def cast(x: Array, fmt: str, out: Array | None = None, overflow: str | None = None) -> Array:
    """Round every value of `x` to the nearest value of format `fmt`, ties to the even fraction.

    `rounding.round_to_nearest_even` is the definition, written out for one number. FP64 is cast to formats narrower than FP32
    through FP32, in two roundings: near a tie of the format, the first may give the tie.

    x: an array of any format. out: an array of format `fmt` to write to; it may be `x` itself where nothing changes.
    Where `x` already has the format it is returned, not copied.

    overflow: the result for a value whose rounded magnitude exceeds the format's largest.
      'inf'       an infinity; NaN in a format without infinities; the largest value in a format without either
                  (IEEE 754, ml_dtypes; the default for 16 bits and more)
      'saturate'  the largest finite value of the same sign, also for infinities; NaN stays NaN, or is a zero in a format
                  without one
    FP8 and narrower formats have no default, since libraries disagree.

    Errors: TypeError for a format of 8 bits or fewer where `overflow` is missing, or `x` is not a NumPy array.
    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1; IEEE 754-2019, section 4.3.1 (roundTiesToEven).
    PyTorch: `x.to(torch.float16)`, bit for bit except for NaN payloads; `overflow='saturate'` is what
      `.to(torch.float8_e4m3fn)` does since 2.13.
    """
    target = FORMATS[fmt]
    narrow = target.bits <= 8
    if overflow is None and narrow:
        raise TypeError(f"cast to {fmt}: say overflow='inf' or overflow='saturate', the conventions differ")
    if overflow not in (None, "inf", "saturate"):
        raise TypeError(f"cast: overflow is {overflow!r}; it is 'inf' or 'saturate'")
    if narrow and not isinstance(x, np.ndarray | np.generic):
        raise TypeError(f"cast to {fmt}: CuPy has no such arrays; formats of 8 bits and fewer need NumPy arrays")
    if x.dtype == np.float64 and target.dtype.itemsize < 4:
        x = _convert(x, dtype_of("fp32"))  # fp64 is rounded twice, as PyTorch does
    if overflow == "saturate":
        x = _clip_to(x, fmt)
    if fmt == "tf32":
        x = _round_to_tf32(x)
    if fmt == "e8m0" and x.dtype != target.dtype:
        x = _round_smallest_e8m0(x)
    return _convert(x, target.dtype, out)


def widen(x: Array, fmt: str = "fp32", out: Array | None = None) -> Array:
    """Convert `x` to a format that holds all its values, exactly.

    Where `x` already has the format it is returned, not copied.
    Errors: TypeError where `fmt` does not contain the format of `x`.
    """
    source = format_of(x)
    if not widens_to(source, fmt):
        raise TypeError(f"widen: {source} -> {fmt} would round; use cast for that")
    return _convert(x, FORMATS[fmt].dtype, out)


def _convert(x: Array, dtype: np.dtype, out: Array | None = None) -> Array:
    """Convert with the array library, which rounds to nearest even. An overflow is a result here, not a warning."""
    if out is not None:
        _check_out(out, x, dtype)
    if x.dtype == dtype:
        return _store(x, out)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if out is None:
            return x.astype(dtype)
        out[...] = x
        return out


def _check_out(out: Array, x: Array, dtype: np.dtype) -> None:
    if out.dtype != dtype:
        raise TypeError(f"out is {out.dtype}, not {dtype}: writing to it would round once more")
    if out.shape != x.shape:
        raise ValueError(f"out has the shape {out.shape}, x {x.shape}")


def _store(x: Array, out: Array | None) -> Array:
    if out is None or out is x:
        return x
    out[...] = x
    return out


def _round_to_tf32(x: Array) -> Array:
    """Round fp32 to TF32's 10 fraction bits: add half of the last kept place, minus one bit where it is even, and truncate.

    A carry runs into the exponent, up to infinity. NaNs are not changed, since their payload could wrap to zero.
    """
    x = x if x.dtype == np.float32 else cast(x, "fp32")
    dropped = FORMATS["fp32"].fraction_bits - FORMATS["tf32"].fraction_bits
    bits = x.view(np.uint32)
    odd = (bits >> dropped) & 1
    rounded = ((bits + ((1 << (dropped - 1)) - 1) + odd) >> dropped) << dropped
    return (rounded * (x == x) + bits * (x != x)).view(np.float32)


def _round_smallest_e8m0(x: Array) -> Array:
    """Return x in fp32, with 2^-127 in place of the numbers that are nearest to it: ml_dtypes 0.6 rounds them up to 2^-126."""
    x, smallest = widen(x, "fp32"), FORMATS["e8m0"].smallest_normal
    return np.where((x > smallest) & (x < 1.5 * smallest), smallest, x)


def _clip_to(x: Array, fmt: str) -> Array:
    """Clip to the largest values of `fmt`, in fp32 or fp64, which hold both them and `x`; NaN stays NaN."""
    own = format_of(x)
    wide = widen(x, "fp64" if "fp64" in (own, fmt) else "fp32")
    return wide.clip(-FORMATS[fmt].max, FORMATS[fmt].max)
