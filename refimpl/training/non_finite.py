"""Where Inf or NaN begins in a step: found after the fact, by taking forward and backward once more and looking on.

A loss that is not finite is another fault than an overflow in backward. The loss scale enters only there, so it is not why the
loss is not finite: a weight holds the NaN, or an operation overflows in forward. Nothing here costs a step that goes well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refimpl.nn.autograd import Entry, Sink, Tape
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import is_float
from refimpl.optim.micro_batches import divided, divisors
from refimpl.precision.context import Observer
from refimpl.precision.recipes import RECIPES
from refimpl.training.config import Config
from refimpl.training.setup import Training

Batch = tuple[Array, Array]


@dataclass(frozen=True)
class Origin:
    """The first thing in a step that is not finite.

    stage: 'parameter' (a weight holds it), 'cast' (a finite weight overflows its 16-bit copy), 'forward' (the output of an
        operation, from finite inputs), 'targets' (none counts, so that the loss is a mean of nothing), 'backward' (a gradient;
        the loss is finite), or 'gone' (with the weights of now all is finite).
    name: of the parameter, of the operation's place, or of what the gradient is of. text: a sentence, without its period.
    """

    stage: str
    name: str
    text: str

    @property
    def in_loss(self) -> bool:
        """Whether the loss itself is not finite."""
        return self.stage in ("parameter", "cast", "forward", "targets")


Event = tuple[str, int, str]
"""What is looked at: 'activations', 'activation_grads' or 'weight_grads'; the micro-batch; the place or parameter."""


@dataclass
class _Watch:
    """Looks at every result of a pass, in order; keeps the place of the first that is not finite, and what is in it."""

    training: Training
    events: list[Event] = field(default_factory=list)
    first: int | None = None
    bad: str = ""

    def look(self, event: Event, array: Array) -> None:
        """Look at one result."""
        self.events.append(event)
        if self.first is None:
            self.bad = contents(self.training.state.backend.to_host(array))
            self.first = len(self.events) - 1 if self.bad else None

    def of(self, i: int, skips_loss: bool = False) -> Observer:
        """An observer of micro-batch i. skips_loss: its loss is the mean of nothing, which is no fault of the operation."""

        def observe(kind: str, place: str, array: Array) -> Array:
            if not (skips_loss and array.ndim == 0):
                self.look((kind, i, place), array)
            return array

        return observe

    def sink_of(self, i: int) -> Sink:
        """A sink that looks at the gradients of the parameters, and keeps none."""
        return lambda name, gradient: self.look(("weight_grads", i, name), gradient)


def contents(x: np.ndarray) -> str:
    """What of an array is not finite, in words: '1 NaN', '3 Inf and 2 NaN'; '' where all is."""
    if not is_float(x):
        return ""
    x = widen(x, "fp64")
    counts = {"Inf": np.count_nonzero(np.isinf(x)), "NaN": np.count_nonzero(np.isnan(x))}
    return " and ".join(f"{n} {kind}" for kind, n in counts.items() if n)


@np.errstate(all="ignore")
def find_origin(training: Training, batches: Sequence[Batch], S: Array) -> Origin:
    """Take forward and backward of a step once more, from the weights of now and a loss scale S: where does Inf or NaN begin?

    All of forward comes before all of backward. No state changes but the 16-bit weights, which are made from the masters as
    each step does. All ranks call it together.
    """
    state, xp = training.state, training.state.backend.xp
    state.weights_down()
    watch, run = _Watch(training), training.run.frozen()
    passes, tapes, counts = [], [], []
    for i, (tokens, targets) in enumerate(batches):
        counts.append(int(training.model.n_targets(targets)))
        run.observer = watch.of(i, skips_loss=counts[i] == 0)
        tape = Tape(run, state.weight_views, training.model.tied)
        passes.append((tape, training.model.loss(tape, tokens, targets)))
        tapes.append({entry.output.name: entry for entry in tape.entries})
    for i, ((tape, loss), n) in enumerate(zip(passes, divisors(training.model, batches, state), strict=True)):
        run.observer = watch.of(i, skips_loss=counts[i] == 0)
        tape.backward(loss, divided(S, n, xp), watch.sink_of(i))
    none = len(watch.events)
    first = state.min_over_ranks(none if watch.first is None else watch.first)
    if first < none:
        return _told(watch, watch.events[first], tapes, first == watch.first, S)
    if sum(counts) == 0:
        text = f"none of the step's targets counts: all are {training.model.ignore_index}, so the loss is a mean of nothing"
        return Origin("targets", "loss", text)
    return Origin("gone", "", "with the weights of now every result of that step is finite")


def _told(watch: _Watch, event: Event, tapes: Sequence[Mapping[str, Entry]], own: bool, S: Array) -> Origin:
    """The origin that an event is. own: this rank saw it, and knows what is in it."""
    kind, i, name = event
    bad = watch.bad if own else "Inf or NaN"
    if kind != "activations":
        what = f"the gradient of {name}" if kind == "weight_grads" else f"the gradient of the output of {name}"
        at = f"at a loss scale of {float(S):g}"
        text = f"the loss is finite and a gradient is not: {what} is the first in backward order, with {bad}, {at}"
        return Origin("backward", name, text)
    entry = tapes[i][name]
    fault = _of_parameters(watch.training, entry)
    if fault is not None:
        return fault
    read = [node.name for node in entry.inputs if node is not None]
    inputs = f"its inputs ({', '.join(read)}) and parameters are finite" if read else "its parameters are finite"
    text = f"the output of {name} ({entry.op.name}) is the first that is not finite, with {bad}, while {inputs}"
    return Origin("forward", name, text)


def _of_parameters(training: Training, entry: Entry) -> Origin | None:
    """The first parameter of an operation that is not finite, or whose copy in fewer bits is not."""
    state, to_host = training.state, training.state.backend.to_host
    for value in entry.params:
        if value is None:
            continue
        name = _leaf(value.node.name, state.weight_views)
        held = contents(to_host(state.weight_views[name]))
        copied = "" if value.array is None else contents(to_host(value.array))
        master = held
        if state.ranks == 1:
            master = contents(to_host(state.layout.views(state.values(state.master_kind))[name]))
        if master:
            return Origin("parameter", name, f"{name} holds {master}")
        if held or copied:
            text = f"{name} is finite, but its 16-bit copy holds {held or copied}: it overflows when it is cast"
            return Origin("cast", name, text)
    return None


def _leaf(name: str, weights: Mapping[str, Array]) -> str:
    """The parameter that a value on the tape is, or a copy of: 'h.0.fc.weight.fp16' -> 'h.0.fc.weight'."""
    return name if name in weights else name.rpartition(".")[0]


# -- for a person ------------------------------------------------------------------------------------------------------


def explained(origin: Origin, config: Config, updates: int, since: str = "") -> str:
    """Origin and advice, in sentences. updates: made so far. since: from when on it is known to be so."""
    cause = f"{origin.text}{since if origin.stage == 'parameter' else ''}"
    return f"{cause}. {advice(origin, config, updates, since)}"


def advice(origin: Origin, config: Config, updates: int, since: str = "") -> str:
    """What can be done about it, as far as the recipe leaves it to be done."""
    not_why = "The loss is not finite before backward begins, so the loss scale is not why"
    if origin.stage == "targets":
        return "Neither the loss scale nor the learning rate is why: look at the targets, and at --ignore-index"
    if origin.stage == "parameter":
        if since or updates == 0:
            return "Neither the loss scale nor the learning rate is why, and no step can mend it: start from other weights"
        made = "An update has made it"
        if config.mistake != "none":
            return f"{not_why}, and no step can mend it. {made}, with --mistake {config.mistake} injected"
        return f"{not_why}, and no step can mend it. {made}: try a smaller --lr from an earlier checkpoint"
    options = _options(config, backward=origin.stage == "backward")
    if origin.in_loss:
        grown = ["a smaller --lr if the weights have grown"] if updates else ["other weights to start from"]
        return f"{not_why}. Try {', or '.join([*options, *grown])}"
    return f"Try {', or '.join(['a smaller --lr', *options])}"


def _options(config: Config, backward: bool) -> list[str]:
    """The flags that give a result more room: a format with more exponents, and in backward another loss scale."""
    options = []
    if "fp16" in config.recipe:
        other = config.recipe.replace("fp16", "bf16")
        options.append(f"--recipe {other if other in RECIPES else 'bf16'}")
    if backward and "fp16" in config.recipe and config.loss_scale == "none":
        options.append("--loss-scale dynamic, which can go below 1")
    elif backward and config.loss_scale not in ("none", None) and not config.make_loss_scale().adapts:
        options.append("a smaller --loss-scale, or dynamic")
    return options


def known_since(updates: int, step: int, first_step: int) -> str:
    """' since before the first step', where a step has shown it at which nothing had been changed yet; else ''."""
    if updates == 0:
        return " since before the first step"
    return f" since before step {step}, the first after the checkpoint" if step == first_step > 1 else ""

