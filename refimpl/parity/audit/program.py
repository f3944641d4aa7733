"""`ProgramAudit`: audits a program that knows nothing of it, and finds by itself where its steps begin and end.

A step begins where a module with trained parameters is called with gradients on. It has made its update when an optimizer or
a GradScaler has stepped, and ends where the next module is called: so what a loop does after its update (a scheduler, averaged
weights) belongs to it, and an evaluation, or the reading of the next batch, to no step if the batch comes from no module.

Modules are watched only where a step may begin or end: in an unaudited step each call of `backward`, of an optimizer and of a
GradScaler costs one Python call more, and nothing else is different.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from refimpl.errors import one_line
from refimpl.parity.audit.found import objects_alive, training_objects
from refimpl.parity.audit.session import Audit

CALL = "__call__"
SLOW = 5.0
"""Seconds from which an audited step is reported when it ends: there is no other sign of progress."""


class ProgramAudit:
    """A context manager around a program. audit: the audit of its training, None until one was found."""

    def __init__(self, steps: int = 4, every: int = 100, say: Callable[[str], None] = lambda line: None) -> None:
        """steps, every: as for `Audit`. say: callback with a line about what was found, and about each slow step."""
        self.audit: Audit | None = None
        self._options = {"steps": steps, "every": every}
        self._say = say
        self._open = ExitStack()
        self._place = os.getpid(), threading.get_ident()
        self._call = nn.Module.__call__
        self._watching = self._entered = False
        self._backward = self._updated = False  # since the last border
        self._busy, self._begun = False, 0.0

    def __enter__(self) -> ProgramAudit:
        """Begin to look for a training."""
        self._earlier = objects_alive()
        self._open.callback(register_optimizer_step_pre_hook(self._stepping).remove)
        self._open.callback(register_optimizer_step_post_hook(lambda *_: self._guarded(self._update)).remove)
        self._wrap(torch.autograd, "backward", before=self._note_backward)
        for kind in _with_subclasses(torch.amp.GradScaler):
            for name in ("step", "update"):
                if name in vars(kind):
                    self._wrap(kind, name, after=self._update)
        self._watch_modules()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """End the audit, and put everything back."""
        self._unwatch_modules()
        if self.audit is not None and self._entered:
            as_planned = kind is None or issubclass(kind, SystemExit)
            if self._updated:
                self.audit.end_step()
            self.audit.end("" if as_planned else kind.__name__)
            if as_planned and self.audit.unended and not self.audit.number:
                self.audit.unended = "no optimizer has made a step"
        self._open.close()

    # ------------------------------------------------------------------------------------------------------- what is seen

    def _called(self, module: nn.Module) -> None:
        """A module is called: a step may begin or end here."""
        if self._updated:
            if self.audit is not None and self.audit.recording and not self.audit.on_top:
                return  # inside of a mode of the program's own: later
            self._border()
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in module.parameters()):
            return
        if torch._C._len_torch_dispatch_stack():
            return  # the program would leave its mode before we leave ours
        if self.audit is None and not self._find(module):
            return
        self._begin()

    def _stepping(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step; if with a closure, which is a whole step, the step before ends here."""
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is not None and self._updated and self._here():
            self._guarded(self._border)
            self._guarded(self._begin)

    def _note_backward(self) -> None:
        self._backward = True

    def _update(self) -> None:
        """An optimizer or a GradScaler has stepped: an audited step ends at the next call of a module, others here."""
        if self.audit is None:
            if not self._find(None):
                return
            self._updated = True
        if self.audit is not None and self.audit.recording:
            self._updated = True
            self._watch_modules()
        elif self._backward or self._updated:
            self._border()

    # ------------------------------------------------------------------------------------------------------- what is done

    def _find(self, called: nn.Module | None) -> bool:
        """Look for what trains. Return whether anything does."""
        found = training_objects(self._earlier, called)
        if found is None:
            return False
        self.audit = Audit(
            found.model, found.optimizers, scaler=found.scaler, scheduler=found.schedulers, ema=found.ema, **self._options
        )
        self._say(f"found {found.text}")
        return True

    def _border(self) -> None:
        assert self.audit is not None
        self._backward = self._updated = False
        self.audit.end_step()
        seconds = time.monotonic() - self._begun
        if seconds >= SLOW and self.audit.audited[-1:] == [self.audit.number]:
            self._say(f"step {self.audit.number} was audited, in {seconds:.0f} s")
        if self.audit.due:
            self._watch_modules()
        else:
            self._unwatch_modules()

    def _begin(self) -> None:
        assert self.audit is not None
        self._unwatch_modules()
        self._begun = time.monotonic()
        if self._entered:
            self.audit.begin_step()
        else:
            self._entered = True
            self.audit.__enter__()

    def _watch_modules(self) -> None:
        if self._watching:
            return
        self._watching, call = True, nn.Module.__call__

        def noted_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._watching and self._here():
                self._guarded(self._called, module)
            return call(module, *args, **kwargs)

        self._call = call
        setattr(nn.Module, CALL, noted_call)

    def _unwatch_modules(self) -> None:
        if self._watching:
            self._watching = False
            setattr(nn.Module, CALL, self._call)

    def _wrap(
        self, owner: Any, name: str, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
    ) -> None:
        """Call functions before and after a function of PyTorch's, until the audit ends."""
        function = vars(owner)[name]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before()
            result = function(*args, **kwargs)
            if after is not None:
                self._guarded(after)
            return result

        setattr(owner, name, wrapped)
        self._open.callback(setattr, owner, name, function)

    def _here(self) -> bool:
        """Return whether it is the program's main thread that calls: no other, no worker process, and not the audit itself."""
        return (os.getpid(), threading.get_ident()) == self._place and not self._busy

    def _guarded(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a part of the audit; its failures are not the program's."""
        if not self._here():
            return
        self._busy = True
        try:
            function(*args)
        except Exception as error:
            self._unwatch_modules()
            print(one_line(f"audit: {type(error).__name__}: {error}; the program continues", 400), file=sys.stderr)
        finally:
            self._busy = False


def _with_subclasses(kind: Any) -> list[Any]:
    children: list[Any] = kind.__subclasses__()
    return [kind, *(each for child in children for each in _with_subclasses(child))]
