"""Traces: what a training run computed, step by step, as named tensors in a safetensors file.

A tensor's name is `step/point` or `step/point/name`, for example `3/2.grads/transformer.wte.weight`. Step 0 holds the states
before the first step. docs/traces.md describes the points; a trace may hold any of them. In micro-batches after the first,
the name begins with their number: `3/2.activations/2:lm_head`. The header (metadata key `refimpl-trace`) is JSON: `version`,
`order` of the tensors, `settings` that the writer states, and `config` if refimpl wrote the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of, format_of
from refimpl.optim.state import State
from refimpl.parity.hooks import UpdateArguments, WrappedOptimizer
from refimpl.parity.mistakes import inject
from refimpl.training.checkpoint import (
    TRACE_KEY,
    check_exchanged,
    parse_header,
    read_tensors,
    sealed,
    write_tensors,
    written_here,
)
from refimpl.training.config import Config
from refimpl.training.data import sample_batch
from refimpl.training.progress_bar import Tick, no_tick
from refimpl.training.schema import Integer, Table, Words, check
from refimpl.training.setup import BATCHES, INIT, Training, generator

VERSION = 1
WRITERS = "scripts/trace.py record writes the trace of a run, and docs/traces.md shows how a loop in PyTorch writes one"
HEADER = Table(optional={"version": Integer(), "order": Words(), "config": Table(), "settings": Table()})

POINTS = {
    "0.tokens": "the tokens that the model reads: (B, T) integers; with n micro-batches (n, B, T)",
    "0.targets": "the tokens that it must predict, in the same shape",
    "1.weights": "a parameter as the forward pass reads it, in its own format",
    "2.loss_scale": "S, which backward starts from",
    "2.activations": "the output of an operation, by its place in the model",
    "2.loss": "the mean loss, not scaled",
    "2.activation_grads": "the gradient of S times the loss with respect to that output",
    "2.grads": "the gradient of S times the loss with respect to a parameter, in the format that it is stored in",
    "3.unscaled": "this gradient in FP32, divided by S, not yet clipped",
    "3.found_inf": "whether the step is skipped: 0 or 1",
    "3.norm": "the L2 norm of all unscaled gradients, before clipping",
    "4.clip": "the coefficient that the unscaled gradients are multiplied by: 1 if nothing is clipped",
    "4.lr": "the learning rate of this update",
    "4.m": "Adam's first moment (SGD: momentum) after the step",
    "4.v": "Adam's second moment after the step",
    "4.master": "the FP32 weights after the step",
    "4.scale": "the loss scale after the step",
    "4.growth_tracker": "good steps since the loss scale last changed, after the step",
    "4.hysteresis_tracker": "overflows until the loss scale is reduced, after the step, if it has hysteresis",
    "4.overflowed": "1 once there has been an overflow, if the loss scale grows gradually until then",
    "4.t": "the number of updates made, skipped steps not counted, after the step",
}
"""The points of a step, in the order in which it computes them, and what each holds."""

BY_PARAMETER = ("1.weights", "2.grads", "3.unscaled", "4.m", "4.v", "4.master")
BY_PLACE = ("2.activations", "2.activation_grads")
BATCH = ("0.tokens", "0.targets")
SCALE_STATE = {
    "4.scale": "scale", "4.growth_tracker": "_growth_tracker", "4.hysteresis_tracker": "_hysteresis_tracker",
    "4.overflowed": "overflowed",
}  # fmt: skip
"""Points of the loss scale -> keys of `LossScale.state_dict`."""


@dataclass
class Trace:
    """Named tensors of some steps, in memory.

    config: all fields of the `Config` of a run of refimpl, else empty. settings: those that another writer states.
    """

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def put(self, step: int, point: str, name: str, array: Array) -> None:
        """Add a copy of a tensor; name is '' if the point has only one."""
        self.tensors[key(step, point, name)] = np.array(array)

    def get(self, step: int, point: str, name: str = "") -> np.ndarray | None:
        """Return a tensor, or None if the trace does not hold it."""
        return self.tensors.get(key(step, point, name))

    def at(self, step: int, point: str) -> dict[str, np.ndarray]:
        """Return all tensors of a point by name, in the order in which they were added."""
        prefix = f"{step}/{point}/"
        return {k.removeprefix(prefix): array for k, array in self.tensors.items() if k.startswith(prefix)}

    @property
    def steps(self) -> list[int]:
        """Return the steps that the trace holds tensors of, in order, without step 0."""
        return sorted({int(k.partition("/")[0]) for k in self.tensors} - {0})

    def inputs(self, step: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Return the micro-batches of a step, or None if tokens or targets are missing."""
        tokens, targets = self.get(step, "0.tokens"), self.get(step, "0.targets")
        if tokens is None or targets is None:
            return None
        return [(tokens, targets)] if tokens.ndim == 2 else list(zip(tokens, targets, strict=True))


