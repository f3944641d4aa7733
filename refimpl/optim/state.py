"""The model states: one flat buffer per kind, with named views.

    weights, grads      in the recipe's format; 16 bits in mixed precision
    master, m, v        FP32
    main_grads          FP32 gradients beside 16-bit ones, in the recipes that keep them

The bytes of the model states are the sum of the buffers' `nbytes`: 2 + 2 + 4 + 4 + 4 = 16 per parameter with Adam.
A recipe may encode a kind in another way than as plain numbers: see `precision/state_encodings.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeVar

import numpy as np

from refimpl.backends.base import Backend
from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of, widens_to
from refimpl.optim.exchange import Exchange
from refimpl.optim.layout import HasParameters, Layout, blocks
from refimpl.precision.context import Monitor
from refimpl.precision.state_encodings import MAIN, BufferSpec, Plain, RandomKey, buffer_name, get_encoding

R = TypeVar("R")


class State(Exchange):
    """The states of a run on one host: a flat array per kind, `state.grads[block]`, and `t`, the number of updates made.

    Skipped steps do not count as updates. `distributed.zero.ShardedState` has the states of one of several ranks: there
    `weights`, `grads`, `master` and `flat` are the part that this rank updates, which begins at the parameter `first`.
    """

    def __init__(self, model: HasParameters, stored: Mapping[str, str], backend: Backend, seed: int = 0) -> None:
        """Allocate zeroed buffers.

        stored: kind -> name of its encoding, as `Recipe.state_encodings` returns it. seed: for encodings that round at random.
        """
        self.layout, self.stored, self.backend, self.seed = Layout.of(model), dict(stored), backend, seed
        self.encodings = {kind: get_encoding(name).of(self.layout.embeddings, backend) for kind, name in stored.items()}
        if not backend.on_host:
            self.refuse_codes(f"--backend {backend.name}")
        self.formats = {kind: encoding.fmt for kind, encoding in self.encodings.items()}
        self.master_kind = "master" if "master" in stored else "weights"  # what the optimizer updates
        self.master_format = self.formats[self.master_kind]
        self.math_format = "fp64" if self.master_format == "fp64" else "fp32"  # what the optimizer computes in
        self.buffers = {
            buffer_name(kind, part): self.allocate(kind, part, spec)
            for kind, encoding in self.encodings.items() for part, spec in encoding.parts.items()
        }  # fmt: skip
        self.t = backend.xp.zeros((), np.int64)
        self.decayed = self.layout.decayed  # the ranges of the flat arrays that weight decay acts on
        self.monitor: Monitor | None = None
        self.weight_views: Mapping[str, Array] = self.views("weights")
        self.grad_views = self.views("grads") if "grads" in stored else {}
        self.without_grad = {*self.grad_views}  # the parameters that have had no gradient in this step

    # -- arrays: a kind has one, or more where its encoding has several parts, such as codes (MAIN) and 'scales' --------------

    def allocate(self, kind: str, part: str, spec: BufferSpec) -> Array:
        """Return a new buffer of zeros."""
        return self.backend.xp.zeros(spec.size(self.layout.size), spec.dtype)

    def views(self, kind: str) -> dict[str, Array]:
        """Return name -> view of that parameter in its shape."""
        return self.layout.views(self.buffers[kind])

    def flat(self, kind: str, part: str = MAIN) -> Array:
        """Return the flat array of a kind: numbers in the format of its encoding, or codes."""
        return self.buffers[buffer_name(kind, part)]

    @property
    def weights(self) -> Array:
        """The model weights, which forward and backward read."""
        return self.flat("weights")

    @property
    def grads(self) -> Array:
        """The gradients of the scaled loss, which backward writes."""
        return self.flat("grads")

    @property
    def master(self) -> Array:
        """The masters, which the optimizer updates: the weights themselves in a recipe without separate masters."""
        return self.flat(self.master_kind)

    def parts(self, kind: str, block: slice) -> dict[str, Array]:
        """Return a block of a kind as its encoding reads and writes it: part -> view of the array."""
        return {part: self.flat(kind, part)[spec.slice(block)] for part, spec in self.encodings[kind].parts.items()}

    def values(self, kind: str) -> Array:
        """Return a kind's values, for reading: the array itself where it holds them, else an FP32 copy."""
        return self.encodings[kind].values(self.parts(kind, slice(0, self.master.size)))

    @property
    def nbytes(self) -> int:
        """The bytes of all model states."""
        return sum(int(buffer.nbytes) for buffer in self.buffers.values())

    @cached_property
    def decayed_edges(self) -> Array:
        """The starts and the stops of `decayed` in an array of the backend, for kernels."""
        return self.backend.from_host(np.array(self.decayed, np.int64).reshape(-1, 2).T.copy())

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
        Errors: UsageError for a parameter that is missing or has another shape.
        """
        for name, elements, place in self.layout.parameters_in(self.first, self.first + self.master.size):
            source = self.backend.from_host(self.layout.checked(weights, name).reshape(-1)[elements])
            if rounded:
                source = cast(source, self.formats["weights"])
            self.encodings[self.master_kind].start(self.parts(self.master_kind, place), widen(source, self.math_format))
            del source  # before the next one, which `weights` may read from a file only when it is asked for it
        self.weights_down()

    def weights_down(self) -> None:
        """Round the masters to the format of the model weights. Do nothing if the weights are their own masters.

        An update smaller than half the distance between two 16-bit numbers would be rounded away; FP32 masters add such up.
        Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1.
        """
        if self.master_kind == "master":
            self.backend.cast(self.master, self.formats["weights"], out=self.weights)
            self._report("weights_down", self.master, self.weights, start=0)

    # -- step 2 --------------------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Set all gradients to zero, before the first micro-batch of a step.

        PyTorch: optimizer.zero_grad(), which by default drops them, so that there too the first new one is stored, not added.
        """
        self.buffers["grads"][...] = 0
        self.without_grad = {*self.grad_views}

    def accumulate_grad(self, name: str, gradient: Array) -> None:
        """Add the gradient of a parameter that backward has finished. The first of a step is stored as it is.

        Sums over micro-batches are FP32, never 16 bits: `Recipe.state_encodings` makes the buffer FP32 for several.
        Errors: UsageError for a second gradient where it did not.
        """
        view, fmt = self.grad_views[name], self.formats["grads"]
        if name in self.without_grad:
            self.backend.widen(gradient, fmt, out=view)  # as 0 + gradient, without a pass over memory, and -0 stays -0
            self.without_grad.remove(name)
        elif FORMATS[fmt].bits < 32:
            raise UsageError("several micro-batches: State needs state_encodings(grad_accum=...), which sums gradients in FP32")
        else:
            view += self.backend.widen(gradient, fmt)

    # -- steps 3 and 4 -------------------------------------------------------------------------------------------------------

    def each_block(self, f: Callable[[slice], R]) -> list[R]:
        """Return `f` of each block of the flat arrays, in order; the backend may compute several at a time."""
        size = self.master.size
        pieces = blocks(size, self.backend.on_host)
        if self.monitor is not None:  # monitors need not be thread-safe
            return [f(block) for block in pieces]
        return self.backend.each(f, pieces, size)

    def write(self, kind: str, block: slice, parts: Mapping[str, Array], values: Array) -> None:
        """Encode the updated `values` of a block into `parts`, which `parts(kind, block)` returned, or copies of them."""
        encoding = self.encodings[kind]
        encoding.write(parts, values, RandomKey(self.seed, self.t, self.first + block.start, self.backend.xp, kind))
        if isinstance(encoding, Plain):
            self._report(f"update.{kind}", values, parts[MAIN], block.start)

    def _report(self, site: str, values: Array, rounded: Array, start: int) -> None:
        """Report a rounding of the values from `start` on to the monitor, per parameter, at sites `parameter:site`."""
        if self.monitor is None or widens_to(format_of(values), format_of(rounded)):
            return
        start += self.first
        for name, _, place in self.layout.parameters_in(start, start + values.size):
            self.monitor(f"{name}:{site}", values[place], rounded[place])
