"""`GradientHistory`: what happens to the gradients of one step, from the scaled loss to the update, and what factor they carry.

A gradient leaves backward multiplied by the loss scale S. Whoever multiplies it by a number changes its factor: unscaling by
1/S, clipping by a coefficient. A norm that is taken, and an update that is made, see the factor of their moment. Gradients are
known by their storages: by their role, and by being computed from one elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.step import Step
from refimpl.parity.audit.values import Values, is_float

UNSCALE = "aten._amp_foreach_non_finite_check_and_unscale_"
UPDATE_SCALE = "aten._amp_update_scale_"
PRODUCTS = ("mul", "mul_", "_foreach_mul", "_foreach_mul_")
QUOTIENTS = ("div", "div_", "_foreach_div", "_foreach_div_")
NORMS = ("linalg_vector_norm", "norm", "_foreach_norm")
CLAMPS = ("clamp_", "clamp_min_", "clamp_max_", "_foreach_clamp_min_", "_foreach_clamp_max_", "clamp")
SUMS = ("add", "add_")
LEAST_MANUAL = 64.0
"""A loss that is multiplied by a power of two of at least this much, in a step with FP16 gradients, is scaled by hand."""


def scalars(values: Values) -> dict[str, float] | None:
    """Measure the one-element tensors of an operation outside the forward pass, or of a product in it.

    By argument; 'out' is the result, and 'found_inf >' what an argument is after the operation has written it.
    """
    operation = values.operation
    if operation.phase == "forward" and short(operation) not in ("mul", "div"):
        return None
    found = {name: x.detach().item() for name, x in values.inputs.items() if is_float(x) and x.numel() == 1}
    found |= {f"{name} >": x.detach().item() for name, x in values.written.items() if is_float(x) and x.numel() == 1}
    if is_float(values.output) and values.output.numel() == 1:
        found["out"] = values.output.detach().item()
    return found or None


@dataclass(slots=True)
class Event:
    """Something that happened to gradients.

    kind: 'backward', 'norm', 'multiply', 'clamp', 'unscale' (by inv_scale), 'check' (an unscale by 1), or 'update'.
    names: of the gradients' parameters. factor: what they were multiplied by; in an update, 1 / grad_scale of a fused kernel.
    carried: the factor that they had before. value: of a norm; of found_inf after a check; NaN if there is none.
    operation: None for 'backward'. by_norm: whether the factor is computed from a norm.
    """

    kind: str
    names: tuple[str, ...]
    factor: float
    carried: float
    value: float
    operation: Operation | None
    line: str
    by_norm: bool = False


@dataclass(slots=True)
class Unscaled:
    """A parameter's gradient after its division by the loss scale, in one storage.

    added: the largest factor, 1 or the scale, of what backward passes have added to it since; 0 if they have not.
    """

    storage: int | None
    division: Event
    added: float = 0.0


@dataclass(slots=True)
class Mixture:
    """Gradients that were divided by the loss scale, to which a backward pass has added, and that were not cleared.

    end: the event that read them so: another division, or an update.
    """

    division: Event
    end: Event


@dataclass(slots=True)
class GradientHistory:
    """The events of a step, in order.

    scale: the loss scale that the backward passes carried, 1 without one; by_hand: whether no GradScaler applied it.
    seeds: of each backward pass, the values of the chain of one-element gradients that it began with. mixtures: of unscaled
    gradients and of what was added to them later.
    """

    events: list[Event] = field(default_factory=list)
    scale: float = 1.0
    by_hand: bool = False
    seeds: list[list[float]] = field(default_factory=list)
    mixtures: list[Mixture] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Event]:
        """Return the events of these kinds."""
        return [event for event in self.events if event.kind in kinds]

    def unscales(self) -> list[Event]:
        """Return the events that divide gradients by the loss scale, of whatever kind."""
        return [event for event in self.of("unscale", "multiply", "update") if self.divides(event.factor)]

    def divides(self, factor: float) -> bool:
        """Return whether a factor is 1 / scale."""
        return self.scale != 1 and math.isclose(factor * self.scale, 1.0, rel_tol=1e-5)

    @property
    def found_inf(self) -> bool:
        """Whether a GradScaler's check found an infinity or NaN."""
        return any(event.value > 0 for event in self.of("unscale", "check"))


