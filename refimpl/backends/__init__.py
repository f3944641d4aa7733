"""Where arrays live and what computes them.

A `Backend` is the array library (`xp`) and the primitives that are not the same call everywhere. Backends live side by
side in one process, so there is no module-level `xp`: a run carries its backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.backends.heap import keep_freed_memory
from refimpl.cast import widen
from refimpl.errors import UsageError

Array = Any


@dataclass(frozen=True)
class Backend:
    """An array library and its primitives, in the readable form that holds for any of them."""

    name: str
    xp: Any
    cached_blocks: bool = False  # whether elementwise work is faster in pieces that fit a processor's cache

    def gemm(self, a: Array, b: Array, acc: str) -> Array:
        """a (..., M, K) @ b (..., K, N) in the accumulation format `acc`: widen both, multiply, do not round.

        Products of 16-bit values are exact in fp32, so this is what tensor cores compute, but for the order
        and the rounding of their sums.
        """
        return self.xp.matmul(widen(a, acc), widen(b, acc))

    def from_host(self, x: np.ndarray) -> Array:
        """Copy a NumPy array to the backend's memory (NumPy: no copy)."""
        return self.xp.asarray(x)

    def to_host(self, x: Array) -> np.ndarray:
        """Copy an array to a NumPy array; waits for the device."""
        return np.asarray(x)


NUMPY = Backend("numpy", np, cached_blocks=True)


def get_backend(name: str) -> Backend:
    """The backend of that name. Errors: UsageError when it is unknown, not installed, or has no device."""
    if name == "numpy":
        keep_freed_memory()
        return NUMPY
    if name == "cupy":
        from refimpl.backends.cupy import cupy_backend

        return cupy_backend()
    raise UsageError(f"unknown backend {name!r}: choose numpy or cupy")
