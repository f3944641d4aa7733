"""Collectives: the calls by which ranks exchange flat arrays, the same for every transport.

    all_reduce(x)                    every rank gets the sum of all x
    reduce_scatter(x, shares)        each rank gets the sum of its share of all x; returns at once, the caller waits later
    all_gather(own, shares, out)     every rank gets the shares of all ranks, concatenated
    largest(x)                       every rank gets the largest of all x, element by element
    broadcast(x)                     every rank gets rank 0's x
    any(flag)                        every rank gets whether one of the flags is set
    barrier()                        no rank continues before all have arrived

Transports only move bytes. Sums are computed here: in FP32 (FP64 for FP64 arrays), from rank 0 to the last rank, rounded once.
So they are the same with every transport and on every rank, and 16-bit arrays are never summed in 16 bits.

    Serial       one rank
    ThreadComm   threads.py   ranks as threads of one process, for tests
    MpiComm      mpi.py       ranks as processes, with mpi4py
    NcclComm     nccl.py      ranks with a GPU each, with NCCL

Source: the collectives of MPI, and their use in ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).
PyTorch: the functions of the same names in torch.distributed, whose all_reduce of 16-bit tensors sums in 16 bits on gloo, and
in an order of its own.
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
"""The share of each rank in a flat array: consecutive slices that cover it, of which some may be empty."""
Pending = Callable[[], Array]
"""The result of a call that has begun: call it to wait for the array."""


def shares_of(size: int, ranks: int, grain: int = 1) -> list[slice]:
    """Return the shares of `size` elements among ranks: each a multiple of `grain`, all of one size until none are left.

    So the last ranks may have fewer elements, or none. A single rank has all of them.
    """
    share = share_size(size, ranks, grain)
    return [slice(min(rank * share, size), min((rank + 1) * share, size)) for rank in range(ranks)]


def share_size(size: int, ranks: int, grain: int = 1) -> int:
    """Return the elements of a full share: ceil(ceil(size / grain) / ranks) grain, or `size` for a single rank."""
    grains = -(-size // grain)
    return size if ranks == 1 else -(-grains // ranks) * grain


def add_up(pieces: Sequence[Array]) -> Array:
    """Return the sum of arrays of one format, first to last, in FP32 (FP64 for FP64), rounded once to that format."""
    fmt = format_of(pieces[0])
    wide = "fp64" if fmt == "fp64" else "fp32"
    total = widen(pieces[0], wide)
    for piece in pieces[1:]:
        total = total + widen(piece, wide)
    return cast(total, fmt)


class Comm:
    """One rank among `size`. A transport implements `_swap`, `_all_gather`, `broadcast`, `any` and `barrier`.

    received: bytes that came from other ranks, by call; in total, a rank sends as many. on_machine: the number of ranks on
    this machine.
    """

    rank: int = 0
    size: int = 1
    on_machine: int = 1

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()

    @property
    def on_host(self) -> Comm:
        """The communicator of the same ranks for arrays on the host."""
        return self

    # -- sums -------------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Array) -> Array:
        """Return the sum over ranks of x (n,), in its format."""
        if self.size == 1:
            return x
        shares = shares_of(x.size, self.size)
        own = self.reduce_scatter(x, shares)()
        return self.all_gather(own, shares, x.copy())

    def reduce_scatter(self, x: Array, shares: Shares) -> Pending:
        """Begin to sum x (n,) over ranks. Return a call that waits for this rank's share of the sum, in the format of x.

        x must not be written to before that call returns.
        """
        if self.size == 1:
            return lambda: x[shares[0]]
        own = shares[self.rank]
        self.received["reduce_scatter"] += (self.size - 1) * (own.stop - own.start) * x.itemsize
        arrived = self._swap(x, shares)
        return lambda: add_up(arrived())

    # -- copies -----------------------------------------------------------------------------------------------------

    def all_gather(self, own: Array, shares: Shares, out: Array) -> Array:
        """Fill `out` (n,) with the shares of all ranks, of which `own` is this rank's, and return it."""
        out[shares[self.rank]] = own
        if self.size > 1:
            self.received["all_gather"] += out.nbytes - own.nbytes
            self._all_gather(shares, out)
        return out

    def largest(self, x: Array) -> Array:
        """Return the largest of the ranks' x, element by element, ignoring NaN. x must be on the host."""
        if self.size == 1:
            return x
        shares = [slice(rank * x.size, (rank + 1) * x.size) for rank in range(self.size)]
        everyone = self.all_gather(x, shares, np.empty(self.size * x.size, x.dtype)).reshape(self.size, -1)
        largest: Array = functools.reduce(np.fmax, everyone)
        return largest

    def broadcast(self, x: Array) -> Array:
        """Overwrite x with rank 0's, and return it."""
        return x

    # -- flags -------------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Return whether the flag of any rank is set."""
        return flag

    def barrier(self) -> None:
        """Wait for all ranks."""

    # -- to be implemented by a transport ----------------------------------------------------------------------------------

    def _swap(self, x: Array, shares: Shares) -> Callable[[], Sequence[Array]]:
        """Begin to send x[shares[r]] to each rank r. Return a call that waits for what each rank sent here, in rank order."""
        raise NotImplementedError

    def _all_gather(self, shares: Shares, out: Array) -> None:
        """Fill `out`, which has this rank's share already, with the shares of the other ranks."""
        raise NotImplementedError


class Serial(Comm):
    """One rank: nothing is sent."""
