"""The one door for rounding: no other file changes a floating-point format, but its fast twin `fast_cast.py` behind it.

`cast` rounds (32 -> 16 bits), `widen` goes the exact way (16 -> 32 bits) and refuses any other. Because every rounding
passes here, it can be counted, shown, injected and replaced in one place.
"""

from __future__ import annotations

import numpy as np

from refimpl.numerics import fast_cast
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import FORMATS, dtype_of, format_of, widens_to


def cast(x: Array, fmt: str, out: Array | None = None, overflow: str | None = None) -> Array:
    """Round every value of `x` to the nearest value of format `fmt`, ties to the even fraction.

    x: an array of any format. out: an array of that format to write to; it may be `x` itself where nothing changes.
    Where `x` has the format already it is returned as it is, not copied.

    overflow: what becomes of a value beyond the format's largest after rounding.
      'inf'       an infinity, NaN in a format that has no infinity, the largest value in one that has neither
                  (IEEE 754, ml_dtypes; the default for 16 bits and more)
      'saturate'  the largest finite value with the same sign, infinities included; NaN stays NaN
    FP8 and narrower formats have no default: their users disagree, so the caller says which is meant.

    Values above fp32 go to narrower formats by way of fp32, and are so rounded twice, as PyTorch does it.

    Errors: TypeError when `overflow` is missing for a format of 8 bits or fewer, or `x` is not NumPy's for one of them.
    Source: the note, step 1; IEEE 754-2019 section 4.3.1 (roundTiesToEven).
    PyTorch: `x.to(torch.float16)`, bit for bit but for the payload of NaNs; `overflow='saturate'` is what
      `.to(torch.float8_e4m3fn)` does since 2.13.
    """
    target = FORMATS[fmt]
    if overflow is None and target.bits <= 8:
        raise TypeError(f"cast to {fmt}: say overflow='inf' or overflow='saturate', the conventions differ")
    if overflow not in (None, "inf", "saturate"):
        raise TypeError(f"cast: overflow is {overflow!r}; it is 'inf' or 'saturate'")
    if target.bits <= 8 and not isinstance(x, np.ndarray | np.generic):
        raise TypeError(f"cast to {fmt}: CuPy has no such arrays; formats of 8 bits and fewer are for NumPy's alone")
    _check_out(out, x, target.dtype)
    if x.dtype == np.float64 and target.itemsize < 4:
        x = _convert(x, dtype_of("fp32"))
    if overflow == "saturate":
        x = _clip_to(x, fmt)
    if fmt == "tf32":
        return _store(_round_to_tf32(x), out)
    if x.dtype == target.dtype:
        return _store(x, out)
    return _convert(x, target.dtype, out)


def widen(x: Array, fmt: str = "fp32", out: Array | None = None) -> Array:
    """Convert `x` to a format that holds all its values: exact, nothing is rounded.

    Where `x` has the format already it is returned as it is, not copied.
    Errors: TypeError when `fmt` does not contain the format of `x`.
    Source: the note, step 3.
    """
    source = format_of(x)
    if not widens_to(source, fmt):
        raise TypeError(f"widen: {source} -> {fmt} would round; that is spelled cast")
    _check_out(out, x, dtype_of(fmt))
    if x.dtype == dtype_of(fmt):
        return _store(x, out)
    return _convert(x, dtype_of(fmt), out)


def _convert(x: Array, dtype: np.dtype, out: Array | None = None) -> Array:
    """The array library's own conversion, which rounds to nearest even; an overflow is a result here, not a warning.

    NumPy converts fp16 slowly; `fast_cast` does the same to the bit in a third of the time.
    """
    if isinstance(x, np.ndarray) and x.size >= fast_cast.SMALL:
        fast = _FAST.get((x.dtype, dtype))
        if fast is not None:
            return fast(x, np.empty_like(x, dtype) if out is None else out)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if out is None:
            return x.astype(dtype)
        out[...] = x
        return out


_FP16, _FP32 = dtype_of("fp16"), dtype_of("fp32")
_FAST = {(_FP32, _FP16): fast_cast.fp32_to_fp16, (_FP16, _FP32): fast_cast.fp16_to_fp32}


def _check_out(out: Array | None, x: Array, dtype: np.dtype) -> None:
    if out is not None and out.dtype != dtype:
        raise TypeError(f"out is {out.dtype}, not {dtype}: writing to it would round once more")
    if out is not None and out.shape != x.shape:
        raise ValueError(f"out has the shape {out.shape}, x {x.shape}")


def _store(x: Array, out: Array | None) -> Array:
    if out is None or out is x:
        return x
    out[...] = x
    return out


def _round_to_tf32(x: Array) -> Array:
    """Round fp32 to TF32's 10 fraction bits: add half of the last kept place, less one where it is even, and truncate.

    The carry runs into the exponent by itself, up to infinity. NaNs are left alone, their payload could wrap to zero.
    """
    x = x if x.dtype == np.float32 else cast(x, "fp32")
    dropped = FORMATS["fp32"].fraction_bits - FORMATS["tf32"].fraction_bits
    bits = x.view(np.uint32)
    odd = (bits >> dropped) & 1
    rounded = ((bits + ((1 << (dropped - 1)) - 1) + odd) >> dropped) << dropped
    return (rounded * (x == x) + bits * (x != x)).view(np.float32)


def _clip_to(x: Array, fmt: str) -> Array:
    """Clip to the largest values of `fmt`, in a format that holds both those and `x`; NaN stays NaN.

    It has 32 bits at least: 16-bit arrays are storage, and of BF16 CuPy would make FP32 by itself.
    """
    own = format_of(x)
    wide = widen(x, "fp64" if "fp64" in (own, fmt) else "fp32")
    return wide.clip(-FORMATS[fmt].max, FORMATS[fmt].max)