def history_of(step: Step) -> GradientHistory:
    """Return what happened to the gradients of a step."""
    if isinstance(step.history, GradientHistory):
        return step.history
    history = step.history = GradientHistory(seeds=list(_seeds(step)))
    history.scale, history.by_hand = _scale(step, history.seeds)
    carried: dict[int, dict[str, float]] = {}  # storage -> parameter -> factor
    measures: dict[int, tuple[str, ...]] = {}  # storage of a norm, or of what is computed from one -> parameters
    unscaled: dict[str, Unscaled] = {}  # by parameter
    calls = [call for call in step.calls if call.name == "backward"]
    passes = 0
    for operation in step.operations:
        while passes < len(calls) and calls[passes].index <= operation.index:
            carried.clear()
            history.events.append(Event("backward", (), history.scale, 1.0, math.nan, None, calls[passes].line))
            passes += 1
        if operation.phase == "backward" and unscaled and passes:
            _add(operation, history.scale if _jumps(history.seeds[passes - 1], history.scale) else 1.0, unscaled)
        if operation.phase in ("forward", "backward"):
            continue
        event = _event(operation, history.scale, carried) or _norm_of_norms(operation, measures)
        _measure(operation, event, measures)
        _mix(operation, event, history, carried, unscaled)
        if event is not None:
            event.by_norm = event.kind == "multiply" and any(t.storage in measures for t in tensors_in(operation.arguments))
            history.events.append(event)
    return history


# ------------------------------------------------------------------------------------------------- the loss scale


def _seeds(step: Step) -> Iterator[list[float]]:
    """Yield, of each backward pass, the values of the one-element gradients that it begins with: 1, then 1 x S, S / n, ..."""
    starts = [call.index for call in step.calls if call.name == "backward"]
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else math.inf
        values = []
        for operation in step.operations:
            if not start <= operation.index < end or operation.phase != "backward":
                continue
            out = operation.probed.get("scalars", {}).get("out")
            if out is None:
                break
            values.append(out)
        yield values


def _scale(step: Step, seeds: list[list[float]]) -> tuple[float, bool]:
    scale = step.before.scale
    if scale is not None:
        used = any(_jumps(seed, scale) for seed in seeds)
        return (scale, False) if used and scale != 1 else (1.0, False)
    if any(t.dtype == "float16" for o in step.operations if o.phase == "backward" for t in tensors_in(o.outputs)):
        largest = max((factor for seed in seeds for factor in _factors(seed)), default=0.0)
        if largest >= LEAST_MANUAL and math.log2(largest).is_integer():
            return largest, True
    return 1.0, False


def _factors(seed: list[float]) -> list[float]:
    """Return the factors between the values that a backward pass begins with."""
    return [b / a for a, b in pairwise((1.0, *seed)) if a and math.isfinite(b / a)]


def _jumps(seed: list[float], scale: float) -> bool:
    """Return whether a backward pass began with a multiplication by the scale."""
    return any(math.isclose(factor, scale, rel_tol=1e-5) for factor in _factors(seed))


# ------------------------------------------------------------------------------------------------- events


def _event(operation: Operation, scale: float, carried: dict[int, dict[str, float]]) -> Event | None:
    read = {name: factor for t in tensors_in(operation.arguments) for name, factor in _gradient(t, scale, carried).items()}
    if not read:
        return None
    names, name = tuple(read), short(operation)
    measured: dict[str, float] = operation.probed.get("scalars", {})
    factor, value, kind = 1.0, math.nan, ""
    if operation.name.startswith(UNSCALE):
        factor, value = measured.get("inv_scale", 1.0), measured.get("found_inf >", 0.0)
        kind = "unscale" if factor != 1 else "check"
    elif name in PRODUCTS + QUOTIENTS and _changes_gradient(operation, carried):
        number = _number(operation, measured)
        factor = math.nan if number is None else number if name in PRODUCTS else 1 / number if number else math.inf
        kind = "multiply" if number is not None else ""
    elif name in NORMS:
        kind, value = "norm", measured.get("out", math.nan)
    elif name in CLAMPS:
        kind = "clamp"
    elif _updates(operation):
        kind = "update"
        if "grad_scale" in measured:
            factor = 1 / measured["grad_scale"]
        value = measured.get("found_inf", math.nan)
    _carry(operation, read, factor if kind in ("unscale", "multiply") else 1.0, carried)
    held = next(iter(read.values()))
    return Event(kind, names, factor, held, value, operation, operation.line) if kind else None


def _measure(operation: Operation, event: Event | None, measures: dict[int, tuple[str, ...]]) -> None:
    """Note what is computed from norms: their stack, their sum, the clip coefficient."""
    read = [measures[t.storage] for t in tensors_in(operation.arguments) if t.storage in measures]
    is_norm = event is not None and event.kind == "norm"
    names = event.names if event is not None and is_norm else tuple(dict.fromkeys(n for part in read for n in part))
    if names and (event is None or is_norm):
        measures.update({t.storage: names for t in tensors_in(operation.outputs) if t.storage is not None})


def _norm_of_norms(operation: Operation, measures: dict[int, tuple[str, ...]]) -> Event | None:
    """Return the event of a total norm, which is taken of norms, or is the root of their squares' sum."""
    if short(operation) not in (*NORMS, "sqrt", "pow"):
        return None
    names = tuple(dict.fromkeys(n for t in tensors_in(operation.arguments) for n in measures.get(t.storage or -1, ())))
    value = operation.probed.get("scalars", {}).get("out", math.nan)
    return Event("norm", names, 1.0, 1.0, value, operation, operation.line) if names else None


