"""`Operands`: the arguments and results of a few operations, kept so that what was found in them can be judged once more.

Kept are those of the worst operation of each kind whose verdict is above a note, and those of the operations that findings rest
on. Of these it is known only at the end of a step which they are, so that until then more are kept: of each kind the first few
on which a rule has measured something.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.finding import Finding, is_serious
from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.operation import Operation
from refimpl.parity.audit.report.excerpts import excerpt
from refimpl.parity.audit.report.operation_table import Kind, plain
from refimpl.parity.audit.rules.table import PROBES
from refimpl.parity.audit.values import Values

MOST_BYTES = 8 << 20
"""Of one operation. Of a larger one an excerpt is kept, or nothing, which the report says."""
MOST_BYTES_OF_ALL = 64 << 20
ENOUGH = f"the operands of others have {MOST_BYTES_OF_ALL >> 20} MiB already, and no more are kept"
FIRST = 2
"""How many operations of each name are kept per measurement of a rule, until the step ends."""
CONSTANTS = {"$dtype": torch.dtype, "$layout": torch.layout, "$memory_format": torch.memory_format}
"""Arguments that are written as {kind: name}; no argument has a name with a dollar sign."""


class CannotKeep(Exception):
    """Raised where an operation cannot be kept; its text is the reason, for the report."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An operation with its tensors as they were before it ran, and its results.

    values: args, kwargs, output and written of its `Values`, as plain data that refer to tensors by name. verdicts, measured:
    what judge and rules say of it, as data. excerpt: whether it is a part of the operation. skipped: why nothing was kept.
    """

    step: int
    operation: Operation
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    verdicts: list[dict[str, Any]]
    measured: dict[str, str]
    excerpt: bool = False
    skipped: str = ""

    @property
    def bytes(self) -> int:
        """How much memory its tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def data(self, name: str) -> dict[str, Any]:
        """Return it as plain data, under a name."""
        operation = self.operation
        return {
            "id": name,
            "step": self.step,
            "operation": operation.index,
            "name": operation.name,
            "phase": operation.phase,
            "module": operation.module,
            "line": operation.line,
            "values": self.values,
            "verdicts": self.verdicts,
            "measured": self.measured,
            "excerpt": self.excerpt,
            "skipped": self.skipped,
        }


class Operands:
    """What is kept. worst: by kind of operation; of_findings: by code."""

    def __init__(self) -> None:
        self.worst: dict[Kind, Kept] = {}
        self.of_findings: dict[str, Kept] = {}
        self._step: dict[int, Kept] = {}
        self._bytes = 0
        self._measured: Counter[tuple[str, str]] = Counter()

    def see(self, step: int, values: Values, worst_of: list[Kind]) -> None:
        """Look at an operation that was judged and measured. worst_of: the kinds of which it is the worst so far."""
        operation = values.operation
        bad = any(is_serious(verdict.level) for verdict in operation.verdicts)
        new = False
        for probe in operation.probed:
            self._measured[probe, operation.name] += 1
            new = new or self._measured[probe, operation.name] <= FIRST
        if not new and not (bad and worst_of):
            return
        kept = kept_of(step, values)
        if bad:
            others = sum(each.bytes for kind, each in self.worst.items() if kind not in worst_of)
            fits = others + kept.bytes <= MOST_BYTES_OF_ALL
            self.worst |= dict.fromkeys(worst_of, kept if fits else replace(kept, tensors={}, skipped=ENOUGH))
        if self._bytes + kept.bytes <= MOST_BYTES_OF_ALL:
            self._bytes += kept.bytes
            self._step[operation.index] = kept

    def end_step(self, findings: Mapping[str, Finding], step: int) -> None:
        """Keep those that new findings rest on, and let go of the others of the step."""
        for code, finding in findings.items():
            if finding.step == step and code not in self.of_findings and finding.operation in self._step:
                self.of_findings[code] = self._step[finding.operation]
        self._step.clear()
        self._measured.clear()
        self._bytes = 0


