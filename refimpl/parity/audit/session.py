"""`Audit`: the context manager around a user's training loop."""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from refimpl.errors import UsageError, one_line
from refimpl.parity.audit.borders import border_of, checked_optimizers, parameters_of, schedulers_of
from refimpl.parity.audit.calls import CallWatch
from refimpl.parity.audit.conversions import Conversions
from refimpl.parity.audit.finding import Finding, is_serious, merged
from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.loop_recipe import LoopRecipe, recipe_of
from refimpl.parity.audit.operation import Keep, Operation
from refimpl.parity.audit.recorder import Recorder
from refimpl.parity.audit.report.data import contents, kept_operations
from refimpl.parity.audit.report.files import write_report
from refimpl.parity.audit.report.flags import flags_in_force
from refimpl.parity.audit.report.operands import Operands
from refimpl.parity.audit.report.operation_table import OperationTable
from refimpl.parity.audit.report.terminal import summary
from refimpl.parity.audit.rules.entry import Rule
from refimpl.parity.audit.rules.table import PROBES, RULES
from refimpl.parity.audit.step import Border, Step, View
from refimpl.parity.audit.values import Values
from refimpl.training.columns import fit

EARLIER = 3
"""How many audited steps are kept beside the current one."""
MOST_BORDERS = 256
"""How many borders are kept: the first one, and the newest."""
MOST_OPERATIONS = 200_000
"""How many operations of one step are looked at: a loop that never ends its step must not fill the memory."""


