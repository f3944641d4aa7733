"""The states that a loop keeps from step to step, as an audited step shows them, and its loss scale.

A state is a tensor that is older than the step and is read or written in it: a copy that each step makes anew is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from refimpl.numerics.formats import FORMATS
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.report.operation_table import short
from refimpl.parity.audit.rules.flow import COPIES, Flow, is_any
from refimpl.parity.audit.step import Step, View

MOMENTS = {
    "exp_avg": "m", "momentum_buffer": "m", "m": "m", "exp_avg_sq": "v", "square_avg": "v", "sum": "v", "v": "v",
}  # fmt: skip
"""Optimizers' names for first and second moments."""
SIZES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "int64": 8, "int32": 4, "int16": 2, "uint16": 2}
"""Bytes of an element; of formats that are not listed it is 1."""
LOW = ("fp16", "bf16")
UPDATES = ("step", "other", "update")
"""The phases in which weights are updated, copied and averaged."""
ADDS = ("aten.add", "aten.copy", "aten._foreach_add", "aten._foreach_copy")


@dataclass(frozen=True, slots=True)
class LoopState:
    """A state. kind: one of `recipes.STATE_KINDS`, or another name: that of the optimizer, 'EMA', 'frozen weights'.

    format: of its elements; encoding: as refimpl's recipes call it, where it is one of theirs.
    """

    kind: str
    format: str
    elements: int
    encoding: str = ""

    @property
    def bytes(self) -> int:
        """Return the bytes of all elements."""
        return self.elements * SIZES.get(self.format, 1)


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """How a loop scales its loss. kind: 'none', 'static' or 'dynamic'. scale: S of the step. The others: as of a GradScaler."""

    kind: str
    scale: float = 1.0
    growth_factor: float | None = None
    backoff_factor: float | None = None
    growth_interval: int | None = None

    @property
    def text(self) -> str:
        """Return the rule in words."""
        if self.kind == "none":
            return "none"
        if self.kind == "static":
            return f"static, {self.scale:g}"
        return (
            f"dynamic, {self.scale:g}: times {self.growth_factor:g} after {self.growth_interval} good steps in a row, times "
            f"{self.backoff_factor:g} at an overflow"
        )


@dataclass
class LoopStates:
    """All states of a loop. trained: how many parameters it trains. micro_batches: calls of backward in the step."""

    trained: int
    micro_batches: int
    states: list[LoopState] = field(default_factory=list)

    def of(self, kind: str) -> list[LoopState]:
        """Return the states of a kind, the largest first."""
        return sorted((s for s in self.states if s.kind == kind), key=lambda s: -s.elements)

    def encoding(self, kind: str) -> str:
        """Return the encoding of most elements of a kind, '' if there is no such state."""
        found = self.of(kind)
        return found[0].encoding or found[0].format if found else ""

    @property
    def bytes_per_parameter(self) -> float:
        """Return the bytes of all states per trained parameter; frozen weights and averages are not counted."""
        counted = [s.bytes for s in self.states if s.kind not in (FROZEN, EMA)]
        return sum(counted) / max(self.trained, 1)


FROZEN, EMA = "frozen weights", "EMA of the weights"


def states_of(view: View) -> LoopStates:
    """Return the states that an audited step shows. view: with a step that has ended as steps do."""
    step = view.step
    trained = {name: p for name, p in view.parameters.items() if p.requires_grad}
    found = LoopStates(sum(prod(p.shape) for p in trained.values()), sum(call.name == "backward" for call in step.calls))
    stores = _Stores(step, {prod(p.shape) for p in trained.values()})
    of_optimizers, kept = _of_optimizers(step), dict[str, str]()
    masters = stores.masters(owned=any(p.groups for p in trained.values()))
    for key, fmt, _ in of_optimizers:
        kept.setdefault(MOMENTS.get(key, key), fmt)
    weights = _by_format((short(p.dtype), prod(p.shape)) for p in trained.values())
    for fmt, n in weights.items():
        found.states.append(LoopState("weights", fmt, n, _encoding_of_weights(fmt, kept, bool(masters), stores.random)))
    for fmt, n in _gradients(step, {name: short(p.dtype) for name, p in trained.items()}, view).items():
        found.states.append(LoopState("grads", fmt, n, fmt))
    for kind, formats in (("main_grads", stores.main_gradients()), ("master", masters)):
        found.states += [LoopState(kind, fmt, n, fmt) for fmt, n in formats.items()]
    for key, fmt, n in of_optimizers:
        kind = MOMENTS.get(key, key)
        found.states.append(LoopState(kind, fmt, n, _encoding_of_moments(kind, fmt)))
    frozen = [(short(p.dtype), prod(p.shape)) for p in view.parameters.values() if not p.requires_grad]
    found.states += [LoopState(FROZEN, fmt, n) for fmt, n in _by_format(frozen).items()]
    found.states += [LoopState(EMA, fmt, n) for fmt, n in stores.averages().items()]
    return found