def verdict_data(verdict: Any) -> dict[str, Any]:
    """Return a verdict as plain data."""
    return {key: plain(value) if isinstance(value, float) else value for key, value in asdict(verdict).items()}


def kept_of(step: int, values: Values) -> Kept:
    """Copy an operation's tensors, or a part of them where they are large."""
    operation = values.operation
    verdicts = [verdict_data(verdict) for verdict in operation.verdicts]
    measured = {probe: repr(found) for probe, found in operation.probed.items()}
    part = excerpt(values) if _size(values) > MOST_BYTES else None
    try:
        if part is not None:
            values = part
            verdicts, measured = looked_at(values)
        if _size(values) > MOST_BYTES:
            raise CannotKeep(f"its operands have {_size(values) / 2**20:.1f} MiB, and at most {MOST_BYTES >> 20} are kept")
        packed = Packed()
        packing = packed.pack(_parts(values))
        return Kept(step, operation, packing, packed.tensors, verdicts, measured, part is not None)
    except CannotKeep as reason:
        return Kept(step, operation, {}, {}, verdicts, measured, skipped=str(reason))


def looked_at(values: Values) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Judge and measure an operation. Return the verdicts, and what the rules have measured as text."""
    verdicts = [verdict_data(verdict) for verdict in Judge()(values)]
    return verdicts, {name: repr(found) for name, probe in PROBES.items() if (found := probe(values)) is not None}


def _parts(values: Values) -> dict[str, Any]:
    return {"args": values.args, "kwargs": values.kwargs, "output": values.output, "written": values.written}


def _size(values: Values) -> int:
    """Return how many bytes an operation's tensors have; one that stands at several places counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(_parts(values))}.values())


class Packed:
    """Arguments as plain data. tensors: copies of those among them, by the names by which the data refer to them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def pack(self, value: Any) -> Any:
        """Return a value as plain data. Errors: CannotKeep."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return [self.pack(part) for part in value]
        if isinstance(value, Mapping):
            return {key: self.pack(part) for key, part in value.items()}
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, float):
            return {"$float": str(value)}
        if isinstance(value, torch.device):
            return {"$device": "cpu"}
        for kind, type_ in CONSTANTS.items():
            if isinstance(value, type_):
                return {kind: str(value).removeprefix("torch.")}
        raise CannotKeep(f"an argument of type {type(value).__name__} cannot be written to a file")

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        """Copy a tensor, its dimensions in the order in which they lie in memory: the order of a sum may depend on it."""
        plain_type = type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
        if tensor.layout is not torch.strided or not plain_type:
            raise CannotKeep(f"an argument is not a plain tensor but {type(tensor).__name__}, {tensor.layout}")
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
        name = self._names.setdefault(id(tensor), str(len(self._names)))
        if name not in self.tensors:
            in_order = tensor.detach().permute(order)
            self.tensors[name] = in_order.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"$tensor": name, "order": order}


class Unpacked:
    """Values from plain data; a tensor that stood at several places is one object again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._stored = tensors
        self._made: dict[str, Tensor] = {}

    def unpack(self, value: Any) -> Any:
        """Return what `Packed.pack` was given. Errors: KeyError for a tensor that is not there."""
        if isinstance(value, list):
            return [self.unpack(part) for part in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"$tensor", "order"}:
            name, order = value["$tensor"], value["order"]
            if name not in self._made:
                self._made[name] = self._stored[name].permute([order.index(d) for d in range(len(order))])
            return self._made[name]
        if set(value) == {"$float"}:
            return float(value["$float"])
        if set(value) == {"$device"}:
            return torch.device(value["$device"])
        for kind in CONSTANTS:
            if set(value) == {kind}:
                return getattr(torch, value[kind])
        return {key: self.unpack(part) for key, part in value.items()}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
