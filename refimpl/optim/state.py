"""The model states: one flat buffer per kind, with named views.

    weights, grads      in the recipe's format; 16 bits in mixed precision
    master, m, v        FP32
    main_grads          FP32 gradients beside 16-bit ones, in the recipes that keep them

The bytes of the model states are the sum of the buffers' `nbytes`: 2 + 2 + 4 + 4 + 4 = 16 per parameter with Adam.
A recipe may encode a kind in another way than as plain numbers: see `precision/state_encodings.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from refimpl.backends.base import Backend
from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of, widens_to
from refimpl.optim.layout import HasParameters, Layout, blocks
from refimpl.precision.context import Monitor
from refimpl.precision.state_encodings import MAIN, BufferSpec, Plain, RandomKey, buffer_name, get_encoding

Sink = Callable[[str, Array], None]
R = TypeVar("R")


class State:
    """The flat buffers of one run, by kind, and `t`, the number of updates made (skipped steps do not count).

    local_slice: the range of the flat index that is updated here. On one host it is the whole index; with several ranks
    each updates its own range, and may store no more than that (`distributed.zero.ShardedState`).
    """

    ranks = 1

    def __init__(self, model: HasParameters, stored: Mapping[str, str], backend: Backend, seed: int = 0) -> None:
        """Allocate zeroed buffers.

        stored: kind -> name of its encoding, as `Recipe.state_encodings` returns it. seed: for encodings that round at random.
        """
        self.layout, self.stored, self.backend, self.seed = Layout.of(model), dict(stored), backend, seed
        self.encodings = {kind: get_encoding(name).of(self.layout.embeddings) for kind, name in stored.items()}
        if not backend.on_host:
            self.refuse_codes(f"--backend {backend.name}")
        self.formats = {kind: encoding.fmt for kind, encoding in self.encodings.items()}
        self.local_slice = self.stored_slice("master")
        xp = backend.xp
        self.buffers = {
            buffer_name(kind, part): xp.zeros(self.buffer_size(kind, part, spec), spec.dtype)
            for kind, encoding in self.encodings.items() for part, spec in encoding.parts.items()
        }  # fmt: skip
        self.t = xp.zeros((), np.int64)
        start, stop = self.local_slice.start, self.local_slice.stop
        decayed = np.clip(np.array(self.layout.decayed, np.int64).reshape(-1, 2).T, start, stop)
        self.decayed = backend.from_host((decayed - start).copy())  # starts and stops, relative to the start of local_slice
        self.monitor: Monitor | None = None
        self.weight_views: Mapping[str, Array] = self.views("weights")
        self.grad_views = self.views("grads") if "grads" in stored else {}

    # -- buffers; a kind has one per part of its encoding: MAIN, and perhaps 'scales', 'compensation', ... -------------------

    def stored_slice(self, kind: str, part: str = MAIN) -> slice:
        """Return the range of the flat index whose values this rank stores: on one host, all of it."""
        return slice(0, self.layout.size)

    def capacity(self, kind: str, part: str) -> int:
        """Return the number of parameters that a buffer has room for."""
        return self.layout.size

    def buffer_size(self, kind: str, part: str, spec: BufferSpec) -> int:
        """Return the number of elements to allocate: the capacity, or what is stored if few parameters have this part."""
        stored = spec.slice(self.stored_slice(kind, part))
        return spec.size(self.capacity(kind, part)) if spec.first is None else stored.stop - stored.start

    def views(self, kind: str) -> dict[str, Array]:
        """Return name -> view of that parameter in its shape, for a kind that is stored here as a whole."""
        return self.layout.views(self.buffers[kind])

    def buffer_slices(self, kind: str, block: slice) -> dict[str, Array]:
        """Return the views of a kind's buffers, by part, that belong to a block of the flat index."""
        views = {}
        for part, spec in self.encodings[kind].parts.items():
            first, elements = spec.slice(self.stored_slice(kind, part)).start, spec.slice(block)
            views[part] = self.buffers[buffer_name(kind, part)][elements.start - first : elements.stop - first]
        return views

    def block(self, kind: str, block: slice) -> Array:
        """Return a view of a block of a kind's main buffer: numbers in the format of its encoding, or codes."""
        return self.buffer_slices(kind, block)[MAIN]

    def local(self, kind: str) -> Array:
        """Return a view of a kind's main buffer over `local_slice`."""
        return self.block(kind, self.local_slice)

    def values(self, kind: str) -> Array:
        """Return a kind's values over `local_slice`, for reading: a view where the buffer holds them, else an FP32 copy."""
        return self.encodings[kind].values(self.buffer_slices(kind, self.local_slice))

    @property
    def weights(self) -> Array:
        """The model weights, which forward and backward read."""
        return self.buffers["weights"]

    @property
    def grads(self) -> Array:
        """The gradients of the scaled loss, which backward writes."""
        return self.buffers["grads"]

    @property
    def master(self) -> Array:
        """The masters, which the optimizer updates: the weights themselves in a recipe without separate masters."""
        return self.buffers.get("master", self.weights)

    @property
    def master_kind(self) -> str:
        """The kind that the optimizer updates: 'master', or 'weights' in a recipe without separate masters."""
        return "master" if "master" in self.stored else "weights"

    @property
    def master_format(self) -> str:
        """The format of the kind that the optimizer updates."""
        return self.formats[self.master_kind]

    @property
    def math_format(self) -> str:
        """The format that the optimizer computes in: fp32, or fp64 if the states are fp64."""
        return "fp64" if self.master_format == "fp64" else "fp32"

    @property
    def nbytes(self) -> int:
        """The bytes of all model states."""
        return sum(int(buffer.nbytes) for buffer in self.buffers.values())

    def refuse_codes(self, who: str) -> None:
        """Raise UsageError if a kind is stored as 8-bit codes with scales. who: the subject of the message."""
        for kind, encoding in self.encodings.items():
            if not isinstance(encoding, Plain):
                raise UsageError(f"{who} supports states of 16 bits and more; this recipe stores {kind} as {self.stored[kind]}")

    # -- step 1 --------------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Mapping[str, np.ndarray], rounded: bool = False) -> None:
        """Start from FP32 weights by name: the masters are set to them, and the model weights to their rounded copy.

        rounded: set the masters to the rounded copy too, as Apex O2, Megatron, DeepSpeed and llm.c do, which make a 16-bit
        model first and then its masters. PyTorch: a model trained with autocast keeps its FP32 weights.
        """
        encoding = self.encodings[self.master_kind]
        for name, (start, stop, _) in self.layout.slots.items():
            local = slice(max(start, self.local_slice.start), min(stop, self.local_slice.stop))
            if local.start >= local.stop:
                continue
            source = self.backend.from_host(weights[name].reshape(-1)[local.start - start : local.stop - start])
            if rounded:
                source = cast(source, self.formats["weights"])
            wide = widen(source, self.math_format)
            encoding.start(self.buffer_slices(self.master_kind, local), wide)
        self.weights_down()

    def weights_down(self) -> None:
        """Round the masters to the format of the model weights. Do nothing if the weights are their own masters.

        Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.
        """
        if "master" not in self.stored:
            return
        masters, weights = self.local("master"), self.local("weights")
        cast(masters, self.formats["weights"], out=weights)
        self._report("weights_down", masters, weights, self.local_slice.start)

    # -- step 2 --------------------------------------------------------------------------------------------------------------

    def gradient_sink(self, first: bool) -> Sink:
        """Return the function that backward hands each gradient to: it stores those of a step's first micro-batch, adds others.

        Sums over micro-batches are FP32 (`Recipe.state_encodings` makes the buffer FP32), never 16 bits.
        """

        def store(name: str, gradient: Array) -> None:
            widen(gradient, self.formats["grads"], out=self.grad_views[name])

        def add(name: str, gradient: Array) -> None:
            view = self.grad_views[name]
            view += widen(gradient, self.formats["grads"])

        if first:
            self.grads[...] = 0  # a parameter that this step does not use must not keep the gradient of the last step
        return store if first else add

    # -- steps 3 and 4 -------------------------------------------------------------------------------------------------------

    def each_block(self, f: Callable[[slice], R]) -> list[R]:
        """Return `f` of each block of `local_slice`, in order; the backend may compute several at a time."""
        pieces, size = blocks(self.local_slice, self.backend.on_host), self.local_slice.stop - self.local_slice.start
        if self.monitor is not None:  # monitors need not be thread-safe
            return [f(block) for block in pieces]
        return self.backend.each(f, pieces, size)

    def write(self, kind: str, slices: Mapping[str, Array], values: Array, site: str, start: int) -> None:
        """Encode `values` into `slices`, which `buffer_slices` returned for a block that begins at index `start`."""
        encoding = self.encodings[kind]
        encoding.write(slices, values, RandomKey(self.seed, self.t, start, self.backend.xp, kind))
        if isinstance(encoding, Plain):
            self._report(site, values, slices[MAIN], start)

    def _report(self, site: str, values: Array, rounded: Array, start: int) -> None:
        """Report a rounding of the values from index `start` on to the monitor, per parameter, at sites `parameter:site`."""
        if self.monitor is None or widens_to(format_of(values), format_of(rounded)):
            return
        for name, (first, last, _) in self.layout.slots.items():
            overlap = slice(max(first - start, 0), max(last - start, 0))
            if rounded[overlap].size:
                self.monitor(f"{name}:{site}", values[overlap], rounded[overlap])

    # -- exchange among ranks: nothing to do on one host; `distributed.zero.ShardedState` overrides these ---------------------

    def reduce_gradients(self, last: bool) -> None:
        """Sum the gradients over ranks, after the backward of a micro-batch. last: whether it is the step's last one."""

    def gather_grains(self, *grains: Array) -> tuple[Array, ...]:
        """Return arrays over all grains from arrays over those of `local_slice`."""
        return grains

    def mean_over_ranks(self, loss: Array) -> Array:
        """Return the mean over ranks of a loss, 0-d."""
        return loss

    def sum_over_ranks(self, count: Array) -> Array:
        """Return the sum over ranks of a number, 0-d."""
        return count

    def min_over_ranks(self, index: int) -> int:
        """Return the smallest of the ranks' numbers."""
        return index

    def gather(self, kind: str, part: str) -> Array:
        """Return a buffer over the whole flat index, for a checkpoint."""
        return self.buffers[buffer_name(kind, part)]

    def load_gathered(self, kind: str, part: str, values: Array) -> None:
        """Set a buffer from what `gather` returned."""
        self.buffers[buffer_name(kind, part)][...] = values
