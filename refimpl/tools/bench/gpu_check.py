"""The `gpu_check` command: a report on the CuPy backend that only a GPU can give.

Each recipe trains on the GPU and on the host from the same weights on the same batches. The first steps are recorded, and each
is judged from the GPU's own values by the bounds for runs of PyTorch (`parity/judge.py`); whole runs are compared by the
limits of `parity.pytorch.TRAJECTORY`. Then steps are timed, and checked for waits and for new allocations of memory.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from refimpl.backends.choose import get_backend
from refimpl.parity.findings import Finding
from refimpl.parity.judge import judge_trace
from refimpl.parity.pytorch import STAGE_STEPS, TRAJECTORY
from refimpl.parity.trace import Trace, record
from refimpl.tools.bench.steps import MODELS, WARM_UP, Ours, timed
from refimpl.training.columns import table
from refimpl.training.config import Config
from refimpl.training.progress_bar import ProgressBar

RECIPES = ("fp32", "fp16", "bf16", "amp-fp16", "amp-bf16")
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "batch_size": 8, "lr": 1e-3, "warmup": 10}
"""A model that trains in seconds, with 256 predictions per step, as the limits of trajectories assume."""


@dataclass(frozen=True)
class Trained:
    """The comparison of a recipe's runs on both backends."""

    recipe: str
    findings: Sequence[Finding]
    loss_difference: float
    drift: float
    same_scales: bool

    @property
    def agrees(self) -> bool:
        """Return whether everything is within its bounds."""
        loss_limit, drift_limit = TRAJECTORY["fp32" if self.recipe == "fp32" else "16 bits"]
        near = self.loss_difference <= loss_limit and self.drift <= drift_limit
        return near and self.same_scales and not any(finding.departs for finding in self.findings)

    def row(self) -> list[str]:
        """Return a row of the report."""
        worst = max(self.findings, key=lambda f: np.nan_to_num(f.error, nan=np.inf))
        return [
            self.recipe, f"{worst.error:.2f} ({worst.where})", f"{self.loss_difference:.1e}", f"{self.drift:.1e}",
            "equal" if self.same_scales else "NOT equal", "agrees" if self.agrees else "DEPARTS",
        ]  # fmt: skip


def train_both(recipe: str, steps: int, sizes: dict[str, Any] = SIZES, backend: str = "cupy") -> Trained:
    """Train on the backend and on the host; judge the first steps, and compare the whole runs."""
    there = Config.of({**sizes, "recipe": recipe, "steps": steps, "backend": backend})
    here = replace(there, backend="numpy")
    theirs, ours = record(there), record(here)
    early = Trace(theirs.config, {k: v for k, v in theirs.tensors.items() if int(k.partition("/")[0]) <= STAGE_STEPS})
    scales = [[np.float64(trace.tensors[f"{step}/4.scale"]) for step in ours.steps] for trace in (ours, theirs)]
    return Trained(recipe, judge_trace(here, early), loss_difference(ours, theirs), drift(ours, theirs), scales[0] == scales[1])


def loss_difference(ours: Trace, theirs: Trace) -> float:
    """Return the median over steps of the loss difference, where both losses are finite."""
    losses = [np.array([float(trace.tensors[f"{step}/2.loss"]) for step in ours.steps]) for trace in (ours, theirs)]
    difference = np.abs(losses[0] - losses[1])
    finite = difference[np.isfinite(difference)]
    return float(np.median(finite)) if finite.size else 0.0


def drift(ours: Trace, theirs: Trace) -> float:
    """Return the L2 norm of the difference of the final masters, relative to how far ours have moved."""
    first, last = ours.at(0, "4.master"), ours.steps[-1]
    mine, other = ours.at(last, "4.master"), theirs.at(last, "4.master")
    apart = sum(float(np.square(mine[k] - other[k]).sum()) for k in first)
    moved = sum(float(np.square(mine[k] - first[k]).sum()) for k in first)
    return (apart / moved) ** 0.5 if moved else 0.0


# -- speed, waits, memory ----------------------------------------------------------------------------------------------


class OnDevice(Ours):
    """A run of the CuPy backend that makes one step at a time."""

    def __init__(self, sizes: dict[str, int], recipe: str) -> None:
        super().__init__(sizes, recipe, "cupy")
        backend = self.training.state.backend
        self.cupy = backend.xp
        self.on_device = tuple(backend.from_host(x) for x in self.batch)

    def queue(self) -> None:
        """Start a step without reading its result, as training does between two lines of the log."""
        self.training.step([self.on_device])

    def step(self) -> float:
        """Make a step and wait for its end."""
        self.queue()
        self.cupy.cuda.Device().synchronize()
        return 0.0


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise an error where the host reads a value from the device, and so waits for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cupyx.allow_synchronize")  # deprecated in CuPy, without a replacement
        with importlib.import_module("cupyx").allow_synchronize(False):
            yield


