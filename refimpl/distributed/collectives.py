"""How ranks exchange flat arrays: six calls, the same on every engine.

    all_reduce(x)                    every rank gets the sum of all x
    reduce_scatter(x, shares)        each rank gets the sum of its share of all x; begins, and the caller waits when it must
    all_gather(own, shares, out)     every rank gets the shares of all, one after the other
    broadcast(x)                     every rank gets rank 0's x
    any(flag)                        whether one of the ranks says yes
    barrier()                        nobody goes on before all have come

Engines only move bytes. Sums are taken here: in FP32 (FP64 of FP64), rank 0 first and the last rank last, and rounded once, so
that they are the same on every engine and on every rank. A 16-bit array travels as its 16 bits and is never summed in 16 bits.

    Serial          here       one rank
    ThreadComm      threads.py ranks as threads of one process, for tests
    MpiComm         mpi.py     processes, by mpi4py
    NcclComm        nccl.py    GPUs, by NCCL

Source: the collectives of MPI, and what ZeRO makes of them (arXiv 1910.02054). PyTorch: torch.distributed's functions of the
same names; its all_reduce of 16-bit tensors sums in 16 bits on gloo, and in an order of its own.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of

Shares = Sequence[slice]
"""The share of each rank in a flat array: slices that follow one another and cover it. Some may be empty."""
Pending = Callable[[], Array]
"""A call that has begun: call it to wait for its result."""


def shares_of(size: int, ranks: int, grain: int = 1) -> list[slice]:
    """`size` elements divided among ranks: shares of one size, a multiple of `grain`, until nothing is left.

    One rank has all. So the last ranks may have less, or nothing.
    """
    share = share_size(size, ranks, grain)
    return [slice(min(rank * share, size), min((rank + 1) * share, size)) for rank in range(ranks)]


def share_size(size: int, ranks: int, grain: int = 1) -> int:
    """The elements of a full share: ceil(ceil(size / grain) / ranks) grain, or all of one rank."""
    grains = -(-size // grain)
    return size if ranks == 1 else -(-grains // ranks) * grain


def add_up(pieces: Sequence[Array]) -> Array:
    """The sum of arrays of one format, first to last, in FP32 (FP64 of FP64), rounded once to that format."""
    fmt = format_of(pieces[0])
    wide = "fp64" if fmt == "fp64" else "fp32"
    total = widen(pieces[0], wide)
    for piece in pieces[1:]:
        total = total + widen(piece, wide)
    return cast(total, fmt)


class Comm:
    """One rank among `size`. An engine provides `_swap`, `_all_gather`, `broadcast`, `any` and `barrier`.

    received: bytes that came from other ranks, by call; what a rank sends is as much in all. on_machine: ranks that share
    this machine's processor.
    """

    rank: int = 0
    size: int = 1
    on_machine: int = 1

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()

    @property
    def on_host(self) -> Comm:
        """The same ranks, for arrays on the host."""
        return self

    # -- sums -------------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Array) -> Array:
        """The sum over ranks of x (n,), in its format. -> (n,)"""
        if self.size == 1:
            return x
        shares = shares_of(x.size, self.size)
        own = self.reduce_scatter(x, shares)()
        return self.all_gather(own, shares, x.copy())

    def reduce_scatter(self, x: Array, shares: Shares) -> Pending:
        """Begin to sum x (n,) over ranks, each rank its share. The result of the wait: (share,), in the format of x.

        x must not be written to before that.
        """
        if self.size == 1:
            return lambda: x[shares[0]]
        own = shares[self.rank]
        self.received["reduce_scatter"] += (self.size - 1) * (own.stop - own.start) * x.itemsize
        arrived = self._swap(x, shares)
        return lambda: add_up(arrived())

    # -- copies -----------------------------------------------------------------------------------------------------

    def all_gather(self, own: Array, shares: Shares, out: Array) -> Array:
        """`out` (n,) becomes the shares of all ranks, of which `own` is this one's. -> out"""
        out[shares[self.rank]] = own
        if self.size > 1:
            self.received["all_gather"] += out.nbytes - own.nbytes
            self._all_gather(shares, out)
        return out

    def largest(self, x: Array) -> Array:
        """The largest of all ranks, element by element, NaN left aside: an all_gather of an array on the host."""
        if self.size == 1:
            return x
        shares = [slice(rank * x.size, (rank + 1) * x.size) for rank in range(self.size)]
        everyone = self.all_gather(x, shares, np.empty(self.size * x.size, x.dtype)).reshape(self.size, -1)
        largest: Array = functools.reduce(np.fmax, everyone)
        return largest

    def broadcast(self, x: Array) -> Array:
        """x, in place, becomes rank 0's. -> x"""
        return x

    # -- one bit, or none -------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether a rank's flag is set."""
        return flag

    def barrier(self) -> None:
        """Wait for all ranks."""

    # -- what an engine provides ------------------------------------------------------------------------------------

    def _swap(self, x: Array, shares: Shares) -> Callable[[], Sequence[Array]]:
        """Begin to send x[shares[r]] to each rank r; the wait gives what every rank sent here, in the order of ranks."""
        raise NotImplementedError

    def _all_gather(self, shares: Shares, out: Array) -> None:
        """Fill in `out`, of which this rank's share is there, what the other ranks have."""
        raise NotImplementedError


class Serial(Comm):
    """One rank: nothing is sent."""