def key(step: int, point: str, name: str = "") -> str:
    """Return the name of a tensor in the file."""
    return f"{step}/{point}/{name}" if name else f"{step}/{point}"


def parse_key(text: str) -> tuple[int, str, str]:
    """Return step, point and name ('' without one) from a tensor's name. Errors: ValueError if a trace has no such name."""
    step, _, rest = text.partition("/")
    point, slash, name = rest.partition("/")
    named = point in BY_PARAMETER or point in BY_PLACE
    if not (step.isascii() and step.isdecimal() and str(int(step)) == step) or point not in POINTS or bool(slash) != named:
        raise ValueError(text)
    if named and not name:
        raise ValueError(text)
    return int(step), point, name


def in_batch(place: str, number: int) -> str:
    """Return the name of a place in a micro-batch, counted from 1: 'lm_head' in the first, '2:lm_head' in the second."""
    return place if number == 1 else f"{number}:{place}"


def split_batch(name: str) -> tuple[str, int]:
    """Return (place, number of the micro-batch) of a name that `in_batch` made; '1:lm_head' is 'lm_head'."""
    number, colon, place = name.partition(":")
    return (place, int(number)) if colon and number.isascii() and number.isdecimal() else (name, 1)


# -- files -------------------------------------------------------------------------------------------------------------


def save(path: Path, trace: Trace) -> None:
    """Write a trace. Errors: UsageError when it cannot be written."""
    header: dict[str, Any] = {"version": VERSION, "config": trace.config, "order": list(trace.tensors)}
    if trace.settings:
        header["settings"] = trace.settings
    write_tensors(path, trace.tensors, {TRACE_KEY: sealed(header, trace.tensors)})


