"""A training has the same bits with any number of threads, on any BLAS: whole runs, to the bytes of their checkpoints.

Which BLAS and which of its kernels these tests ran on stands in pytest's header; OPENBLAS_CORETYPE=Haswell chooses others.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SUPPORT
from progress_bars import NoBar
from samples import sample
from threadpoolctl import ThreadpoolController, threadpool_limits

import refimpl
from refimpl.backends.numpy import backend as backends
from refimpl.backends.numpy import threads as of_backends
from refimpl.backends.numpy.threads import Workers
from refimpl.training.config import Config
from refimpl.training.run_folder import CHECKPOINT
from refimpl.training.trainer import Trainer

SIZES: dict[str, Any] = {
    "n_layer": 1, "n_head": 4, "n_embd": 64, "block_size": 128, "batch_size": 12, "steps": 2, "warmup": 1, "lr": 1e-2,
    "eval_every": 2, "eval_batches": 1, "log_every": 1, "init_scale": 2.0**18,
}  # fmt: skip
"""Large enough that products are two or four blocks, and that attention and elementwise work are cut and shared."""

BLAS = ThreadpoolController().select(user_api="blas").lib_controllers
needs_blas = pytest.mark.skipif(not BLAS, reason="threadpoolctl does not know this NumPy's BLAS")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A small file of real structure."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}; {'even' if i % 2 == 0 else 'odd'}.\n" for i in range(1000)))
    return str(path)


def train(recipe: str, text: str, folder: Path, bar: NoBar | None = None, resume: bool = False, **more: Any) -> bytes:
    """The bytes of the checkpoint that a training writes."""
    folder.mkdir(exist_ok=True)
    trainer = Trainer(Config.of({**SIZES, "recipe": recipe, "data": text, **more}), folder)
    if resume:
        trainer.restore()
    trainer.train(bar or NoBar())
    return (folder / CHECKPOINT).read_bytes()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """In how many parts operations were cut, one after the other."""
    cut, whole = list[int](), Workers.map

    def count(self: Workers, f: Any, parts: Any) -> Any:
        cut.append(len(items := list(parts)))
        return whole(self, f, items)

    monkeypatch.setattr(Workers, "map", count)
    return cut


def of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process works like one whose BLAS has so many threads: call it within that limit."""
    workers = Workers(*BLAS)
    assert workers.threads == threads
    for module in (backends, of_backends):
        monkeypatch.setattr(module, "workers", lambda: workers)


@needs_blas
@pytest.mark.parametrize(("model", "recipe"), [("gpt", "fp32"), ("gpt", "amp-fp16"), ("gpt", "fp8"), ("llama", "fp16")])
def test_the_number_of_threads_makes_no_difference(
    model: str, recipe: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: list[int]
) -> None:
    """Nor does going on with another number. It turns red where a product is cut by their number, or the BLAS does so:
    with the kernels for Haswell and Zen by any such cut, with others at least by another number of ours."""
    found, cut = dict[str, bytes](), dict[str, list[int]]()
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            of_threads(threads, monkeypatch)
            shared.clear()
            found[f"{threads} threads"] = train(recipe, text, tmp_path / str(threads), model=model)
            cut[f"{threads} threads"] = list(shared)
    with threadpool_limits(2):
        of_threads(2, monkeypatch)
        found["2 threads, blocks computed again"] = train(recipe, text, tmp_path / "again", model=model, checkpointing="full")
    for threads in (3, 1):  # the first step with three, the second alone
        with threadpool_limits(threads):
            of_threads(threads, monkeypatch)
            stop_at = 1 if threads == 3 else 0
            resumed = {"resume": threads == 1, "model": model}
            found["3 threads, then 1"] = train(recipe, text, tmp_path / "parts", NoBar(stop_at), **resumed)
    assert [name for name, data in found.items() if data != found["1 threads"]] == []
    assert cut["1 threads"] == cut["2 threads"] == cut["3 threads"] and {2, 4} <= set(cut["1 threads"])


PROGRAM = """
import sys
from pathlib import Path
from threadpoolctl import threadpool_limits
from refimpl.backends.numpy.threads import workers
from test_same_bits import train
threads, text, folder = sys.argv[1:]
with threadpool_limits(int(threads) if int(threads) > workers.__wrapped__().threads else None):
    assert workers().threads == int(threads)
    train("fp16", text, Path(folder))
"""


