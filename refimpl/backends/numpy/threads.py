"""Threads that share the independent parts of one large operation. NumPy and the BLAS release Python's lock while they work.

Results do not depend on the number of threads, because work is cut by shapes alone, also with one thread, and the BLAS computes
each product on the calling thread. With threads of its own a BLAS cuts a product by their number, and how it sums a row may
depend on the rows beside it (as OpenBLAS's kernels for Haswell and Zen do).

It is also faster: OpenBLAS's own threads spin for some 20 ms after each product, and would take the cores from ours.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy  # noqa: F401 (its BLAS must be loaded for threadpoolctl to find it)
from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as the BLAS would use, including the calling one; fewer while the BLAS is limited to fewer."""

    def __init__(self, *blas: Any) -> None:
        """blas: threadpoolctl's handles of all libraries that may be NumPy's BLAS; without any, the calling thread does all."""
        self._blas = blas
        # The library's own function is called, since threadpoolctl from 3.8 on obeys only the first thread that sets a number,
        # as long as that lives. Ranks are threads too; `_lock` keeps them apart.
        self._set_num_threads = [getattr(one, "_real_set_num_threads", one.set_num_threads) for one in blas]
        self.threads = max((one.num_threads for one in blas), default=1)
        self._here = threading.local()
        self._lock, self._inside, self._before = threading.Lock(), 0, [1] * len(blas)
        # Not concurrent.futures: handing over a part takes twice as long there, as long as a small product.
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for _ in range(self.threads - 1):
            threading.Thread(target=_serve, args=(self._jobs,), daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)

    @property
    def at_work(self) -> bool:
        """Return whether the calling thread computes a part already, so that nested calls are not divided again."""
        return getattr(self._here, "busy", False)

    @contextmanager
    def one_thread_per_product(self) -> Iterator[int]:
        """Let the BLAS compute each product on the calling thread, for the time of the context. Yields its threads before.

        Threads may enter at the same time, and nested: the first to enter notes the limit, the last to leave restores it.
        Takes a few microseconds.
        """
        with self._lock:
            if not self._inside:
                self._before = [blas.num_threads for blas in self._blas]
            self._inside += 1
            self._stay()
        try:
            yield max(self._before, default=1)
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for set_num_threads, threads in zip(self._set_num_threads, self._before, strict=True):
                        set_num_threads(threads)

    def _stay(self) -> None:
        """Limit the BLAS to the calling thread. Each thread must do this: with OpenMP each has its own number."""
        for set_num_threads in self._set_num_threads:
            set_num_threads(1)

    def map(self, f: Callable[[T], R], parts: Iterable[T]) -> list[R]:
        """Return [f(part) for part in parts], computed by the threads. An error in a part is raised when all have ended."""
        items = list(parts)
        if self.at_work:
            return [f(item) for item in items]
        if self.threads == 1 or len(items) < 2:
            with self.one_thread_per_product():
                return [f(item) for item in items]
        todo: list[Callable[[], R] | None] = [functools.partial(f, item) for item in items]
        results, errors, ended = list[Any]([None] * len(items)), list[BaseException](), SimpleQueue[int]()
        left = iter(range(len(items)))  # next() is atomic, so each index goes to one thread

        def work() -> None:
            self._here.busy = True
            for i in left:
                try:
                    self._stay()
                    results[i] = todo[i]()  # type: ignore[misc]
                except BaseException as error:
                    errors.append(error)
                todo[i] = None
                ended.put(i)
            self._here.busy = False

        with self.one_thread_per_product() as allowed:
            for _ in range(min(self.threads, allowed, len(items)) - 1):
                # In a copy of the caller's context, which holds np.errstate.
                self._jobs.put(functools.partial(contextvars.copy_context().run, work))
            work()
            for _ in items:
                ended.get()
        # A thread that wakes up late finds nothing to do, and is not waited for. Until then it must not keep arrays alive.
        done = results.copy()
        results.clear()
        if errors:
            raise errors[0]
        return done


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    """Run one job after the other, until None comes."""
    while (job := jobs.get()) is not None:
        job()
        del job  # it refers to the workers, which send None when they are garbage-collected


@functools.cache
def workers() -> Workers:
    """Return the threads of this process; only one where threadpoolctl does not know the BLAS, and cannot limit it.

    It knows OpenBLAS, MKL and BLIS. With Apple's Accelerate results may depend on its number of threads.
    """
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return Workers(*([blas for blas in found if "numpy" in blas.filepath] or found))


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """Let the BLAS compute each product on the calling thread, for the time of the context or of the decorated function.

    For what calls products of the backend `reference`, which are NumPy's own. Products of `numpy` do so by themselves.
    """
    with workers().one_thread_per_product():
        yield


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads, and would wait for them forever
    os.register_at_fork(after_in_child=workers.cache_clear)
