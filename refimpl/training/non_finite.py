"""Find where Inf or NaN first appears in a step, by computing its forward and backward again and checking every result.

A loss that is not finite has another cause than an overflow in backward: the loss scale enters only backward, so either a
weight is NaN or an operation overflows in forward. A step without Inf and NaN costs nothing extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.backends.numpy.threads import one_thread_per_product
from refimpl.nn.autograd import Entry, Sink, Tape
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import is_float
from refimpl.optim.layout import blocks
from refimpl.optim.micro_batches import divided, divisors
from refimpl.optim.state import State
from refimpl.precision.context import Observer
from refimpl.training.setup import Training

Batch = tuple[Array, Array]


@dataclass(frozen=True)
class Origin:
    """The first result of a step that is not finite.

    stage: 'parameter' (a weight), 'cast' (a finite weight overflows when it is cast to 16 bits), 'forward' (the output of an
        operation with finite inputs), 'targets' (all are ignored, so that the loss is a mean over nothing), 'backward' (a
        gradient, while the loss is finite), or 'gone' (with the present weights every result is finite).
    name: the parameter, the operation's place, or what the gradient belongs to. text: a sentence, without its period.
    of_rows: whether the operation reads only the rows of the parameter that a batch asks for.
    """

    stage: str
    name: str
    text: str
    of_rows: bool = False

    @property
    def in_loss(self) -> bool:
        """Whether the loss is not finite."""
        return self.stage in ("parameter", "cast", "forward", "targets")


Event = tuple[str, int, str]
"""The identity of a result: 'activations', 'activation_grads' or 'weight_grads'; the micro-batch; the place or parameter."""


@dataclass
class _Check:
    """Checks every result of a pass, in order. first: the index of the first that is not finite; bad: its Inf and NaN."""

    training: Training
    events: list[Event] = field(default_factory=list)
    first: int | None = None
    bad: str = ""

    def check(self, event: Event, array: Array) -> None:
        """Check one result."""
        self.events.append(event)
        if self.first is None:
            self.bad = contents(self.training.state.backend.to_host(array))
            self.first = len(self.events) - 1 if self.bad else None

    def of(self, i: int, skips_loss: bool = False) -> Observer:
        """Return an observer of micro-batch i. skips_loss: ignore its loss, a mean over no targets."""

        def observe(kind: str, place: str, array: Array) -> Array:
            if not (skips_loss and array.ndim == 0):
                self.check((kind, i, place), array)
            return array

        return observe

    def sink_of(self, i: int) -> Sink:
        """Return a sink that checks the gradients of the parameters without storing them."""
        return lambda name, gradient: self.check(("weight_grads", i, name), gradient)


def contents(x: np.ndarray) -> str:
    """Return the counts of Inf and NaN in an array as text: '1 NaN', '3 Inf and 2 NaN', or '' if all is finite."""
    if not is_float(x):
        return ""
    x = widen(x, "fp64")
    counts = {"Inf": np.count_nonzero(np.isinf(x)), "NaN": np.count_nonzero(np.isnan(x))}
    return " and ".join(f"{n} {kind}" for kind, n in counts.items() if n)


@np.errstate(all="ignore")
@one_thread_per_product()
def find_origin(training: Training, batches: Sequence[Batch], S: Array) -> Origin:
    """Return where Inf or NaN first appears in a step, computed again with the present weights and loss scale S.

    Forward of all micro-batches comes before any backward. No state changes but the 16-bit weights, which are cast from the
    masters as in every step. All ranks must call this together.
    """
    state, xp = training.state, training.state.backend.xp
    state.weights_down()
    found, run = _Check(training), training.run.frozen()
    passes, tapes, counts = [], [], []
    for i, (tokens, targets) in enumerate(batches):
        counts.append(int(training.model.n_targets(targets)))
        run.observer = found.of(i, skips_loss=counts[i] == 0)
        tape = Tape(run, state.weight_views, training.model.tied)
        passes.append((tape, training.model.loss(tape, tokens, targets)))
        tapes.append({entry.output.name: entry for entry in tape.entries})
    for i, ((tape, loss), n) in enumerate(zip(passes, divisors(training.model, batches, state), strict=True)):
        run.observer = found.of(i, skips_loss=counts[i] == 0)
        tape.backward(loss, divided(S, n, xp), found.sink_of(i))
    none = len(found.events)
    first = state.min_over_ranks(none if found.first is None else found.first)
    if first < none:
        return _origin(found, found.events[first], tapes, first == found.first, S)
    if sum(counts) == 0:
        text = f"all targets of the step are ignored ({training.model.ignore_index}), so the loss is a mean over nothing"
        return Origin("targets", "loss", text)
    return Origin("gone", "", "with the present weights every result of that step is finite")


def _origin(found: _Check, event: Event, tapes: Sequence[Mapping[str, Entry]], own: bool, S: Array) -> Origin:
    """Return the origin for a result. own: this rank computed it, so its contents are known."""
    kind, i, name = event
    bad = found.bad if own else "Inf or NaN"
    if kind != "activations":
        what = f"the gradient of {name}" if kind == "weight_grads" else f"the gradient of the output of {name}"
        at = f"at a loss scale of {float(S):g}"
        text = f"the loss is finite, but a gradient is not: {what} is the first in backward order, with {bad}, {at}"
        return Origin("backward", name, text)
    entry = tapes[i][name]
    fault = _of_parameters(found.training, entry)
    if fault is not None:
        return fault
    read = [node.name for node in entry.inputs if node is not None]
    inputs = f"its inputs ({', '.join(read)}) and parameters are finite" if read else "its parameters are finite"
    text = f"the output of {name} ({entry.op.name}) is the first that is not finite, with {bad}, while {inputs}"
    return Origin("forward", name, text)


def _of_parameters(training: Training, entry: Entry) -> Origin | None:
    """Return the first parameter of an operation that is not finite or overflows when it is cast, or None."""
    state, to_host = training.state, training.state.backend.to_host
    for value in entry.params:
        if value is None:
            continue
        name = _leaf(value.node.name, state.weight_views)
        weight = contents(to_host(state.weight_views[name]))
        copied = "" if value.array is None else contents(to_host(value.array))
        master = weight
        if state.ranks == 1:
            master = contents(to_host(state.layout.views(state.values(state.master_kind))[name]))
        if master:
            return Origin("parameter", name, f"{name} has {master}")
        if weight or copied:
            text = f"{name} is finite, but its 16-bit copy has {weight or copied}: it overflows when it is cast"
            return Origin("cast", name, text, entry.op.name == "embedding")
    return None


def _leaf(name: str, weights: Mapping[str, Array]) -> str:
    """Return the name of the parameter behind a name on the tape: 'h.0.fc.weight.fp16' -> 'h.0.fc.weight'."""
    return name if name in weights else name.rpartition(".")[0]


def first_non_finite(state: State) -> str | None:
    """Return the name of the first parameter whose gradient has an Inf or NaN, or None. Waits for the device and all ranks."""
    first = state.layout.size
    for block in blocks(state.grads.size):
        bad = ~np.isfinite(state.backend.to_host(widen(state.grads[block], state.math_format)))
        if bad.any():
            first = state.first + block.start + int(bad.argmax())
            break
    first = state.min_over_ranks(first)
    return state.layout.name_at(first) if first < state.layout.size else None
