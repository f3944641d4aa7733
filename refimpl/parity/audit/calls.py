"""`CallWatch`: notes calls that are no operations, of backward and of optimizers, while a step is audited."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from refimpl.parity.audit.place import Places
from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.step import Call


class CallWatch:
    """Between `start` and `stop`, each call of `torch.autograd.backward` and of an optimizer's step is noted."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], seen: Callable[[], int]) -> None:
        """seen: returns how many operations of the step have run."""
        self._optimizers, self._seen = optimizers, seen
        self._places = Places(torch.__path__[0])
        self._calls: list[Call] = []
        self._undo: list[Callable[[], None]] = []

    def start(self, calls: list[Call]) -> None:
        """Begin to note calls, in the list `calls`."""
        self._calls = calls
        backward = torch.autograd.backward

        def noted_backward(*args: Any, **kwargs: Any) -> Any:
            self._note("backward")
            return backward(*args, **kwargs)

        def restore() -> None:
            torch.autograd.backward = backward

        torch.autograd.backward = noted_backward
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
            device = next((d for d in ("cuda", "cpu") if torch.is_autocast_enabled(d)), None)
            dtype = name_of(torch.get_autocast_dtype(device)) if device is not None else ""
            self._calls.append(Call(name, self._seen(), line, dtype, which))
