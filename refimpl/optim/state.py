"""The model states: one flat buffer a kind, with named views.

    weights, grads      in the recipe's format, 16 bits in the note's algorithm
    master, m, v        FP32
    main_grads          FP32 gradients beside 16-bit ones, where a recipe keeps them

What a recipe keeps in another way than as plain numbers, `storage` reads and writes.

All parameters lie end to end in one buffer, in state_dict order, without padding. So one loop updates them all, a shard
is a slice, and the bytes of the model states are a sum of five `nbytes`: 2 + 2 + 4 + 4 + 4 = 16 a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol, TypeVar

import numpy as np

from refimpl.backends.base import Backend
from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of, widens_to
from refimpl.precision.context import Monitor
from refimpl.precision.state_encodings import MAIN, BufferSpec, Plain, RandomKey, buffer_name, get_encoding

Sink = Callable[[str, Array], None]
R = TypeVar("R")


class ParameterSpec(Protocol):
    """What is asked of a parameter here (`models.Parameter`): its shape, and whether weight decay acts on it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def decay(self) -> bool: ...


class HasParameters(Protocol):
    """What is asked of a model here: its table of parameters."""

    @property
    def parameters(self) -> Mapping[str, ParameterSpec]: ...


EMBEDDINGS = {"wte", "wpe"}
"""The modules that are tables of embeddings, of all our models."""


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat buffers: name -> (start, stop, shape)."""

    slots: Mapping[str, tuple[int, int, tuple[int, ...]]]
    decayed: tuple[tuple[int, int], ...]  # the ranges that weight decay acts on, in order, joined where they touch
    size: int

    @property
    def embeddings(self) -> int:
        """How many parameters the tables of embeddings have that lie first."""
        first = takewhile(lambda name: EMBEDDINGS & {*name.split(".")}, self.slots)
        return max((self.slots[name][1] for name in first), default=0)

    @classmethod
    def of(cls, model: HasParameters) -> Layout:
        """The layout of a model: its parameters in the order of their table."""
        slots: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        decayed: list[tuple[int, int]] = []
        start = 0
        for name, spec in model.parameters.items():
            stop = start + int(np.prod(spec.shape))
            slots[name] = (start, stop, spec.shape)
            if spec.decay and decayed and decayed[-1][1] == start:
                decayed[-1] = (decayed[-1][0], stop)
            elif spec.decay:
                decayed.append((start, stop))
            start = stop
        return cls(slots, tuple(decayed), start)

    def views(self, buffer: Array, first: int | None = None) -> dict[str, Array]:
        """name -> the parameter's part of a flat buffer, in its shape; no copies. first: of a buffer of so many only."""
        slots = {name: slot for name, slot in self.slots.items() if first is None or slot[1] <= first}
        return {name: buffer[start:stop].reshape(shape) for name, (start, stop, shape) in slots.items()}

    def name_at(self, index: int) -> str:
        """The parameter that the element `index` of a flat buffer belongs to."""
        return next(name for name, (start, stop, _) in self.slots.items() if start <= index < stop)


BLOCK = 1 << 18
"""Elements that passes over flat buffers handle at a time: few enough for a cache, enough for a thread to work on alone."""


DEVICE_BLOCK = 1 << 24
"""The same on a device: so many that their launches take no time beside the memory, and few enough that the FP32 arrays in
between, 64 MiB each, are small beside the states."""

GRAIN = 1 << 10
"""Elements of the flat index that are summed by themselves first, where a sum goes over all: blocks, and the shards of several
ranks, begin at multiples of it. So no sum depends on blocks, threads or ranks."""


def blocks(part: slice, step: int = 0) -> Iterator[slice]:
    """Slices of BLOCK elements, or of `step`, that cover a part of the flat index."""
    for start in range(part.start, part.stop, step or BLOCK):
        yield slice(start, min(start + (step or BLOCK), part.stop))


def by_grain(x: Array, fold: Callable[[Array], Array], xp: Any) -> Array:
    """x (n,) -> (n / GRAIN, rounded up): `fold` of the last axis of each grain; the last one may be shorter."""
    whole = x.size // GRAIN * GRAIN
    folded = fold(x[:whole].reshape(-1, GRAIN))
    return folded if whole == x.size else xp.concatenate([folded, fold(x[whole:].reshape(1, -1))])


