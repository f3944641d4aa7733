"""The fast backend for the host: NumPy, with large operations cut into parts that are shared among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from refimpl.backends.base import Backend
from refimpl.backends.numpy.threads import workers
from refimpl.numerics import fast_cast
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import dtype_of

T = TypeVar("T")
R = TypeVar("R")

SHARED = 1 << 19
"""The least elements that are shared among threads: with fewer, waiting for Python's lock costs more than threads save."""

CONVERTED = 1 << 18
"""Elements that a thread converts at a time."""

ROWS = 384
"""A product is cut into more than two blocks only while each has so many rows on average, for the BLAS packs the whole right
operand again for each block. 2048 rows make four blocks.
"""

WHOLE = 1 << 21
"""The most multiplications of a matrix product that is one block: waking another thread would take longer."""


def row_blocks(M: int, multiplications: int) -> list[slice]:
    """Return the blocks of rows in which a product of M rows is computed: one, or two, four, ... of which the last is shorter.

    They depend on the shape alone, never on the number of threads: how a BLAS sums a row may depend on how many rows it gets.

    >>> row_blocks(1600, 1600 * 64 * 64)
    [slice(0, 448, None), slice(448, 896, None), slice(896, 1344, None), slice(1344, 1792, None)]
    """
    if multiplications <= WHOLE:
        return [slice(0, M)]
    count = 2
    while 2 * count * ROWS <= M:
        count *= 2
    step = -(-M // (count * 64)) * 64
    return [slice(start, start + step) for start in range(0, M, step)]


@dataclass(frozen=True)
class NumPyBackend(Backend):
    """NumPy on the host. Large operations are cut into parts and shared among threads (threads.py).

    Results depend neither on the number of our threads nor on that of the BLAS's.
    """

    @property
    def ops(self) -> Mapping[str, Any]:
        return _tables()[0]

    @property
    def passes(self) -> Mapping[str, Callable[..., Any]]:
        return _tables()[1]

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        return workers().map(f, parts) if size >= SHARED else super().each(f, parts, size)

    def cast(self, x: Array, fmt: str, out: Array | None = None) -> Array:
        """Round as `casts.cast` does, to the bit, on several threads."""
        return _converted(fast_cast.cast, x, fmt, out)

    def widen(self, x: Array, fmt: str, out: Array | None = None) -> Array:
        """Widen as `casts.widen` does, on several threads."""
        return _converted(fast_cast.widen, x, fmt, out)

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        """Multiply as `Backend` does: two matrices in `row_blocks`, the matrices of a batch one by one."""
        if a.ndim != 2 or b.ndim != 2:
            with workers().one_thread_per_product():
                return super().matmul(a, b, acc)
        a, b = self.widen(a, acc), self.widen(b, acc)
        z = np.empty((len(a), b.shape[1]), dtype_of(acc))
        workers().map(lambda rows: np.matmul(a[rows], b, out=z[rows]), row_blocks(len(a), len(a) * b.size))
        return z

    def matmul_then(self, a: Array, b: Array, acc: str, finish: Callable[[Array], Array], fmt: str) -> Array:
        """Return `finish(matmul(a, b, acc))`, to the bit, for a `finish` that treats each row by itself and rounds it to `fmt`.

        The thread that computes rows rounds them at once, and the product is never stored in FP32.
        """
        if a.ndim != 2 or b.ndim != 2 or len(a) * b.shape[1] < SHARED:
            return finish(self.matmul(a, b, acc))
        if not a.flags.c_contiguous:
            a = self.widen(a, acc)  # all at once: slices of a transposed array would not be contiguous
        b, result = self.widen(b, acc), np.empty((len(a), b.shape[1]), dtype_of(fmt))

        def product(rows: slice) -> None:
            part = result[rows]
            z = part if fmt == acc else np.empty(part.shape, dtype_of(acc))
            y = finish(np.matmul(fast_cast.widen(a[rows], acc), b, out=z))
            if y is not part:
                part[...] = y

        workers().map(product, row_blocks(len(a), len(a) * b.size))
        return result


def _converted(change: Callable[..., Array], x: Array, fmt: str, out: Array | None = None) -> Array:
    """Return `change(x, fmt, out)`, computed in parts."""
    if x.size < SHARED or x.dtype == dtype_of(fmt) or workers().at_work:
        return change(x, fmt, out)
    if out is None and not x.flags.c_contiguous and x.T.flags.c_contiguous:
        return _converted(change, x.T, fmt).T
    result = np.empty(x.shape, dtype_of(fmt)) if out is None else out
    if not (x.flags.c_contiguous and result.flags.c_contiguous and result.shape == x.shape):
        return change(x, fmt, out)
    flat, target = x.reshape(-1), result.reshape(-1)

    def part(start: int) -> None:
        change(flat[start : start + CONVERTED], fmt, target[start : start + CONVERTED])

    workers().map(part, range(0, x.size, CONVERTED))
    return result


NUMPY = NumPyBackend("numpy", np, on_host=True)


@cache
def _tables() -> tuple[Mapping[str, Any], ...]:
    """Return the tables of fast versions, imported late: arrays alone need no operations."""
    from refimpl.backends.numpy.table import OPS, PASSES

    return OPS, PASSES
