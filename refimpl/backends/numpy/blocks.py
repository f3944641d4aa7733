"""Operations in blocks that fit a cache, shared among threads. Results do not depend on the blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.backends.base import Backend
from refimpl.numerics.arrays import Array

BLOCK = 1 << 18
"""Elements per block.

Few enough to fit a cache, and many enough to be worth a thread: between two NumPy calls threads wait for Python's lock, some
10 us each time.
"""


def elementwise(backend: Backend, f: Callable[..., Array], *arrays: Array) -> Array:
    """Return f(*arrays) for a function of each element by itself, and arrays of one shape."""
    size = arrays[0].size
    if size <= BLOCK or not all(x.flags.c_contiguous for x in arrays):
        return f(*arrays)
    (result,) = _joined(backend, lambda *part: (f(*part),), [x.reshape(-1) for x in arrays], BLOCK, size)
    return result.reshape(arrays[0].shape)


def by_example(backend: Backend, f: Callable[..., tuple[Array, ...]], size: int, *arrays: Array) -> tuple[Array, ...]:
    """Return f(*arrays), for arrays (B, ...) of B independent examples.

    size: elements of the largest array that f makes.
    """
    B = len(arrays[0]) if arrays[0].ndim > 1 else 1  # a vector is one example, such as a single row of a norm
    if size <= BLOCK or B < 2:
        return f(*arrays)
    return tuple(_joined(backend, f, arrays, max(1, BLOCK * B // size), size))


def _joined(backend: Backend, f: Callable[..., tuple[Array, ...]], arrays: Sequence[Array], step: int, size: int) -> list[Any]:
    """Apply f to every `step` rows of the arrays, and join the results."""
    n, results, making = len(arrays[0]), list[Array](), threading.Lock()

    def compute(start: int) -> None:
        rows = slice(start, start + step)
        parts = f(*(x[rows] for x in arrays))
        with making:  # the first part to finish shows the shapes and types of the results
            if not results:
                results.extend(np.empty((n, *part.shape[1:]), part.dtype) for part in parts)
        for result, part in zip(results, parts, strict=True):
            result[rows] = part

    backend.each(compute, range(0, n, step), size)
    return results
