"""Ranks with a GPU each, with NCCL: mpiexec -n 4 python -m mpi4py scripts/train.py --backend cupy --zero 1

MPI connects the ranks and exchanges flags and other host data; NCCL moves the arrays on the devices, as bytes. Sums are those
of `Comm`, in rank order, which NCCL's own sums are not. So no NCCL type for BF16 is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.backends.choose import get_backend
from refimpl.distributed.collectives import Comm, Shares
from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bytes_of


class NcclComm(Comm):
    """A rank with CuPy arrays, on the device that is current when it is created."""

    def __init__(self, host: Comm, nccl: Any, cupy: Any) -> None:
        """Connect the ranks. host: the communicator of the same ranks for arrays on the host."""
        super().__init__()
        self.host, self.nccl, self.cupy = host, nccl, cupy
        self.rank, self.size = host.rank, host.size
        name = np.frombuffer(nccl.get_unique_id(), np.uint8).copy()  # only rank 0's is used: see the broadcast below
        self.world = nccl.NcclCommunicator(host.size, bytes(host.broadcast(name)), host.rank)

    @property
    def on_host(self) -> Comm:
        return self.host

    @property
    def _stream(self) -> int:
        return int(self.cupy.cuda.get_current_stream().ptr)

    def _send(self, x: Array, rank: int) -> None:
        if x.size:
            self.world.send(x.data.ptr, x.size, self.nccl.NCCL_UINT8, rank, self._stream)

    def _receive(self, x: Array, rank: int) -> None:
        if x.size:
            self.world.recv(x.data.ptr, x.size, self.nccl.NCCL_UINT8, rank, self._stream)

    def _swap(self, x: Array, shares: Shares) -> Callable[[], Sequence[Array]]:
        own = shares[self.rank]
        arrived = self.cupy.empty((self.size, own.stop - own.start), x.dtype)
        self.nccl.groupStart()
        for rank in range(self.size):
            self._send(bytes_of(x[shares[rank]]), rank)
            self._receive(bytes_of(arrived[rank]), rank)
        self.nccl.groupEnd()
        return lambda: arrived  # no wait: what reads it is queued behind it on the same stream

    def _all_gather(self, shares: Shares, out: Array) -> None:
        self.nccl.groupStart()
        for rank in range(self.size):
            if rank != self.rank:
                self._send(bytes_of(out[shares[self.rank]]), rank)
                self._receive(bytes_of(out[shares[rank]]), rank)
        self.nccl.groupEnd()

    def broadcast(self, x: Array) -> Array:
        raw = bytes_of(x)
        self.world.broadcast(raw.data.ptr, raw.data.ptr, raw.size, self.nccl.NCCL_UINT8, 0, self._stream)
        return x

    def any(self, flag: bool) -> bool:
        return self.host.any(flag)

    def barrier(self) -> None:
        self.host.barrier()


def nccl_comm(host: Comm) -> Comm:
    """Select device r modulo the number of devices for rank r, and return the rank. Errors: UsageError without CuPy or NCCL."""
    cupy = get_backend("cupy").xp
    try:
        nccl = importlib.import_module("cupy.cuda.nccl")
    except ImportError as error:
        raise UsageError(f"several ranks on GPUs need NCCL: pip install nvidia-nccl-cu12 or -cu13 ({error})") from None
    cupy.cuda.Device(host.rank % cupy.cuda.runtime.getDeviceCount()).use()
    return NcclComm(host, nccl, cupy)
