"""`Audit`: the context manager around a user's training loop."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.parity.audit.finding import Finding, merged
from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.operation import Keep, Operation
from refimpl.parity.audit.place import Places
from refimpl.parity.audit.recorder import Recorder
from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.rules.table import PROBES, RULES
from refimpl.parity.audit.step import Border, Call, OptimizerFacts, ParameterFacts, Step, View
from refimpl.parity.audit.values import Values

EARLIER = 3
"""How many audited steps are kept beside the current one."""


class Audit:
    """Audits a training loop; `step()` ends each of its steps.

    findings: the mistakes found so far, by code. steps: the audited steps that are kept, the newest last.
    """

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
        """optimizer, scheduler: one, or several. steps: how many of the first are audited, and then one in `every`."""
        self._model, self._scaler = model, scaler
        self._optimizers = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
        several = isinstance(scheduler, list | tuple)
        self._schedulers = tuple(scheduler) if several else () if scheduler is None else (scheduler,)
        self._first, self._every = steps, every
        self.judge = Judge()
        self.findings: dict[str, Finding] = {}
        self.steps: deque[Step] = deque(maxlen=EARLIER + 1)
        self.recorder = Recorder(model, self._optimizers, ema, choose=_all, observe=self._observe)
        self._borders: dict[int, Border] = {}
        self._number = 0
        self._recording = False
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Audit:
        """Begin the audit, at the beginning of a step."""
        self._borders[0] = self._border(True)
        self._begin()
        return self

    def __exit__(self, *error: Any) -> None:
        """End it; a step that has begun and was not ended is not judged."""
        self._stop()

    def step(self) -> None:
        """End a step of the training, and begin the next."""
        ended = self._recording
        self._stop()
        self._number += 1
        if ended:
            step = self.steps[-1]
            step.operations = self.recorder.operations
            step.after = self._borders[self._number] = self._border(True)
            self._find()
        self._begin()

    @property
    def parameters(self) -> Mapping[str, ParameterFacts]:
        """The model's parameters by name."""
        owners: dict[int, list[int]] = {}
        for i, optimizer in enumerate(self._optimizers):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    owners.setdefault(id(p), []).append(i)
        return {
            name: ParameterFacts(tuple(p.shape), name_of(p.dtype), p.requires_grad, tuple(owners.get(id(p), ())))
            for name, p in self._model.named_parameters()
        }

    # ------------------------------------------------------------------------------------------------- one audited step

    def _due(self) -> bool:
        following = self._number + 1
        return following <= self._first or following % self._every == 0

    def _begin(self) -> None:
        if not self._due():
            return
        before = self._borders.setdefault(self._number, self._border(True))
        self.steps.append(Step(self._number + 1, before))
        self._watch_calls(self.steps[-1].calls)
        self.recorder.__enter__()
        self._recording = True

    def _stop(self) -> None:
        if self._recording:
            self.recorder.__exit__(None, None, None)
            self._recording = False
        while self._undo:
            self._undo.pop()()

    def _observe(self, values: Values) -> None:
        operation = values.operation
        operation.verdicts = self.judge(values)
        for name, probe in PROBES.items():
            measured = probe(values)
            if measured is not None:
                operation.probed[name] = measured

    def _find(self) -> None:
        view = View(self.steps[-1], tuple(self.steps)[:-1], self._borders, self.parameters)
        for each in RULES.values():
            for finding in each.find(view):
                merged(self.findings, finding)

    def _border(self, audited: bool) -> Border:
        scale = tracker = None
        if audited and self._scaler is not None and self._scaler.is_enabled():
            scale, tracker = float(self._scaler.get_scale()), int(self._scaler._get_growth_tracker())
        names = {id(p): name for name, p in self._model.named_parameters()}
        optimizers = tuple(_optimizer_facts(o, names) for o in self._optimizers)
        return Border(scale, tracker, optimizers, tuple(int(s.last_epoch) for s in self._schedulers))

    def _watch_calls(self, calls: list[Call]) -> None:
        """Note calls of backward and of optimizers, until `_undo` is called."""
        backward = torch.autograd.backward
        places = Places(torch.__path__[0])

        def note(name: str, which: int | None = None) -> None:
            with suppress(Exception):
                line = places.of(sys._getframe(1)).line
                device = next((d for d in ("cuda", "cpu") if torch.is_autocast_enabled(d)), None)
                dtype = name_of(torch.get_autocast_dtype(device)) if device is not None else ""
                calls.append(Call(name, self.recorder.seen, line, dtype, which))

        def noted_backward(*args: Any, **kwargs: Any) -> Any:
            note("backward")
            return backward(*args, **kwargs)

        def restore() -> None:
            torch.autograd.backward = backward

        torch.autograd.backward = noted_backward
        self._undo.append(restore)
        for i, optimizer in enumerate(self._optimizers):
            handle = optimizer.register_step_pre_hook(lambda *_, which=i: note("optimizer.step", which))
            self._undo.append(handle.remove)


def _all(operation: Operation) -> Keep:
    """Choose to see the values of every operation."""
    return Keep.VALUES


def _optimizer_facts(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> OptimizerFacts:
    groups, updates, formats = [], dict[str, float](), dict[tuple[str, str], int]()
    for group in optimizer.param_groups:
        plain = {key: v for key, v in group.items() if key != "params"}
        plain |= {key: float(v) for key, v in plain.items() if isinstance(v, Tensor) and v.numel() == 1}
        groups.append({**plain, "names": tuple(names.get(id(p), "") for p in group["params"])})
    for p, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, Mapping) else ():
            if key == "step" and not isinstance(value, bool):
                updates[names.get(id(p), "")] = float(value)
            elif isinstance(value, Tensor):
                entry = (str(key), name_of(value.dtype))
                formats[entry] = formats.get(entry, 0) + value.numel()
    return OptimizerFacts(type(optimizer).__name__, tuple(groups), updates, formats)
