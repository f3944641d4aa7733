"""Parts of one operation on several threads: the same bits as the whole, whatever the number of threads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from bounds import gamma
from fake_blas import FakeBlas
from recipe_lists import others_slow
from threadpoolctl import ThreadpoolController, threadpool_limits

import refimpl.backends.numpy.backend as backends
from refimpl.backends.base import Backend
from refimpl.backends.numpy import blocks
from refimpl.backends.numpy.backend import NUMPY, WHOLE, row_blocks
from refimpl.backends.numpy.threads import Workers, workers
from refimpl.optim import layout
from refimpl.precision.context import Run
from refimpl.precision.recipes import RECIPES
from refimpl.tools.bench.steps import MODELS, Ours


def slowly(_: int) -> int:
    """Which thread it is, after a while that leaves the others time to take a part too."""
    time.sleep(0.01)
    return threading.get_ident()


class OpenMPBlas:
    """One whose number of threads is the calling thread's own, as that of a BLAS built on OpenMP is."""

    def __init__(self, threads: int) -> None:
        self.first, self.own = threads, threading.local()

    @property
    def num_threads(self) -> int:
        return getattr(self.own, "n", self.first)

    def set_num_threads(self, n: int) -> None:
        self.own.n = n


@pytest.fixture(params=[1, 2, 3])
def some(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """Workers of one, two and three threads."""
    yield Workers(FakeBlas(request.param))


def test_results_are_in_the_order_of_the_parts(some: Workers) -> None:
    def late(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    assert some.map(late, range(20)) == [i * i for i in range(20)]
    assert some.map(late, []) == [] and some.map(late, [3]) == [9]


def test_each_part_is_computed_once_and_threads_share_them() -> None:
    three, seen, barrier = Workers(FakeBlas(3)), list[tuple[int, int]](), threading.Barrier(3, timeout=20)

    def meet(i: int) -> None:
        seen.append((i, threading.get_ident()))
        barrier.wait()  # passes only where three threads are at it at the same time

    three.map(meet, range(6))
    assert sorted(i for i, _ in seen) == list(range(6))
    assert len({thread for _, thread in seen}) == 3 and threading.get_ident() in {thread for _, thread in seen}


@pytest.mark.parametrize("blas", [FakeBlas(2), OpenMPBlas(2)], ids=["one number", "one for each thread"])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_blas_has_one_thread_while_parts_run_and_all_of_them_afterwards(blas: FakeBlas | OpenMPBlas, parts: int) -> None:
    two, barrier = Workers(blas), threading.Barrier(min(2, parts), timeout=20)

    def at(_: int) -> int:
        barrier.wait()  # so that either thread has some
        return blas.num_threads

    assert two.map(at, range(parts)) == [1] * parts and blas.num_threads == 2
    with pytest.raises(ZeroDivisionError):
        two.map(lambda i: 1 // i, range(parts))
    assert blas.num_threads == 2


def test_whoever_leaves_last_restores_what_the_first_has_found() -> None:
    """Ranks that are threads of one process come and go as they like; and a product may stand within a part."""
    blas, other = FakeBlas(3), FakeBlas(2)
    some, inside, leave = Workers(blas, other), threading.Barrier(2, timeout=20), threading.Event()

    def stay() -> None:
        with some.one_thread_per_product() as before:
            assert before == 3
            inside.wait()
            leave.wait(20)

    stays = threading.Thread(target=stay)
    with some.one_thread_per_product():
        stays.start()
        inside.wait()
        with pytest.raises(ValueError, match="inner"), some.one_thread_per_product() as before:
            assert before == 3
            raise ValueError("inner")
        assert (blas.num_threads, other.num_threads) == (1, 1)
    assert (blas.num_threads, other.num_threads) == (1, 1)
    leave.set()
    stays.join()
    assert (blas.num_threads, other.num_threads) == (3, 2)


def test_who_limits_the_blas_limits_the_workers_too_and_keeps_the_limit() -> None:
    blas = FakeBlas(4)
    some = Workers(blas)
    for limit in (4, 2, 1):
        blas.num_threads = limit
        assert len(set(some.map(slowly, range(40)))) == limit
        assert blas.num_threads == limit


def test_threads_heed_the_callers_errstate() -> None:
    """Warnings are errors in these tests: one that a thread gave would be raised."""
    two, barrier, large = Workers(FakeBlas(2)), threading.Barrier(2, timeout=20), np.full(4, 1e30, np.float32)

    def overflow(_: int) -> float:
        barrier.wait()  # so that either thread has one
        return float((large * large)[0])

    with np.errstate(over="ignore"):
        assert two.map(overflow, range(2)) == [np.inf, np.inf]
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        two.map(overflow, range(2))


FORKED = """
import os, sys
from refimpl.backends.numpy.threads import workers
if workers().threads < 2:
    sys.exit("one thread")
workers().map(abs, range(4))
pid = os.fork()
if pid == 0:
    os._exit(workers().map(abs, range(4)) != [0, 1, 2, 3])
sys.exit(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_workers_of_its_own() -> None:
    if workers().threads < 2:
        pytest.skip("one thread has nobody to wait for")
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=60).returncode == 0


def test_a_part_is_not_divided_once_more() -> None:
    three, barrier = Workers(FakeBlas(3)), threading.Barrier(2, timeout=20)

    def inner(_: int) -> bool:
        barrier.wait()  # two threads have a part each; the third has nothing to do, and must not help either
        return three.at_work and set(three.map(slowly, range(4))) == {threading.get_ident()} and three.at_work

    assert three.map(inner, range(2)) == [True, True]
    assert not three.at_work


def test_a_thread_that_wakes_late_holds_nothing_until_then() -> None:
    """Its job waits in the queue after `map` has returned; a memory count at that moment must not see what was mapped."""
    two, late = Workers(FakeBlas(2)), threading.Event()
    two._jobs.put(lambda: late.wait(20))
    part = np.zeros(8)
    seen, result = weakref.ref(part), weakref.ref(two.map(lambda x: x + 1, [part, part])[0])
    del part
    assert seen() is None and result() is None
    late.set()


def test_the_blas_heeds_every_thread() -> None:
    """Ranks are threads: each of them holds the BLAS, and the last one lets it go, whoever held it first."""
    ours = workers()
    if ours.threads < 2:
        pytest.skip("the BLAS has one thread anyway")
    (blas, *_), first, second, seen = ours._blas, threading.Event(), threading.Event(), list[int]()

    def rank(mine: threading.Event, other: threading.Event) -> None:
        with ours.one_thread_per_product():
            seen.append(blas.num_threads)
            mine.set()
            other.wait(20)
        time.sleep(0.05)  # it lives on, as the thread that threadpoolctl would go on to heed

    with ours.one_thread_per_product():
        pass
    for _ in range(3):
        first.clear()
        second.clear()
        ranks = [threading.Thread(target=rank, args=pair) for pair in ((first, second), (second, first))]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        assert seen == [1, 1] and blas.num_threads == ours.threads
        seen.clear()


def test_an_error_is_raised_when_all_have_ended() -> None:
    two, running = Workers(FakeBlas(2)), list[int]()

    def fail(i: int) -> None:
        if i == 0:
            raise ValueError("part 0")
        running.append(i)
        time.sleep(0.05)
        running.remove(i)

    with pytest.raises(ValueError, match="part 0"):
        two.map(fail, range(6))
    assert running == [] and not two.at_work
    assert two.map(lambda i: i, range(3)) == [0, 1, 2]  # and they work again


def test_without_a_blas_that_can_be_told_the_calling_thread_does_all() -> None:
    alone = Workers()
    assert alone.threads == 1
    assert set(alone.map(lambda _: threading.get_ident(), range(4))) == {threading.get_ident()}


def test_the_workers_of_this_process_have_the_threads_of_numpys_blas() -> None:
    numpys = [b for b in ThreadpoolController().select(user_api="blas").lib_controllers if "numpy" in b.filepath]
    if not numpys:
        pytest.skip("threadpoolctl does not know this NumPy's BLAS")
    assert workers().threads == numpys[0].num_threads and workers() is workers()


# --------------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("shape", [(2048, 384, 1536), (1536, 2048, 384), (1000, 700, 321), (130, 1100, 1000), (20, 60, 50)])
@pytest.mark.parametrize("layout", ["a b", "aT b", "a bT"])
def test_a_product_in_blocks_is_the_product(shape: tuple[int, int, int], layout: str) -> None:
    """To the bit where the BLAS itself makes no difference between the whole and its blocks: OpenBLAS's kernels for Nehalem
    never do, those for AVX512 for some shapes, those for Haswell for most. Where it does, the two are apart by no more than the
    order of a sum can do; and the blocks are those that anyone would compute by themselves, in any case.
    """
    M, K, N = shape
    rng = np.random.default_rng(0)
    a = rng.standard_normal((M, K), np.float32) if layout != "aT b" else rng.standard_normal((K, M), np.float32).T
    b = rng.standard_normal((K, N), np.float32) if layout != "a bT" else rng.standard_normal((N, K), np.float32).T
    with threadpool_limits(1):
        whole = Backend.matmul(NUMPY, a, b, "fp32")
        blocks = np.concatenate([a[rows] @ b for rows in row_blocks(M, M * K * N)])
    z = NUMPY.matmul(a, b, "fp32")
    assert z.tobytes() == blocks.tobytes()
    # Either sum is within gamma(K) |a| |b| of the exact one, whatever its order (Higham 2002, section 3.1); the bound of the
    # sizes is computed in FP32 too, which the factor covers.
    if blocks.tobytes() != whole.tobytes():
        assert (abs(z - whole) <= 2 * gamma(K) * (1 + gamma(K)) * (abs(a) @ abs(b))).all()


def test_blocks_cover_all_rows_and_are_two_at_least_for_a_large_product() -> None:
    for M in (1, 2, 63, 64, 65, 130, 384, 767, 768, 1152, 1536, 1600, 2048, 8192):
        blocks = row_blocks(M, 1 << 30)
        assert [i for rows in blocks for i in range(M)[rows]] == list(range(M))
        assert row_blocks(M, WHOLE) == [slice(0, M)]
    assert [len(row_blocks(M, 1 << 30)) for M in (64, 384, 1152, 1536, 3072, 8192)] == [1, 2, 2, 4, 8, 16]


IN_PARTS = ("fp32", "fp16", "amp-bf16-cpu", "bf16-sr", "bf16-kahan", "adam-8bit", "mxfp8", "nvfp4", "fp16-sums-64")
"""Every operation and every pass that is cut."""


@pytest.mark.parametrize(("model", "recipe"), others_slow(
    itertools.product(("gpt", "llama"), (name for name in RECIPES if name != "fp64")),
    plain=[*(("gpt", name) for name in IN_PARTS), ("llama", "fp16"), ("llama", "amp-bf16-cpu")],
))  # fmt: skip
def test_a_step_in_parts_is_the_step(model: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations cut small and shared by three threads, against all of them whole on one. (Of products the blocks of rows
    stay the same: they are part of what is computed.)"""
    sizes = {"model": model, "n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 6}
    monkeypatch.setattr(backends, "WHOLE", 0)
    monkeypatch.setattr(backends, "ROWS", 32)

    def states(threads: int) -> dict[str, bytes]:
        some = Workers(FakeBlas(threads))
        monkeypatch.setattr(backends, "workers", lambda: some)
        ours = Ours(sizes, recipe)
        for _ in range(2):
            ours.step()
        return {kind: buffer.tobytes() for kind, buffer in ours.training.state.buffers.items()}

    with threadpool_limits(1):  # since those workers cannot tell the true BLAS
        monkeypatch.setattr(backends, "SHARED", 1 << 60)
        monkeypatch.setattr(blocks, "BLOCK", 1 << 60)
        whole = states(1)
        monkeypatch.setattr(backends, "SHARED", 0)
        monkeypatch.setattr(blocks, "BLOCK", 1 << 10)
        assert states(3) == whole


def test_a_single_row_of_a_norm_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """x (C,), longer than a block: its elements are no examples."""
    rng = np.random.default_rng(1)
    x, w, b, dy = (rng.standard_normal(64, np.float32) for _ in range(4))
    layernorm = NUMPY.ops["layernorm"]
    p = Run(RECIPES["fp32"].policy, NUMPY).precision("layernorm", "norm")

    def both() -> list[bytes]:
        y, saved = layernorm.forward(x, w, b, p=p)
        return [a.tobytes() for a in (y, *layernorm.backward(dy, saved, w, b, p=p))]

    whole = both()
    monkeypatch.setattr(blocks, "BLOCK", 16)
    assert both() == whole


def test_results_are_allocated_once_whoever_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SHARED", 0)
    monkeypatch.setattr(blocks, "BLOCK", 1)
    two, made = Workers(FakeBlas(2)), list[tuple[int, ...]]()
    monkeypatch.setattr(backends, "workers", lambda: two)

    def slow_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(shape)
        time.sleep(0.05)  # the other thread has its first part by now
        return np.empty(shape, dtype)

    monkeypatch.setattr(blocks, "np", SimpleNamespace(empty=slow_empty))
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    (doubled,) = blocks.by_example(NUMPY, lambda part: (2 * part,), x.size, x)
    assert made == [(8, 3)] and np.array_equal(doubled, 2 * x)


def test_a_monitor_sees_whole_arrays_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SHARED", 0)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 6)
    monkeypatch.setattr(layout, "BLOCK", 1 << 6)
    ours, seen = Ours(MODELS["smoke"], "pure-fp16"), list[tuple[str, int, int]]()

    def watch(site: str, before: np.ndarray, after: np.ndarray) -> None:
        seen.append((site, before.size, threading.get_ident()))

    ours.training.set_monitor(watch)
    ours.step()
    assert any(site.endswith(":update.weights") for site, _, _ in seen)  # no masters: the update rounds too
    assert {thread for _, _, thread in seen} == {threading.get_ident()}
    sizes = {site: size for site, size, _ in seen if site.endswith(":attention.softmax.P")}
    assert list(sizes.values()) == [2 * 2 * 8 * 8], seen[:40]  # batch, heads, block, block: not an example at a time
