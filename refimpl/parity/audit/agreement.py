"""`TwinAudit`: the PyTorch training of scripts/compare_pytorch.py under the audit, and whether the two judges agree.

The comparison judges tensors of a step: it computes each by refimpl's definitions from the others, as PyTorch had them, within
one bound for the tensor. The audit judges each operation of PyTorch on that operation's own inputs. So a tensor is made by the
operations between it and the tensors that the comparison starts from: for stage 2 the outputs, their gradients and the weights;
for stages 3 and 4 the gradients as backward left them, and the state before the step. They are followed by storage, from each
result to the last operation that wrote what it reads.

Both have judged a tensor if the comparison has a finding on it and the audit has a verdict on every operation that makes it.
Results in FP64 are what the audit compares with, and need none. In each step nothing after the first departure is counted: the
comparison's bounds of FP32 tensors grow with it. Of tensors that no operation lies between, as the gradient that an addition
passes on, the first one is counted.

They agree if each tensor that departs is made by an operation with a level above 'note', and each operation that is 'wrong'
makes a tensor that departs. The levels between say that a result within its bound is worse than it need be, which the
comparison does not look for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.judge.judge import produces
from refimpl.parity.audit.operation import Operation, TensorFacts
from refimpl.parity.audit.origins import named_tensors, result_facts
from refimpl.parity.audit.session import Audit
from refimpl.parity.audit.verdict import Verdict
from refimpl.parity.findings import Finding

if TYPE_CHECKING:
    from refimpl.parity.pytorch_model import PyTorchTraining

STARTS = ("1.", "2.")
"""Points whose tensors the comparison starts from."""
COPIES = ("aten.clone.",)
"""What they return has the values of what they read: backward keeps the gradient of an output so."""
SHOWN = 5
"""How many disagreements are printed."""


@dataclass(frozen=True)
class Both:
    """A tensor that both have judged. made: the results that it is made of, with the audit's verdicts."""

    finding: Finding
    made: tuple[tuple[Operation, Verdict], ...]

    @property
    def wrong(self) -> set[tuple[int, int, str]]:
        """Return the results of operations that are wrong, by step, operation and name."""
        return {(self.finding.step, operation.index, v.result) for operation, v in self.made if v.level == "wrong"}

    @property
    def worst(self) -> tuple[Operation, Verdict]:
        """Return the operation that is farthest beyond its bound, with its verdict."""
        return max(self.made, key=lambda each: (is_serious(each[1].level), each[1].ratio))

    @property
    def sentence(self) -> str:
        """Return what each judge says, in words."""
        finding, (operation, verdict) = self.finding, self.worst
        other = f"{operation.name} is {verdict.level}: {verdict.reason}"
        if not is_serious(verdict.level):
            n = len({made.index for made, _ in self.made})
            other = "its operation is right" if n == 1 else f"its {n} operations are right"
        own = finding.note or f"{finding.error:.3g} times its bound"
        return f"{finding.where}: the comparison {'departs' if finding.departs else 'agrees'} ({own}); by the audit {other}"


