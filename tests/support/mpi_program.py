"""What each process of test_mpi.py runs: mpiexec -n 3 python -m mpi4py tests/support/mpi_program.py collectives"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from refimpl.distributed.collectives import Comm, Serial, add_up, shares_of
from refimpl.distributed.mpi import mpi_comm
from refimpl.distributed.threads import run_ranks
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of


def values(rank: int, n: int, fmt: str) -> Any:
    """What a rank contributes."""
    return cast(np.random.default_rng(rank).standard_normal(n).astype(np.float32), fmt)


def collectives(comm: Comm) -> list[bytes]:
    """The results of all calls, in several formats and sizes, with shares that are empty among them."""
    results = []
    for fmt in ("fp32", "fp16", "bf16", "fp64"):
        for n in (1, 5, 1000, 30_001):
            shares = shares_of(n, comm.size, 256)
            x = values(comm.rank, n, fmt)
            pending = comm.reduce_scatter(x, shares)
            results.append(comm.all_reduce(x).tobytes())
            own = pending()
            results.append(own.tobytes())
            results.append(comm.all_gather(own, shares, np.zeros(n, dtype_of(fmt))).tobytes())
            results.append(comm.broadcast(x.copy()).tobytes())
        results.append(comm.largest(values(comm.rank, 9, "fp32")).tobytes())
    flags = comm.all_gather(np.array([comm.rank == 1]), shares_of(comm.size, comm.size), np.zeros(comm.size, bool))
    results.append(flags.tobytes())
    results.append(bytes([comm.any(False), comm.any(comm.rank == comm.size - 1)]))
    comm.barrier()
    return [*results, str(sorted(comm.received.items())).encode()]


def native(comm: Comm) -> float:
    """The share of elements in which MPI's own sum of FP16 differs from the FP32 sum."""
    from mpi4py import MPI

    n = 100_000
    x, total = values(comm.rank, n, "fp16"), np.zeros(n, np.float16)
    MPI.COMM_WORLD.Allreduce(x, total)
    ours = add_up([values(rank, n, "fp16") for rank in range(comm.size)])
    # Four roundings at most, each by half the spacing of numbers below 16, which is 2^-7: the same sum, rounded elsewhere.
    assert np.abs(widen(ours)).max() < 16 and np.abs(widen(ours) - widen(total)).max() <= 4 * 2.0**-8
    return float((ours != total).mean())


def main(what: str) -> None:
    """Print one word per rank."""
    comm = mpi_comm()
    if what == "collectives":
        here = collectives(comm)
        threads = run_ranks(comm.size, collectives) if comm.size > 1 else [collectives(Serial())]
        words = "same" if here == threads[comm.rank] else "DIFFERENT"
    elif what == "native":
        words = str(native(comm))
    else:
        if comm.rank == 1:
            raise ValueError("rank 1 has had enough")
        comm.all_reduce(np.zeros(10, np.float32))
        words = "never"
    sys.stdout.write(f"{words}\n")  # at once, or lines of several ranks may be mixed up
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