class Audit:
    """Audits a training loop; `step()` ends each of its steps.

    findings: the mistakes found so far, by code. steps: the audited steps that are kept, the newest last. number: how many
    steps have ended; audited: the numbers of those audited. recording: whether a step is being audited. table: verdicts over
    the operations of all audited steps; operands: of operations that can be judged once more.
    conversions: what casts did.
    failures: exceptions of the audit itself by text; none has reached the training.
    """

    _running: ClassVar[Audit | None] = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        *,
        scaler: Any = None,
        scheduler: Any = None,
        ema: nn.Module | None = None,
        steps: int = 4,
        every: int = 100,
    ) -> None:
        """optimizer, scheduler: one, or several. steps: how many of the first are audited, and then one in `every`.

        Errors: UsageError for what is none of these.
        """
        if not isinstance(model, nn.Module):
            raise UsageError(f"Audit: model must be a torch.nn.Module, not {type(model).__name__}")
        if isinstance(scaler, type):
            raise UsageError(f"Audit: scaler must be a GradScaler, not the class: give the object, {scaler.__name__}()")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise UsageError(f"Audit: scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
        if ema is not None and not isinstance(ema, nn.Module):
            raise UsageError(f"Audit: ema must be the torch.nn.Module with averaged weights, not {type(ema).__name__}")
        for name, number, least in (("steps", steps, 0), ("every", every, 1)):
            if not isinstance(number, Integral) or number < least:
                raise UsageError(f"Audit: {name} must be a whole number of at least {least}, not {number!r}")
        self.model, self.scaler, self.ema = model, scaler, ema
        self.optimizers, self.schedulers = checked_optimizers(optimizer), schedulers_of(scheduler)
        self._first, self._every = steps, every
        self.judge, self.table, self.operands, self.conversions = Judge(), OperationTable(), Operands(), Conversions()
        self.findings: dict[str, Finding] = {}
        self.steps: deque[Step] = deque(maxlen=EARLIER + 1)
        self.recorder = Recorder(model, self.optimizers, ema, choose=self._choose, observe=self._observe)
        self._calls = CallWatch(self.optimizers, lambda: self.recorder.seen)
        self._borders: dict[int, Border] = {}
        self.number, self.audited, self.unended = 0, list[int](), ""
        self.flags: list[dict[str, Any]] = []
        self._failures: Counter[str] = Counter()
        self._rank = 0
        self.recording, self._whole = False, True
        self._stance: Any = None
        self._view: View | None = None

    def __enter__(self) -> Audit:
        """Begin the audit, at the beginning of a step. Errors: UsageError if one is running."""
        if Audit._running is not None:
            which = "this audit is" if Audit._running is self else "another audit is"
            raise UsageError(f"{which} running already: leave its 'with' before the next")
        Audit._running = self
        self.begin_step()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """End it. If the loop has raised, print on standard error what was found until then; the exception propagates."""
        self.end(kind.__name__ if kind is not None else "")
        if kind is not None:
            self._guarded("summary: ", self._say_all, kind.__name__)

    def end(self, raised: str = "") -> None:
        """End the audit. raised: the name of the exception that has ended the loop.

        Of a step that was begun and not ended only the rules about single operations are asked.
        """
        if self._stop() and self.recorder.seen:
            which = f"step {self.number + 1}"
            why = f"the audit ended within {which}" if self.number else "audit.step() was never called"
            self.unended = f"{raised} in {which}" if raised else why
            self._finish(complete=False)
        Audit._running = None

    def step(self) -> None:
        """End a step of the training, and begin the next. Errors: UsageError outside of `with`."""
        if Audit._running is not self:
            raise UsageError("audit.step() outside of the audit: call it at the end of each step inside 'with Audit(...)'")
        self.end_step()
        self.begin_step()

    def end_step(self) -> None:
        """End a step: ask the rules, if it was audited."""
        if self.recording and not self.on_top:
            # Leaving the recorder now would leave that mode instead, which is the user's.
            self._whole = False
            self._failures["a step ended inside of another TorchDispatchMode, and could not be judged"] += 1
            self.number += 1
            return
        recorded, whole = self._stop(), self._whole
        self.number, self._whole = self.number + 1, True
        if recorded and whole:
            self._finish(complete=True)

    def begin_step(self) -> None:
        """Begin a step; one that is to be audited is recorded from here on."""
        if self.due and not self.recording:
            if self.number not in self._borders:
                self._borders[self.number] = self._border()
            self.steps.append(Step(self.number + 1, self._borders[self.number]))
            self._guarded("", self._start)
            if not self.recording:
                self.steps.pop()

    @property
    def on_top(self) -> bool:
        """Whether no TorchDispatchMode has been entered since the recording began, so that it can end."""
        return _get_current_dispatch_mode() is self.recorder

    @property
    def due(self) -> bool:
        """Whether the next step is to be audited."""
        following = self.number + 1
        return following <= self._first or following % self._every == 0

    @property
    def failures(self) -> Counter[str]:
        """The exceptions of the audit itself, of rules and judges too."""
        return self._failures + self.recorder.failures

    def recipe(self) -> LoopRecipe | None:
        """Return the loop's recipe, read off the last audited step that has ended; None if none has."""
        return self._guarded("recipe: ", recipe_of, self._view, self.scaler) if self._view is not None else None

    def report(self, folder: str | Path = "runs/audit") -> Path:
        """Write audit.html and audit.json to a folder, print the summary, and return the path of the page.

        A report that is there is replaced. Of several processes each but the first writes to a folder rank1, rank2, ... in it.
        Errors: UsageError if the files cannot be written; the summary is printed before.
        """
        rank = self._rank or _rank()
        data = contents(self)
        tensors = {f"{name}/{key}": t for name, (kept, _) in kept_operations(self).items() for key, t in kept.tensors.items()}
        page = None
        try:
            page = write_report(Path(folder) / (f"rank{rank}" if rank else ""), data, tensors)
            return page
        except UsageError as error:
            raise error from None
        finally:
            if not rank:
                print("\n".join(summary(data, str(page or ""))), flush=True)

    # ------------------------------------------------------------------------------------------------- one audited step

    def _start(self) -> None:
        if "torch._dynamo" in sys.modules:  # what torch.compile has compiled runs as it was written, so that all of it is seen
            self._stance = torch.compiler.set_stance("force_eager")
        self._calls.start(self.steps[-1].calls)
        self.recorder.__enter__()
        self.recording = True

    def _stop(self) -> bool:
        """Stop recording, if a step is recorded. Return whether one was."""
        recorded, self.recording = self.recording, False
        if recorded:
            self._guarded("", self.recorder.__exit__, None, None, None)
        self._guarded("", self._calls.stop)
        if self._stance is not None:
            self._guarded("", self._stance.__exit__, None, None, None)
            self._stance = None
        return recorded

    def _finish(self, complete: bool) -> None:
        """Ask the rules about the step that has been recorded. complete: whether it has ended as a step does."""
        step = self.steps[-1]
        step.operations = self.recorder.operations
        self.flags, self._rank = self.flags or flags_in_force(), _rank()
        self.audited.append(step.number)
        if complete:
            step.after = self._borders[self.number] = self._border()
            while len(self._borders) > MOST_BORDERS:
                del self._borders[list(self._borders)[1]]
        parameters = self._guarded("", parameters_of, self.model, self.optimizers) or {}
        view = View(step, tuple(self.steps)[:-1], self._borders, parameters)
        self._view = replace(view, earlier=()) if complete else self._view
        for rule in RULES.values():
            if complete or rule.unended:
                self._guarded(f"rule {rule.code}: ", self._ask, rule, view)
        self.operands.end_step(self.findings, step.number)
        self._guarded("conversions: ", self.conversions.end_step, step.before.scale)

    def _ask(self, rule: Rule, view: View) -> None:
        for finding in rule.find(view):
            known = self.findings.get(finding.code)
            merged(self.findings, finding)
            if is_serious(finding.level) and (known is None or not is_serious(known.level)):
                _say(self.findings[finding.code])

    def _choose(self, operation: Operation) -> Keep:
        """Choose to see the values of every operation."""
        return Keep.VALUES if operation.index < MOST_OPERATIONS else Keep.NOTHING

    def _observe(self, values: Values) -> None:
        operation = values.operation
        operation.verdicts = self._guarded(f"judge of {operation.name}: ", self.judge, values) or ()
        worst_of = self.table.add(self.number + 1, operation)
        for name, probe in PROBES.items():
            measured = self._guarded(f"probe {name}: ", probe, values)
            if measured is not None:
                operation.probed[name] = measured
        self.operands.see(self.number + 1, values, worst_of)
        self.conversions.see(values)

    def _say_all(self, raised: str) -> None:
        """Print the summary on standard error, where the loop has raised."""
        rank = f"rank {_rank()}: " if _rank() else ""
        print(f"audit: {rank}{raised} has ended the loop; what was found until then:", file=sys.stderr)
        print("\n".join(summary(contents(self), "")), file=sys.stderr, flush=True)

    def _border(self) -> Border:
        border = self._guarded("", border_of, self.model, self.optimizers, self.scaler, self.schedulers)
        return border or Border(None, None, (), ())

    def _guarded(self, prefix: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return what a part of the audit returns, or None where it fails: its failures are not the user's."""
        try:
            return function(*args)
        except Exception as error:
            self._failures[one_line(f"{prefix}{type(error).__name__}: {error}", 300)] += 1
            return None


def _say(finding: Finding) -> None:
    """Print a new finding on standard error, in one line."""
    with suppress(Exception):
        where = f" ({finding.line.removeprefix(os.path.join(os.getcwd(), ''))})" if finding.line else ""
        rank = f"rank {_rank()}: " if _rank() else ""
        text = f"audit: {rank}step {finding.step}: {finding.code} {finding.name}{where}: {finding.number}"
        print(fit(one_line(text, 400), sys.stderr), file=sys.stderr, flush=True)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