@dataclass
class Agreement:
    """both: the tensors that both have judged. alone: how many only the comparison has."""

    both: list[Both] = field(default_factory=list)
    alone: int = 0

    @property
    def disagreements(self) -> list[Both]:
        """Return the tensors on which the judges do not agree."""
        known = {result for each in self.both if each.finding.departs for result in each.wrong}
        found: list[Both] = []
        for each in self.both:
            departs = each.finding.departs
            if not any(is_serious(v.level) for _, v in each.made) if departs else each.wrong - known:
                found.append(each)
                known |= each.wrong  # named once, at the first tensor that it makes
        return found

    @property
    def operations(self) -> int:
        """Return how many operations the tensors that both have judged are made by."""
        return len({(each.finding.step, operation.index) for each in self.both for operation, _ in each.made})

    def summary(self) -> dict[str, Any]:
        """Return the figures, as `--json` writes them."""
        return {
            "operations": self.operations, "tensors": len(self.both), "tensors_of_the_comparison_alone": self.alone,
            "disagreements": [each.sentence for each in self.disagreements],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """Return the lines of the printed report: how many agree, and those that do not."""
        apart = self.disagreements
        total = f"{len(self.both)} tensors, made by {self.operations} operations of PyTorch"
        verdict = f"disagree on {len(apart)}:" if apart else "agree on all of them"
        more = [f"  and {len(apart) - SHOWN} more"] if len(apart) > SHOWN else []
        told = [f"  {each.sentence}" for each in apart[:SHOWN]]
        return [f"the audit has judged {total}, too: the two judges {verdict}", *told, *more]


class TwinAudit:
    """A context manager around the PyTorch training: its first steps, those with a trace, are audited."""

    def __init__(self, twin: PyTorchTraining, steps: int) -> None:
        scaler = twin.scaler if twin.scaler.is_enabled() else None
        self.audit = Audit(twin.model, twin.optimizer, scaler=scaler, steps=steps, every=10**9)
        self._seen: dict[int, dict[tuple[str, str], _Read]] = {}
        twin.watch = self._see

    def __enter__(self) -> TwinAudit:
        self.audit.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.audit.end(kind.__name__ if kind is not None else "")

    def step(self) -> None:
        """End a step of the training."""
        self.audit.step()

    def _see(self, point: str, name: str, tensor: Tensor) -> None:
        """Note where a tensor of the trace is, while it is there."""
        recorder = self.audit.recorder
        storage = recorder.storage(tensor)
        if storage is not None:
            self._seen.setdefault(self.audit.number + 1, {})[point, name] = _Read(storage, recorder.seen)

    def agreement(self, findings: Iterable[Finding]) -> Agreement:
        """Return the comparison's findings beside the audit's verdicts."""
        steps = {step.number: step.operations for step in self.audit.steps}
        origins = {number: _Origins(operations, self._seen.get(number, {})) for number, operations in steps.items()}
        result, taken, departed = Agreement(), set[tuple[int, _Result]](), set[int]()
        for finding in findings:
            place, origin = (finding.point, finding.name), origins.get(finding.step)
            first = origin.first(place) if origin is not None else None
            if origin is None or first is None or (finding.step, first) in taken or finding.step in departed:
                result.alone += 1
                continue
            taken.add((finding.step, first))
            if finding.departs:
                departed.add(finding.step)
            made = origin.verdicts(place)
            if made:
                result.both.append(Both(finding, made))
            else:
                result.alone += 1
        return result


class _Read(NamedTuple):
    """Where a tensor was when the trace took it down: its storage, and how many operations had been seen."""

    storage: int
    before: int


class _Result(NamedTuple):
    """A result of an operation, by the operation's index, and the name that `Values.results` gives it."""

    operation: int
    name: str


class _Origins:
    """What the tensors of one step are made of."""

    def __init__(self, operations: list[Operation], seen: dict[tuple[str, str], _Read]) -> None:
        self.operations = {operation.index: operation for operation in operations}
        self.seen = seen
        self.writers: dict[int, list[_Result]] = {}
        for operation in operations:
            for name, storage in _writes(operation):
                self.writers.setdefault(storage, []).append(_Result(operation.index, name))

    def writer(self, storage: int | None, before: int) -> _Result | None:
        """Return the last result in a storage of the operations before one, None if no operation of the step made it."""
        if storage is None:
            return None
        return next((result for result in reversed(self.writers.get(storage, ())) if result.operation < before), None)

    def same(self, place: tuple[str, str]) -> list[_Result]:
        """Return the result that is a tensor of the trace, and those that it is a copy of."""
        read = self.seen.get(place)
        found: list[_Result | None] = [self.writer(*read)] if read is not None else [None]
        while (last := found[-1]) is not None and self.operations[last.operation].name.startswith(COPIES):
            found.append(next(self.sources(last), None))
        return [result for result in found if result is not None]

    def first(self, place: tuple[str, str]) -> _Result | None:
        """Return the result that has the values of a tensor of the trace first."""
        return next(reversed(self.same(place)), None)

    @cached_property
    def starts(self) -> set[_Result]:
        """The results that the comparison starts from."""
        return {result for place in self.seen if place[0].startswith(STARTS) for result in self.same(place)}

    def sources(self, result: _Result) -> Iterator[_Result]:
        """Yield the results that one is computed from. Of lists, only what stands at its own place where it is in one too."""
        operation, place = self.operations[result.operation], result.name.partition(".")[2]
        for name, value in named_tensors(operation.arguments):
            there = name.partition(".")[2]
            if isinstance(value, TensorFacts) and (not place or not there or place == there):
                source = self.writer(value.storage, result.operation)
                if source is not None:
                    yield source

    def made_of(self, place: tuple[str, str]) -> set[_Result]:
        """Return the results between a tensor and those that the comparison starts from."""
        own = self.same(place)
        waiting, found = own[:1], set[_Result]()
        while waiting:
            result = waiting.pop()
            if result not in found and (result in own or result not in self.starts):
                found.add(result)
                waiting.extend(self.sources(result))
        return found

    def verdicts(self, place: tuple[str, str]) -> tuple[tuple[Operation, Verdict], ...]:
        """Return the verdicts over what a tensor is made of; none if the audit has not judged all of it."""
        made: list[tuple[Operation, Verdict]] = []
        for result in sorted(self.made_of(place)):
            operation = self.operations[result.operation]
            verdict = next((v for v in operation.verdicts if v.result == result.name), None)
            if verdict is not None:
                made.append((operation, verdict))
            elif _is_arithmetic(operation, result.name):
                return ()
        return tuple(made)


def _writes(operation: Operation) -> Iterator[tuple[str, int]]:
    """Yield the results of an operation that it has written to, with their storages: not those that only look at its inputs."""
    inputs = {value.storage for _, value in named_tensors(operation.arguments) if isinstance(value, TensorFacts)}
    for name, value in result_facts(operation):
        if value.storage is not None and (name.partition(".")[0] in operation.written or value.storage not in inputs):
            yield name, value.storage


def _is_arithmetic(operation: Operation, result: str) -> bool:
    """Return whether a result has floating-point numbers, in less than FP64, that the operation has computed."""
    dtype = next((value.dtype for name, value in result_facts(operation) if name == result), "")
    return "float" in dtype and dtype != "float64" and produces(operation)
