"""Step times: against PyTorch, against the step's matrix products, per operation, and as sizes grow.

The two sides of a comparison run alternately in one process, and medians are compared: on a shared machine the ratio of two
medians of one run is more reliable than either of them.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import threadpoolctl

from refimpl.backends.numpy.attention import query_blocks
from refimpl.errors import UsageError, unknown
from refimpl.nn.ops import OPS
from refimpl.numerics.casts import cast
from refimpl.parity.trace import batches_of
from refimpl.tools.memory.measure import process_memory
from refimpl.training.columns import table
from refimpl.training.config import Config
from refimpl.training.console import json_text
from refimpl.training.machine import processor
from refimpl.training.progress_bar import ProgressBar, Tick, no_tick
from refimpl.training.setup import start

MODELS: dict[str, dict[str, int]] = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12},
    "medium": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 8},
    "smoke": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2},
}
WARM_UP = 3
REST = 0.05
"""Seconds between the two sides of a comparison, so that spinning threads of one are asleep when the other runs."""


def machine() -> str:
    """Return the processor, the version of NumPy, and its BLAS with kernels and threads, as printed with every table."""
    kernels = ", ".join(
        f"{lib['internal_api']} {lib['version']} ({lib.get('architecture', 'unknown')} kernels, {lib['num_threads']} threads)"
        for lib in threadpoolctl.threadpool_info()
        if lib["user_api"] == "blas" and "numpy" in lib["filepath"]
    )
    return f"{processor()}; NumPy {np.__version__}, {kernels or 'an unknown BLAS'}"


# ---------------------------------------------------------------------------------------------------- our side


class Ours:
    """A run of this project that makes one step at a time."""

    def __init__(self, sizes: Mapping[str, Any], recipe: str, backend: str = "numpy") -> None:
        self.config = Config.of({**sizes, "recipe": recipe, "backend": backend, "steps": 10_000})
        self.training = start(self.config)
        (self.batch,) = next(batches_of(self.config, None))

    def step(self) -> float:
        """Make one training step on the batch and return the loss."""
        return float(self.training.step([self.batch]).loss)


def timed(f: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def alternating(fs: Sequence[Callable[[], Any]], rounds: int, tick: Tick = no_tick) -> list[float]:
    """Return the median time of each function, all called in turn after a warm-up."""
    for f in fs:
        for _ in range(WARM_UP):
            f()
    return _medians(lambda: [timed(f) for f in fs], rounds, tick)


def _medians(one_round: Callable[[], list[float]], rounds: int, tick: Tick) -> list[float]:
    times = []
    for _ in range(rounds):
        times.append(one_round())
        tick()
    return [median(column) for column in zip(*times, strict=True)]


def alternating_with_rests(fs: Sequence[Callable[[], Any]], rounds: int, tick: Tick = no_tick) -> list[float]:
    """Return median times as `alternating`, with a rest before each timed call and, if calls are short, one to wake threads."""

    def awake(f: Callable[[], Any]) -> Callable[[], Any]:
        f()
        return f if timed(f) < 10 * REST else lambda: None

    wake_up = [awake(f) for f in fs]

    def rested(f: Callable[[], Any], wake: Callable[[], Any]) -> float:
        time.sleep(REST)
        wake()
        return timed(f)

    return _medians(lambda: [rested(*pair) for pair in zip(fs, wake_up, strict=True)], rounds, tick)


def gemm_floor(sizes: dict[str, int], rounds: int, vocab_size: int = 256) -> float:
    """Return the seconds that the matrix products of a step take in FP32: a lower bound of the step time in NumPy.

    There are three per linear layer and six per attention, without the keys beyond the last query of a block. Operands and
    results are reused, so that only the products are timed.
    """
    L, H, C, T, B = (sizes[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "batch_size"))
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        x: np.ndarray = cast(rng.standard_normal(shape), "fp32")
        return x

    seconds = 0.0
    for n_in, n_out, count in ((C, 3 * C, L), (C, C, L), (C, 4 * C, L), (4 * C, C, L), (C, vocab_size, 1)):
        x, w, dy = draw(B * T, n_in), draw(n_out, n_in), draw(B * T, n_out)
        y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
        products = [
            lambda x=x, w=w, y=y: np.matmul(x, w.T, out=y),
            lambda dy=dy, w=w, dx=dx: np.matmul(dy, w, out=dx),
            lambda dy=dy, x=x, dw=dw: np.matmul(dy.T, x, out=dw),
        ]
        seconds += count * sum(alternating(products, rounds))
    q, S = draw(B, H, T, C // H), draw(B, H, T, T)
    out = np.empty_like(q)
    blocks = query_blocks(T)

    def to_scores() -> None:
        for b in blocks:
            np.matmul(q[:, :, b], q[:, :, : b.stop].swapaxes(-1, -2), out=S[:, :, b, : b.stop])

    def from_scores() -> None:
        for b in blocks:
            np.matmul(S[:, :, b, : b.stop], q[:, :, : b.stop], out=out[:, :, b])

    wide, narrow = alternating([to_scores, from_scores], rounds)
    return seconds + L * (2 * wide + 4 * narrow)  # S, dP: (T, T) from (T, D); O, dv, dq, dk: (T, D) from (T, T)


# ---------------------------------------------------------------------------------------------------- tables


def against_torch(models: Sequence[str], recipes: Sequence[str], rounds: int, tick: Tick) -> list[dict[str, Any]]:
    """Time refimpl and PyTorch: one row per model and recipe, times in ms. Errors: UsageError without torch."""
    from refimpl.tools.bench.pytorch import Theirs, variants

    rows = []
    for model in models:
        floor = gemm_floor(MODELS[model], rounds)
        for recipe in recipes:
            ours = Ours(MODELS[model], recipe)
            theirs = [Theirs(MODELS[model], recipe, variant, ours.batch) for variant in variants(recipe)]
            mine, *their_times = alternating_with_rests([ours.step, *(t.step for t in theirs)], rounds, tick)
            best = min(their_times)
            rows.append({
                "model": model, "recipe": recipe, "ours_ms": 1e3 * mine, "torch_ms": 1e3 * best,
                "torch_variant": variants(recipe)[their_times.index(best)], "ratio": best / mine,
                "gemm_floor_ms": 1e3 * floor, "over_floor": mine / floor,
                "ours_peak_mib": peak_of("numpy", model, recipe), "torch_peak_mib": peak_of("torch", model, recipe),
            })  # fmt: skip
    return rows


def alone(models: Sequence[str], recipes: Sequence[str], rounds: int, tick: Tick) -> list[dict[str, Any]]:
    """Time refimpl only: one row per model and recipe."""
    rows = []
    for model in models:
        floor = gemm_floor(MODELS[model], rounds)
        for recipe in recipes:
            (mine,) = alternating([Ours(MODELS[model], recipe).step], rounds, tick)
            rows.append({"model": model, "recipe": recipe, "ours_ms": 1e3 * mine, "gemm_floor_ms": 1e3 * floor,
                         "over_floor": mine / floor, "ours_peak_mib": peak_of("numpy", model, recipe)})  # fmt: skip
    return rows


def peak_of(side: str, model: str, recipe: str) -> float:
    """Return the peak resident memory, in MiB, of a process that only makes a few steps."""
    code = f"from refimpl.tools.bench.steps import print_peak; print_peak({side!r}, {model!r}, {recipe!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def print_peak(side: str, model: str, recipe: str) -> None:
    """Print the peak memory of this process; `peak_of` runs it in a process of its own."""
    ours = Ours(MODELS[model], recipe) if side == "numpy" else None
    if ours is None:
        from refimpl.tools.bench.pytorch import Theirs, variants

        sizes = MODELS[model]
        tokens = np.zeros((sizes["batch_size"], sizes["block_size"]), np.int64)
        step: Callable[[], float] = Theirs(sizes, recipe, variants(recipe)[0], (tokens, tokens)).step
    else:
        step = ours.step
    for _ in range(WARM_UP):
        step()
    memory = process_memory()
    print(memory[1] / 2**20 if memory else math.nan)


def profile(model: str, recipe: str, rounds: int, tick: Tick = no_tick) -> list[dict[str, Any]]:
    """Return ms per step of each operation, forward and backward, and of the rest, the largest first."""
    ours = Ours(MODELS[model], recipe)
    spent: dict[str, float] = defaultdict(float)

    def watch(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: Any, **more: Any) -> Any:
            start = time.perf_counter()
            result = f(*arrays, **more)
            spent[name] += time.perf_counter() - start
            return result

        return call

    run, optimizer = ours.training.run, ours.training.optimizer
    run.overrides = {
        name: replace(op, forward=watch(f"{name} forward", op.forward), backward=watch(f"{name} backward", op.backward))
        for name, op in ((name, run.version(op)) for name, op in OPS.items())
    }
    optimizer.update = watch("update", optimizer.update)  # type: ignore[method-assign]
    for _ in range(WARM_UP):
        ours.step()
    spent.clear()
    total = 0.0
    for _ in range(rounds):
        total += timed(ours.step)
        tick()
    spent["everything else"] = total - sum(spent.values())
    return [
        {"what": name, "ms": 1e3 * seconds / rounds, "share": seconds / total}
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1])
    ]


GROWING = {"batch_size": (4, 8, 16, 32, 64), "block_size": (32, 64, 128, 256), "n_layer": (2, 4, 8, 16)}
"""The sizes of `scaling`, and their values."""


def scaling(recipe: str, rounds: int, tick: Tick) -> list[dict[str, Any]]:
    """Return microseconds per token as one size grows and the others stay those of the small model."""
    rows = []
    for name, value in ((name, value) for name, values in GROWING.items() for value in values):
        sizes = {**MODELS["small"], name: value}
        (seconds,) = alternating([Ours(sizes, recipe).step], rounds, tick)
        tokens = sizes["batch_size"] * sizes["block_size"]
        rows.append({"size": name, "value": value, "us_per_token": 1e6 * seconds / tokens})
    return rows


# ---------------------------------------------------------------------------------------------------- the script


def bench(
    what: str = "alone",
    models: str = "small,medium",
    recipes: str = "fp32,bf16,fp16",
    rounds: int = 15,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Run the `bench` command. quiet: show no progress.

    Errors: UsageError for an unknown model or recipe, or too few rounds.
    """
    where, chosen, kinds = machine(), models.split(","), recipes.split(",")
    for name in chosen:
        if name not in MODELS:
            raise UsageError(unknown("model", name, MODELS))
    if rounds < 1:
        raise UsageError(f"--rounds is {rounds}: it must be at least 1")
    for recipe in kinds:
        Config.of({"recipe": recipe})
    timings = {"profile": 1, "scaling": sum(map(len, GROWING.values()))}.get(what, len(chosen) * len(kinds))
    with ProgressBar(timings * rounds, "step", quiet=quiet) as bar:
        rows = {
            "alone": lambda: alone(chosen, kinds, rounds, bar.update),
            "torch": lambda: against_torch(chosen, kinds, rounds, bar.update),
            "profile": lambda: profile(chosen[0], kinds[0], rounds, bar.update),
            "scaling": lambda: scaling(kinds[0], rounds, bar.update),
        }[what]()
    if as_json:
        print(json_text({"machine": where, "rounds": rounds, "rows": rows}))
        return
    print(f"{where}\n{'mean' if what == 'profile' else 'medians'} of {rounds} steps\n")
    print(table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