def speed(model: str, recipe: str, rounds: int) -> list[str]:
    """Return a row: step times of both, the size of the memory pool, and whether the pool grew during the timed steps."""
    ours = OnDevice(MODELS[model], recipe)
    pool = ours.cupy.get_default_memory_pool()
    for _ in range(WARM_UP):
        ours.step()
    held = pool.total_bytes()
    with no_waits():
        ours.queue()
    mine = median(timed(ours.step) for _ in range(rounds))
    grown = pool.total_bytes() - held
    theirs = torch_time(model, recipe, ours.batch, rounds)
    of_torch = ["-", "-"] if theirs is None else [f"{1e3 * theirs:.3f}", f"{theirs / mine:.2f}"]
    return [model, recipe, f"{1e3 * mine:.3f}", *of_torch, f"{held / 2**20:.1f}", f"grew by {grown}" if grown else "steady"]


def torch_time(model: str, recipe: str, batch: tuple[np.ndarray, np.ndarray], rounds: int) -> float | None:
    """Return seconds per step of PyTorch's fastest variant on the GPU; None without PyTorch, its GPU or a variant."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or recipe.startswith("amp"):
        return None
    from refimpl.tools.bench.pytorch import Theirs, variants

    times = []
    for variant in variants(recipe):
        theirs = Theirs(MODELS[model], recipe, variant, batch, "cuda")
        for _ in range(WARM_UP):
            theirs.step()
        times.append(median(timed(theirs.step) for _ in range(rounds)))
    return min(times)


# -- the report --------------------------------------------------------------------------------------------------------


def device(cupy: Any) -> str:
    """Return the name of the GPU, and the versions of driver, CUDA and CuPy."""
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    name = properties["name"].decode()
    if "CUPY_ON_CPU" in os.environ:
        name = f"NO GPU: CuPy runs on the processor, and times mean nothing ({name})"
    return (
        f"{name}, compute capability {properties['major']}.{properties['minor']}, "
        f"{properties['totalGlobalMem'] / 2**30:.0f} GiB; driver {runtime.driverGetVersion()}, "
        f"CUDA {runtime.runtimeGetVersion()}, CuPy {cupy.__version__}"
    )


def kernel_tests(tests: Path) -> tuple[bool, str]:
    """Return whether the tests of each kernel against its NumPy definition pass (`pytest -m gpu`), and their output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)], capture_output=True, text=True, cwd=tests.parent
    )
    lines = done.stdout.strip().splitlines() or ["no output", done.stderr.strip()]
    failed = [line for line in lines if line.startswith("FAILED")]
    return done.returncode == 0, "\n".join([*failed, lines[-1]])


def check(tests: Path, recipes: Sequence[str], steps: int, models: Sequence[str], rounds: int, quiet: bool = False) -> int:
    """Run all checks and print the report. quiet: show no progress.

    Return 0 if all pass, else 1. Errors: UsageError without CuPy or a GPU.
    """
    cupy: Any = get_backend("cupy").xp
    print(f"refimpl on {device(cupy)}\n")
    trained, rows = [], []
    with ProgressBar(1 + len(recipes) * (1 + len(models)), "check", delay=0, quiet=quiet) as bar:
        passed, line = kernel_tests(tests)
        bar.update()
        bar.write(f"kernels against their NumPy definitions (pytest -m gpu): {line}\n")
        for recipe in recipes:
            trained.append(train_both(recipe, steps))
            bar.update()
        header = ["recipe", "closest to its bound", "loss", "drift", "scales", "verdict"]
        bar.write(f"{steps} steps against the numpy backend:\n{table(header, [t.row() for t in trained])}\n")
        for model, recipe in product(models, recipes):
            rows.append(speed(model, recipe, rounds))
            bar.update()
    header = ["model", "recipe", "step ms", "PyTorch ms", "ratio", "pool MiB", "pool"]
    print(f"medians of {rounds} steps with a wait after each; no step waits within:\n{table(header, rows)}\n")
    good = passed and all(t.agrees for t in trained)
    print("PASSED" if good else "FAILED: please report this output")
    return 0 if good else 1
