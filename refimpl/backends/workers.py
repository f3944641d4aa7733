"""Threads that share the independent parts of one large operation; NumPy and the BLAS let go of Python's lock while they work.

A part is a range of examples, of rows or of a flat index, chosen by sizes alone, and computes what it would compute by
itself, so results do not depend on the number of threads. While parts run, the BLAS computes each product on the thread
that asked for it. That is not only to have one thread a core: OpenBLAS's own threads spin for some 20 ms after each product
that they shared, and take those cores from ours. In a step of large operations they never start.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as the BLAS would use, the calling one among them; fewer while someone limits the BLAS to fewer."""

    def __init__(self, blas: Any = None) -> None:
        """blas: threadpoolctl's handle of the BLAS; without one, the calling thread does all."""
        self._blas = blas
        self.threads = blas.num_threads if blas else 1
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self._here = threading.local()

    @property
    def at_work(self) -> bool:
        """Whether the calling thread computes a part already; what it calls is then not divided once more."""
        return getattr(self._here, "busy", False)

    def map(self, f: Callable[[T], R], parts: Iterable[T]) -> list[R]:
        """[f(part) for part in parts], the parts shared among the threads. An error in one is raised when all have ended."""
        items = list(parts)
        if self._pool is None or self.at_work or len(items) < 2:
            return [f(item) for item in items]
        allowed = self._blas.num_threads
        results: list[Any] = [None] * len(items)
        left = iter(range(len(items)))  # its next() is atomic: each index goes to one thread

        def work() -> None:
            self._here.busy = True
            try:
                for i in left:
                    results[i] = f(items[i])
            finally:
                self._here.busy = False

        self._blas.set_num_threads(1)
        # Each in a copy of the caller's context: np.errstate lives there, and an overflow is a result in a step, not a warning.
        count = min(self.threads, allowed, len(items)) - 1
        others = [self._pool.submit(contextvars.copy_context().run, work) for _ in range(count)]
        try:
            work()
        finally:
            errors = [other.exception() for other in others]
            self._blas.set_num_threads(allowed)
        for error in errors:
            if error is not None:
                raise error
        return results


@functools.cache
def workers() -> Workers:
    """The threads of this process; one where threadpoolctl does not know the BLAS, which then cannot be told to stay on one."""
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    numpys = [blas for blas in found if "numpy" in blas.filepath] or found
    return Workers(numpys[0] if numpys else None)


def cores() -> int:
    """Of the processor, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads, and would wait for them for ever
    os.register_at_fork(after_in_child=workers.cache_clear)
