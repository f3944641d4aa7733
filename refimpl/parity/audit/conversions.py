"""`Conversions`: what every conversion between number formats did in the audited steps, and the room left before overflow.

Counted are casts (`to`, `copy_`, those that autocast makes), results that an operation writes into a tensor of a narrower
format than its operands have, and results in FP16, whose range is the small one. Of the last two the exact values are the
judge's. The figures are those of the precision report of refimpl's own runs: `numerics.rounding_effects.Counts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.numerics.formats import FORMATS, widens_to
from refimpl.numerics.rounding_effects import KINDS, SWEEP, Counts, room_below
from refimpl.numerics.rounding_words import scale_sentence
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.report.operation_table import short
from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.rounding_counts import count_roundings, count_widened
from refimpl.parity.audit.values import Twin, Values, is_float

CASTS = {"aten._to_copy": ("self", "out"), "aten.copy_": ("src", "self"), "aten._foreach_copy_": ("src", "self")}
"""Operations that convert: the argument that is read, and the result."""
CAST, EXACT = "cast", "exact"
MASK = 0.99
"""The negative values of a result that reach this share of the format's largest are a mask's: finfo.min, plus the scores."""


class Place(NamedTuple):
    """What the rows are told apart by.

    module, phase: as in `Operation`. kind: of the tensor, one of `rounding_effects.KINDS`. operation: 'cast', or the one that
    rounds its result. source: the format before, 'exact' for the exact result of an operation; target: the one after.
    """

    module: str | None
    phase: str
    kind: str
    operation: str
    source: str
    target: str


@dataclass(slots=True)
class Conversion:
    """A row of the table: the conversions at one place, added up over the audited steps.

    calls: how many there were. counts: of their values, by outcome; of a widening conversion without binades and SNR.
    unscaled: of FP16 gradients in backward the values divided by the loss scale of their step, without outcomes: the
    figures for other loss scales; else None. sampled: the judge saw a sample of rows and columns, and so do the counts.
    integers: (different integers before, after) of the call that made most of them equal, None if none became equal.
    """

    calls: int
    counts: Counts
    unscaled: Counts | None = None
    sampled: bool = False
    integers: tuple[int, int] | None = None

    def __iadd__(self, other: Conversion) -> Conversion:
        self.calls += other.calls
        self.counts += other.counts
        if other.unscaled is not None:
            self.unscaled = self.unscaled or Counts(other.unscaled.fmt)
            self.unscaled += other.unscaled
        self.sampled = self.sampled or other.sampled
        self.integers = max(filter(None, (self.integers, other.integers)), key=lambda n: n[0] - n[1], default=None)
        return self

    def data(self, place: Place) -> dict[str, Any]:
        """Return the row as plain data."""
        counts = self.counts.plain()
        counts = {name: plain_number(value) for name, value in counts.items() if name != "fmt"}
        shares = {name: self.counts.share(name) for name in ("exact", "rounded", "flushed", "tie", "subnormal")}
        gradient = {} if self.unscaled is None else {"advice": scale_sentence(self.unscaled, place.target)}
        integers = None if self.integers is None else list(self.integers)
        extra = {"calls": self.calls, "room": self.counts.room, "sampled": self.sampled, "integers": integers}
        return {**place._asdict(), **extra, **counts, "shares": shares, **gradient}


def plain_number(value: Any) -> Any:
    """Return a number as JSON can have it: Inf and NaN as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Room:
    """The largest finite magnitude among a module's results in a format, and how far it is below overflow.

    room: the largest k such that 2^k times as much would still be finite; negative where a result overflowed.
    """

    module: str | None
    phase: str
    format: str
    largest: float
    room: int


@dataclass(frozen=True, slots=True)
class ScaleEffect:
    """What the loss scale 2^exponent would do to the FP16 gradients of the audited steps.

    flushed: the share of their nonzero values that would become zero. overflowing: the modules whose largest gradient would
    overflow.
    """

    exponent: int
    flushed: float
    overflowing: tuple[str, ...]


