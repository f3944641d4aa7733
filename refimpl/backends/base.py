"""Where arrays live and what computes them.

A `Backend` is the array library (`xp`) and the primitives that are not the same call everywhere. Backends live side by
side in one process, so there is no module-level `xp`: a run carries its backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from refimpl.backends.malloc import keep_freed_memory
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
    """An array library and its primitives, in the readable form that holds for any of them."""

    name: str
    xp: Any
    on_host: bool = False  # whether Python can look at a value without waiting, and small pieces of work stay in its cache

    @property
    def ops(self) -> Mapping[str, Any]:
        """Fast twins of operations, by name (an `ops.Op` each): the same results as the definitions in `ops`."""
        return {}

    @property
    def passes(self) -> Mapping[str, Callable[..., Any]]:
        """Fast twins of passes over the flat buffers, by name: `measure` and `fold` of gradients.py, `AdamW` of optim.py."""
        return {}

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        """[f(part) for part in parts], for parts that are independent and have `size` elements in all."""
        return [f(part) for part in parts]

    def convert(self, change: Conversion, x: Array, fmt: str) -> Array:
        """`change(x, fmt)`, for one of cast.py's two: `cast` or `widen`."""
        return change(x, fmt)

    def gemm(self, a: Array, b: Array, acc: str) -> Array:
        """a (..., M, K) @ b (..., K, N) in the accumulation format `acc`: widen both, multiply, do not round.

        Products of 16-bit values are exact in fp32, so this is what tensor cores compute, but for the order
        and the rounding of their sums.
        """
        return self.xp.matmul(widen(a, acc), widen(b, acc))

    def gemm_then(self, a: Array, b: Array, acc: str, finish: Callable[[Array], Array], fmt: str) -> Array:
        """`finish(a b)`, for a `finish` that treats each row by itself and whose result has the format `fmt`."""
        return finish(self.gemm(a, b, acc))

    def row_sum(self, x: Array) -> Array:
        """x (..., N) -> (..., 1): the sum of each row, in the format of `x`."""
        return x.sum(-1, keepdims=True)

    def row_dot(self, x: Array, y: Array) -> Array:
        """x, y (..., N) -> (..., 1): the sum of the products of each row, in their format."""
        return (x * y).sum(-1, keepdims=True)

    def sum_by_index(self, rows: Array, index: Array, count: int) -> Array:
        """rows (n, C), index (n,) -> (count, C): place r has the sum of the rows whose index is r, in their format.

        It is a product with the matrix that is one where a row belongs to a place: the order of the sum is fixed.
        """
        xp = self.xp
        belongs = xp.arange(count)[:, None] == index
        return xp.matmul(xp.where(belongs, xp.ones((), rows.dtype), xp.zeros((), rows.dtype)), rows)

    def from_host(self, x: np.ndarray) -> Array:
        """Copy a NumPy array to the backend's memory (NumPy: no copy)."""
        return self.xp.asarray(x)

    def to_host(self, x: Array) -> np.ndarray:
        """Copy an array to a NumPy array; waits for the device."""
        return np.asarray(self.xp.asnumpy(x))


SHARED = 1 << 19
"""Elements from which work is shared among threads: below, threads take turns at Python's lock longer than they save."""

CONVERTED = 1 << 18
"""Elements of an array that a thread converts at a time."""

ROWS = 384
"""The rows of a matrix product that a thread computes are at least so many, if there are enough for two threads: with each
block of rows the BLAS packs the whole right operand anew. So 2048 rows are shared by four threads at most.
"""

WHOLE = 1 << 21
"""Multiplications up to which a matrix product is one block: to wake another thread would take longer."""


def row_blocks(M: int, multiplications: int) -> list[slice]:
    """The blocks in which a product of M rows is computed: two, four, ... equal ones, or one. They follow from the shape alone,
    never from the number of threads: how a row is summed may depend on how many there are beside it.

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
    """The host: large operations in parts, shared among threads; small ones whole. See workers.py: results do not depend on
    the number of threads, neither of ours nor of the BLAS's."""

    def to_host(self, x: Array) -> np.ndarray:
        """As it is: no copy."""
        return np.asarray(x)

    @property
    def ops(self) -> Mapping[str, Any]:
        return _numpy_ops()

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        return workers().map(f, parts) if size >= SHARED else super().each(f, parts, size)

    def convert(self, change: Conversion, x: Array, fmt: str) -> Array:
        """As in `Backend`, to the bit: each element is converted by itself."""
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

    def gemm(self, a: Array, b: Array, acc: str) -> Array:
        """As in `Backend`; a product of two matrices in `row_blocks`, those of a batch one by one, each whole."""
        if a.ndim != 2 or b.ndim != 2:
            with workers().one_thread_a_product():
                return super().gemm(a, b, acc)
        a, b = self.convert(widen, a, acc), self.convert(widen, b, acc)
        z = np.empty((len(a), b.shape[1]), dtype_of(acc))
        workers().map(lambda rows: np.matmul(a[rows], b, out=z[rows]), row_blocks(len(a), len(a) * b.size))
        return z

    def gemm_then(self, a: Array, b: Array, acc: str, finish: Callable[[Array], Array], fmt: str) -> Array:
        """As in `Backend`, to the bit: the blocks are those of `gemm`, each finished by the thread that computed it."""
        if a.ndim != 2 or b.ndim != 2 or len(a) * b.shape[1] < SHARED:
            return finish(self.gemm(a, b, acc))
        if not a.flags.c_contiguous:
            a = self.convert(widen, a, acc)  # whole: slices of a transposed array would be in no order at all
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
        """As in `Backend`, but for the order of the sum: einsum adds vectors, where sum() begins anew with each short row."""
        return np.einsum("...i->...", _whole_rows(x))[..., None] if x.ndim and x.itemsize >= 4 else super().row_sum(x)

    def row_dot(self, x: Array, y: Array) -> Array:
        """As in `Backend`, but for the order of the sum, and without an array of the products."""
        if not x.ndim or x.itemsize < 4:
            return super().row_dot(x, y)
        return np.einsum("...i,...i->...", _whole_rows(x), _whole_rows(y))[..., None]


    def sum_by_index(self, rows: Array, index: Array, count: int) -> Array:
        """As in `Backend`, but for the order of the sum: rows sorted by place (stable), each run added from its first."""
        sums = np.zeros((count, rows.shape[1]), rows.dtype)
        if index.size:
            order = np.argsort(index, kind="stable")
            ordered = index[order]
            starts = np.flatnonzero(np.concatenate([np.ones(1, bool), ordered[1:] != ordered[:-1]]))
            sums[ordered[starts]] = np.add.reduceat(rows[order], starts, axis=0)
        return sums


def _whole_rows(x: Array) -> Array:
    """`x`, or a copy where a row's elements do not lie side by side: einsum would add them in another order."""
    return x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x)


NUMPY = NumPyBackend("numpy", np, on_host=True)


@functools.cache
def _numpy_ops() -> Mapping[str, Any]:
    """The host's fast twins; imported late, since who only needs arrays needs no operations."""
    from refimpl.backends.numpy_ops import NUMPY_OPS

    return NUMPY_OPS


def get_backend(name: str) -> Backend:
    """The backend of that name. Errors: UsageError when it is unknown, not installed, or has no device."""
    if name == "numpy":
        keep_freed_memory()
        return NUMPY
    if name == "cupy":
        from refimpl.backends.cupy.backend import cupy_backend

        return cupy_backend()
    raise UsageError(unknown("backend", name, ("numpy", "cupy")))
