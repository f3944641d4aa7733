"""`Recorder`: sees every operation of a PyTorch training step, from the forward pass to the optimizer, and changes none.

    recorder = Recorder(model, [optimizer])
    for batch in loader:
        with recorder:                      # a step to be recorded; other steps run outside, and cost nothing
            ...                             # the user's step, unchanged
        for operation in recorder.operations:
            print(operation.phase, operation.module, operation.name, operation.line)

It is a `TorchDispatchMode`: PyTorch hands it each operation below autograd and autocast, just before the kernel. The Python
frames tell the phase, the line and the module of a forward operation (place.py); the sequence numbers of autograd's nodes tell
which forward operation one of backward belongs to (nodes.py).

A recorded step gives the same parameters, outputs and random numbers, to the bit. So the recorder runs no operation of its own
but clones of what is about to be overwritten, draws no random numbers, reads no value (which would synchronize), puts no hook
on tensors or modules, and keeps no tensor. An exception in it, or in an observer, is kept, and reported once.

What it cannot see: inside kernels that torch.compile has generated (but see `UncompiledRecorder`); a replayed CUDA graph;
kernels that an extension launches without the dispatcher; operations on other threads of the user's.
It has run on the CPU only. On CUDA backward runs on a thread of its own, which nodes.py and the lock here are made for.

Measured with a Llama of 10 M parameters (2,576 operations per step) on one core of a shared machine: 35 microseconds per
operation for its facts, 46 with its values handed to an observer that does nothing. Outside `with` no line of this file runs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode

from refimpl.parity.audit.nodes import Nodes, Site
from refimpl.parity.audit.operation import Keep, Operation, Role, tensors_in
from refimpl.parity.audit.place import Places
from refimpl.parity.audit.roles import Roles, storage_of
from refimpl.parity.audit.values import Values

T = TypeVar("T")
TRACED = (FakeTensor, FunctionalTensor)
"""Tensors without values: somebody traces a program here, and computes nothing."""
ACCUMULATE = "torch::autograd::AccumulateGrad"
"""The node that adds to a parameter's gradient."""
UNDECLARED_WRITES = ("c10d",)
"""Namespaces whose schemas do not say which arguments are written: each tensor may be."""
UNDECLARED_ARGUMENTS = {
    "aten::native_batch_norm": ("running_mean", "running_var"),
    "aten::cudnn_batch_norm": ("running_mean", "running_var"),
    "aten::miopen_batch_norm": ("running_mean", "running_var"),
}
"""Arguments that are written although the schema does not say so."""


class Observer(Protocol):
    """Looks at the values of operations while they are alive."""

    def __call__(self, values: Values) -> None:
        """Look at an operation that has run. No gradients are recorded here, and no operation of the observer is."""


def facts_only(operation: Operation) -> Keep:
    """Choose to keep the facts of every operation and the values of none."""
    return Keep.FACTS


