"""Ranks as threads of one process, for tests: the algorithm of several ranks without MPI.

    losses = run_ranks(4, lambda comm: train(comm))
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from refimpl.distributed.collectives import Comm, Shares
from refimpl.numerics.arrays import Array

T = TypeVar("T")


class _World:
    """The memory that the ranks share: a slot for each, and a barrier."""

    def __init__(self, size: int) -> None:
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size)


class ThreadComm(Comm):
    """A rank that is a thread. Arrays are passed by reference, and the receiver copies them."""

    def __init__(self, world: Any, rank: int) -> None:
        super().__init__()
        self.world, self.rank, self.size = world, rank, world.size

    def _exchange(self, value: Any, read: Callable[[list[Any]], Any]) -> Any:
        """Put `value` in this rank's slot, and return `read` of all slots once all ranks have read."""
        self.world.slots[self.rank] = value
        self.world.barrier.wait()
        result = read(self.world.slots)
        self.world.barrier.wait()
        return result

    def _swap(self, x: Array, shares: Shares) -> Callable[[], Sequence[Array]]:
        own = shares[self.rank]
        arrived: list[Array] = self._exchange(x, lambda slots: [theirs[own].copy() for theirs in slots])
        return lambda: arrived

    def _all_gather(self, shares: Shares, out: Array) -> None:
        def read(slots: list[Array]) -> None:
            for rank, share in enumerate(shares):
                if rank != self.rank:
                    out[share] = slots[rank][share]

        self._exchange(out, read)

    def broadcast(self, x: Array) -> Array:
        first = self._exchange(x, lambda slots: slots[0].copy())
        x[...] = first
        return x

    def any(self, flag: bool) -> bool:
        return bool(self._exchange(flag, any))

    def barrier(self) -> None:
        self.world.barrier.wait()


def run_ranks(size: int, f: Callable[[Comm], T]) -> list[T]:
    """Return f(comm) of every rank, each run in its own thread. Errors: that of the first rank to fail; the others stop."""
    world, results, errors = _World(size), [None] * size, list[BaseException]()

    def work(rank: int) -> None:
        try:
            results[rank] = f(ThreadComm(world, rank))  # type: ignore[call-overload]
        except threading.BrokenBarrierError:
            pass  # another rank has failed, and its error is reported
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    # Each in a copy of the caller's context: np.errstate lives there.
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(work, rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