def scale_rule(view: View, scaler: Any) -> ScaleRule:
    """Return the rule of the loss scale. scaler: the GradScaler, or what has its methods; None without one."""
    step = view.step
    if step.before.scale is None or scaler is None:
        scale = _scale_by_hand(step)
        return ScaleRule("static", scale) if scale > 1 else ScaleRule("none")
    updates = any(o.phase == "update" or "_amp_update_scale_" in o.name for o in step.operations)
    factors = [_call(scaler, f"get_{name}") for name in ("growth_factor", "backoff_factor", "growth_interval")]
    if not updates or factors[:2] == [1.0, 1.0]:
        return ScaleRule("static", step.before.scale)
    return ScaleRule("dynamic", step.before.scale, *factors)


def _call(scaler: Any, method: str) -> Any:
    return getattr(scaler, method)() if hasattr(scaler, method) else None


def _scale_by_hand(step: Step) -> float:
    """Return the number by which the loss is multiplied before backward, and gradients divided after it; 1 if there is none."""
    first = next((call.index for call in step.calls if call.name == "backward"), 0)
    scales = {
        float(number)
        for o in step.operations
        if o.index < first and is_any(o, ("aten.mul",)) and all(not t.shape for t in tensors_in(o.outputs))
        for number in o.arguments.values()
        if isinstance(number, int | float)
    }
    for o in step.operations:
        if o.index > first and o.phase in ("other", "unscale") and is_any(o, ("aten.mul", "aten.div", *FOREACH)):
            for number in o.arguments.values():
                if isinstance(number, int | float) and number > 0 and {float(number), 1 / number} & scales:
                    return float(max(number, 1 / number))
    return 1.0


FOREACH = ("aten._foreach_mul", "aten._foreach_div")


