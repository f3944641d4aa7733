"""The array library of a run, and the primitives that are not the same call in every library.

Several backends work side by side in one process, so there is no global `xp`: each run has its backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from refimpl.backends.malloc import keep_freed_memory
from refimpl.backends.numpy_passes import NUMPY_PASSES
from refimpl.backends.threads import workers
from refimpl.errors import UsageError, unknown
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import dtype_of

Conversion = Callable[[Array, str], Array]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Backend:
    """An array library and its primitives, in a readable form that works with any library."""

    name: str
    xp: Any
    on_host: bool = False  # whether Python reads values without waiting, and blocks fit a CPU cache

    @property
    def ops(self) -> Mapping[str, Any]:
        """Return fast versions of operations, by name, as `nn.op.Op`. The roundings are those of the definitions in `nn/`."""
        return {}

    @property
    def passes(self) -> Mapping[str, Callable[..., Any]]:
        """Return fast versions of passes over flat buffers, by name: `measure` and `fold` of gradients.py, `adamw`, `sgd`."""
        return {}

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        """Return [f(part) for part in parts], for independent parts with `size` elements in total."""
        return [f(part) for part in parts]

    def convert(self, change: Conversion, x: Array, fmt: str) -> Array:
        """Return `change(x, fmt)`, where `change` is `cast` or `widen`."""
        return change(x, fmt)

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        """Multiply a (..., M, K) and b (..., K, N) in the accumulation format `acc`: widen both, multiply, do not round.

        Products of 16-bit values are exact in fp32, so tensor cores compute the same, except for the order and the rounding of
        their sums.
        """
        return self.xp.matmul(widen(a, acc), widen(b, acc))

    def matmul_then(self, a: Array, b: Array, acc: str, finish: Callable[[Array], Array], fmt: str) -> Array:
        """Return `finish(a b)`, for a `finish` that treats each row by itself and returns the format `fmt`."""
        return finish(self.matmul(a, b, acc))

    def row_sum(self, x: Array) -> Array:
        """Sum each row, x (..., N) -> (..., 1), in the format of `x`."""
        return x.sum(-1, keepdims=True)

    def row_dot(self, x: Array, y: Array) -> Array:
        """Return the scalar product of each row, x and y (..., N) -> (..., 1), in their format."""
        return (x * y).sum(-1, keepdims=True)

    def sum_by_index(self, rows: Array, index: Array, count: int) -> Array:
        """Sum the rows that have the same index: rows (n, C), index (n,) -> (count, C), in the format of `rows`.

        This multiplies by a matrix of ones and zeros, so that the order of the sum is fixed.
        """
        xp = self.xp
        belongs = xp.arange(count)[:, None] == index
        return xp.matmul(xp.where(belongs, xp.ones((), rows.dtype), xp.zeros((), rows.dtype)), rows)

    def from_host(self, x: np.ndarray) -> Array:
        """Copy a NumPy array to the backend's memory (for NumPy no copy is made)."""
        return self.xp.asarray(x)

    def to_host(self, x: Array) -> np.ndarray:
        """Copy an array to the host, waiting for the device."""
        return np.asarray(self.xp.asnumpy(x))


SHARED = 1 << 19
"""The least elements that are shared among threads: with fewer, waiting for Python's lock costs more than threads save."""

CONVERTED = 1 << 18
"""Elements that a thread converts at a time."""

ROWS = 384
"""The least rows per block of a matrix product that is cut into blocks. For each block the BLAS packs the whole right operand
again. So 2048 rows make four blocks.
"""

WHOLE = 1 << 21
"""The most multiplications of a matrix product that is one block: waking another thread would take longer."""


