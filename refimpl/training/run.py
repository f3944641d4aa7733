"""A training run in a folder, from start to report: the function behind scripts/train.py."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from refimpl.backends.numpy.backend import NUMPY
from refimpl.backends.numpy.threads import cores
from refimpl.distributed.collectives import Comm, Serial
from refimpl.distributed.mpi import launched, mpi_comm
from refimpl.distributed.nccl import nccl_comm
from refimpl.distributed.zero import exchanged
from refimpl.errors import TrainingStopped, UsageError
from refimpl.training.config import Config, Flags
from refimpl.training.console import count, printable
from refimpl.training.evaluate import TextLoss
from refimpl.training.init_from import settings_from
from refimpl.training.metrics import WHOLE, WHOLE_BITS, read_metrics
from refimpl.training.ngrams import NgramBaselines, ngram_baselines
from refimpl.training.pictures import NO_PICTURE
from refimpl.training.plots import plot_run
from refimpl.training.run_folder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    PICTURE,
    VALIDATION,
    first_weights,
    name_in_logs,
    open_folder,
    own_folder,
    prepare_folder,
    read_config,
    write_config,
)
from refimpl.training.sampling import START, Writer
from refimpl.training.setup import NO_FAULTS, SAMPLE, Fault, find_fault, generator
from refimpl.training.signals import ENDED
from refimpl.training.trainer import Trainer

PATIENCE = 1.0
"""Seconds that another rank waits before it raises: if rank 0 fails alike, it ends all ranks first, with one message."""


MANY_SKIPPED = 0.1
"""The share of skipped steps above which a run ends with a warning."""


def train(
    given: Flags,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    init_from: Path | None,
    faults: Mapping[str, Fault] = NO_FAULTS,
) -> int:
    """Train a model in a folder, and print how it went. Return the exit code: 0, or 130 after Ctrl-C.

    faults: those that --mistake may name.
    """
    with only_rank_0_prints():
        if resume and init_from is not None:
            raise UsageError("--resume and --init-from contradict each other: a resumed run has its own weights")
        comm = mpi_comm() if launched()[1] > 1 else Serial()
        given, first = (given, None) if init_from is None else settings_from(init_from, given)
        config, _ = prepare_folder(given, out, resume, overwrite)
        find_fault(config.mistake, faults)  # refuses an unknown one before there is a folder
        comm = comm_of_arrays(config, comm)
        threads = max(1, cores() // comm.on_host.on_machine) if comm.size > 1 else None
        with own_folder(config, out, comm, resume, overwrite) as folder, threadpool_limits(threads):
            trainer = Trainer(config, folder, comm, faults, first)
            first = None  # a folder's files are mapped: what has been read of them would stay in memory
            return _resume(trainer) if resume else _begin(trainer, init_from)


def comm_of_arrays(config: Config, comm: Comm) -> Comm:
    """Return the communicator for a run's arrays: NCCL's for --backend cupy. Errors: UsageError for ranks without --zero."""
    if comm.size > 1 and config.zero is None:
        raise UsageError(f"mpiexec has started {comm.size} processes: say how they share the training, --zero 0, 1, 2 or 3")
    return nccl_comm(comm) if comm.size > 1 and config.backend == "cupy" else comm


@contextmanager
def only_rank_0_prints() -> Iterator[None]:
    """Silence the other ranks, which print the same and mostly fail alike; their errors say which rank they are."""
    rank, _ = launched()
    if rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(ENDED)
        except (UsageError, TrainingStopped) as error:
            time.sleep(PATIENCE)
            raise type(error)(f"rank {rank}: {error}") from error


def _begin(trainer: Trainer, init_from: Path | None) -> int:
    """Start a new run. init_from: the file with its first weights, if any."""
    baselines = ngram_baselines(trainer.corpus)
    trainer.comm.barrier()  # until all ranks have read the folder as it was
    if trainer.writes:
        open_folder(trainer.config, trainer.folder, init_from)
    trainer.owes_evaluation = init_from is not None
    return _train(trainer, baselines, "")


def _resume(trainer: Trainer) -> int:
    """Resume a run from its checkpoint, or start it if it has none yet."""
    config, folder = trainer.config, trainer.folder
    saved, weights = read_config(folder), first_weights(folder)
    planned, backend = saved["steps"], saved.get("backend", Config.backend)
    trainer.restore()
    done, steps = trainer.progress.step, config.steps
    if done == steps and not trainer.owes_evaluation:
        print(f"already at step {done} of {steps}; give --steps N for more")
        return 0
    if not done and weights is not None and not (folder / CHECKPOINT).exists():
        raise UsageError(f"{folder} has no checkpoint to resume: start the run again with --init-from {weights}")
    baselines = ngram_baselines(trainer.corpus)
    trainer.comm.barrier()
    if trainer.writes:
        write_config(config, folder, name_in_logs(folder), None if weights is None else Path(weights))
    trainer.owes_evaluation |= not done and weights is not None
    missing = ", whose validation loss is missing" if done == steps else ""
    note = f"resumed after step {done} of {steps}"
    note = note + missing if done else f"no checkpoint in {folder}: starting at step 1 of {steps}"
    if planned != steps and done:
        schedules = [replace(config, steps=n).make_optimizer(NUMPY).schedule for n in (planned, steps)]
        t = int(trainer.state.t)
        before, after = schedules[0](max(0, t - 1)), schedules[1](t)
        note += (
            f"; the schedule is replanned for {steps} steps instead of {planned}: the learning rate goes from {before:.3g} "
            f"to {after:.3g}"
        )
    if backend != config.backend and done:
        note += f"; with --backend {config.backend} instead of {backend}: last bits may differ from those of one backend"
    return _train(trainer, baselines, note)


def _train(trainer: Trainer, baselines: NgramBaselines, note: str) -> int:
    """Train to the last step, or until a signal or an unusable loss stops the run. Return the exit code."""
    from tqdm import tqdm

    done, steps, folder = trainer.progress.step, trainer.config.steps, trainer.folder
    _announce(trainer, baselines)
    if note:
        print(note)
    shown: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.1, "disable": not trainer.writes}
    with trainer.stop:
        try:
            with tqdm(total=steps, initial=done, **shown) as bar:
                trainer.train(bar)
        except TrainingStopped:
            _draw(trainer, baselines)
            warn(trainer)
            raise
        trainer.stop.saying = SAVED
        if not trainer.stopping():
            _report(trainer, baselines, trainer.progress.step - done)
        elif trainer.progress.step < steps:
            print(f"\nstopped after step {trainer.progress.step} of {steps}; continue with: --resume --out {folder}")
            _draw(trainer, baselines)
        else:
            all_done = f"all {steps} steps are done" if steps > 1 else "the only step is done"
            when = "before its evaluation ended" if trainer.owes_evaluation else "after its evaluation"
            print(f"\n{all_done}; stopped {when}")
            if trainer.owes_evaluation:
                print(f"evaluate with: --resume --out {folder}")
            _draw(trainer, baselines)
        warn(trainer)
        return ENDED if trainer.stopping() else 0


SAVED = "stopping: the checkpoint is written; again to stop at once"


def _announce(trainer: Trainer, baselines: NgramBaselines) -> None:
    config, model, state = trainer.config, trainer.model, trainer.state
    print(f"{model.name}, {model.n_params:,} parameters, recipe {trainer.recipe.name}: {trainer.recipe.summary}")
    if trainer.fault is not None:
        print(trainer.fault.announcement)
    kinds = " + ".join(f"{kind} {buffer.nbytes / model.n_params:g}" for kind, buffer in state.buffers.items())
    rank = f" on each of {trainer.comm.size} ranks, ZeRO stage {config.zero}" if trainer.comm.size > 1 else ""
    print(f"model states: {kinds} = {state.nbytes / model.n_params:g} bytes per parameter, as measured{rank}")
    if config.grad_accum > 1 and state.formats["grads"] != trainer.recipe.state["grads"]:
        print(f"  (gradients are summed over {config.grad_accum} micro-batches in FP32)")
    if config.zero is not None and trainer.comm.size == 1:
        print("  (one rank, which stores everything; start several with mpiexec -n N python -m mpi4py scripts/train.py ...)")
    corpus = trainer.corpus
    unit = corpus.tokenizer.unit
    print(f"data: {corpus.name}, {count(len(corpus.train), unit)} to train on, {len(corpus.valid):,} to validate on")
    if unit != "byte":
        comparable = "bits per byte compare between tokenizers"
        print(f"tokenizer: {corpus.tokenizer.name}, {corpus.tokenizer.vocab_size:,} ids; {comparable}")
    if baselines.entropies:
        sampled = " (from a sample)" if baselines.sampled else ""
        print(f"to beat{sampled}: {_list_baselines(baselines)}")


def _list_baselines(baselines: NgramBaselines) -> str:
    names = {1: "unigram", 2: "bigram", 3: "trigram"}
    return ", ".join(f"{names[n]} {entropy:.3f}" for n, entropy in baselines.entropies.items()) + " nats per byte"


def _compared(baselines: NgramBaselines) -> str:
    """Return what follows the loss at the end of a run: what it compares with."""
    return f"; {_list_baselines(baselines)}" if baselines.entropies else ""


def _losses(trainer: Trainer) -> str:
    """Return the losses at the end of a run: beside that before its first step, if it is known, and of the whole text."""
    rows = read_metrics(trainer.folder).evaluations
    unit, first, last = trainer.corpus.tokenizer.unit, rows[0], rows[-1]

    def described(*names: str) -> str:
        return TextLoss(*(_number(last.get(name)) for name in names)).described(unit)

    known = first["step"] == 0 and last["step"] > 0
    lines = []
    if known or WHOLE not in last:
        before = f"; before the first step {_number(first['val_loss']):.4f}" if known else ""
        lines.append(f"validation loss {described('val_loss', 'val_bits_per_byte')}{before}")
    if WHOLE in last:
        size = count(trainer.corpus.valid.size, unit)
        lines.append(f"validation loss of the whole text ({size}) {described(WHOLE, WHOLE_BITS)}")
    return "\n".join(lines)


def _report(trainer: Trainer, baselines: NgramBaselines, steps: int) -> None:
    """Print the end of a run: the losses, the files that were written, and a sample of the model."""
    config, progress = trainer.config, trainer.progress
    counted = trainer.comm.on_host.all_reduce(np.array([trainer.exchanged / max(1, steps)]))[0] / trainer.comm.size
    if trainer.writes:
        print(f"\n{_losses(trainer)}{_compared(baselines)}")
        print(f"{progress.skipped} of {count(progress.step, 'step')} skipped, loss scale {float(trainer.loss_scale.scale):g}")
        if trainer.comm.size > 1 and steps:
            print(_exchanged(trainer, counted))
        _draw(trainer, baselines)
    if config.sample_bytes:
        _show_sample(trainer)


def _show_sample(trainer: Trainer) -> None:
    """Print a sample. Every rank computes it, since ZeRO stage 3 needs all of them; rank 0 prints it."""
    config, rng = trainer.config, generator(trainer.config.seed, SAMPLE)
    tokenizer, stopping = trainer.corpus.tokenizer, trainer.stopping
    prompt, _ = tokenizer.encode(START)
    writer = Writer(trainer.model, trainer.state, trainer.run, tokenizer, prompt if prompt.size else trainer.corpus.valid[:1])
    text = "".join(writer.text(config.sample_bytes, rng, stopping=stopping))
    print(f"\na sample of {count(writer.count, tokenizer.unit)}:\n{'-' * 60}\n{printable(text)}\n{'-' * 60}")
    if writer.why_ended and not stopping():
        print(f"({writer.why_ended})")


def _draw(trainer: Trainer, baselines: NgramBaselines) -> None:
    """Plot the run, and print which files its folder has."""
    config, folder = trainer.config, trainer.folder
    if not trainer.writes:
        return
    title = f"{config.model}, recipe {config.recipe}, seed {config.seed}, {trainer.model.n_params:,} parameters"
    if config.mistake != "none":
        title += f"\nMISTAKE injected: {config.mistake}"
    try:
        picture = plot_run(folder, baselines.entropies, title, trainer.corpus.tokenizer.unit)
    except UsageError as error:  # a full disk must not hide why a run stopped
        picture = None
        print(f"no picture: {error}")
    written = [name for name in (CONFIG, METRICS, VALIDATION, CHECKPOINT) if (folder / name).exists()]
    written += [PICTURE] if picture else []
    print(f"written to {folder}: {', '.join(written)}")
    if importlib.util.find_spec("matplotlib") is None:
        print(NO_PICTURE)


def warn(trainer: Trainer) -> None:
    """Print warnings, as the last lines: many skipped steps, an injected mistake."""
    progress = trainer.progress
    if progress.skipped > MANY_SKIPPED * progress.step:
        share = 100 * progress.skipped / progress.step
        steps = count(progress.step, "step")
        print(f"WARNING: {progress.skipped} of {steps} ({share:.0f} %) were skipped: they changed no weight")
    if trainer.fault is not None:
        print(trainer.fault.announcement)


def _exchanged(trainer: Trainer, counted: float) -> str:
    """Return the line with the bytes that a rank received per step, counted and as ZeRO predicts them."""
    config, model, comm = trainer.config, trainer.model, trainer.comm
    states = trainer.recipe.bytes_by_buffer(config.make_rule().moments, config.grad_accum)
    again = sum(int(np.prod(model.parameters[name].shape)) for name in set(model.tied.values()))
    predicted = float(exchanged(model.n_params, states, config.zero or 0, comm.size, again, config.grad_accum))
    return (
        f"a rank received {counted:,.0f} bytes per step from the others; ZeRO stage {config.zero} predicts {predicted:,.0f}, "
        f"{predicted / model.n_params:.2f} bytes per parameter"
    )


def _number(loss: float | None) -> float:
    """Return a loss from the log, which stores NaN as null."""
    return math.nan if loss is None else loss
