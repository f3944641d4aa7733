"""The CuPy backend: the same algorithm on an NVIDIA GPU, with one cuBLAS call per product and one kernel per pass.

docs/gpu.md says what has been tested, on a GPU and without one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.backends.base import Backend
from refimpl.backends.cupy import cublas
from refimpl.backends.cupy.launch import FORMATS, Kernels
from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of


@dataclass(frozen=True)
class CupyBackend(Backend):
    """CuPy's arrays with our own products, operations and passes. It keeps no arrays, and works on the current device."""

    kernels: Kernels = field(default_factory=Kernels)

    @property
    def ops(self) -> Mapping[str, Any]:
        from refimpl.backends.cupy.ops import CUPY_OPS

        return CUPY_OPS

    @property
    def passes(self) -> Mapping[str, Callable[..., Any]]:
        from refimpl.backends.cupy.passes import CUPY_PASSES

        return CUPY_PASSES

    def product(self, a: Array, b: Array, fmt: str, out: Array | None = None) -> Array:
        """Return a b, summed in FP32 and rounded once to `fmt`: `cublas.product`."""
        return cublas.product(a, b, fmt, out)

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        """Multiply as `Backend` does, but without widened copies of 16-bit operands."""
        if acc == "fp32" and format_of(a) == format_of(b) and format_of(a) in FORMATS:
            batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # cuBLAS has one step per batch: what is repeated is copied
            a, b = (self.xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b))
            return self.product(a, b, acc)
        return super().matmul(a, b, acc)


def cupy_backend() -> Backend:
    """Return the CuPy backend. Errors: UsageError that says what is missing."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise UsageError(
            "backend cupy: CuPy is not installed; pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]', depending on "
            "your CUDA version"
        ) from None
    if not cupy.cuda.is_available():
        raise UsageError("backend cupy: CuPy is installed, but finds no NVIDIA GPU; use --backend numpy")
    return CupyBackend("cupy", cupy)
