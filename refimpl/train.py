"""What scripts/train.py does: train in a folder, and tell the person how it went."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from refimpl.backends.workers import cores
from refimpl.comm import Comm, Serial
from refimpl.comm.mpi import launched, mpi_comm
from refimpl.comm.nccl import nccl_comm
from refimpl.config import Config
from refimpl.data import NgramBaselines, ngram_entropies
from refimpl.errors import TrainingStopped, UsageError
from refimpl.generate import sample
from refimpl.memory import exchanged, recipe_states
from refimpl.metrics import plot_run, read_metrics
from refimpl.run_folder import CHECKPOINT, CONFIG, METRICS, PICTURE, open_folder, prepare_folder
from refimpl.state_file import load_initial_weights
from refimpl.trainer import SAMPLE, Trainer, generator

PATIENCE = 1.0
"""Seconds in which the first rank, if it fails like another one, ends all of them, and says why as the only one."""


def train(given: dict[str, Any], out: Path | None, resume: bool, overwrite: bool, init_from: Path | None) -> int:
    """What scripts/train.py does: train, show, write. Returns the exit code: 0, or 130 after Ctrl-C."""
    with only_the_first_speaks():
        comm = mpi_comm() if launched()[1] > 1 else Serial()
        config, folder = prepare_folder(given, out, resume, overwrite)
        comm = where_arrays_lie(config, comm)
        with threadpool_limits(max(1, cores() // comm.on_host.on_machine) if comm.size > 1 else None):
            return _train(config, folder, comm, resume, init_from)


def where_arrays_lie(config: Config, comm: Comm) -> Comm:
    """The ranks of a run, which exchange where its arrays lie. Errors: UsageError where it does not say how they share it."""
    if comm.size > 1 and config.zero is None:
        raise UsageError(f"mpiexec has started {comm.size} processes: say how they share the training, --zero 0, 1, 2 or 3")
    return nccl_comm(comm) if comm.size > 1 and config.backend == "cupy" else comm


@contextmanager
def only_the_first_speaks() -> Iterator[None]:
    """Of several ranks, which do the same and fail alike, the first one prints."""
    rank, _ = launched()
    if rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        except (UsageError, TrainingStopped) as error:
            time.sleep(PATIENCE)
            raise type(error)(f"rank {rank}: {error}") from error


def _train(config: Config, folder: Path, comm: Comm, resume: bool, init_from: Path | None) -> int:
    from tqdm import tqdm

    trainer = Trainer(config, folder, comm)
    if resume:
        trainer.restore()
    else:
        if init_from is not None:
            load_initial_weights(init_from, trainer.model, trainer.state, rounded=config.rounds_masters)
        comm.barrier()  # all ranks have seen the folder as it was
        if trainer.writes:
            open_folder(config, folder)
    baselines = ngram_entropies(trainer.corpus.train, trainer.corpus.valid)
    _announce(trainer, baselines)
    done = trainer.progress.step
    shown: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.1, "disable": not trainer.writes}
    with tqdm(total=config.steps, initial=done, **shown) as bar:
        finished = trainer.train(bar)
    if not finished:
        print(f"\nstopped after step {trainer.progress.step}; go on with: --resume --out {folder}")
        return 130
    _report(trainer, baselines, trainer.progress.step - done)
    return 0


def _announce(trainer: Trainer, baselines: NgramBaselines) -> None:
    config, model, state = trainer.config, trainer.model, trainer.state
    print(f"{model.name}, {model.n_params:,} parameters, recipe {trainer.recipe.name}: {trainer.recipe.summary}")
    kinds = " + ".join(f"{kind} {buffer.nbytes / model.n_params:g}" for kind, buffer in state.buffers.items())
    rank = f" on each of {trainer.comm.size} ranks, ZeRO stage {config.zero}" if trainer.comm.size > 1 else ""
    print(f"model states: {kinds} = {state.nbytes / model.n_params:g} bytes a parameter, as measured{rank}")
    if config.grad_accum > 1 and state.formats["grads"] != trainer.recipe.state["grads"]:
        print(f"  (gradients are summed over {config.grad_accum} micro-batches in FP32)")
    if config.zero is not None and trainer.comm.size == 1:
        print("  (one rank, which has all: several are started by mpiexec -n N python -m mpi4py scripts/train.py ...)")
    corpus = trainer.corpus
    print(f"data: {corpus.name}, {len(corpus.train):,} bytes to train on, {len(corpus.valid):,} to validate on")
    sampled = " (from a sample)" if baselines.sampled else ""
    print(f"to beat{sampled}: {_list_baselines(baselines)}")


def _list_baselines(baselines: NgramBaselines) -> str:
    names = {1: "unigram", 2: "bigram", 3: "trigram"}
    return ", ".join(f"{names[n]} {entropy:.3f}" for n, entropy in baselines.entropies.items()) + " nats a byte"


def _report(trainer: Trainer, baselines: NgramBaselines, steps: int) -> None:
    """The end of a run: where the loss stands, what the model writes, what was written.

    Every rank makes the sample, for which stage 3 needs all of them; the first one shows it.
    """
    config, folder = trainer.config, trainer.folder
    text = b""
    if config.sample_bytes:
        text = sample(trainer.model, trainer.state, trainer.run, config.sample_bytes, generator(config.seed, SAMPLE))
    counted = trainer.comm.on_host.all_reduce(np.array([trainer.exchanged / max(1, steps)]))[0] / trainer.comm.size
    if not trainer.writes:
        return
    losses = [row["val_loss"] for row in read_metrics(folder / METRICS) if "val_loss" in row]
    print(f"\nvalidation loss {_number(losses[-1])} nats a byte; {_list_baselines(baselines)}")
    scale, progress = float(trainer.loss_scale.scale), trainer.progress
    print(f"{progress.skipped} of {progress.step} steps skipped, loss scale {scale:g}")
    if trainer.comm.size > 1 and steps:
        print(_exchanged(trainer, counted))
    if config.sample_bytes:
        print(f"\na sample of {config.sample_bytes} bytes:\n{'-' * 60}\n{text.decode('utf-8', 'replace')}\n{'-' * 60}")
    title = f"{config.model}, recipe {config.recipe}, {trainer.model.n_params:,} parameters"
    picture = plot_run(folder, baselines.entropies, title)
    written = [CONFIG, METRICS, CHECKPOINT] + ([PICTURE] if picture else [])
    print(f"written to {folder}: {', '.join(written)}")


def _exchanged(trainer: Trainer, counted: float) -> str:
    """Bytes that came to a rank from the others in a step, counted, and what ZeRO predicts."""
    config, model, comm = trainer.config, trainer.model, trainer.comm
    assert config.zero is not None
    states = recipe_states(trainer.recipe, config.make_rule().moments, config.grad_accum)
    again = sum(int(np.prod(model.parameters[name].shape)) for name in set(model.tied.values()))
    predicted = float(exchanged(model.n_params, states, config.zero, comm.size, again, config.grad_accum))
    return (
        f"a rank received {counted:,.0f} bytes a step from the others; ZeRO stage {config.zero} predicts {predicted:,.0f}, "
        f"{predicted / model.n_params:.2f} bytes a parameter"
    )


def _number(loss: float | None) -> str:
    """A loss as text; the log has null for NaN."""
    return "NaN" if loss is None else f"{loss:.4f}"
