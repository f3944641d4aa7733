"""A training run in a folder, from start to report: the function behind scripts/train.py."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

from threadpoolctl import threadpool_limits

from refimpl.backends.numpy.backend import NUMPY
from refimpl.backends.numpy.threads import cores
from refimpl.distributed.collectives import Comm, Serial
from refimpl.distributed.mpi import launched, mpi_comm
from refimpl.distributed.nccl import nccl_comm
from refimpl.errors import TrainingStopped, UsageError
from refimpl.training.config import Config, Flags
from refimpl.training.init_from import settings_from
from refimpl.training.kept_checkpoints import require_space
from refimpl.training.log_writers import chosen, open_writers, require_packages
from refimpl.training.metrics import as_table, read_metrics
from refimpl.training.ngrams import NgramBaselines, ngram_baselines
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.run_folder import (
    CHECKPOINT,
    first_weights,
    name_in_logs,
    open_folder,
    own_folder,
    prepare_folder,
    read_config,
    write_config,
)
from refimpl.training.run_report import announce, draw, report, warn
from refimpl.training.setup import NO_FAULTS, Fault, find_fault
from refimpl.training.signals import ENDED
from refimpl.training.trainer import Trainer

PATIENCE = 1.0
"""Seconds that another rank waits before it raises: if rank 0 fails alike, it ends all ranks first, with one message."""


def train(
    given: Flags,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    init_from: Path | None,
    faults: Mapping[str, Fault] = NO_FAULTS,
    quiet: bool = False,
) -> int:
    """Train a model in a folder, and print how it went. Return the exit code: 0, or 130 after Ctrl-C.

    faults: those that --mistake may name. quiet: print the end only, and no sample.
    """
    with only_rank_0_prints():
        if resume and init_from is not None:
            raise UsageError("--resume and --init-from contradict each other: a resumed run has its own weights")
        comm = mpi_comm() if launched()[1] > 1 else Serial()
        given, first = (given, None) if init_from is None else settings_from(init_from, given)
        config, _ = prepare_folder(given, out, resume, overwrite)
        require_packages(config.log)
        find_fault(config.mistake, faults)  # refuses an unknown one before there is a folder
        comm = comm_of_arrays(config, comm)
        threads = max(1, cores() // comm.on_host.on_machine) if comm.size > 1 else None
        with own_folder(config, out, comm, resume, overwrite) as folder, threadpool_limits(threads):
            trainer = Trainer(config, folder, comm, faults, first, quiet)
            first = None  # a folder's files are mapped: what has been read of them would stay in memory
            return _resume(trainer, quiet) if resume else _begin(trainer, init_from, quiet)


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
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(ENDED)
        except (UsageError, TrainingStopped) as error:
            time.sleep(PATIENCE)
            raise type(error)(f"rank {rank}: {error}") from error


def _begin(trainer: Trainer, init_from: Path | None, quiet: bool) -> int:
    """Start a new run. init_from: the file with its first weights, if any."""
    baselines = ngram_baselines(trainer.corpus)
    trainer.comm.barrier()  # until all ranks have read the folder as it was
    if trainer.writes:
        require_space(trainer.folder, trainer.checkpoint_space())
        open_folder(trainer.config, trainer.folder, init_from)
    trainer.owes_evaluation = init_from is not None
    return _train(trainer, baselines, "", quiet)


def _resume(trainer: Trainer, quiet: bool) -> int:
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
        require_space(folder, trainer.checkpoint_space())
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
    return _train(trainer, baselines, note, quiet)


def _train(trainer: Trainer, baselines: NgramBaselines, note: str, quiet: bool) -> int:
    """Train to the last step, or until a signal or an unusable loss stops the run. Return the exit code."""
    done, steps, folder = trainer.progress.step, trainer.config.steps, trainer.folder
    if not quiet:
        announce(trainer, baselines)
        print(note, end="\n" if note else "")
    with trainer.stop:
        try:
            with _other_logs(trainer), ProgressBar(steps, "step", done=done, quiet=quiet or not trainer.writes) as bar:
                trainer.train(bar)
        except TrainingStopped:
            draw(trainer, baselines)
            warn(trainer)
            raise
        trainer.stop.saying = SAVED
        if not trainer.stopping():
            report(trainer, baselines, trainer.progress.step - done, quiet)
        elif trainer.progress.step < steps:
            print(f"\nstopped after step {trainer.progress.step} of {steps}; continue with: --resume --out {folder}")
            draw(trainer, baselines)
        else:
            all_done = f"all {steps} steps are done" if steps > 1 else "the only step is done"
            when = "before its evaluation ended" if trainer.owes_evaluation else "after its evaluation"
            print(f"\n{all_done}; stopped {when}")
            if trainer.owes_evaluation:
                print(f"evaluate with: --resume --out {folder}")
            draw(trainer, baselines)
        warn(trainer)
        return ENDED if trainer.stopping() else 0


@contextmanager
def _other_logs(trainer: Trainer) -> Iterator[None]:
    """Open the logs of --log for the rows that the trainer writes, and close them."""
    names, folder = chosen(trainer.config.log), trainer.folder
    if not trainer.writes or not names:
        yield
        return
    run, before = name_in_logs(folder), as_table(read_metrics(folder))
    with open_writers(names, folder, run, before, asdict(trainer.config)) as trainer.log.others:
        yield


SAVED = "stopping: the checkpoint is written; again to stop at once"
