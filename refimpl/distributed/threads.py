"""Ranks as threads of one process: all of the algorithm of several ranks, without anything to install. For tests.

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
    """What the ranks share: a place for each, and a barrier."""

    def __init__(self, size: int) -> None:
        self.size, self.places, self.barrier = size, [None] * size, threading.Barrier(size)


class ThreadComm(Comm):
    """A rank that is a thread. Arrays are handed over by reference and copied by who takes them."""

    def __init__(self, world: Any, rank: int) -> None:
        super().__init__()
        self.world, self.rank, self.size = world, rank, world.size

    def _exchange(self, mine: Any, take: Callable[[list[Any]], Any]) -> Any:
        """Put `mine` where the others see it; `take` from all; and wait until all have taken."""
        self.world.places[self.rank] = mine
        self.world.barrier.wait()
        taken = take(self.world.places)
        self.world.barrier.wait()
        return taken

    def _swap(self, x: Array, shares: Shares) -> Callable[[], Sequence[Array]]:
        own = shares[self.rank]
        arrived: list[Array] = self._exchange(x, lambda places: [theirs[own].copy() for theirs in places])
        return lambda: arrived

    def _all_gather(self, shares: Shares, out: Array) -> None:
        def take(places: list[Array]) -> None:
            for rank, share in enumerate(shares):
                if rank != self.rank:
                    out[share] = places[rank][share]

        self._exchange(out, take)

    def broadcast(self, x: Array) -> Array:
        first = self._exchange(x, lambda places: places[0].copy())
        x[...] = first
        return x

    def any(self, flag: bool) -> bool:
        return bool(self._exchange(flag, any))

    def barrier(self) -> None:
        self.world.barrier.wait()


def run_ranks(size: int, f: Callable[[Comm], T]) -> list[T]:
    """f(comm) of every rank, each on a thread of its own. Errors: that of the first that fails; the others stop waiting."""
    world, results, errors = _World(size), [None] * size, list[BaseException]()

    def work(rank: int) -> None:
        try:
            results[rank] = f(ThreadComm(world, rank))  # type: ignore[call-overload]
        except threading.BrokenBarrierError:
            pass  # another rank has failed, and says why
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
