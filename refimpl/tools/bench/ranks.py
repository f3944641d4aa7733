"""Weak scaling over ranks: measured on this machine, and predicted for many GPUs.

Each rank has a batch of fixed size, so that N ranks train on N times as many tokens per step. With perfect scaling the step
time is that of one rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from refimpl.distributed.collectives import shares_of
from refimpl.distributed.mpi import mpi_comm
from refimpl.distributed.zero import COMMUNICATION, exchanged, per_rank
from refimpl.errors import UsageError, unknown
from refimpl.parity.trace import batches_of
from refimpl.precision.recipes import get_recipe
from refimpl.tools.bench.gpu_cost import GPUS
from refimpl.tools.bench.steps import MODELS, WARM_UP
from refimpl.training.columns import table
from refimpl.training.config import Config
from refimpl.training.progress_bar import ProgressBar, Tick, no_tick
from refimpl.training.setup import start

STAGES = (0, 1, 2, 3)

# -- measured --------------------------------------------------------------------------------------------------------------


def of_one_rank(model: str, recipe: str, stage: int, rounds: int) -> None:
    """Time steps in each process, on its own rows; the first rank prints the median in seconds."""
    comm = mpi_comm()
    sizes = {**MODELS[model], "batch_size": MODELS[model]["batch_size"] * comm.size}
    config = Config.of({**sizes, "recipe": recipe, "zero": stage, "steps": 10_000})
    training, times = start(config, comm), []
    (batch,) = next(batches_of(config, None))
    rows = shares_of(sizes["batch_size"], comm.size)[comm.rank]
    mine = batch[0][rows], batch[1][rows]
    for _ in range(WARM_UP + rounds):
        comm.barrier()
        begun = time.perf_counter()
        float(training.step([mine]).loss)
        comm.barrier()
        times.append(time.perf_counter() - begun)
    if comm.rank == 0:
        print(json.dumps(median(times[WARM_UP:])))


def measured(model: str, recipe: str, stage: int, ranks: int, rounds: int) -> float:
    """Return seconds per step on `ranks` processes of one thread each. Errors: UsageError if they cannot be started."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        raise UsageError("--ranks starts processes with MPI: pip install mpi4py mpich")
    program = f"from refimpl.tools.bench.ranks import of_one_rank; of_one_rank({model!r}, {recipe!r}, {stage}, {rounds})"
    done = subprocess.run(
        [str(mpiexec), "-n", str(ranks), sys.executable, "-m", "mpi4py", "-c", program],
        capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise UsageError(f"{ranks} ranks failed: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return float(json.loads(done.stdout))


def plan(most: int) -> list[tuple[int, int]]:
    """Return the (ranks, stage) to time: one rank, then 2, 4 ... and `most` at each stage."""
    numbers = sorted({most, *(2**i for i in range(1, most.bit_length()))})
    return [(1, 0), *((ranks, stage) for ranks in numbers for stage in STAGES)]


def weak_scaling(
    model: str, recipe: str, most: int, rounds: int, tick: Tick = no_tick
) -> list[dict[str, Any]]:
    """Return rows for each of `plan`: step time, tokens per second, and efficiency. tick: callback after each."""
    tokens = MODELS[model]["batch_size"] * MODELS[model]["block_size"]
    seconds = {}
    for ranks, stage in plan(most):
        seconds[ranks, stage] = measured(model, recipe, stage, ranks, rounds)
        tick()
    return [
        {"model": model, "recipe": recipe, "ranks": ranks, "stage": stage, "step_ms": 1e3 * s,
         "tokens_per_s": ranks * tokens / s, "efficiency": seconds[1, 0] / s} for (ranks, stage), s in seconds.items()
    ]  # fmt: skip


# -- predicted -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """The assumptions of a prediction: a model, the utilization of a GPU, and the bandwidth between GPUs."""

    n_params: int = 7_000_000_000
    tokens: int = 8192  # per rank and step
    utilization: float = 0.4  # of the peak, while computing
    inside: float = 450e9  # bytes per second to a GPU from others in its machine, by NVLink
    outside: float = 50e9  # and from other machines, by one port of 400 Gbit/s per GPU
    machine: int = 8  # GPUs per machine


CLUSTER = Cluster()
RANKS = (1, 2, 4, 8, 64, 256, 1024)


@dataclass(frozen=True)
class Scaled:
    """One row of the prediction. Times are in seconds per step."""

    stage: int
    ranks: int
    nbytes: int  # of model states per rank
    computing: float
    exchanging: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """Return bounds of the efficiency: without any overlap of computing and exchanging, and with full overlap."""
        return self.computing / (self.computing + self.exchanging), self.computing / max(self.computing, self.exchanging)


def scaled(stage: int, ranks: int, recipe: str = "bf16", c: Cluster = CLUSTER) -> Scaled:
    """Predict one row, by the formulas that `prediction` prints."""
    states = get_recipe(recipe).bytes_by_buffer()
    computing = 6 * c.n_params * c.tokens / (GPUS["h100"].flops[recipe] * c.utilization)
    bandwidth = c.inside if ranks <= c.machine else c.outside
    nbytes = sum(per_rank(c.n_params, states, stage, ranks).values())
    return Scaled(stage, ranks, nbytes, computing, float(exchanged(c.n_params, states, stage, ranks)) / bandwidth)


def prediction(c: Cluster = CLUSTER) -> str:
    """Return the table with its formulas and assumptions."""
    rows = []
    for ranks in RANKS:
        for stage in STAGES if ranks > 1 else (0,):
            s = scaled(stage, ranks, c=c)
            fits = "" if s.nbytes < GPUS["h100"].memory else "does not fit"
            least, most = s.efficiency
            rows.append([
                str(ranks), str(stage), f"{s.nbytes / 1e9:.1f}", fits, f"{1e3 * s.computing:.0f}", f"{1e3 * s.exchanging:.0f}",
                f"{100 * least:.0f} to {100 * most:.0f} %",
            ])  # fmt: skip
    header = ["GPUs", "stage", "GB of states", "80 GB", "computing ms", "exchanging ms", "efficiency"]
    elements = ", ".join(f"{n} (stage {stage})" for stage, n in COMMUNICATION.items())
    return (
        f"A PREDICTION: nothing was run. {c.n_params / 1e9:g}B parameters in bf16 on H100s, "
        f"{c.tokens} tokens per GPU and step.\n"
        f"  computing  = 6 x parameters x tokens / ({GPUS['h100'].flops['bf16'] / 1e12:g} TFLOP/s x {c.utilization:g})\n"
        f"  exchanging = elements per parameter x 2 bytes x (N - 1)/N x parameters / bandwidth; elements: {elements}\n"
        f"  bandwidth  = {c.inside / 1e9:g} GB/s within a machine of {c.machine} GPUs, {c.outside / 1e9:g} GB/s between "
        f"machines; no latency, no congestion\n"
        f"  efficiency: without overlap of computing and exchanging, to full overlap; GB are without activations.\n\n"
        + table(header, rows)
    )


def show(
    models: list[str], recipes: list[str], ranks: int, rounds: int, quiet: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """Return the measured table with the prediction as text, and the measured rows as data. quiet: show no progress."""
    if ranks < 2:
        raise UsageError(f"--ranks is {ranks}: it must be at least 2, to compare with 1")
    for model in models:
        if model not in MODELS:
            raise UsageError(unknown("model", model, MODELS))
    for recipe in recipes:
        get_recipe(recipe)
    kinds = [(model, recipe) for model in models for recipe in recipes]
    with ProgressBar(len(kinds) * len(plan(ranks)), "timing", quiet=quiet) as bar:
        rows = [row for kind in kinds for row in weak_scaling(*kind, ranks, rounds, bar.update)]
    cells = [
        [r["model"], r["recipe"], str(r["ranks"]), str(r["stage"]), f"{r['step_ms']:.1f}", f"{r['tokens_per_s']:,.0f}",
         f"{100 * r['efficiency']:.0f} %"] for r in rows
    ]  # fmt: skip
    header = ["model", "recipe", "ranks", "stage", "step ms", "tokens/s", "efficiency"]
    text = f"weak scaling, one thread per rank, medians of {rounds} steps:\n{table(header, cells)}\n\n{prediction()}"
    return text, rows
