"""Threads that share the independent parts of one large operation; NumPy and the BLAS let go of Python's lock while they work.

The rule that makes results independent of the number of threads: work is cut by shapes alone, with one thread too, each part
computes what it would compute by itself, and the BLAS computes each product on the thread that asks for it. A BLAS promises
nothing more: where it shares a product among threads of its own, it cuts by their number, and how a row is summed may depend
on the rows beside it (with OpenBLAS's kernels for Haswell and Zen it does).

It is faster, too: OpenBLAS's own threads spin for some 20 ms after each product that they shared, and would take the cores
from ours.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as the BLAS would use, the calling one among them; fewer while someone limits the BLAS to fewer."""

    def __init__(self, *blas: Any) -> None:
        """blas: threadpoolctl's handles of the BLAS (of all that may be NumPy's); without one, the calling thread does all."""
        self._blas = blas
        self.threads = self._limit()
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self._here = threading.local()
        self._lock, self._inside, self._before = threading.Lock(), 0, [1] * len(blas)

    def _limit(self) -> int:
        """The threads that the BLAS would use now."""
        return max((blas.num_threads for blas in self._blas), default=1)

    @property
    def at_work(self) -> bool:
        """Whether the calling thread computes a part already; what it calls is then not divided once more."""
        return getattr(self._here, "busy", False)

    @contextmanager
    def one_thread_a_product(self) -> Iterator[int]:
        """Meanwhile the BLAS computes each product on the thread that asks for it. Yields how many threads it had before.

        Any number of threads may be inside at once, and enter again: who comes first sees what limit there is, and who leaves
        last restores it. It takes about 2 us, and 1 us for those who come later.
        """
        with self._lock:
            if not self._inside:
                self._before = [blas.num_threads for blas in self._blas]
            self._inside += 1
            for blas in self._blas:
                blas.set_num_threads(1)  # by everyone: one that is built on OpenMP has a number for each thread
        try:
            yield max(self._before, default=1)
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for blas, threads in zip(self._blas, self._before, strict=True):
                        blas.set_num_threads(threads)

    def map(self, f: Callable[[T], R], parts: Iterable[T]) -> list[R]:
        """[f(part) for part in parts], the parts shared among the threads. An error in one is raised when all have ended."""
        items = list(parts)
        if self._pool is None or self.at_work or len(items) < 2:
            with self.one_thread_a_product():
                return [f(item) for item in items]
        results: list[Any] = [None] * len(items)
        left = iter(range(len(items)))  # its next() is atomic: each index goes to one thread

        def work() -> None:
            self._here.busy = True
            try:
                with self.one_thread_a_product():
                    for i in left:
                        results[i] = f(items[i])
            finally:
                self._here.busy = False

        with self.one_thread_a_product() as allowed:
            # Each in a copy of the caller's context: np.errstate lives there, and an overflow is a result in a step.
            count = min(self.threads, allowed, len(items)) - 1
            others = [self._pool.submit(contextvars.copy_context().run, work) for _ in range(count)]
            try:
                work()
            finally:
                errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error
        return results


@functools.cache
def workers() -> Workers:
    """The threads of this process; one where threadpoolctl does not know the BLAS, which then cannot be told to stay on one.

    (It knows OpenBLAS, MKL and BLIS. With Apple's Accelerate results may depend on the number of threads that it takes.)
    """
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return Workers(*([blas for blas in found if "numpy" in blas.filepath] or found))


def cores() -> int:
    """Of the processor, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads, and would wait for them for ever
    os.register_at_fork(after_in_child=workers.cache_clear)
