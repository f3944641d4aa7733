"""Parts of one operation on several threads: the same bits as the whole, whatever the number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

import refimpl.backends as backends
from refimpl import policy
from refimpl.backends import NUMPY, Backend
from refimpl.backends.workers import Workers, workers
from refimpl.bench import MODELS, Ours
from refimpl.recipes import RECIPES


class FakeBlas:
    """What threadpoolctl hands out, writing down what it is told."""

    def __init__(self, threads: int) -> None:
        self.num_threads, self.told = threads, list[int]()

    def set_num_threads(self, n: int) -> None:
        self.told.append(n)


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


def test_the_blas_has_one_thread_while_parts_run_and_all_of_them_afterwards() -> None:
    blas = FakeBlas(2)
    Workers(blas).map(lambda i: i, range(4))
    assert blas.told == [1, 2]
    with pytest.raises(ZeroDivisionError):
        Workers(blas).map(lambda i: 1 // i, range(4))
    assert blas.told == [1, 2, 1, 2]


def test_a_part_is_not_divided_once_more(some: Workers) -> None:
    def inner(i: int) -> list[int]:
        threads = set(some.map(lambda _: threading.get_ident(), range(5)))
        assert threads == {threading.get_ident()}
        return some.map(lambda j: 10 * i + j, range(3))

    assert some.map(inner, range(4)) == [[10 * i + j for j in range(3)] for i in range(4)]
    assert not some.at_work


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
    alone = Workers(None)
    assert alone.threads == 1
    assert set(alone.map(lambda _: threading.get_ident(), range(4))) == {threading.get_ident()}


def test_the_workers_of_this_process_have_the_threads_of_numpys_blas() -> None:
    numpys = [b for b in ThreadpoolController().select(user_api="blas").lib_controllers if "numpy" in b.filepath]
    if not numpys:
        pytest.skip("threadpoolctl does not know this NumPy's BLAS")
    assert workers().threads == numpys[0].num_threads and workers() is workers()


# --------------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("shape", [(2048, 384, 1536), (1536, 2048, 384), (1000, 700, 321), (130, 1100, 1000)])
@pytest.mark.parametrize("layout", ["a b", "aT b", "a bT"])
def test_a_product_in_parts_is_the_product(shape: tuple[int, int, int], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SHARED_PRODUCTS", 1)
    M, K, N = shape
    rng = np.random.default_rng(0)
    a = rng.standard_normal((M, K), np.float32) if layout != "aT b" else rng.standard_normal((K, M), np.float32).T
    b = rng.standard_normal((K, N), np.float32) if layout != "a bT" else rng.standard_normal((N, K), np.float32).T
    with threadpool_limits(1):
        whole = Backend.gemm(NUMPY, a, b, "fp32")
    assert NUMPY.gemm(a, b, "fp32").tobytes() == whole.tobytes()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "fp64"])
def test_a_step_in_parts_is_the_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations cut small and shared, against all of them whole."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 6}

    def states() -> dict[str, bytes]:
        ours = Ours(sizes, recipe)
        for _ in range(2):
            ours.step()
        return {kind: buffer.tobytes() for kind, buffer in ours.parts.state.buffers.items()}

    monkeypatch.setattr(backends, "SHARED", 1 << 60)
    monkeypatch.setattr(backends, "SHARED_PRODUCTS", 1 << 60)
    monkeypatch.setattr(policy, "MAP_BLOCK", 1 << 60)
    whole = states()
    monkeypatch.setattr(backends, "SHARED", 0)
    monkeypatch.setattr(policy, "MAP_BLOCK", 1 << 10)
    assert states() == whole


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_does_not_depend_on_the_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**MODELS["medium"], "n_layer": 1, "batch_size": 4}

    def states() -> bytes:
        ours = Ours(sizes, "amp-fp16")
        ours.step()
        return b"".join(buffer.tobytes() for buffer in ours.parts.state.buffers.values())

    normal = states()
    others = Workers(workers()._blas)
    others.threads = threads
    others._pool = Workers(FakeBlas(threads))._pool
    monkeypatch.setattr(backends, "workers", lambda: others)
    assert states() == normal


def test_a_monitor_sees_whole_arrays_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SHARED", 0)
    monkeypatch.setattr(policy, "MAP_BLOCK", 1 << 8)
    ours, seen = Ours(MODELS["smoke"], "fp16"), list[tuple[str, int, int]]()

    def watch(site: str, before: np.ndarray, after: np.ndarray) -> None:
        seen.append((site, before.size, threading.get_ident()))

    ours.parts.watch(watch)
    ours.step()
    assert {thread for _, _, thread in seen} == {threading.get_ident()}
    sizes = {site: size for site, size, _ in seen if site.endswith(":attention.softmax.P")}
    assert list(sizes.values()) == [2 * 2 * 8 * 8], seen[:40]  # batch, heads, block, block: not an example at a time
