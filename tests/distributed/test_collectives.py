"""Collectives of ranks that are threads, and what every engine shares: the sums."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from refimpl.distributed.collectives import Comm, Serial, add_up, share_size, shares_of
from refimpl.distributed.threads import run_ranks
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of

Array = np.ndarray
RANKS = (1, 2, 3, 4, 7)
FORMATS = ("fp32", "fp16", "bf16", "fp64")


def values(rank: int, n: int, fmt: str) -> Array:
    x: Array = cast(np.random.default_rng(rank).standard_normal(n).astype(np.float32), fmt)
    return x


def on(ranks: int, f: Callable[[Comm], Any]) -> list[Any]:
    return [f(Serial())] if ranks == 1 else run_ranks(ranks, f)


# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("grain", [1, 4, 1024])
@pytest.mark.parametrize("size", [0, 1, 5, 1023, 1024, 1025, 10_000])
def test_shares_follow_one_another_and_cover_all(size: int, grain: int, ranks: int) -> None:
    shares, full = shares_of(size, ranks, grain), share_size(size, ranks, grain)
    assert len(shares) == ranks and shares[0].start == 0 and shares[-1].stop == size
    assert all(one.stop == other.start for one, other in pairwise(shares))
    assert all(share.stop - share.start <= full for share in shares)
    assert all(share.start % grain == 0 or share.start == size for share in shares)
    assert full * ranks >= size and (ranks == 1 or full % grain == 0)
    assert full * ranks - size < grain * ranks  # less than a grain a rank is padding


# --------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ranks", RANKS)
def test_all_reduce_is_the_sum_in_fp32_rank_after_rank_rounded_once(ranks: int, fmt: str) -> None:
    n = 1000
    results = on(ranks, lambda comm: comm.all_reduce(values(comm.rank, n, fmt)))
    total = widen(values(0, n, fmt), "fp64" if fmt == "fp64" else "fp32").copy()
    for rank in range(1, ranks):
        total += widen(values(rank, n, fmt), "fp64" if fmt == "fp64" else "fp32")
    expected = cast(total, fmt)
    for result in results:
        assert result.dtype == dtype_of(fmt) and result.tobytes() == expected.tobytes()


def test_sums_of_16_bits_are_not_taken_in_16_bits() -> None:
    """2048 + 1 + 1 is 2050 in FP16; rounded after each addition it stays 2048."""
    pieces = [cast(np.array([x], np.float32), "fp16") for x in (2048.0, 1.0, 1.0)]
    assert float(add_up(pieces)[0]) == 2050.0
    assert float((pieces[0] + pieces[1] + pieces[2])[0]) == 2048.0
    assert on(3, lambda comm: float(comm.all_reduce(pieces[comm.rank])[0])) == [2050.0] * 3


def test_a_sum_may_overflow_where_no_share_does() -> None:
    half = cast(np.array([40_000.0], np.float32), "fp16")
    with np.errstate(over="ignore"):
        assert np.isinf(widen(add_up([half, half]))).all()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("grain", [1, 64])
def test_reduce_scatter_gives_each_rank_its_share_of_that(ranks: int, grain: int) -> None:
    n, fmt = 333, "bf16"
    shares = shares_of(n, ranks, grain)  # with grains of 64 and 7 ranks the last ones have nothing
    results = on(ranks, lambda comm: comm.reduce_scatter(values(comm.rank, n, fmt), shares)())
    whole = on(ranks, lambda comm: comm.all_reduce(values(comm.rank, n, fmt)))[0]
    for share, result in zip(shares, results, strict=True):
        assert result.tobytes() == whole[share].tobytes()


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_summed_is_not_changed(ranks: int) -> None:
    def unchanged(comm: Comm) -> bool:
        x = values(comm.rank, 50, "fp32")
        before = x.copy()
        comm.reduce_scatter(x, shares_of(50, comm.size))()
        comm.all_reduce(x)
        return bool((x == before).all())

    assert all(on(ranks, unchanged))


# ------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("dtype", [np.float32, np.float16, dtype_of("bf16"), np.bool_, np.uint8])
@pytest.mark.parametrize("ranks", RANKS)
def test_all_gather_puts_shares_side_by_side(ranks: int, dtype: Any) -> None:
    n = 100
    shares, whole = shares_of(n, ranks, 8), np.arange(n).astype(dtype)

    def gathered(comm: Comm) -> Array:
        return comm.all_gather(whole[shares[comm.rank]], shares, np.zeros(n, dtype))

    assert all(result.tobytes() == whole.tobytes() for result in on(ranks, gathered))


@pytest.mark.parametrize("ranks", RANKS)
def test_broadcast_any_and_largest(ranks: int) -> None:
    assert [x.tolist() for x in on(ranks, lambda comm: comm.broadcast(np.full(3, comm.rank + 5)))] == [[5, 5, 5]] * ranks
    assert on(ranks, lambda comm: comm.any(False)) == [False] * ranks
    for one in range(ranks):
        assert on(ranks, lambda comm, one=one: comm.any(comm.rank == one)) == [True] * ranks
    magnitudes = on(ranks, lambda comm: comm.largest(np.array([comm.rank, -comm.rank, np.nan, 3], np.float32)).tolist())
    assert all(m[0] == ranks - 1 and m[1] == 0 and np.isnan(m[2]) and m[3] == 3 for m in magnitudes)


def test_a_barrier_waits_for_the_last() -> None:
    arrived = []

    def late(comm: Comm) -> int:
        time.sleep(0.02 * comm.rank)
        arrived.append(comm.rank)
        comm.barrier()
        return len(arrived)

    assert run_ranks(3, late) == [3, 3, 3]


# ------------------------------------------------------------------------------------------------- what it costs, errors


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_came_from_other_ranks_is_counted(ranks: int) -> None:
    """A sum over ranks, both halves of it: 2 (N - 1) / N of the array; nothing on one rank."""
    n = 12 * 100

    def counted(comm: Comm) -> dict[str, int]:
        comm.all_reduce(values(comm.rank, n, "fp16"))
        return dict(comm.received)

    half = 2 * n * (ranks - 1) // ranks
    assert run_ranks(ranks, counted) == [{"reduce_scatter": half, "all_gather": half}] * ranks
    alone = Serial()
    alone.all_reduce(values(0, n, "fp16"))
    assert not alone.received


def test_a_rank_that_fails_ends_the_others() -> None:
    """They would wait for it at the next collective; and its error is what is raised."""

    def fail(comm: Comm) -> None:
        if comm.rank == 1:
            raise ValueError("rank 1 has had enough")
        comm.all_reduce(np.zeros(3, np.float32))

    threads = threading.active_count()
    with pytest.raises(ValueError, match="rank 1 has had enough"):
        run_ranks(3, fail)
    assert threading.active_count() == threads
