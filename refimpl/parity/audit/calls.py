"""`CallWatch`: notes calls that are not operations, of backward and of optimizers, while a step is audited."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from refimpl.parity.audit.place import Places
from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.step import Call

DEVICES = ("cuda", "cpu")


class CallWatch:
    """Between `start` and `stop`, calls of `torch.autograd.backward` and of optimizers, and regions of autocast, are noted."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], seen: Callable[[], int]) -> None:
        """seen: returns how many operations of the step have run."""
        self._optimizers, self._seen = optimizers, seen
        self._places = Places(torch.__path__[0])
        self._calls: list[Call] = []
        self._undo: list[Callable[[], None]] = []

    def start(self, calls: list[Call]) -> None:
        """Begin to note calls, in the list `calls`."""
        self._calls = calls
        backward, set_dtype = torch.autograd.backward, torch.set_autocast_dtype

        def noted_set_dtype(*args: Any, **kwargs: Any) -> None:  # the last of what a region of autocast sets, and restores
            set_dtype(*args, **kwargs)
            self._note("autocast")

        def noted_backward(*args: Any, **kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() < 0:  # else a node calls it: checkpointing, of what it has repeated
                self._note("backward")
            return backward(*args, **kwargs)

        def restore() -> None:
            torch.autograd.backward, torch.set_autocast_dtype = backward, set_dtype

        torch.autograd.backward, torch.set_autocast_dtype = noted_backward, noted_set_dtype
        if any(map(torch.is_autocast_enabled, DEVICES)):
            self._note("autocast")
        self._undo.append(restore)
        for i, optimizer in enumerate(self._optimizers):
            handle = optimizer.register_step_pre_hook(lambda *_, which=i: self._note("optimizer.step", which))
            self._undo.append(handle.remove)

    def stop(self) -> None:
        """Put everything back as it was."""
        while self._undo:
            self._undo.pop()()

    def _note(self, name: str, which: int | None = None) -> None:
        with suppress(Exception):
            line = self._places.of(sys._getframe(1)).line
            device = next(filter(torch.is_autocast_enabled, DEVICES), None)
            dtype = name_of(torch.get_autocast_dtype(device)) if device is not None else ""
            self._calls.append(Call(name, self._seen(), line, dtype, which))