@needs_blas
def test_processes_with_different_numbers_of_threads_write_the_same_checkpoint(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenBLAS takes as many as OPENBLAS_NUM_THREADS says, but no more than there are cores; that many need a limit."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{SUPPORT}", prepend=":")
    running = {}
    for n in "123":
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", n)
        running[n] = subprocess.Popen([sys.executable, "-c", PROGRAM, n, text, tmp_path / n])
    assert [process.wait(120) for process in running.values()] == [0, 0, 0]
    first, *others = ((tmp_path / n / CHECKPOINT).read_bytes() for n in running)
    assert all(other == first for other in others)


@needs_blas
@pytest.mark.parametrize(("recipe", "backend"), [
    ("bf16", "numpy"), ("fp8", "numpy"), ("nvfp4", "numpy"), ("fp16-sums-64", "numpy"),
    ("bf16", "reference"), ("fp8", "reference"),
])  # fmt: skip
def test_every_product_of_a_training_is_computed_on_the_thread_that_asks(
    recipe: str, backend: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps, evaluations and samples; and afterwards the BLAS has the threads that it had."""
    multiply, seen = np.matmul, list[int]()

    def watched(*operands: Any, **more: Any) -> Any:
        seen.extend(blas.num_threads for blas in backends.workers()._blas)
        return multiply(*operands, **more)

    monkeypatch.setattr(np, "matmul", watched)
    with threadpool_limits(2):
        of_threads(2, monkeypatch)
        config = {**SIZES, "n_embd": 32, "block_size": 64, "steps": 1, "recipe": recipe, "data": text}
        config["backend"] = backend
        trainer = Trainer(Config.of(config), tmp_path)
        trainer.train(NoBar())
        sample(trainer.model, trainer.state, trainer.run, 3)
        assert set(seen) == {1}
        assert {blas.num_threads for blas in backends.workers()._blas} == {2}


# ------------------------------------------------------------------------------------------------- who calls the BLAS

CALLERS = {
    "numerics/accumulators.py": "the default of `multiply`; a run gives its backend's matmul",
    "backends/base.py": "the backends' matmul",
    "backends/numpy/backend.py": "the same, in blocks of rows",
    "backends/cupy/ops.py": "CuPy's",
    "tools/bench/steps.py": "measures the BLAS itself",
    "parity/tolerances.py": "norms that a report shows",
    "tools/compare_recipes/runs.py": "means that a picture shows",
    "tools/experiments/narrow.py": "an FP64 product to compare with",
    "parity/pytorch_model.py": "PyTorch's",
    "tools/audit_demo.py": "PyTorch's",
    "numerics/quantization/products.py": "the default of `multiply`",
    "numerics/rounding_effects.py": "sums of squares that a report shows",
}
"""The files that name what the BLAS computes, and why no number of a training depends on how it does."""


def calls_of_the_blas(text: str) -> Iterator[str]:
    """Yield what a module names of the functions that NumPy computes with the BLAS; einsum is one only with `optimize`."""
    names = {"matmul", "dot", "vdot", "inner", "tensordot", "linalg", "convolve", "correlate", "cov", "corrcoef"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            of_library = ast.unparse(node.value).rpartition(".")[2] in ("np", "xp")
            if node.attr == "dot" or (of_library and node.attr in names):
                yield ast.unparse(node)
        elif isinstance(node, ast.MatMult) or (isinstance(node, ast.keyword) and node.arg == "optimize"):
            yield ast.dump(node)


def test_only_the_backends_call_the_blas() -> None:
    root, found = Path(refimpl.__file__).parent, dict[str, list[str]]()
    audit = root / "parity" / "audit"  # its products are PyTorch's
    for path in sorted(path for path in root.rglob("*.py") if audit not in path.parents):
        found[path.relative_to(root).as_posix()] = list(calls_of_the_blas(path.read_text("utf-8")))
    assert {name: lines for name, lines in found.items() if lines and name not in CALLERS} == {}
    assert [name for name in CALLERS if not found[name]] == []


@pytest.mark.parametrize("text", ["a @ b", "a.dot(b)", "xp.matmul(a, b)", "np.linalg.norm(x)", "self.xp.tensordot(a, b)",
                                  "f(np.matmul)", "np.einsum('ij,jk', a, b, optimize=True)"])  # fmt: skip
def test_the_search_finds_calls(text: str) -> None:
    assert list(calls_of_the_blas(text))