class State:
    """The flat buffers of one run, by kind, and `t`, the number of updates made (skipped steps do not count).

    own: the part of the flat index that is updated here. It is all of it, and so is what the buffers hold, but where several
    ranks divide the states among them (`zero.ShardedState`).
    """

    ranks = 1

    def __init__(self, model: HasParameters, stored: Mapping[str, str], backend: Backend, seed: int = 0) -> None:
        """Zeroed buffers. stored: kind -> storage, as `Recipe.state_encodings` gives it; seed: for storages that use chance."""
        self.layout, self.stored, self.backend, self.seed = Layout.of(model), dict(stored), backend, seed
        self.encodings = {kind: get_encoding(name).of(self.layout.embeddings) for kind, name in stored.items()}
        if not backend.on_host:
            self.need_no_codes(f"--backend {backend.name}")
        self.formats = {kind: storage.fmt for kind, storage in self.encodings.items()}
        self.local_slice = self.stored_slice("master")
        xp = backend.xp
        self.buffers = {
            buffer_name(kind, part): xp.zeros(self.elements(kind, part, spec), spec.dtype)
            for kind, storage in self.encodings.items() for part, spec in storage.parts.items()
        }  # fmt: skip
        self.t = xp.zeros((), np.int64)
        start, stop = self.local_slice.start, self.local_slice.stop
        decayed = np.clip(np.array(self.layout.decayed, np.int64).reshape(-1, 2).T, start, stop)
        self.decayed = backend.from_host((decayed - start).copy())  # starts and stops, counted from that of the local slice
        self.monitor: Monitor | None = None
        self.weight_views: Mapping[str, Array] = self.views("weights")
        self.grad_views = self.views("grads") if "grads" in stored else {}

    # -- what is held here --------------------------------------------------------------------------------------------

    def stored_slice(self, kind: str, part: str = MAIN) -> slice:
        """The part of the flat index whose values of a kind (or of a part of its storage) are held here: all of it."""
        return slice(0, self.layout.size)

    def capacity(self, kind: str, part: str) -> int:
        """How many values a buffer has room for."""
        return self.layout.size

    def elements(self, kind: str, part: str, spec: BufferSpec) -> int:
        """How many elements a buffer has: room for all, or, of what only some parameters have, what is held here."""
        held = spec.slice(self.stored_slice(kind, part))
        return spec.size(self.capacity(kind, part)) if spec.first is None else held.stop - held.start

    def views(self, kind: str) -> dict[str, Array]:
        """name -> the parameter's part of a kind that is held as a whole, in its shape; no copies."""
        return self.layout.views(self.buffers[kind])

    @property
    def grain(self) -> int:
        """GRAIN, for a backend's twins."""
        return GRAIN

    @property
    def weights(self) -> Array:
        """What forward and backward read."""
        return self.buffers["weights"]

    @property
    def grads(self) -> Array:
        """What backward writes: the gradient of the scaled loss."""
        return self.buffers["grads"]

    @property
    def master(self) -> Array:
        """What the optimizer updates; a recipe without separate masters updates the weights themselves."""
        return self.buffers.get("master", self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all model states."""
        return sum(int(buffer.nbytes) for buffer in self.buffers.values())

    def load_weights(self, weights: Mapping[str, np.ndarray], rounded: bool = False) -> None:
        """Start from FP32 weights by name: the masters keep them in full, the model weights are their rounded copy.

        rounded: the masters start from that copy too. So do Apex O2, Megatron, DeepSpeed and llm.c, which make a 16-bit
        model first and masters of it. PyTorch: a model trained with autocast keeps its FP32 weights.
        """
        storage = self.encodings[self.master_kind]
        for name, (start, stop, _) in self.layout.slots.items():
            part = slice(max(start, self.local_slice.start), min(stop, self.local_slice.stop))
            if part.start >= part.stop:
                continue
            source = self.backend.from_host(weights[name].reshape(-1)[part.start - start : part.stop - start])
            if rounded:
                source = cast(source, self.formats["weights"])
            wide = widen(source, self.math_format)
            storage.start(self.parts(self.master_kind, part), wide)
        self.weights_down()

    def weights_down(self) -> None:
        """Round the masters to the format of the model weights. Where the weights are their own masters, do nothing.

        Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.
        """
        if "master" not in self.stored:
            return
        masters, weights = self.local("master"), self.local("weights")
        cast(masters, self.formats["weights"], out=weights)
        self._tell("weights_down", masters, weights, self.local_slice.start)

    def _tell(self, site: str, values: Array, rounded: Array, start: int = 0) -> None:
        """Tell a monitor of a rounding of the parameters from index `start` on, at sites named `parameter:site`."""
        if self.monitor is None or widens_to(format_of(values), format_of(rounded)):
            return
        for name, (first, last, _) in self.layout.slots.items():
            part = slice(max(first - start, 0), max(last - start, 0))
            if rounded[part].size:
                self.monitor(f"{name}:{site}", values[part], rounded[part])

    def parts(self, kind: str, block: slice) -> dict[str, Array]:
        """The parts of a kind's storage for a block of the flat index, as views."""
        parts = {}
        for part, spec in self.encodings[kind].parts.items():
            first, mine = spec.slice(self.stored_slice(kind, part)).start, spec.slice(block)
            parts[part] = self.buffers[buffer_name(kind, part)][mine.start - first : mine.stop - first]
        return parts

    def block(self, kind: str, block: slice) -> Array:
        """The numbers of a kind, as they are stored, for a block of the flat index; a view."""
        return self.parts(kind, block)[MAIN]

    def local(self, kind: str) -> Array:
        """Those of all that is updated here."""
        return self.block(kind, self.local_slice)

    def values(self, kind: str) -> Array:
        """All values of a kind that are updated here, to look at: the buffer itself where it holds them, else an FP32 copy."""
        return self.encodings[kind].values(self.parts(kind, self.local_slice))

    def need_no_codes(self, who: str) -> None:
        """Errors: UsageError where a kind is kept as 8-bit codes with scales."""
        for kind, storage in self.encodings.items():
            if not isinstance(storage, Plain):
                raise UsageError(f"{who} knows states of 16 bits and more; this recipe keeps {kind} as {self.stored[kind]}")

    def write(self, kind: str, parts: Mapping[str, Array], values: Array, site: str, start: int) -> None:
        """Keep values of a block that begins at index `start` in `parts`, rounded as their storage does it."""
        storage = self.encodings[kind]
        storage.write(parts, values, RandomKey(self.seed, self.t, start, self.backend.xp, kind))
        if isinstance(storage, Plain):
            self._tell(site, values, parts[MAIN], start)

    def each_block(self, f: Callable[[slice], R]) -> list[R]:
        """`f` of every block of what is updated here, in order; the backend may take several at a time."""
        step = BLOCK if self.backend.on_host else DEVICE_BLOCK
        pieces, size = blocks(self.local_slice, step), self.local_slice.stop - self.local_slice.start
        if self.monitor is not None:  # who counts what it is told does so for one at a time
            return [f(block) for block in pieces]
        return self.backend.each(f, pieces, size)

    @property
    def master_kind(self) -> str:
        """The kind that the optimizer updates: 'master', or 'weights' where they are their own masters."""
        return "master" if "master" in self.stored else "weights"

    @property
    def master_format(self) -> str:
        """The format of what the optimizer updates."""
        return self.formats[self.master_kind]

    @property
    def math_format(self) -> str:
        """The format that the optimizer computes in: fp32, or fp64 where the states are."""
        return "fp64" if self.master_format == "fp64" else "fp32"

    def gradient_sink(self, first: bool) -> Sink:
        """Where backward leaves its gradients: stored for the first micro-batch of a step, added for the others.

        Sums over micro-batches are in FP32 (`Recipe.state_encodings` makes the buffer so), never in 16 bits.
        """

        def store(name: str, gradient: Array) -> None:
            widen(gradient, self.formats["grads"], out=self.grad_views[name])

        def add(name: str, gradient: Array) -> None:
            view = self.grad_views[name]
            view += widen(gradient, self.formats["grads"])

        if first:
            self.grads[...] = 0  # a parameter that the model did not use this time has a gradient of zero, not the last one
        return store if first else add

    # -- what several ranks do between them, and one does not: `zero.ShardedState` ------------------------------------------

    def reduce_gradients(self, last: bool) -> None:
        """After the backward of a micro-batch, the step's last or another: the gradients become their sums over the ranks."""

    def of_all_ranks(self, *grains: Array) -> tuple[Array, ...]:
        """Values of the grains that are updated here -> those of all grains."""
        return grains

    def mean_over_ranks(self, loss: Array) -> Array:
        """A loss of this rank's examples, 0-d -> the mean of all."""
        return loss

    def sum_over_ranks(self, count: Array) -> Array:
        """A number of this rank's, 0-d -> the sum of all."""
        return count

    def least_over_ranks(self, index: int) -> int:
        """The smallest of all ranks' numbers."""
        return index

    def gathered(self, kind: str, part: str) -> Array:
        """A buffer with the values of the whole flat index, for a checkpoint."""
        return self.buffers[buffer_name(kind, part)]

    def put_whole(self, kind: str, part: str, values: Array) -> None:
        """The way back: what is held here is taken from it."""
        self.buffers[buffer_name(kind, part)][...] = values
