"""Rules A4, A5 and A12: what 16 bits do to the small numbers of Adam, eps and g^2, and to states that are kept in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.factors import short
from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.origins import named_tensors
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import LOW, finding_at, flow_of, results_of
from refimpl.parity.audit.rules.masters import share
from refimpl.parity.audit.rules.update_probes import PHASES, Samples
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Values, is_float

DENOMINATORS = {"div": "other", "addcdiv": "tensor2", "reciprocal": "self", "rsqrt": "self"}
"""The argument that an operation divides by, or by the root of."""
DISTINCT = 16
"""A state with this many values is not a constant."""
FEW = 0.01
"""Flushed squares that are fewer than this are a note."""


class Vanished(NamedTuple):
    """What an operation made 0 in a 16-bit format. zeros: elements that are 0 and not in FP64; of: that are not 0 in FP64.

    number: what was added, of a sum.
    """

    zeros: int
    of: int
    dtype: str
    number: float = 0.0


def lost_eps(values: Values) -> Vanished | None:
    """Measure the sum of 16-bit elements and a positive number in an update: those that are 0 nevertheless."""
    operation = values.operation
    if operation.phase not in PHASES or _kind(operation) != "add":
        return None
    inputs = values.inputs
    given = inputs.get("other", inputs.get("scalar"))
    if isinstance(given, Tensor) and given.numel() == 1:
        given = given.item()
    if not isinstance(given, int | float) or not given > 0:
        return None
    number = float(given) * float(inputs.get("alpha", 1))
    found = [(x, y) for x, y in zip(_tensors(inputs["self"]), _results(values), strict=False) if _is_low(y) and is_float(x)]
    if not found or number <= 0:
        return None
    due = sum(int((x >= 0).count_nonzero()) for x, _ in found)
    zeros = sum(int(((y == 0) & (x >= 0)).count_nonzero()) for x, y in found)
    return Vanished(zeros, due, str(found[0][1].dtype).removeprefix("torch."), number) if zeros else None


def flushed_squares(values: Values) -> Vanished | None:
    """Measure the squares that an update takes, or adds, in 16 bits: those that are 0 nevertheless."""
    operation, inputs = values.operation, values.inputs
    if operation.phase not in PHASES:
        return None
    factors = _factors(_kind(operation), inputs)
    if factors is None:
        return None
    zeros = due = 0
    dtype = ""
    for before, a, b, y in zip(_tensors(inputs["self"]), *(_tensors(f) for f in factors), _results(values), strict=False):
        if _is_low(y) and is_float(a) and is_float(b) and _are_one(a, b):
            # The squares of 16-bit numbers, and of FP32 ones, are in the range of FP64.
            exact = a.double().square() != 0
            exact = exact if before is a else exact | (before != 0)
            due += int(exact.count_nonzero())
            zeros += int((exact & (y == 0)).count_nonzero())
            dtype = str(y.dtype).removeprefix("torch.")
    return Vanished(zeros, due, dtype) if zeros else None


PROBES: tuple[Probe, ...] = (lost_eps, flushed_squares)


@rule("A4", "eps-in-16-bits")
def eps_lost(view: View) -> Iterator[Finding]:
    """eps is added to a denominator in 16 bits, and some of the sums are 0.

    Seen: an update adds a positive number to float16 or bfloat16 elements, some of the sums are 0, and it divides by them or by
    their root.
    Not reported: eps that is added in FP32 inside a kernel; eps that is merely small compared with the root.
    Effect: where gradients have been 0, or too small to be squared, the update is 0/0 or g/0: NaN or Inf in the weights.
    Fix: keep the second moment and the denominator in FP32, or choose an eps that the format can represent: float16 begins at
    6e-8.
    Source: google-deepmind/optax#1754, pytorch/pytorch#8860, NVIDIA/apex#240, keras-team/keras#11860.
    """
    for operation in view.step.operations:
        vanished: Vanished | None = operation.probed.get("lost_eps")
        if vanished is not None and _divides(view, operation):
            stored = float(torch.tensor(vanished.number).to(getattr(torch, vanished.dtype)))
            number = f"eps = {vanished.number:.3g} is {stored:.3g} in {vanished.dtype}: {vanished.zeros} of {vanished.of} "
            yield finding_at(
                view, operation, "A4", "eps-in-16-bits", "wrong", number=number + "denominators are 0",
                effect="NaN or Inf in these weights", fix="keep the denominator in FP32, or eps at 1e-7 or above",
            )  # fmt: skip


@rule("A5", "square-flushed")
def squares_flushed(view: View) -> Iterator[Finding]:
    """Squared gradients are 0 in the format in which they are computed or stored.

    Seen: 16-bit results of an update that squares a tensor: some are 0 where FP64 has a nonzero number, and they are a state of
    the optimizer or are added to one. It is a note if they are fewer than 1 %.
    Effect: in float16 the square of a gradient below 1.7e-4 is 0, and so is v: the update is g/eps instead of about 1.
    Fix: an FP32 second moment, computed from gradients that are cast to FP32 before they are squared.
    Source: matanbt/TROPT#8.
    """
    for operation in view.step.operations:
        vanished: Vanished | None = operation.probed.get("flushed_squares")
        if vanished is not None and _reaches_state(view, operation):
            number = f"{share(vanished.zeros, vanished.of)} of {vanished.of} squares are 0 in {vanished.dtype} and not in FP64"
            level = "worse than it need be" if vanished.zeros > FEW * vanished.of else "note"
            yield finding_at(
                view, operation, "A5", "square-flushed", level, number=number,
                effect="v is 0 where gradients are small, and the update g/eps", fix="square in FP32, and keep v in FP32",
            )  # fmt: skip


@rule("A12", "states-cast-on-load")
def states_cast(view: View) -> Iterator[Finding]:
    """The optimizer's states had been rounded to 16 bits before they were loaded.

    Seen: before the first audited step, all FP32 states with more than one element hold only values of bfloat16 or float16, and
    one of them has many values and none below zero, as a second moment has.
    Not reported: states that are 0, or made in this step; momentum alone, which begins as a gradient from autocast, in 16 bits.
    Effect: m and v lose all but 2 or 3 decimal digits, once; if they are cast at each save, at each restart.
    Fix: save states as they are, and load them without a cast: `optimizer.load_state_dict` casts to the format of the
    parameters.
    Source: pytorch/torchtitan#4615.
    """
    if view.step.number != min(view.borders) + 1:
        return
    states = _states_before(view)
    values = [x for elements in states.values() for x in elements if x]
    dtype = next((d for d in LOW if values and _are_all(values, d)), "")
    if dtype and any(min(x) >= 0 and len(set(x)) >= DISTINCT for x in states.values()):
        keys = ", ".join(f"'{key}'" for key in states)
        number = f"all {len(values)} sampled elements of {keys} are {dtype} values in FP32 before step "
        first = next(o for o in view.step.operations if "samples" in o.probed)
        yield finding_at(
            view, first, "A12", "states-cast-on-load", "worse than it need be", number=f"{number}{view.step.number}",
            effect="moments have lost their last 13 to 16 bits", fix="save and load the optimizer's states in FP32",
        )  # fmt: skip


def _states_before(view: View) -> dict[str, list[float]]:
    """Return some elements of the FP32 states that the step found, as it found them, by key."""
    old = {key for optimizer in view.step.before.optimizers for key, _ in optimizer.state_formats}
    first: dict[tuple[int | None, int, str], tuple[float, ...]] = {}
    for operation in view.step.operations:
        elements: Samples | None = operation.probed.get("samples")
        if elements is None:
            continue
        for name, t in named_tensors(operation.arguments):
            role = t.role if isinstance(t, TensorFacts) and t.dtype == "float32" else None
            if role is not None and role.kind == "state" and role.key in old and name in elements.before:
                first.setdefault((t.storage, t.offset, role.key), elements.before[name])
    found: dict[str, list[float]] = {}
    for (_, _, key), some in first.items():
        found.setdefault(key, []).extend(some)
    return found


def _are_all(values: list[float], dtype: str) -> bool:
    wide = torch.tensor(values, dtype=torch.float32)
    return torch.equal(wide, wide.to(getattr(torch, dtype)).float())


def _divides(view: View, operation: Operation) -> bool:
    """Return whether what an operation has made is divided by, or its root is."""
    made = {t.storage for t in results_of(operation)}
    for o in flow_of(view.step).readers(operation):
        kind = _kind(o)
        divisors = tensors_in(o.arguments.get(DENOMINATORS.get(kind, "")))
        if any(t.storage in made for t in divisors) or (kind == "sqrt" and _divides(view, o)):
            return True
    return False


def _reaches_state(view: View, operation: Operation) -> bool:
    """Return whether an operation writes a state, or an operation that does so reads what it makes, scaled perhaps."""
    waiting, seen = [operation], set[int]()
    while waiting:
        o = waiting.pop()
        if any(t.role is not None and t.role.kind == "state" for name in o.written for t in tensors_in(o.arguments[name])):
            return True
        if o.index not in seen and (o is operation or _kind(o) in ("mul", "div", "add", "_to_copy")):
            seen.add(o.index)
            waiting += flow_of(view.step).readers(o)
    return False


def _kind(operation: Operation) -> str:
    """Return an operation's name, whether it is of lists or not, and in place or not."""
    return short(operation).removeprefix("_foreach_").removesuffix("_")


def _factors(kind: str, inputs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the two factors of an operation that multiplies tensors."""
    if kind == "square" or (kind == "pow" and inputs.get("exponent") == 2):
        return inputs["self"], inputs["self"]
    if kind == "mul" and "other" in inputs:
        return inputs["self"], inputs["other"]
    return (inputs["tensor1"], inputs["tensor2"]) if kind == "addcmul" else None


def _are_one(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _is_low(x: Any) -> bool:
    return is_float(x) and str(x.dtype).removeprefix("torch.") in LOW


def _tensors(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


def _results(values: Values) -> list[Any]:
    return _tensors(values.written.get("self", values.output))
