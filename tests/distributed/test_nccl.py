"""The calls that NcclComm makes of NCCL, on a stand-in that moves the bytes between threads: who sends what to whom.

What NCCL itself does only GPUs show; docs/gpu.md says what one has shown.
"""

from __future__ import annotations

import ctypes
import os
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refimpl.distributed.collectives import Comm, shares_of
from refimpl.distributed.nccl import NcclComm, nccl_comm
from refimpl.distributed.threads import run_ranks
from refimpl.errors import UsageError
from refimpl.numerics.formats import dtype_of


class OnDevice(np.ndarray):
    """A host array that says where it lies as CuPy's arrays do."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)


CUPY = SimpleNamespace(
    empty=lambda shape, dtype: np.full(shape, 77, dtype).view(OnDevice),
    cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0)),
)


class FakeNccl:
    """cupy.cuda.nccl: point-to-point calls are queued in a group, matched in their order, and moved at its end."""

    NCCL_UINT8 = 1

    def __init__(self, ranks: int) -> None:
        self.ranks, self.barrier, self.local = ranks, threading.Barrier(ranks), threading.local()
        self.sent: dict[tuple[int, int], list[bytes]] = {}
        self.names: list[bytes] = []

    def get_unique_id(self) -> bytes:
        return np.random.default_rng().bytes(128)  # each rank's own, of which only the first one's counts

    def NcclCommunicator(self, size: int, name: bytes, rank: int) -> Any:
        self.local.rank = rank
        self.names.append(name)
        assert size == self.ranks
        return self

    def groupStart(self) -> None:
        self.local.sends, self.local.receives = [], []

    def send(self, pointer: int, count: int, kind: int, to: int, stream: int) -> None:
        assert kind == self.NCCL_UINT8
        self.local.sends.append((to, ctypes.string_at(pointer, count)))

    def recv(self, pointer: int, count: int, kind: int, source: int, stream: int) -> None:
        self.local.receives.append((source, pointer, count))

    def groupEnd(self) -> None:
        me = self.local.rank
        for to, content in self.local.sends:
            self.sent.setdefault((me, to), []).append(content)
        self.barrier.wait()
        for source, pointer, count in self.local.receives:
            content = self.sent[source, me].pop(0)
            assert len(content) == count, "a message of another length is waited for"
            ctypes.memmove(pointer, content, count)
        self.barrier.wait()
        assert not self.sent.get((me, me)) and not any(self.sent.values()), "a message that nobody waits for"
        self.barrier.wait()

    def broadcast(self, source: int, target: int, count: int, kind: int, root: int, stream: int) -> None:
        if self.local.rank == root:
            self.content = ctypes.string_at(source, count)
        self.barrier.wait()
        ctypes.memmove(target, self.content, count)
        self.barrier.wait()


def values(rank: int, n: int, fmt: str) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(n).astype(dtype_of(fmt)).view(OnDevice)


def collectives(comm: Comm) -> list[bytes]:
    results = []
    for fmt in ("fp32", "fp16", "bf16"):
        for n, grain in ((1000, 1), (5, 4), (1000, 512)):  # with shares of two sizes, and empty ones
            x, shares = values(comm.rank, n, fmt), shares_of(n, comm.size, grain)
            own = comm.reduce_scatter(x, shares)()
            out = np.zeros(n, dtype_of(fmt)).view(OnDevice)
            results += [own.tobytes(), comm.all_gather(own, shares, out).tobytes(), comm.broadcast(x.copy()).tobytes()]
        on_host = np.asarray(values(comm.rank, 7, "fp32"))
        results += [comm.on_host.all_reduce(on_host).tobytes(), comm.on_host.largest(on_host).tobytes()]
    results.append(bytes([comm.any(False), comm.any(comm.rank == 0)]))
    comm.barrier()
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives_are_those_of_threads(ranks: int) -> None:
    nccl = FakeNccl(ranks)
    assert run_ranks(ranks, lambda host: collectives(NcclComm(host, nccl, CUPY))) == run_ranks(ranks, collectives)
    assert len(nccl.names) == ranks and len(set(nccl.names)) == 1  # all meet under the first rank's name


def test_a_message_that_nobody_waits_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NcclComm, "_receive", lambda self, x, rank: None)
    nccl = FakeNccl(2)
    with pytest.raises(AssertionError, match="nobody waits"):
        run_ranks(2, lambda host: collectives(NcclComm(host, nccl, CUPY)))


@pytest.mark.gpu
def test_nccls_own_calls_from_one_rank_to_itself() -> None:
    """A rank has nothing to send to itself, so the engine's own calls are made: the bits come back."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    pytest.importorskip("cupy.cuda.nccl", reason="NCCL is not installed")
    if not cupy.cuda.is_available() or "CUPY_ON_CPU" in os.environ:
        pytest.skip("no NVIDIA GPU answers")
    comm = nccl_comm(Comm())
    for fmt in ("fp32", "fp16", "bf16"):
        x = cupy.asarray(np.asarray(values(0, 1000, fmt)))
        arrived, out = comm._swap(x, [slice(0, 1000)])()[0], x.copy()
        comm._all_gather([slice(0, 1000)], out)
        comm.broadcast(out)
        for y in (arrived, out):
            assert cupy.asnumpy(y).tobytes() == cupy.asnumpy(x).tobytes()


def test_without_nccl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError("libnccl.so.2")

    monkeypatch.setattr("refimpl.distributed.nccl.get_backend", lambda name: SimpleNamespace(xp=CUPY))
    monkeypatch.setattr("refimpl.distributed.nccl.importlib.import_module", missing)
    with pytest.raises(UsageError, match=r"pip install nvidia-nccl-cu12 or -cu13 \(libnccl.so.2\)"):
        nccl_comm(Comm())