class Recorder(TorchDispatchMode):
    """A context manager; each `with` records one step anew.

    operations: what was kept of the last step's operations, in order. seen: how many there were. failures: exceptions of the
    recorder itself and of observers, by text, with their counts, over all steps.
    """

    # Else PyTorch raises in the user's step where it meets an operation such as flex_attention.
    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        ema: nn.Module | None = None,
        choose: Callable[[Operation], Keep] = facts_only,
        observe: Observer | None = None,
    ) -> None:
        """model, optimizers, ema: where names and roles come from; operations on other tensors are recorded without.

        choose: says how much to keep of an operation, given its facts (outputs not known yet). observe: is handed the values
        of those with `Keep.VALUES`; it runs before the next operation does.
        """
        super().__init__()
        self.operations: list[Operation] = []
        self.seen = 0
        self.failures: Counter[str] = Counter()
        self._first_traceback = ""
        self._model, self._optimizers, self._ema = model, tuple(optimizers), ema
        self._choose, self._observe = choose, observe
        self._places = Places(os.path.dirname(torch.__file__))
        self._schemas: dict[Any, _Schema] = {}
        self._lock = threading.RLock()  # on CUDA, backward runs on one thread per device
        self._recording = self._reported = False
        self._roles: Roles | None = None

    # ------------------------------------------------------------------------------------------------- one recorded step

    def __enter__(self) -> Recorder:
        """Begin to record. RuntimeError if it is recording already."""
        if self._recording:
            raise RuntimeError("this Recorder is recording already: leave its 'with' before entering it again")
        self._recording = True
        self.operations, self.seen = [], 0
        self._gradients_moved = False
        self._module: object = None
        self._nodes = Nodes(threading.get_ident(), torch._C._autograd._get_sequence_nr())
        self._paths = {id(module): path for path, module in self._model.named_modules()}
        self._roles = self._guarded(Roles, self._model, self._optimizers, self._ema)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End the recording, and report the recorder's own failures if there are any for the first time."""
        super().__exit__(*error)
        self._recording, self._roles, self._module = False, None, None
        if self.failures and not self._reported:
            self._reported = True
            count = self.failures.total()
            text = "the recorder or its observer failed %d times; the training continued. The first time:\n%s"
            logging.getLogger(__name__).warning(text, count, self._first_traceback)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell torch.compile to go on in spite of this mode, as it would without."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation as PyTorch would have, and look at it before and after."""
        kwargs = kwargs or {}
        subclasses = [kind for kind in types if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl]
        traced = _tracing() or any(issubclass(kind, TRACED) for kind in subclasses)
        if subclasses and not traced:
            return NotImplemented  # DTensor and its like: their own dispatch runs next, and its operations come here
        call = None if traced else self._guarded(self._before, func, args, kwargs)
        output = func(*args, **kwargs)
        if call is not None:
            self._guarded(self._after, call, output)
        return output

    # ------------------------------------------------------------------------------------------------- one operation

    def _before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """Describe an operation that is about to run, and clone what it overwrites if its values are wanted."""
        if getattr(func, "namespace", "") == "profiler":  # marks of the profiler
            return None
        with self._lock:
            operation = self._describe(func, args, kwargs)
            self.seen += 1
            keep = self._choose(operation)
        if keep is Keep.VALUES and self._observe is not None:
            schema = self._schemas[func]
            named = _named(schema, args, kwargs)
            written = {name: named[name] for name in operation.written}
            args, kwargs = _with_clones(written, args, kwargs)
            return _Call(operation, keep, Values(operation, schema.arguments, args, kwargs, None, written))
        return _Call(operation, keep)

    def _after(self, call: _Call, output: Any) -> None:
        """Keep an operation that has run, and hand it to the observer if its values are wanted."""
        operation = call.operation
        with self._lock:
            if self._roles is not None:
                self._roles.find_new(_tensors(output), tensors_in(operation.arguments))
            if call.keep is not Keep.NOTHING:
                self.operations.append(operation)
            if operation.accumulates is not None and isinstance(output, Tensor) and self._roles is not None:
                self._roles.label(output, Role("gradient", operation.accumulates))
            operation.outputs = self._facts(output)
            if call.values is not None and self._observe is not None:
                call.values.output = output
                try:
                    self._observe(call.values)
                except Exception as error:
                    operation.error = _text(error)
                    raise

    def _describe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
        thread, task = threading.get_ident(), torch._C._current_graph_task_id()
        node: Any = torch._C._current_autograd_node()
        number = torch._C._autograd._get_sequence_nr()
        mark, module, line, code_line = self._places.of(sys._getframe(1))
        made_one = self._nodes.made_one(thread, number)
        phase = _phase(mark, node is not None, made_one)
        recomputed = phase == "forward" and node is not None
        self._nodes.enter_task(thread, task, recomputed)
        origin = self._nodes.site(thread, task, node._sequence_nr()) if node is not None else None
        if origin is not None and not line:  # PyTorch itself calls it: to run or repeat what was called there
            line, code_line = origin.line, code_line or origin.code_line
        site = Site(self._path(module), line or code_line, code_line)
        if phase == "backward" and node is not None:
            site = origin or site
        if made_one:
            self._nodes.record(thread, number, site)
        self._find_roles(phase)
        schema = self._schemas.get(func) or self._schemas.setdefault(func, _schema(func))
        named = _named(schema, args, kwargs)
        operation = Operation(
            index=self.seen, name=schema.name, overload=func,
            arguments={name: self._facts(value) for name, value in named.items()},
            written=tuple(name for name in schema.written if name in named),
            phase=phase, recomputed=recomputed, module=site.module, line=site.line, code_line=site.code_line,
            node=node.name() if node is not None else None,
            sequence=number - 1 if made_one else node._sequence_nr() if node is not None else None,
            accumulates=None,
        )  # fmt: skip
        if node is not None and phase == "backward" and operation.node == ACCUMULATE:
            self._name_accumulated(operation, node.variable)
        return operation

    def _name_accumulated(self, operation: Operation, parameter: Tensor) -> None:
        """Say whose gradient AccumulateGrad adds to. Its node has no number; it belongs to the parameter's module."""
        operation.sequence = None
        if self._roles is not None and (name := self._roles.name(parameter)) is not None:
            operation.accumulates, operation.module = name, name.rpartition(".")[0]

    def _find_roles(self, phase: str) -> None:
        """Look up gradients and states again where they may have moved: after backward, and in the optimizer."""
        if phase == "backward":
            self._gradients_moved = True
        if self._roles is not None and phase not in ("forward", "backward"):
            if self._gradients_moved:
                self._roles.find_parameters()
                self._gradients_moved = False
            if phase == "step" and self._roles.states_are_new():
                self._roles.find_states()

    def storage(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage, as `TensorFacts` have it; None where no step is being recorded."""
        return self._roles.facts(tensor).storage if self._roles is not None else None

    def _facts(self, value: Any) -> Any:
        return self._roles.facts(value) if self._roles is not None else None

    def _path(self, module: object) -> str | None:
        """Return the name of a module, and look up its parameters if it was not the last one's."""
        if module is None:
            return None
        path = self._paths.get(id(module))
        if path is None:
            path = self._paths.get(id(getattr(module, "_orig_mod", None)))  # what torch.compile wraps
        if isinstance(module, nn.Module) and module is not self._module and path is not None and self._roles is not None:
            self._roles.label_module(module, path)
        self._module = module
        return path if path is not None else f"({type(module).__name__})"

    # ------------------------------------------------------------------------------------------------- failures

    def _guarded(self, function: Callable[..., T], *args: Any) -> T | None:
        """Return what a part of the recorder returns, or None where it fails: its failures are not the user's."""
        try:
            return function(*args)
        except Exception as error:
            with suppress(Exception):
                self.failures[_text(error)] += 1
                # The text alone: a traceback holds frames, and those hold tensors.
                self._first_traceback = self._first_traceback or traceback.format_exc()
            return None


class UncompiledRecorder(Recorder):
    """A recorder under which PyTorch runs what torch.compile has compiled, or would, as the program that it was written as.

    So all of it is seen; but a recorded step has that program's bits, and torch.compile(fullgraph=True) raises, which
    flex_attention makes use of.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell torch.compile to step aside."""
        return False


@dataclass(slots=True)
class _Call:
    """An operation that is about to run, with its arguments if an observer wants them."""

    operation: Operation
    keep: Keep
    values: Values | None = None


def _phase(mark: str, in_backward: bool, made_node: bool) -> str:
    """Return the phase of an operation. mark: of its place; made_node: whether autograd has made a node for it."""
    if mark in ("unscale", "clip", "update"):
        return mark
    if mark in ("module", "checkpoint"):
        return "forward"
    if mark == "step":
        return "forward" if made_node else "step"  # a closure's loss
    if mark == "backward" or in_backward:
        return "backward"
    return "forward" if made_node else "other"


class _Schema(NamedTuple):
    """What is known of an operation before it is called: its name, its arguments' names, and which of them it writes to."""

    name: str
    arguments: tuple[str, ...]
    written: tuple[str, ...]


def _schema(func: Any) -> _Schema:
    schema = getattr(func, "_schema", None)
    if schema is None:  # an operation of higher order
        return _Schema(str(func), (), ())
    undeclared, known = func.namespace in UNDECLARED_WRITES, UNDECLARED_ARGUMENTS.get(schema.name, ())
    written = [
        a.name for a in schema.arguments
        if undeclared or a.name in known or (a.alias_info is not None and a.alias_info.is_write)
    ]  # fmt: skip
    return _Schema(str(func), tuple(a.name for a in schema.arguments), tuple(written))


def _named(schema: _Schema, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names of the schema; those without a name there by their position."""
    unnamed = (str(i) for i in range(len(schema.arguments), len(args)))
    return {**dict(zip((*schema.arguments, *unnamed), args, strict=False)), **kwargs}


def _with_clones(
    written: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return args and kwargs, in which every tensor that is about to be written, or shares memory with one, is a clone."""
    targets = list(_tensors(list(written.values())))
    if not targets:
        return args, dict(kwargs)
    same = {id(t) for t in targets}
    storages = {storage._cdata for t in targets if (storage := storage_of(t)) is not None}

    def saved(value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = storage_of(value)
            shares = storage is not None and storage._cdata in storages
            return value.clone() if shares or id(value) in same else value
        if isinstance(value, list | tuple):
            return type(value)(saved(part) for part in value)
        return value

    return tuple(saved(value) for value in args), {name: saved(value) for name, value in kwargs.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _tracing() -> bool:
    """Return whether a FakeTensorMode is active: operations make tensors without values."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
