"""Arrays of each format, what they hold in FP64, and their bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
DTYPE = {
    "fp64": np.dtype(np.float64),
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
FORMATS = ["fp32", "fp16", "bf16"]
LOW = ["fp16", "bf16"]
AMP = {"amp-fp16": "fp16", "amp-bf16": "bf16", "amp-fp16-cpu": "fp16", "amp-bf16-cpu": "bf16"}
"""The recipes under autocast, each with its 16-bit format."""

U = 2.0**-24
"""Unit roundoff of FP32: one rounding errs by at most U times its result."""


def wide(x: Any) -> Array:
    """Return an array, or a tensor of PyTorch, in FP64, which is exact."""
    return (x.detach().double().numpy() if hasattr(x, "detach") else np.asarray(x)).astype(np.float64)


def array(x: Any, fmt: str) -> Array:
    """Round to FP32, then to the format, by NumPy's and ml_dtypes' own conversions."""
    with np.errstate(over="ignore", under="ignore"):  # an overflow is a result
        return np.asarray(x).astype(np.float32).astype(DTYPE[fmt])


def rounded(x: Any, fmt: str) -> Array:
    """Round as `array` does, and return the values in FP64."""
    return wide(array(np.asarray(x, np.float64), fmt))


def bits(x: Any) -> Array:
    """Return the same memory as unsigned integers."""
    x = np.asarray(x)
    return x.view(f"u{x.itemsize}")


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two arrays have one type, one shape and the same bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_bits(ours: Any, theirs: Any, name: str = "result") -> None:
    """Signs of zeros and payloads of NaN included; the message names the first element that differs."""
    a, b = np.asarray(ours), np.asarray(theirs)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{name}: {a.dtype} {a.shape} here, {b.dtype} {b.shape} there"
    different = np.flatnonzero(bits(a).ravel() != bits(b).ravel())
    if different.size:
        i = int(different[0])
        x, y = (f"{array.flat[i]} ({bits(array).flat[i]:#x})" for array in (a, b))
        raise AssertionError(f"{name}: {different.size} of {a.size} differ, [{i}] is {x} here, {y} there")