class _Stores:
    """The tensors of a step that are older than it and have no role: masters, gradients and averages kept by hand."""

    def __init__(self, step: Step, sizes: set[int]) -> None:
        """sizes: the numbers of elements that the trained parameters have."""
        self.step, self.flow, self.sizes = step, Flow(step.operations), sizes
        read: set[int] = set()
        self.born: set[int] = set()  # storages that the step has made
        for o in step.operations:
            read |= {t.storage for t in tensors_in(o.arguments) if t.storage is not None}
            self.born |= {t.storage for t in tensors_in(o.outputs) if t.storage is not None and t.storage not in read}

    @property
    def random(self) -> bool:
        """Whether the update draws as many random numbers as a parameter has elements."""
        return any(
            o.phase in UPDATES
            and torch.Tag.nondeterministic_seeded in getattr(o.overload, "tags", ())
            and any(prod(t.shape) in self.sizes for t in (*tensors_in(o.outputs), *tensors_in(o.arguments)))
            for o in self.step.operations
        )

    def masters(self, owned: bool) -> dict[str, int]:
        """Return the elements by format of what weights are copied from, and of what the optimizer has in their place.

        owned: whether the optimizer owns the model's own parameters.
        """
        found = {}
        for source in self._copied_into_weights():
            found[source.storage, source.offset] = source
        if not found and not owned:
            for target in self._written(("step",)):
                found[target.storage, target.offset] = target
        return _by_format((short(t.dtype), prod(t.shape)) for t in found.values() if short(t.dtype) in FORMATS)

    def main_gradients(self) -> dict[str, int]:
        """Return the elements by format of tensors that gradients are added to or copied into, and that live on."""
        found = {}
        for o in self.step.operations:
            if o.phase not in ("backward", "other") or not o.written or not is_any(o, ADDS):
                continue
            sources = [t for name, value in o.arguments.items() if name not in o.written for t in tensors_in(value)]
            if any(t.role is not None and t.role.kind == "gradient" for t in sources):
                for target in self._targets(o):
                    found[target.storage, target.offset] = target
        return _by_format((short(t.dtype), prod(t.shape)) for t in found.values() if short(t.dtype) in FORMATS)

    def averages(self) -> dict[str, int]:
        """Return the elements by format of averaged weights."""
        tensors = (t for o in self.step.operations if o.phase in UPDATES for t in tensors_in(o.arguments))
        found = {t.role.name: t for t in tensors if t.role is not None and t.role.kind == "ema"}
        return _by_format((short(t.dtype), prod(t.shape)) for t in found.values())

    def _copied_into_weights(self) -> Iterator[TensorFacts]:
        for o in self.step.operations:
            if is_any(o, ("aten.copy", "aten._foreach_copy")) and o.written:
                pairs = zip(tensors_in((o.arguments["self"],)), tensors_in((o.arguments["src"],)), strict=False)
                for target, source in pairs:
                    if target.role is not None and target.role.kind == "parameter":
                        origin = self._origin(source, o)
                        if origin.storage not in self.born and origin.role is None and prod(origin.shape) in self.sizes:
                            yield origin

    def _origin(self, tensor: TensorFacts, operation: Operation) -> TensorFacts:
        """Return what a tensor is a cast or a copy of."""
        while (maker := self.flow.maker(tensor, operation.index)) is not None:
            if maker.written or not is_any(maker, ("aten._to_copy", *COPIES)):
                break
            operation, tensor = maker, next(tensors_in(maker.arguments))
        return tensor

    def _written(self, phases: Iterable[str]) -> Iterator[TensorFacts]:
        for o in self.step.operations:
            if o.phase in phases and o.written:
                yield from self._targets(o)

    def _targets(self, operation: Operation) -> Iterator[TensorFacts]:
        for name in operation.written:
            for t in tensors_in((operation.arguments[name],)):
                if t.role is None and t.storage is not None and t.storage not in self.born and prod(t.shape) in self.sizes:
                    yield t


def _of_optimizers(step: Step) -> list[tuple[str, str, int]]:
    """Return the states that PyTorch's optimizers hold: key, format, elements."""
    border = step.after or step.before
    found: dict[tuple[str, str], int] = {}
    for optimizer in border.optimizers:
        for (key, dtype), n in optimizer.state_formats.items():
            found[key, short(dtype)] = found.get((key, short(dtype)), 0) + n
    return [(key, fmt, n) for (key, fmt), n in found.items()]


def _gradients(step: Step, formats: Mapping[str, str], view: View) -> dict[str, int]:
    """Return the elements of gradients by format: as AccumulateGrad leaves them."""
    seen = dict[str, str]()
    for o in step.operations:
        if o.accumulates is not None and o.accumulates in formats:
            made = next((short(t.dtype) for t in tensors_in(o.outputs) if short(t.dtype) in FORMATS), "")
            seen[o.accumulates] = made or formats[o.accumulates]
    return _by_format((fmt, prod(view.parameters[name].shape)) for name, fmt in seen.items())


def _by_format(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for fmt, n in sizes:
        found[fmt] = found.get(fmt, 0) + n
    return found


def _encoding_of_weights(fmt: str, kept: Mapping[str, str], masters: bool, random: bool) -> str:
    """Return how 16-bit weights without masters are stored, by what the optimizer keeps, and draws, beside them."""
    if fmt not in LOW or masters:
        return fmt
    others = {other for key, other in kept.items() if key not in ("m", "v")}
    if others & {"int16", "uint16"}:
        return f"{fmt}-remainder"
    if fmt in others:
        return f"{fmt}-kahan"
    return f"{fmt}-stochastic" if random else fmt


def _encoding_of_moments(kind: str, fmt: str) -> str:
    """Return the encoding of moments: those of 8 bits have a scale per block."""
    if fmt in ("int8", "uint8"):
        return {"m": "int8-signed", "v": "int8-unsigned"}.get(kind, fmt)
    return "e4m3-blocks" if fmt == "e4m3" else fmt
