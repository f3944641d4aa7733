"""One forward and backward pass of a model of transformers: every operation with its 16-bit results, and the audit's verdicts.

The recorder of the audit sees each operation of PyTorch below autograd and autocast, and says which module it belongs to; in
backward, which forward operation it differentiates. So a result is found by its module and by what it was computed from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from refimpl.errors import UsageError
from refimpl.numerics.bits import from_bits
from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.judge.judge import Judge, produces
from refimpl.parity.audit.operation import Keep, Operation, TensorFacts
from refimpl.parity.audit.recorder import Recorder
from refimpl.parity.audit.values import Values, is_float
from refimpl.parity.tolerances import fp64
from refimpl.parity.trace import Trace
from refimpl.parity.transformers.training import TransformersTraining

SUM = "aten.add.Tensor"
"""In backward: the engine adds two gradients of one tensor. No formula of a derivative here has another addition."""


class Result(NamedTuple):
    """A floating-point result of an operation. name: as `Values.results` has it. array: its values, if they have 16 bits."""

    operation: Operation
    name: str
    facts: TensorFacts
    array: np.ndarray | None

    @property
    def values(self) -> np.ndarray:
        """Return the values of a result that is known to have 16 bits. Errors: LookupError if it has more."""
        if self.array is None:
            raise LookupError(f"{self.operation.name} of {self.operation.module} has {self.facts.dtype}, not 16 bits")
        return self.array

    def read(self, argument: str) -> int | None:
        """Return the storage of an argument that is a tensor."""
        value = self.operation.arguments.get(argument)
        return value.storage if isinstance(value, TensorFacts) else None

    @property
    def reads(self) -> set[int | None]:
        """Return the storages of all arguments."""
        return {value.storage for value in self.operation.arguments.values() if isinstance(value, TensorFacts)}

    def is_a(self, *names: str) -> bool:
        """Return whether the operation has one of these names, without namespace and overload: 'mm'."""
        return self.operation.name.split(".")[1] in names


@dataclass
class Module:
    """The results of one module, in order; those that backward makes, without the sums of the engine, and those sums."""

    forward: list[Result] = field(default_factory=list)
    backward: list[Result] = field(default_factory=list)
    sums: list[Result] = field(default_factory=list)

    def of(self, *names: str, phase: str = "forward") -> list[Result]:
        """Return the results of operations of these names."""
        return [result for result in getattr(self, phase) if result.is_a(*names)]

    def after(self, result: Result) -> list[Result]:
        """Return what backward makes for a forward operation."""
        return [each for each in self.backward if each.operation.sequence == result.operation.sequence]


class Recording:
    """A recorded pass.

    modules: results by the path of their module. results: all with 16 bits, in order. sums: those of the engine. log_sums: the
    logarithms of the sums of exponentials, in FP32, of each row of the loss. trace: outputs and gradients of our places, and
    gradients of parameters, in FP32. loss: not scaled. judge: the audit's judge, which has judged every operation; serious:
    those that it minds.
    """

    def __init__(self, training: TransformersTraining, tokens: np.ndarray, targets: np.ndarray, S: float) -> None:
        """Run the pass. S: what backward starts from. Errors: UsageError if the recorder itself has failed."""
        self.modules: dict[str, Module] = {}
        self.results: list[Result] = []
        self.sums: list[Result] = []
        self.serious: list[Operation] = []
        self.log_sums: np.ndarray | None = None
        self.trace, self.judge = Trace(), Judge()
        recorder = Recorder(training.model, choose=_choose, observe=self._see)
        with recorder:
            self.loss = training.forward_backward(tokens, targets, S, self.trace)
        if recorder.failures:
            raise UsageError(f"the pass of transformers could not be recorded: {next(iter(recorder.failures))}")

    def _see(self, values: Values) -> None:
        operation = values.operation
        if not produces(operation):
            return
        operation.verdicts = self.judge(values)
        if any(is_serious(verdict.level) for verdict in operation.verdicts):
            self.serious.append(operation)
        if operation.name.startswith("aten._log_softmax.") and values.output.dtype == torch.float32:
            self.log_sums = to_numpy(-values.output.amax(-1, keepdim=True))  # the largest logit minus itself and the logarithm
        for name, tensor in values.results():
            if is_float(tensor):
                facts = _facts(operation, name)
                low = tensor.dtype in (torch.bfloat16, torch.float16)
                self._add(Result(operation, name, facts, to_numpy(tensor.clone()) if low else None))

    def _add(self, result: Result) -> None:
        operation = result.operation
        module = self.module(operation.module or "")
        if result.array is not None:
            self.results.append(result)
        if operation.phase == "forward":
            module.forward.append(result)
        elif operation.name == SUM:
            module.sums.append(result)
            self.sums.append(result)
        else:
            module.backward.append(result)

    def module(self, path: str) -> Module:
        """Return the results of a module; none, if nothing ran in it."""
        return self.modules.setdefault(path, Module())

    def errors_of_log_sums(self) -> np.ndarray | None:
        """Return how far each is from FP64's, computed from the same logits; None if they were not recorded."""
        logits = self.trace.get(1, "2.activations", "lm_head")
        if self.log_sums is None or logits is None:
            return None
        z = fp64(logits).reshape(len(self.log_sums), -1)
        errors: np.ndarray = fp64(self.log_sums) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        return errors

    def casts_of(self, parameter: str) -> list[Result]:
        """Return the 16-bit copies of a parameter that autocast has made."""
        return [each for each in self.results if each.is_a("_to_copy") and parameter in _parameters(each.operation)]


def _choose(operation: Operation) -> Keep:
    return Keep.VALUES if operation.phase in ("forward", "backward", "other") else Keep.NOTHING


def _parameters(operation: Operation) -> Iterator[str]:
    for value in operation.arguments.values():
        if isinstance(value, TensorFacts) and value.role is not None and value.role.kind == "parameter":
            yield value.role.name


def is_of_parameter(result: Result) -> bool:
    """Return whether an operation reads a parameter itself."""
    return any(True for _ in _parameters(result.operation))


def _facts(operation: Operation, name: str) -> TensorFacts:
    """Return the facts of a result: 'out', 'out.1', or the name of an argument."""
    first, _, place = name.partition(".")
    value: Any = operation.outputs if first == "out" else operation.arguments[first]
    facts = value[int(place)] if place else value
    assert isinstance(facts, TensorFacts)
    return facts


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor as an array of the same format."""
    x = x.detach().contiguous()
    array: np.ndarray = from_bits(x.view(torch.uint16).numpy(), "bf16") if x.dtype == torch.bfloat16 else x.numpy()
    return array