def row_blocks(M: int, multiplications: int) -> list[slice]:
    """Return the blocks of rows in which a product of M rows is computed: one, or two, four, ... equal ones.

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

    def to_host(self, x: Array) -> np.ndarray:
        """Return the array itself."""
        return np.asarray(x)

    @property
    def ops(self) -> Mapping[str, Any]:
        return _numpy_ops()

    @property
    def passes(self) -> Mapping[str, Callable[..., Any]]:
        return NUMPY_PASSES

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        return workers().map(f, parts) if size >= SHARED else super().each(f, parts, size)

    def convert(self, change: Conversion, x: Array, fmt: str) -> Array:
        """Convert as `Backend` does, to the bit, on several threads."""
        if x.size < SHARED or x.dtype == dtype_of(fmt) or workers().at_work:
            return change(x, fmt)
        if not x.flags.c_contiguous:
            return self.convert(change, x.T, fmt).T if x.T.flags.c_contiguous else change(x, fmt)
        flat, result = x.reshape(-1), np.empty(x.shape, dtype_of(fmt))
        target = result.reshape(-1)

        def part(start: int) -> None:
            target[start : start + CONVERTED] = change(flat[start : start + CONVERTED], fmt)

        workers().map(part, range(0, x.size, CONVERTED))
        return result

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        """Multiply as `Backend` does: two matrices in `row_blocks`, the matrices of a batch one by one."""
        if a.ndim != 2 or b.ndim != 2:
            with workers().one_thread_per_product():
                return super().matmul(a, b, acc)
        a, b = self.convert(widen, a, acc), self.convert(widen, b, acc)
        z = np.empty((len(a), b.shape[1]), dtype_of(acc))
        workers().map(lambda rows: np.matmul(a[rows], b, out=z[rows]), row_blocks(len(a), len(a) * b.size))
        return z

    def matmul_then(self, a: Array, b: Array, acc: str, finish: Callable[[Array], Array], fmt: str) -> Array:
        """Return `finish(matmul(a, b, acc))`, to the bit, where each thread finishes the blocks that it computes."""
        if a.ndim != 2 or b.ndim != 2 or len(a) * b.shape[1] < SHARED:
            return finish(self.matmul(a, b, acc))
        if not a.flags.c_contiguous:
            a = self.convert(widen, a, acc)  # all at once: slices of a transposed array would not be contiguous
        b, result = self.convert(widen, b, acc), np.empty((len(a), b.shape[1]), dtype_of(fmt))

        def product(rows: slice) -> None:
            part = result[rows]
            z = part if fmt == acc else np.empty(part.shape, dtype_of(acc))
            y = finish(np.matmul(widen(a[rows], acc), b, out=z))
            if y is not part:
                part[...] = y

        workers().map(product, row_blocks(len(a), len(a) * b.size))
        return result

    def row_sum(self, x: Array) -> Array:
        """Sum each row with einsum, in another order than `Backend`: unlike sum() it is fast for short rows."""
        return np.einsum("...i->...", _whole_rows(x))[..., None] if x.ndim and x.itemsize >= 4 else super().row_sum(x)

    def row_dot(self, x: Array, y: Array) -> Array:
        """Return the scalar product of each row, in another order than `Backend`, without an array of the products."""
        if not x.ndim or x.itemsize < 4:
            return super().row_dot(x, y)
        return np.einsum("...i,...i->...", _whole_rows(x), _whole_rows(y))[..., None]


    def sum_by_index(self, rows: Array, index: Array, count: int) -> Array:
        """Sum the rows of each index in another order than `Backend`: sorted by index (stable), then added first to last."""
        sums = np.zeros((count, rows.shape[1]), rows.dtype)
        if index.size:
            order = np.argsort(index, kind="stable")
            ordered = index[order]
            starts = np.flatnonzero(np.concatenate([np.ones(1, bool), ordered[1:] != ordered[:-1]]))
            sums[ordered[starts]] = np.add.reduceat(rows[order], starts, axis=0)
        return sums


def _whole_rows(x: Array) -> Array:
    """Return `x`, or a copy where rows are not contiguous, which einsum would add in another order."""
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


NUMPY = NumPyBackend("numpy", np, on_host=True)


@functools.cache
def _numpy_ops() -> Mapping[str, Any]:
    """Return the host's fast versions of operations, imported late: arrays alone need no operations."""
    from refimpl.backends.numpy_ops import NUMPY_OPS

    return NUMPY_OPS


def get_backend(name: str) -> Backend:
    """Return the backend of that name. Errors: UsageError where it is unknown, not installed, or has no device."""
    if name == "numpy":
        keep_freed_memory()
        return NUMPY
    if name == "cupy":
        from refimpl.backends.cupy.backend import cupy_backend

        return cupy_backend()
    raise UsageError(unknown("backend", name, ("numpy", "cupy")))