@dataclass
class Conversions:
    """The rows by place, in the order in which they first ran. `see` operations, and `end_step` at the end of each step.

    rows: the table. uncounted: elements converted from or to formats that refimpl does not know, by format.
    """

    rows: dict[Place, Conversion] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)
    _step: dict[Place, Conversion] = field(default_factory=dict)
    _largest: dict[tuple[str | None, str, str], float] = field(default_factory=dict)
    _weights: set[int] = field(default_factory=set)  # storages of the step that hold weights in another format
    _nodes: set[int] = field(default_factory=set)  # sequence numbers of the step's operations that read weights

    def see(self, values: Values) -> None:
        """Count the conversions of an operation that the judge and the probes have seen."""
        operation = values.operation
        self._follow(operation)
        if operation.recomputed:
            return
        cast = CASTS.get(operation.name.rpartition(".")[0])
        if cast is not None:
            for source, target, facts in _pairs(values, *cast):
                if source.dtype != target.dtype and target.numel():
                    self._count_cast(values, source, target, facts)
            return
        twins = {**{name: (twin, False) for name, twin in values.twins.items()},
                 **{name: (twin, True) for name, twin in values.samples.items()}}  # fmt: skip
        for name, (twin, sampled) in twins.items():
            self._count_result(operation, name, twin, sampled)
        if operation.phase in ("forward", "backward"):
            for _, tensor in values.results():
                self._measure_room(operation, tensor)

    def end_step(self, loss_scale: float | None) -> None:
        """Add the counts of a step to the table. loss_scale: S of the step; None for 1."""
        for place, conversion in self._step.items():
            if place.phase == "backward" and place.target == "fp16" and conversion.counts.binades.any():
                conversion.unscaled = conversion.counts.divided_by(loss_scale or 1.0)
            known = self.rows.get(place)
            if known is None:
                self.rows[place] = conversion
            else:
                known += conversion
        self._step, self._weights, self._nodes = {}, set(), set()

    def totals(self) -> dict[Place, Conversion]:
        """Return the rows of all modules together, in the order of a step: by phase, kind, operation and formats."""
        found: dict[Place, Conversion] = {}
        for place, conversion in self.rows.items():
            key = place._replace(module=None)
            if key not in found:
                found[key] = Conversion(0, Counts(conversion.counts.fmt))
            found[key] += conversion
        return dict(sorted(found.items(), key=lambda item: KINDS.index(item[0].kind)))

    def rooms(self) -> list[Room]:
        """Return the room of each module's results in 16 bits, the smallest room first."""
        found = [
            Room(module, phase, fmt, largest, room)
            for (module, phase, fmt), largest in self._largest.items()
            if (room := room_below(largest, fmt)) is not None
        ]
        return sorted(found, key=lambda row: row.room)

    def gradients(self) -> dict[str, Counts]:
        """Return the FP16 gradients of backward by module, divided by their loss scales: their binades and largest."""
        found: dict[str, Counts] = {}
        for place, conversion in self.rows.items():
            if conversion.unscaled is not None:
                found.setdefault(place.module or "", Counts("fp16"))
                found[place.module or ""] += conversion.unscaled
        return found

    def loss_scales(self) -> list[ScaleEffect]:
        """Return what each loss scale of SWEEP would save of the FP16 gradients; [] if there are none."""
        gradients = self.gradients()
        together = Counts("fp16")
        for counts in gradients.values():
            together += counts
        return [
            ScaleEffect(k, together.flushed_at(k, "fp16"), tuple(m for m, c in gradients.items() if not c.fits_at(k, "fp16")))
            for k in SWEEP
            if gradients
        ]

    def advice(self) -> str:
        """Return which loss scales would do for the FP16 gradients, in words; '' if there are none."""
        together = Counts("fp16")
        for counts in self.gradients().values():
            together += counts
        return scale_sentence(together, "fp16") if together.nonzero else ""

    def data(self) -> dict[str, Any]:
        """Return everything as plain data, for audit.json: rows and totals as `Conversion.data`, the others as they are."""
        return {
            "totals": [conversion.data(place) for place, conversion in self.totals().items()],
            "rows": [conversion.data(place) for place, conversion in self.rows.items()],
            "rooms": [
                {"module": r.module, "phase": r.phase, "format": r.format, "largest": r.largest, "room": r.room}
                for r in self.rooms()
            ],
            "loss_scales": [
                {"exponent": s.exponent, "flushed": s.flushed, "overflowing": list(s.overflowing)} for s in self.loss_scales()
            ],
            "advice": self.advice(),
            "uncounted": dict(self.uncounted),
        }

    # ------------------------------------------------------------------------------------------------- one operation

    def _follow(self, operation: Operation) -> None:
        """Note which storages hold weights in another format, and which nodes of the graph read weights."""
        if operation.phase not in ("forward", "other") or not any(map(self._is_weight, tensors_in(operation.arguments))):
            return
        if operation.sequence is not None:
            self._nodes.add(operation.sequence)
        if operation.name.startswith("aten._to_copy"):
            self._weights |= {t.storage for t in tensors_in(operation.outputs) if t.storage is not None}

    def _is_weight(self, tensor: TensorFacts) -> bool:
        return tensor.storage in self._weights or (tensor.role is not None and tensor.role.kind == "parameter")

    def _count_cast(self, values: Values, source: Tensor, target: Tensor, facts: tuple[TensorFacts, ...]) -> None:
        before, after = short(name_of(source.dtype)), short(name_of(target.dtype))
        known = before in FORMATS or not (source.dtype.is_floating_point or source.dtype.is_complex)
        if not is_float(target) or source.dtype == torch.bool or source.dtype.is_complex:
            return
        if not known or after not in FORMATS:
            which = after if known else before
            self.uncounted[which] = self.uncounted.get(which, 0) + target.numel()
            return
        kind = self._kind(values.operation, "", facts)
        row = self._row(values.operation, kind, CAST, before, after)
        if before in FORMATS and widens_to(before, after):
            count_widened(row.counts, source)
        else:
            count_roundings(row.counts, source, target)
        measured = values.operation.probed.get("integers")
        if measured is not None and measured.after < measured.before:
            row.integers = max((measured.before, measured.after), row.integers or (0, 0), key=lambda n: n[0] - n[1])

    def _count_result(self, operation: Operation, result: str, twin: Twin, sampled: bool) -> None:
        """Count the rounding of an operation's result, if it is to FP16, or to a narrower format than operands have."""
        target = short(name_of(twin.actual.dtype))
        read = {short(t.dtype) for t in tensors_in(operation.arguments) if t.shape and short(t.dtype) in FORMATS}
        narrower = [fmt for fmt in read if target in FORMATS and not widens_to(fmt, target)]
        if not (narrower and operation.written) and (target != "fp16" or twin.by == "exact"):
            return  # it rounds nothing, or only to the precision of its operands
        source = max(narrower, key=lambda fmt: FORMATS[fmt].bits) if narrower and operation.written else EXACT
        kind = self._kind(operation, result, tuple(tensors_in([operation.arguments.get(result)])))
        row = self._row(operation, kind, operation.name.rpartition(".")[0], source, target)
        row.sampled = row.sampled or sampled
        count_roundings(row.counts, twin.exact.expand(twin.actual.shape), twin.actual)

    def _row(self, operation: Operation, kind: str, name: str, source: str, target: str) -> Conversion:
        place = Place(operation.module, operation.phase, kind, name, source, target)
        row = self._step.get(place) or self._step.setdefault(place, Conversion(0, Counts(target)))
        row.calls += 1
        return row

    def _kind(self, operation: Operation, result: str, facts: tuple[TensorFacts, ...]) -> str:
        """Return the kind of tensor. facts: of what is converted, and of what it becomes."""
        roles = {t.role.kind for t in facts if t.role is not None}
        if operation.phase == "backward" and operation.accumulates is None and "gradient" not in roles:
            return self._kind_of_gradient(operation, result)
        if "gradient" in roles or operation.accumulates is not None:
            return "weight gradients"
        if roles & {"state", "ema"}:
            return "updated states"
        if not result and any(map(self._is_weight, facts)):
            return "weights"
        return "activations" if operation.phase in ("forward", "other") else "updated states"

    def _kind_of_gradient(self, operation: Operation, result: str) -> str:
        """Return whose gradient a result of backward is: of several the first is that of the activation."""
        if operation.sequence not in self._nodes:
            return "activation gradients"
        reads_weight = any(map(self._is_weight, tensors_in(operation.arguments)))
        of_activation = result == "out.0" if result.startswith("out.") else reads_weight
        return "activation gradients" if of_activation else "weight gradients"

    def _measure_room(self, operation: Operation, tensor: Tensor) -> None:
        """Note the largest magnitude of a result of 16 bits. Those of 8 have scales of their own."""
        if not is_float(tensor) or tensor.dtype.itemsize != 2 or not tensor.numel():
            return
        low, high = (float(part) for part in tensor.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = tensor[tensor.isfinite()]
            if not finite.numel():
                return
            low, high = (float(part) for part in finite.aminmax())
        if low <= -MASK * torch.finfo(tensor.dtype).max:
            low = 0.0
        key = operation.module, operation.phase, short(name_of(tensor.dtype))
        self._largest[key] = max(self._largest.get(key, 0.0), -low, high)


def _pairs(values: Values, read: str, written: str) -> Iterator[tuple[Tensor, Tensor, tuple[TensorFacts, ...]]]:
    """Yield what a conversion read and what it became, with the facts of both."""
    source, facts = values.inputs[read], values.operation.arguments[read]
    if written == "out":
        target, known = values.output, values.operation.outputs
    else:
        target, known = values.written[written], values.operation.arguments[written]
    if isinstance(source, Tensor):
        yield source.expand(target.shape), target, (facts, known)
    else:
        for x, y, fact, other in zip(source, target, facts, known, strict=True):
            yield x.expand(y.shape), y, (fact, other)
