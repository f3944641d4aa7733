"""The loop over training steps, with its log, evaluations, checkpoints and the conditions that stop it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.distributed.collectives import Comm, Serial, shares_of
from refimpl.step import Batch, StepResult
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import saved_bytes, scale_arrays, state_arrays
from refimpl.training.config import Config
from refimpl.training.data import Corpus, sample_batch
from refimpl.training.evaluate import TextLoss, reads_whole_text, validation_loss
from refimpl.training.init_from import First
from refimpl.training.kept_checkpoints import BEST, Keep, keep
from refimpl.training.metrics import WHOLE, WHOLE_BITS, MetricsLog, read_metrics
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.resume import Progress, load_run, run_header
from refimpl.training.run_folder import CHECKPOINT, name_in_logs
from refimpl.training.setup import BATCHES, NO_FAULTS, Fault, find_fault, generator, start
from refimpl.training.signals import Stop
from refimpl.training.stopping import StopRules

STOPPING = "stopping after this step, with a checkpoint; again to stop at once"
EVALUATING = "stopping this evaluation, whose loss --resume computes; the checkpoint is written; again to stop at once"


class Trainer:
    """One run and the loop over its steps. It writes to `folder`, which `prepare_folder` has checked. faults: as in `start`.

    Each rank has a Trainer. All do the same, each with its rows of a batch; only rank 0 writes files.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        comm: Comm | None = None,
        faults: Mapping[str, Fault] = NO_FAULTS,
        first: First | None = None,
        quiet: bool = False,
    ) -> None:
        """Start a run in a folder. comm, faults, first: those of `setup.start`. quiet: show no progress before the steps."""
        self.config, self.folder, self.comm = config, folder, comm or Serial()
        self.writes = self.comm.rank == 0
        self.exchanged = 0  # bytes received from other ranks in training steps
        self.recipe = config.make_recipe()
        self.corpus = self._load_corpus(quiet)
        self.fault = find_fault(config.mistake, faults)
        self.training = start(config, self.comm, faults, first)
        self.model, self.state = self.training.model, self.training.state
        self.loss_scale, self.run = self.training.loss_scale, self.training.run
        self.backend = self.state.backend
        self.batches = generator(config.seed, BATCHES)
        self.progress = Progress()
        self.log = MetricsLog(folder)
        self.keep, self._best = Keep.of(config.keep), math.inf  # the lowest validation loss so far
        self._pending: list[tuple[int, StepResult, list[Batch]]] = []
        self._rules = StopRules(config, self.training)
        self._window_start = self._start = time.perf_counter()  # of the steps to log; of the run, without pauses
        self.owes_evaluation = False
        self.stop = Stop(STOPPING, speaks=self.writes)

    def _load_corpus(self, quiet: bool) -> Corpus:
        """Return the corpus. The other ranks wait until rank 0 has written its tokens, which they then read."""
        if not self.writes:
            self.comm.barrier()
        corpus = self.config.make_corpus(quiet)
        if self.writes:
            self.comm.barrier()
        return corpus

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self, bar: ProgressBar) -> bool:
        """Train to the last step, or until a signal asks to stop. Return whether all steps are done. bar: shows the steps.

        Errors: TrainingStopped if training cannot continue; the last checkpoint stays.
        """
        steps = self.config.steps
        self._start += time.perf_counter() - self._window_start
        self._window_start = time.perf_counter()
        if self.writes:
            self.log.run = name_in_logs(self.folder)
        self._rules.first_step = self.progress.step + 1
        with self.stop:
            if self.owes_evaluation:
                self._evaluate_and_print(bar)
            while self.progress.step < steps and not self.stopping():
                batches = self.next_batches()
                self._pending.append((self.progress.step + 1, self._one_step(batches), batches))
                self.progress.step += 1
                bar.update(1)  # a device may still compute it
                at_end = self.progress.step == steps
                if self.progress.step % self.config.log_every == 0:
                    self._write_steps(bar)
                if at_end or self.progress.step % self.config.eval_every == 0:
                    self._write_steps(bar)
                    if at_end:
                        self._rules.check_end(self.progress.step, self.progress.skipped)
                    self.save()  # before an evaluation, which can be interrupted, and printing, where the reader may have gone
                    self._evaluate_and_print(bar)
            if self.progress.step < steps:
                self._write_steps(bar)
                self.save()
        return self.progress.step == steps

    def _evaluate_and_print(self, bar: ProgressBar) -> None:
        report = self._evaluate(bar.quiet)
        if report and not bar.quiet:
            bar.write(report)

    def stopping(self) -> bool:
        """Return whether a signal has asked this rank or another one to stop."""
        return self.comm.any(self.stop.asked)

    def _one_step(self, batches: list[Batch]) -> StepResult:
        before = self.comm.received.total()
        result = self.training.step(batches)
        self.exchanged += self.comm.received.total() - before
        return result

    def next_batches(self) -> list[Batch]:
        """Return this rank's rows of the next step's micro-batches, which all ranks sample alike from the training part."""
        batch_size, block_size = self.config.batch_size, self.config.block_size
        rows = shares_of(batch_size, self.comm.size)[self.comm.rank]
        micro_batches = []
        for _ in range(self.config.grad_accum):
            x, y = sample_batch(self.corpus.train, batch_size, block_size, self.batches, self.config.no_target)
            micro_batches.append(self.model.batch_on(self.backend, x[rows], y[rows]))
        return micro_batches

    # -- the log ----------------------------------------------------------------------------------------------------

    def _write_steps(self, bar: ProgressBar) -> None:
        """Log the steps since the last call, and stop the run if it cannot continue. The first use of the results: it waits."""
        if not self._pending:
            return
        rows = [_row(result) for _, result, _ in self._pending]
        now, n = time.perf_counter(), len(rows)
        each = (now - self._window_start) / n  # a device makes several steps before the host reads their results
        rate = round(self.config.tokens_per_step / each, 1)
        rows = [
            {**self._position(step, now - (n - i) * each), **row, "tokens_per_s": rate}
            for i, ((step, _, _), row) in enumerate(zip(self._pending, rows, strict=True), 1)
        ]
        if self.writes:
            self.log.write_steps(rows)
        for row, (_, _, batches) in zip(rows, self._pending, strict=True):
            self.progress.count(row["skipped"])
            if (warning := self._rules.check_step(row, batches, self.progress.skipped_in_a_row)) is not None:
                bar.write(warning)
        self._rules.check_scale(rows[-1], batches, self.progress.step, self.save)
        bar.show(
            f"loss {rows[-1]['loss']:.3f}, scale {rows[-1]['loss_scale']:g}, skipped {self.progress.skipped}, {rate:,.0f} tok/s"
        )
        self._pending.clear()
        self._window_start = time.perf_counter()

    def _position(self, step: int, now: float) -> dict[str, Any]:
        """Return what begins each row of the log. now: when the step or evaluation was done."""
        return {"step": step, "seconds": round(now - self._start, 3), "tokens": step * self.config.tokens_per_step}

    def _evaluate(self, quiet: bool) -> str:
        """Log the validation loss, and return the line to print: '' if a signal asked to stop before it was complete.

        All are on the same batches. After the last step comes that of the whole text, if `reads_whole_text`.
        """
        started, self.owes_evaluation = time.perf_counter(), True
        saying = self.stop.saying
        if self.progress.step:
            self.stop.saying = EVALUATING
        loss, row = self._loss_on(False, quiet), {}
        if loss is not None and self.progress.step == self.config.steps and reads_whole_text(self.model, self.corpus):
            whole = self._loss_on(True, quiet)
            loss = None if whole is None else loss
            row = {} if whole is None else {WHOLE: whole.nats_per_token, WHOLE_BITS: whole.bits_per_byte}
        self.stop.saying = saying
        self._window_start += time.perf_counter() - started
        if loss is None:
            return ""
        self.owes_evaluation = False
        n = self.progress.step
        row = {"val_loss": loss.nats_per_token, "val_bits_per_byte": loss.bits_per_byte, **row}
        if self.writes:
            self._keep_if_best(loss.nats_per_token)  # before its row: after a kill between them, it is evaluated again
            self.log.write_evaluation({**self._position(n, time.perf_counter()), **row})
        when = f"step {n}: validation loss" if n else "baseline: validation loss before the first step"
        return f"{when} {loss.described(self.corpus.tokenizer.unit)}"

    def _loss_on(self, whole: bool, quiet: bool) -> TextLoss | None:
        return validation_loss(self.training, self.config, self.corpus, whole, self.stopping, self.writes and not quiet)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write the checkpoint: weights, masters and moments by parameter name, and the header. Return its path.

        All ranks must call this together. The file does not depend on their number.
        """
        self.state.weights_down()
        path, arrays = self.folder / CHECKPOINT, state_arrays(self.state)
        if self.writes:
            header = run_header(self.config, self.corpus, self.training, self.progress, self.batches)
            checkpoint.save(path, {**arrays, **scale_arrays(self.run)}, header)
            self.keep.number(self.folder, self.progress.step)
        return path

    def _keep_if_best(self, loss: float) -> None:
        """Keep the last checkpoint as the best one if no evaluation had so low a loss. One before the first step has none."""
        if self.progress.step and loss < self._best:
            self._best = loss
            if self.keep.best:
                keep(self.folder, BEST)

    def checkpoint_space(self) -> int:
        """Return the bytes that the run's checkpoints will need on its disk beyond those that it has."""
        steps = self.config.steps - self.progress.step
        return self.keep.least_space(self.folder, saved_bytes(self.state), -(-steps // self.config.eval_every))

    def restore(self) -> None:
        """Resume from the checkpoint in the folder, bit for bit, or from the start if there is none.

        Errors: UsageError if it is damaged or belongs to another run.
        """
        if (self.folder / CHECKPOINT).exists():
            self.load_checkpoint()
        step, log = self.progress.step, read_metrics(self.folder)
        evaluated = any(row["step"] == step for row in log.evaluations)
        due = step > 0 and (step % self.config.eval_every == 0 or step == self.config.steps)
        self.owes_evaluation = due and not evaluated  # a signal interrupted it
        known = [row["val_loss"] for row in log.evaluations if 0 < row["step"] <= step and row["val_loss"] is not None]
        self._best = min(known, default=math.inf)
        kept = self.log.keep_up_to(step) if self.writes else log
        self._start = self._window_start - max((row.get("seconds", 0.0) for rows in kept for row in rows), default=0.0)

    def load_checkpoint(self) -> None:
        """Load the checkpoint, as `restore` does, but leave the log alone: no file is changed."""
        path = self.folder / CHECKPOINT
        self.progress = load_run(path, self.config, self.corpus, self.training, self.batches)


def _row(result: StepResult) -> dict[str, Any]:
    """Return the numbers of a step's row of the log. Waits for the device."""
    return {
        "loss": float(result.loss),
        "lr": float(result.lr),
        "loss_scale": float(result.loss_scale),
        "grad_norm": float(result.grad_norm),
        "skipped": bool(result.skipped),
    }
