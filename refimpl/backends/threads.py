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
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as the BLAS would use, the calling one among them; fewer while someone limits the BLAS to fewer."""

    def __init__(self, *blas: Any) -> None:
        """blas: threadpoolctl's handles of the BLAS (of all that may be NumPy's); without one, the calling thread does all."""
        self._blas = blas
        # threadpoolctl from 3.8 on heeds only the first thread that sets a number, while that lives; ranks are threads too, and
        # `_lock` keeps them apart here. So it is the library's own function that is called.
        self._set_num_threads = [getattr(one, "_real_set_num_threads", one.set_num_threads) for one in blas]
        self.threads = max((one.num_threads for one in blas), default=1)
        self._here = threading.local()
        self._lock, self._inside, self._before = threading.Lock(), 0, [1] * len(blas)
        # A queue of our own: handing a part over by a pool of concurrent.futures takes twice as long, and as long as a product.
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for _ in range(self.threads - 1):
            threading.Thread(target=_serve, args=(self._jobs,), daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)

    @property
    def at_work(self) -> bool:
        """Whether the calling thread computes a part already; what it calls is then not divided once more."""
        return getattr(self._here, "busy", False)

    @contextmanager
    def one_thread_a_product(self) -> Iterator[int]:
        """Meanwhile the BLAS computes each product on the thread that asks for it. Yields how many threads it had before.

        Any number of threads may be inside at once, and enter again: who comes first sees what limit there is, and who leaves
        last restores it. It takes a few microseconds.
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
        """Tell the BLAS to stay on the calling thread: by each thread, since one built on OpenMP has a number for each."""
        for set_num_threads in self._set_num_threads:
            set_num_threads(1)

    def map(self, f: Callable[[T], R], parts: Iterable[T]) -> list[R]:
        """[f(part) for part in parts], the parts shared among the threads. An error in one is raised when all have ended."""
        items = list(parts)
        if self.at_work:
            return [f(item) for item in items]
        if self.threads == 1 or len(items) < 2:
            with self.one_thread_a_product():
                return [f(item) for item in items]
        todo: list[Callable[[], R] | None] = [functools.partial(f, item) for item in items]
        results, errors, ended = list[Any]([None] * len(items)), list[BaseException](), SimpleQueue[int]()
        left = iter(range(len(items)))  # its next() is atomic: each index goes to one thread

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

        with self.one_thread_a_product() as allowed:
            for _ in range(min(self.threads, allowed, len(items)) - 1):
                # Each in a copy of the caller's context: np.errstate lives there, and an overflow is a result in a step.
                self._jobs.put(functools.partial(contextvars.copy_context().run, work))
            work()
            for _ in items:
                ended.get()
        # A thread that wakes up too late finds nothing left, and nobody waits for it: until then it must hold no array.
        done = results.copy()
        results.clear()
        if errors:
            raise errors[0]
        return done


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    """What a thread does: one job after the other, until there is None."""
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds the workers, which send None when nobody holds them any more


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
