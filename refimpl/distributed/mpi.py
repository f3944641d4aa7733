"""Ranks as processes, with MPI: mpiexec -n 4 python -m mpi4py scripts/train.py --zero 1

`-m mpi4py` is needed: it makes a rank that raises end all of them. Without it the others would wait for that rank forever.

MPI only moves bytes here. Its own sum of FP16 arrays rounds to FP16 after each rank, and it has no BF16.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.distributed.collectives import Comm, Shares
from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bytes_of

RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")
SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
"""The environment variables that MPICH's and Open MPI's mpiexec set in the processes that they start."""


class MpiComm(Comm):
    """A rank that is a process, with NumPy arrays."""

    def __init__(self, mpi: Any) -> None:
        """Join the ranks of MPI's world. mpi: the module mpi4py.MPI, whose import starts MPI."""
        super().__init__()
        self.mpi, self.world = mpi, mpi.COMM_WORLD.Dup()  # so that messages of other libraries cannot interfere
        self.rank, self.size = self.world.Get_rank(), self.world.Get_size()
        self.on_machine = self.world.Split_type(mpi.COMM_TYPE_SHARED).Get_size()

    def _layout(self, shares: Shares, itemsize: int) -> tuple[list[int], list[int]]:
        """Return the sizes and the starts of shares in bytes."""
        return [(s.stop - s.start) * itemsize for s in shares], [s.start * itemsize for s in shares]

    def _swap(self, x: Array, shares: Shares) -> Callable[[], Sequence[Array]]:
        own, byte = shares[self.rank], self.mpi.BYTE
        arrived = np.empty((self.size, own.stop - own.start), x.dtype)
        each = arrived[0].nbytes
        request = self.world.Ialltoallv(
            [bytes_of(x), self._layout(shares, x.itemsize), byte],
            [bytes_of(arrived.reshape(-1)), ([each] * self.size, [rank * each for rank in range(self.size)]), byte],
        )

        def wait() -> Array:
            request.Wait()
            assert x is not None  # this reference keeps x alive until MPI has read it
            return arrived

        return wait

    def _all_gather(self, shares: Shares, out: Array) -> None:
        self.world.Allgatherv(self.mpi.IN_PLACE, [bytes_of(out), self._layout(shares, out.itemsize), self.mpi.BYTE])

    def broadcast(self, x: Array) -> Array:
        self.world.Bcast([bytes_of(x), self.mpi.BYTE])
        return x

    def any(self, flag: bool) -> bool:
        result = np.zeros(1, np.int32)
        self.world.Allreduce(np.array([flag], np.int32), result, op=self.mpi.MAX)
        return bool(result[0])

    def barrier(self) -> None:
        self.world.Barrier()


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of ranks as mpiexec set them, without starting MPI; (0, 1) without mpiexec."""
    rank, size = (next((int(os.environ[n]) for n in names if n in os.environ), None) for names in (RANK, SIZE))
    return rank or 0, size or 1


def mpi_comm() -> Comm:
    """Return this process's rank. Errors: UsageError if mpi4py, or an MPI for it, is missing."""
    try:
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"several ranks need MPI: pip install mpi4py mpich ({error})") from None
    return MpiComm(mpi)
