"""Where arrays live and what computes them.

A `Backend` is the array library (`xp`) and the primitives that are not the same call everywhere. Backends live side by
side in one process, so there is no module-level `xp`: a run carries its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from refimpl.backends.heap import keep_freed_memory
from refimpl.backends.workers import workers
from refimpl.cast import widen
from refimpl.errors import UsageError
from refimpl.formats import dtype_of

Array = Any
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Backend:
    """An array library and its primitives, in the readable form that holds for any of them."""

    name: str
    xp: Any
    cached_blocks: bool = False  # whether elementwise work is faster in pieces that fit a processor's cache

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        """[f(part) for part in parts], for parts that are independent and have `size` elements in all."""
        return [f(part) for part in parts]

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


SHARED = 1 << 19
"""Elements from which work is shared among threads: below, handing it over takes longer than it saves."""

SHARED_PRODUCTS = 1 << 27
"""The same for matrix products, in multiplications."""

ROWS = 64
"""The rows of a matrix product that a thread computes are a multiple of this, which BLAS kernels take without a remainder."""


@dataclass(frozen=True)
class NumPyBackend(Backend):
    """The host: large operations in parts, one thread of the BLAS for each; small ones whole, by all of its threads."""

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        return workers().map(f, parts) if size >= SHARED else super().each(f, parts, size)

    def gemm(self, a: Array, b: Array, acc: str) -> Array:
        """As in `Backend`, to the bit: a row of a product does not depend on how many there are beside it."""
        if workers().at_work or a.ndim != 2 or b.ndim != 2 or len(a) * b.size < SHARED_PRODUCTS:
            return super().gemm(a, b, acc)
        result, b = np.empty((len(a), b.shape[1]), dtype_of(acc)), widen(b, acc)

        def product(rows: slice) -> None:
            np.matmul(widen(a[rows], acc), b, out=result[rows])

        step = -(-len(a) // (workers().threads * ROWS)) * ROWS
        workers().map(product, [slice(start, start + step) for start in range(0, len(a), step)])
        return result


NUMPY = NumPyBackend("numpy", np, cached_blocks=True)


def get_backend(name: str) -> Backend:
    """The backend of that name. Errors: UsageError when it is unknown, not installed, or has no device."""
    if name == "numpy":
        keep_freed_memory()
        return NUMPY
    if name == "cupy":
        from refimpl.backends.cupy import cupy_backend

        return cupy_backend()
    raise UsageError(f"unknown backend {name!r}: choose numpy or cupy")
