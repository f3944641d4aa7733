"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before NumPy and PyTorch load: one process per core, one thread per process
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from paths import ROOT, SUPPORT, TESTS
from strict_backend import BACKENDS
from threadpoolctl import threadpool_info, threadpool_limits

from refimpl.backends.base import Backend
from refimpl.backends.numpy.threads import workers
from refimpl.training.data import _documentation

DRAWN_TEXT = str(SUPPORT / "drawn_text")
sys.path.insert(0, DRAWN_TEXT)
before = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # an empty entry would be the current folder
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([DRAWN_TEXT, str(ROOT), *before]))

for name in ("SIGINT", "SIGHUP"):  # a shell that starts tests in the background may make them ignore these
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

BLAS_TESTS = {
    f"test_{name}"
    for name in (
        "accumulators", "attention", "autograd", "by_hand", "checkpoint", "compare_recipes", "ddp", "elementwise", "embedding",
        "every_operation", "experiments", "fused_attention", "gradients", "ignored_targets", "inspect_precision",
        "kv_cache",
        "linear", "loss", "mistakes", "models", "mpi", "norm", "numpy_table", "onnx", "opinfo", "optimizer", "policy",
        "published", "quantization", "quantized_linear", "recorded", "run", "same_bits", "shape", "softmax", "step",
        "checkpointed_runs", "checkpointing", "strict_backend", "threads", "trace", "trajectories", "zero",
    )
}  # fmt: skip
"""The files whose tests compare results of matrix products. They must hold on every BLAS, so .ci/run takes several kernels."""
assert {path.stem for path in TESTS.rglob("test_*.py")} >= BLAS_TESTS, "a file of BLAS_TESTS was renamed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark BLAS_TESTS: `OPENBLAS_CORETYPE=Haswell python -m pytest -m 'blas and not slow'`."""
    for item in items:
        if item.path.stem in BLAS_TESTS:
            item.add_marker("blas")


def pytest_collection_finish() -> None:
    """Exempt the thousands of collected tests from garbage collection, which would look through them again and again."""
    workers()  # counts the threads of the BLAS before a test limits them
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Name the BLAS and its kernels, on which last bits of results depend."""
    found = [
        f"{lib['internal_api']} {lib['version']}, {lib.get('architecture', 'unknown')} kernels, {lib['num_threads']} threads"
        for lib in threadpool_info()
        if lib["user_api"] == "blas"
    ]
    return f"NumPy {np.__version__}, BLAS: {'; '.join(found) or 'not known to threadpoolctl'}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Run a test on the host and on the CuPy backend with its stand-in, whose arrays are not NumPy's."""
    return BACKENDS[request.param]


@pytest.fixture
def ieee() -> Iterator[None]:
    """Silence NumPy's warnings, which pytest turns into errors: Inf and NaN are results here."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def one_blas_thread() -> Iterator[None]:
    """Limit the BLAS to one thread: small products are not worth sharing, and waiting threads take the cores of other tests."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def torch() -> Iterator[Any]:
    """Yield PyTorch, on one thread, since its sums depend on their number; skip the test where it is not installed."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture
def pythons_manual(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train on Python's true manual instead of the drawn text."""

    def forget() -> None:
        _documentation.cache_clear()
        for name in ("pydoc_data", "pydoc_data.topics"):
            sys.modules.pop(name, None)

    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != DRAWN_TEXT])
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"].removeprefix(DRAWN_TEXT + os.pathsep))
    forget()
    yield
    forget()


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing of loss.png, which takes longer than the rest of a test."""
    monkeypatch.setattr("refimpl.training.run_report.plot_run", lambda *_: None)