def _gradient(tensor: TensorFacts, scale: float, carried: dict[int, dict[str, float]]) -> dict[str, float]:
    """Return the parameter whose gradient a tensor is, or is computed from, with its factor."""
    known = carried.get(tensor.storage, {}) if tensor.storage is not None else {}
    if tensor.role is not None and tensor.role.kind == "gradient":
        return {tensor.role.name: known.get(tensor.role.name, scale)}
    return known if tensor.role is None else {}


def _carry(operation: Operation, read: dict[str, float], factor: float, carried: dict[int, dict[str, float]]) -> None:
    """Note the factor of what an operation has made of gradients, elementwise: results of the same shape."""
    inputs = list(tensors_in(operation.arguments))
    for name in operation.written:
        for t in tensors_in(operation.arguments[name]):
            if t.storage is not None and t.role is not None and t.role.kind == "gradient":
                table = carried.setdefault(t.storage, {})
                table[t.role.name] = read.get(t.role.name, 1.0) * factor
            elif t.storage in carried and t.storage is not None:
                carried[t.storage] = {key: held * factor for key, held in carried[t.storage].items()}
    if not operation.written:
        shapes = {t.shape for t in inputs if len(t.shape)}
        made = [t for t in tensors_in(operation.outputs) if t.shape in shapes and t.storage is not None]
        sources = [t for t in inputs if t.shape in {m.shape for m in made}]
        for t, source in zip(made, sources, strict=False):
            names = _gradient(source, 1.0, carried)
            if t.storage is not None and t.storage != source.storage:
                carried[t.storage] = {key: read.get(key, held) * factor for key, held in names.items()}


# ------------------------------------------------------------------------------------------------- sums after a division


def _add(operation: Operation, factor: float, unscaled: dict[str, Unscaled]) -> None:
    """Note what a backward pass adds to unscaled gradients; what it overwrites is none of them any more."""
    written = {t.storage for name in operation.written for t in tensors_in(operation.arguments[name])}
    for name in [name for name, gradient in unscaled.items() if gradient.storage in written]:
        if operation.accumulates == name and short(operation) in SUMS:
            unscaled[name].added = max(unscaled[name].added, factor)
        elif operation.accumulates is None:
            del unscaled[name]


def _mix(
    operation: Operation,
    event: Event | None,
    history: GradientHistory,
    carried: dict[int, dict[str, float]],
    unscaled: dict[str, Unscaled],
) -> None:
    """Note divisions of gradients by the scale, and who reads them after more was added.

    Gradients are forgotten once they have been used in an update, were replaced, or were written to in any other way than by
    a product or a clamp: as by zero_grad.
    """
    written = [t for name in operation.written for t in tensors_in(operation.arguments[name])]
    for t in tensors_in(operation.arguments):
        name = t.role.name if t.role is not None and t.role.kind == "gradient" else ""
        if name in unscaled and unscaled[name].storage != t.storage:
            del unscaled[name]
    if event is not None and (event.kind == "update" or history.divides(event.factor)):
        for name in event.names:
            gradient = unscaled.pop(name, None)
            if gradient is not None and gradient.added >= (1.0 if history.divides(event.factor) else history.scale):
                history.mixtures.append(Mixture(gradient.division, event))
        if event.kind != "update":
            made = (*written, *tensors_in(operation.outputs))
            places = {n: t.storage for t in made if t.storage is not None for n in carried.get(t.storage, ())}
            unscaled.update({name: Unscaled(places[name], event) for name in event.names if name in places})
    elif event is None or event.kind not in ("multiply", "clamp", "check") or event.factor == 0:
        for t in written:
            if t.role is not None and t.role.kind == "gradient":
                unscaled.pop(t.role.name, None)


def _changes_gradient(operation: Operation, carried: dict[int, dict[str, float]]) -> bool:
    """Return whether the tensor that is multiplied is a gradient, not a state or a parameter that a gradient is added to."""
    first = next(tensors_in(operation.arguments.get("self")), None)
    return first is not None and bool(_gradient(first, 1.0, carried))


def _number(operation: Operation, measured: dict[str, float]) -> float | None:
    """Return the number that all elements are multiplied with, or divided by."""
    for name in ("other", "scalar", "scalars"):
        given: Any = operation.arguments.get(name)
        if isinstance(given, int | float):
            return float(given)
        if isinstance(given, tuple) and given and all(isinstance(x, int | float) for x in given):
            return float(given[0]) if len(set(given)) == 1 else None
        if name in measured:
            return measured[name]
        if isinstance(given, tuple) and given and all(isinstance(t, TensorFacts) for t in given):
            return None
    return None


def _updates(operation: Operation) -> bool:
    """Return whether an operation writes to a parameter or to a state of the optimizer."""
    written = (t for name in operation.written for t in tensors_in(operation.arguments[name]))
    return any(t.role is not None and t.role.kind in ("parameter", "state") for t in written)


def short(operation: Operation) -> str:
    """Return an operation's name without namespace and overload."""
    return operation.name.split(".")[1] if "." in operation.name else operation.name
