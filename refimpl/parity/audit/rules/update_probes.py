"""What is noted of an update's operations, for the rules: how far they do what FP64 does, and some elements as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.operation import TensorFacts, tensors_in
from refimpl.parity.audit.origins import is_view, named_tensors, result_facts
from refimpl.parity.audit.rules.flow import LOW
from refimpl.parity.audit.rules.updates import Overwritten, overwritten
from refimpl.parity.audit.step import Step
from refimpl.parity.audit.values import Values

PHASES = ("step", "other")
"""Where updates happen: in an optimizer, or by hand between backward and the next forward pass."""
SAMPLES = 64
"""How many elements of a tensor, evenly spaced, are noted as numbers."""
LEAST = 2.0**-21
"""A factor that differs less from 1 cannot be told from roundings to FP32."""


class Written(NamedTuple):
    """What is measured of an overwritten tensor in 16 bits, or of one in FP32 that was left as it was.

    result, facts: as in `Overwritten`; source: of 'copy', what was copied. due: the elements that FP64 changes; left:
    those of them that stayed as they were; beyond: those of `left` that FP64 changes by more than a unit in the last place.
    nearest: the share of `due` that are the correctly rounded results. factor: the number that FP64 multiplies all elements
    with, NaN if there is none. rest: of some elements, the FP64 result less the one written.
    """

    result: str
    facts: TensorFacts
    source: TensorFacts | None
    elements: int
    due: int
    left: int
    beyond: int
    nearest: float
    factor: float
    rest: tuple[float, ...]


def written(values: Values) -> tuple[Written, ...] | None:
    """Measure what an update writes in 16 bits, and what it leaves as it was in FP32."""
    operation = values.operation
    if operation.phase not in PHASES and not _writes_parameter(values):
        return None
    found = [_measured(one) for one in overwritten(values) if _is_measured(one)]
    return tuple(measured for measured in found if measured is not None) or None


def _writes_parameter(values: Values) -> bool:
    facts = (t for name in values.operation.written for t in tensors_in(values.operation.arguments[name]))
    return any(t.role is not None and t.role.kind == "parameter" for t in facts)


def _is_measured(one: Overwritten) -> bool:
    role = one.facts.role
    if one.facts.dtype in LOW:
        return one.before.numel() > 0 and (role is None or role.kind != "gradient")
    kept = role is not None and role.kind in ("parameter", "state") and one.before.numel() > 1
    return kept and one.facts.dtype == "float32" and torch.equal(one.before, one.after)


def _measured(one: Overwritten) -> Written | None:
    exact = one.exact
    if exact is None or exact.shape != one.before.shape:
        return None
    before, after, rounded = one.before, one.after, exact.to(one.before.dtype)
    due = exact != before.double()
    left = due & (after == before)
    spacing = before.abs().double() * torch.finfo(before.dtype).eps
    beyond = left & ((exact - before.double()).abs() > spacing) & (rounded != before)
    number = int(due.count_nonzero())
    source = one.partner_facts.get("src") if one.kind == "copy" else None
    return Written(
        one.result, one.facts, source, before.numel(), number, int(left.count_nonzero()), int(beyond.count_nonzero()),
        int((due & (rounded == after)).count_nonzero()) / max(number, 1), _factor(one, exact), sample(exact - after.double()),
    )  # fmt: skip


def _factor(one: Overwritten, exact: Tensor) -> float:
    """Return the number that FP64 multiplies all elements with, NaN if there is none, or if they do not tell."""
    if one.kind == "mul" and not one.partners:
        return one.scalars.get("other", one.scalars.get("value", math.nan))
    before = one.before.double()
    known = before != 0
    ratio = exact[known] / before[known]
    if ratio.numel() < 2 or bool(before[known].abs().max() == before[known].abs().min()):
        return math.nan
    low, high = float(ratio.min()), float(ratio.max())
    middle = (low + high) / 2
    # A product that was rounded to FP32 before has a relative error of up to 2^-24.
    even = high - low <= 2.0**-23 * abs(middle) and abs(1 - middle) > LEAST
    return middle if even and not bool(exact[~known].any()) else math.nan


class Samples(NamedTuple):
    """Some elements of the tensors of an operation, evenly spaced, as numbers.

    before: of the arguments, by name ('self.3' in a list), before the operation; after: of the results.
    """

    before: Mapping[str, tuple[float, ...]]
    after: Mapping[str, tuple[float, ...]]


def samples(values: Values) -> Samples | None:
    """Note some elements of what operations of the update read and make."""
    operation = values.operation
    if operation.phase not in PHASES or is_view(operation.overload):
        return None
    after = {name: sample(x) for name, x in values.results() if _is_sampled(x)}
    if not after:
        return None
    return Samples({name: sample(x) for name, x in named_tensors(values.inputs) if _is_sampled(x)}, after)


def _is_sampled(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return False
    return x.numel() > 1 and not x.is_complex() and x.dtype != torch.bool


def sample(x: Tensor) -> tuple[float, ...]:
    """Return SAMPLES elements of a tensor, or all if it has fewer, evenly spaced in the order of its indices."""
    stride = max(1, x.numel() // SAMPLES)
    if x.is_contiguous():
        part = x.detach().view(-1)[::stride][:SAMPLES]
    else:
        places = torch.arange(0, x.numel(), stride, device=x.device)[:SAMPLES]
        part = x.detach()[torch.unravel_index(places, x.shape)]
    return tuple(part.double().tolist())


# ------------------------------------------------------------------------------------------------- at the end of a step


@lru_cache(maxsize=1)
def made_in(step: Step) -> frozenset[int]:
    """Return the storages that operations of a step have made: what lives in others is older than the step."""
    made, known = set[int](), set[int]()
    for operation in step.operations:
        read = {t.storage for t in tensors_in(operation.arguments) if t.storage is not None}
        known |= read - made
        made |= {t.storage for t in tensors_in(operation.outputs) if t.storage is not None} - known
    return frozenset(made)


@lru_cache(maxsize=1)
def sampled(step: Step) -> Mapping[tuple[int, ...], list[tuple[int, TensorFacts, tuple[float, ...]]]]:
    """Return what the operations of a step have made or written, where it was sampled, by shape: (index, tensor, elements)."""
    found: dict[tuple[int, ...], list[tuple[int, TensorFacts, tuple[float, ...]]]] = {}
    for operation in step.operations:
        elements = operation.probed.get("samples")
        if elements is not None:
            facts = dict(result_facts(operation))
            for name, some in elements.after.items():
                if name in facts:
                    found.setdefault(facts[name].shape, []).append((operation.index, facts[name], some))
    return found