def load(path: Path) -> Trace:
    """Read a trace, written by refimpl or by another program.

    A file without our header is a trace without a configuration, if its tensors have a trace's names.
    Errors: UsageError that says what is wrong with the file.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, and a trace is a file: {WRITERS}")
    if not path.exists():
        raise UsageError(f"no trace at {path}: {WRITERS}")
    tensors, metadata = read_tensors(path, "trace")
    if TRACE_KEY not in metadata and written_here(path):
        raise UsageError(f"{path} is a checkpoint or exported weights, not a trace; scripts/trace.py record writes traces")
    header = parse_header(path, metadata.get(TRACE_KEY, "{}"))
    check_exchanged(path, header, tensors)
    check(header, HEADER, f"{path} has a damaged header")
    if header.get("version", VERSION) != VERSION:
        raise UsageError(f"{path} has trace version {header['version']!r}; this program reads version {VERSION}")
    position = {name: i for i, name in enumerate(header.get("order", []))}
    tensors = dict(sorted(tensors.items(), key=lambda item: position.get(item[0], len(position))))
    for name in tensors:
        try:
            parse_key(name)
        except ValueError:
            what = f"{name!r} is not a tensor of a trace (step/point or step/point/name)"
            raise UsageError(f"{path}: {what}; points are {', '.join(POINTS)}") from None
    return Trace(header.get("config", {}), tensors, header.get("settings", {}))


# -- recording ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Records a run in a trace, step by step; the first array recorded under a name stays.

    Attach it before a mistake is injected, so that it records the update that the optimizer's rule sees.
    follow: another trace whose activations and their gradients replace the run's own after each is recorded, so that every
    operation computes from that trace's values and no difference is carried from one to the next.
    """

    def __init__(self, training: Training, trace: Trace, follow: Trace | None = None) -> None:
        self.trace, self.follow, self.step = trace, follow, 0
        self._to_host, self._rule_side = training.state.backend.to_host, training.optimizer
        training.run.observer = self._observe
        training.optimizer = WrappedOptimizer(training.optimizer, self._before_update)

    @property
    def step(self) -> int:
        """Return the step that is being recorded; setting it begins a step, with its first micro-batch."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step, self._batch, self._seen = step, 1, set[str]()

    def put(self, point: str, name: str, array: Array) -> None:
        """Record an array, unless there is one already."""
        if key(self.step, point, name) not in self.trace.tensors:
            self.trace.put(self.step, point, name, self._to_host(array))

    def _observe(self, point: str, place: str, array: Array) -> Array:
        if array.ndim == 0:
            return array  # the loss is recorded under 2.loss
        if point == "activations":
            if place in self._seen:  # the next micro-batch has begun
                self._batch, self._seen = self._batch + 1, set()
            self._seen.add(place)
        name = in_batch(place, self._batch)
        self.put(f"2.{point}", name, array)
        theirs = self.follow.get(self.step, f"2.{point}", name) if self.follow else None
        return array if theirs is None else like(theirs, array, f"2.{point} of {name}")

    def weights(self, state: State) -> None:
        """Record the weights that forward reads."""
        for name, view in state.weight_views.items():
            self.put("1.weights", name, view)

    def grads(self, state: State) -> None:
        """Record the gradients that backward has left."""
        for name, view in state.grad_views.items():
            self.put("2.grads", name, view)

    def _before_update(self, state: State, inverse: Array, clip: Array | float, found: Array) -> UpdateArguments:
        self.weights(state)  # still those that forward has read
        self.grads(state)
        with np.errstate(all="ignore"):
            for name, view in state.grad_views.items():
                self.put("3.unscaled", name, widen(view, state.math_format) * widen(inverse, state.math_format))
        self.put("3.found_inf", "", state.backend.xp.asarray(found))
        as_array = state.backend.xp.full((), clip, dtype_of(state.math_format)) if isinstance(clip, float) else clip
        self.put("4.clip", "", as_array)
        self.put("4.lr", "", self._rule_side.lr(state))
        return inverse, clip, found

    def states(self, training: Training) -> None:
        """Record the present masters and moments."""
        state = training.state
        for kind in ("m", "v", "master"):
            own = state.master_kind if kind == "master" else kind
            if own in state.stored:
                for name, view in state.layout.views(state.values(own)).items():
                    self.put(f"4.{kind}", name, view)

    def counters(self, training: Training) -> None:
        """Record the present loss scale, its counters, and the number of updates."""
        self.put("4.scale", "", training.loss_scale.scale)
        counters = training.loss_scale.state_dict()
        for point, name in SCALE_STATE.items():
            if name in counters and name != "scale":
                self.put(point, "", np.int64(counters[name]))
        self.put("4.t", "", training.state.t)


def like(theirs: np.ndarray, ours: Array, what: str) -> np.ndarray:
    """Return their tensor in our format, rounded if theirs is wider. Errors: UsageError if the shapes differ."""
    if theirs.shape != ours.shape:
        raise UsageError(f"{what} has the shape {theirs.shape} in the trace; in this model it has {ours.shape}")
    result: np.ndarray = cast(theirs, format_of(ours))
    return result


def record(config: Config, source: Trace | None = None, tick: Tick = no_tick) -> Trace:
    """Train for `config.steps` steps and return the trace.

    source: another trace, whose initial weights and batches are used. tick: callback after each step.
    Errors: UsageError if the source lacks them.
    """
    training, trace = config.make_training(config.make_backend()), Trace(asdict(config))
    recorder = Recorder(training, trace)
    inject(config.mistake, training)
    start = source.at(0, "4.master") if source else training.model.initial_weights(generator(config.seed, INIT))
    rounded = not source and config.rounds_masters
    training.state.load_weights(checked_start(start, training), rounded)
    recorder.states(training)
    recorder.counters(training)
    write_down(recorder, training, batches_of(config, source), tick)
    return trace


def write_down(
    recorder: Recorder,
    training: Training,
    steps: Iterable[list[tuple[np.ndarray, np.ndarray]]],
    tick: Tick = no_tick,
) -> None:
    """Train on the batches of some steps and record what they compute. tick: callback after each step."""
    for recorder.step, batches in enumerate(steps, 1):
        for point, i in (("0.tokens", 0), ("0.targets", 1)):
            arrays = [batch[i] for batch in batches]
            recorder.trace.put(recorder.step, point, "", np.stack(arrays) if len(arrays) > 1 else arrays[0])
        result = training.step([training.model.batch_on(training.state.backend, x, y) for x, y in batches])
        recorder.put("2.loss", "", result.loss)
        recorder.put("2.loss_scale", "", result.loss_scale)
        recorder.put("3.norm", "", result.grad_norm)
        recorder.states(training)
        recorder.counters(training)
        tick()


def checked_start(start: Mapping[str, np.ndarray], training: Training) -> Mapping[str, np.ndarray]:
    """Return initial weights if they fit this model. Errors: UsageError that names the first that does not."""
    for name, spec in training.model.parameters.items():
        if name not in start or start[name].shape != spec.shape:
            there = f"{start[name].shape}" if name in start else "missing"
            raise UsageError(f"the start of the trace (0/4.master/{name}) is {there}; this model's shape is {spec.shape}")
    return start


def batches_of(config: Config, source: Trace | None) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yield the batches of `config.steps` steps, from a trace or sampled as the trainer does. Errors: UsageError."""
    if source is not None:
        for step in source.steps[: config.steps]:
            batches = source.inputs(step)
            if batches is None:
                raise UsageError(f"the trace has no {key(step, '0.tokens')}: its batches cannot be used")
            yield batches
        return
    corpus, rng = config.make_corpus(), generator(config.seed, BATCHES)
    sizes = config.batch_size, config.block_size
    for _ in range(config.steps):
        yield [sample_batch(corpus.train, *sizes, rng, config.no_target) for _ in range(config.grad_accum)]
