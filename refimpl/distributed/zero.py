"""ZeRO: the model states divided among ranks, each of which trains on its rows of every batch.

    stage   divided among N ranks      bytes per parameter, of 16       elements per parameter that a rank receives per step
    0       nothing                    16                               sums of gradients: 2
    1       masters, m, v              4 + 12/N                         gradients to their shards, weights back: 1 + 1
    2       gradients too              2 + 14/N                         the same, layer by layer during backward
    3       weights too                16/N                             weights twice, gradients to their shards: 2 + 1

A shard is a slice of the flat index. Each rank updates its own shard. The rest is step.py: backward starts from S / N, so that
the sum over ranks is the gradient of the mean over the whole batch; Inf and NaN are checked for in that sum, after its last
rounding; the norm is computed from the grains of all ranks. So all ranks skip or clip alike, and all stages give the same bits,
except with several micro-batches: stages 0 and 1 sum over micro-batches first and then over ranks, stages 2 and 3 over ranks
first.

Source: Rajbhandari et al. 2020, arXiv 1910.02054. PyTorch: DistributedDataParallel (stage 0), ZeroRedundancyOptimizer (1),
fully_shard (3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import groupby

import numpy as np

from refimpl.backends.base import Backend
from refimpl.distributed.collectives import Comm, Pending, share_size, shares_of
from refimpl.numerics.arrays import Array
from refimpl.optim.layout import GRAIN, HasParameters, Layout
from refimpl.optim.state import State
from refimpl.precision.state_encodings import MAIN, BufferSpec, buffer_name


class ShardedState(State):
    """The model states of one rank."""

    def __init__(
        self, model: HasParameters, stored: Mapping[str, str], backend: Backend, seed: int, comm: Comm, stage: int
    ) -> None:
        """Allocate the buffers of the rank `comm`, at ZeRO stage 0 to 3. The other arguments must be equal on all ranks."""
        size = Layout.of(model).size
        self.comm, self.stage, self.ranks = comm, stage, comm.size
        self.shares = shares_of(size, comm.size, GRAIN)
        self.share = self.shares[comm.rank] if stage else slice(0, size)  # the part of the flat index that is updated here
        self.first = self.share.start
        super().__init__(model, stored, backend, seed)
        self.decayed = tuple(clipped(start, stop, self.share) for start, stop in self.layout.decayed)
        self.layers = list(layers_of(self.layout))
        self.layer_of = {name: layer for layer in self.layers for name in layer.slots}
        self._buckets = Buckets(self)
        self._fetched = FetchedWeights(self) if self._divided("weights") else None
        if self._fetched is not None:
            self.weight_views = self._fetched

    # -- buffers ------------------------------------------------------------------------------------------------------

    def _divided(self, kind: str, part: str = MAIN) -> bool:
        return self.stage >= SHARDED_FROM.get(buffer_name(kind, part), 1)

    def allocate(self, kind: str, part: str, spec: BufferSpec) -> Array:
        """Return a new buffer of zeros, for all parameters or for a share. Shares are padded to the size of a full one."""
        if not self._divided(kind, part):
            return super().allocate(kind, part, spec)
        mine = spec.slice(self.share)
        padded = spec.size(share_size(self.layout.size, self.ranks, GRAIN))
        return self.backend.xp.zeros(padded if spec.first is None else mine.stop - mine.start, spec.dtype)

    def views(self, kind: str) -> dict[str, Array]:
        """Return name -> view, or nothing for a kind that is divided: its shards end within parameters."""
        return {} if self._divided(kind) else super().views(kind)

    def flat(self, kind: str, part: str = MAIN) -> Array:
        """Return this rank's share of a kind."""
        buffer, mine = super().flat(kind, part), self.encodings[kind].parts[part].slice(self.share)
        return buffer[: mine.stop - mine.start] if self._divided(kind, part) else buffer[mine]

    def local_part(self, kind: str, layer: Layer) -> Array:
        """Return a view of the part of a layer that lies in this rank's share."""
        return self.flat(kind)[slice(*clipped(layer.span.start, layer.span.stop, self.share))]

    # -- step 1: weights down -----------------------------------------------------------------------------------------

    def weights_down(self) -> None:
        """Round this rank's masters and gather the weights of all ranks; at stage 3 they are gathered when they are used."""
        super().weights_down()
        if self._fetched is not None:
            self._fetched.forget()
        elif self.stage >= 1:
            self.comm.all_gather(self.weights, self.shares, self.buffers["weights"])

    # -- step 2: gradients --------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Set all gradients of this rank to zero."""
        super().zero_grad()
        if self._divided("grads"):
            self._buckets = Buckets(self)

    def accumulate_grad(self, name: str, gradient: Array) -> None:
        """Add a gradient to the buffer, or at stages 2 and 3 put it into the bucket of its layer."""
        if self._divided("grads"):
            self._buckets.put(name, gradient)
        else:
            super().accumulate_grad(name, gradient)

    def reduce(self, loss: Array) -> Array:
        """Replace the gradients by their sums over ranks: all of them at stage 0, else those of this rank's share.

        Return the sum of the ranks' losses, each of which is a share of the mean over the whole batch.
        """
        if self._divided("grads"):
            self._buckets.finish()
        elif self.stage == 0:
            self.grads[...] = self.comm.all_reduce(self.grads)
        else:
            self.grads[...] = self.comm.reduce_scatter(self.buffers["grads"], self.shares)()
        return self.sum_over_ranks(loss)

    def sum_over_ranks(self, count: Array) -> Array:
        """Return the sum over ranks of a number, 0-d."""
        return self.comm.all_reduce(count.reshape(1)).reshape(())

    # -- step 3: gradients up -----------------------------------------------------------------------------------------

    def gather_grains(self, *grains: Array) -> tuple[Array, ...]:
        """Return arrays over all grains, in order, from arrays over the grains of this rank's share."""
        if self.stage == 0:
            return grains
        shares = [slice(-(-share.start // GRAIN), -(-share.stop // GRAIN)) for share in self.shares]
        xp, count = self.backend.xp, shares[-1].stop
        return tuple(self.comm.all_gather(x, shares, xp.empty(count, x.dtype)) for x in grains)

    def min_over_ranks(self, index: int) -> int:
        """Return the smallest of the ranks' numbers, computed as the largest of the negated ones."""
        return -int(self.comm.on_host.largest(np.array([-index]))[0])

    # -- checkpoints, which do not depend on the number of ranks ---------------------------------------------------------

    def gather(self, kind: str, part: str) -> Array:
        """Return a buffer over the whole flat index. All ranks must call this together."""
        if not self._divided(kind, part):
            return super().gather(kind, part)
        spec = self.encodings[kind].parts[part]
        whole = self.backend.xp.empty(spec.size(self.layout.size), spec.dtype)
        return self.comm.all_gather(self.flat(kind, part), [spec.slice(share) for share in self.shares], whole)

    def load_gathered(self, kind: str, part: str, values: Array) -> None:
        """Set this rank's share of a buffer from what `gather` returned, or the whole buffer if it is not divided."""
        if not self._divided(kind, part):
            return super().load_gathered(kind, part, values)
        self.flat(kind, part)[...] = values[self.encodings[kind].parts[part].slice(self.share)]


def clipped(start: int, stop: int, span: slice) -> tuple[int, int]:
    """Return the edges of the part of a range that lies in `span`, relative to the start of `span`."""
    return min(max(start, span.start), span.stop) - span.start, min(max(stop, span.start), span.stop) - span.start


# -- layers, the unit of exchange at stages 2 and 3 ----------------------------------------------------------------------------


class Layer:
    """Consecutive parameters that are used together: a slice of the flat index, and the place of each in it."""

    def __init__(self, names: list[str], layout: Layout) -> None:
        slots = [layout.slots[name] for name in names]
        self.span = slice(slots[0][0], slots[-1][1])
        self.slots = {
            name: (start - self.span.start, stop - self.span.start, shape)
            for name, (start, stop, shape) in zip(names, slots, strict=True)
        }

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.span.stop - self.span.start

    def shares(self, all_shares: list[slice]) -> list[slice]:
        """Return the slice of the layer that lies in each rank's shard, relative to the layer's start."""
        return [slice(*clipped(share.start, share.stop, self.span)) for share in all_shares]

    def parameter(self, name: str, values: Array) -> Array:
        """Return a view of a parameter in the layer's values, in its shape."""
        start, stop, shape = self.slots[name]
        return values[start:stop].reshape(shape)


def layers_of(layout: Layout) -> Iterator[Layer]:
    """Yield the layers of a model: each numbered block, and each module outside of the blocks."""

    def layer(name: str) -> str:
        numbered = re.match(r"(.*?\.\d+)\.", name)
        return numbered[1] if numbered else name.rpartition(".")[0]

    for _, names in groupby(layout.slots, layer):
        yield Layer(list(names), layout)


class Buckets:
    """The gradients of a step, layer by layer, at stages 2 and 3.

    A layer's gradients are sent to their shards when the last of them has been computed, and awaited when the next layer is
    complete: with MPI they travel while backward continues. So a rank holds the gradients of two layers at a time.
    """

    def __init__(self, state: ShardedState) -> None:
        self.state = state
        self.missing = {*state.layer_of}  # parameters without a gradient in this micro-batch
        self.zero = {*state.layers}  # layers whose sum is zero yet
        self.values: dict[Layer, Array] = {}
        self.sent: tuple[Layer, Pending] | None = None

    def put(self, name: str, gradient: Array) -> None:
        """Store a gradient in the format of the buffer, and send its layer if it is complete."""
        if name not in self.missing:  # the next micro-batch has begun; this one had no gradients for `missing`
            self.finish()
        layer = self.state.layer_of[name]
        self.state.backend.widen(gradient, self.state.formats["grads"], out=layer.parameter(name, self._values(layer)))
        self.missing.remove(name)
        if self.missing.isdisjoint(layer.slots):
            self._send(layer)
        if not self.missing:
            self.finish()

    def finish(self) -> None:
        """End a micro-batch: send its incomplete layers, with a gradient of zero for unused parameters, and wait for all."""
        if len(self.missing) < len(self.state.layer_of):
            for layer in reversed(self.state.layers):
                if not self.missing.isdisjoint(layer.slots):
                    self._values(layer)
                    self._send(layer)
        self._arrive()
        self.missing = {*self.state.layer_of}

    def _values(self, layer: Layer) -> Array:
        if layer not in self.values:
            self.values[layer] = self.state.backend.xp.zeros(layer.size, self.state.grads.dtype)
        return self.values[layer]

    def _send(self, layer: Layer) -> None:
        self._arrive()
        self.sent = layer, self.state.comm.reduce_scatter(self.values.pop(layer), layer.shares(self.state.shares))

    def _arrive(self) -> None:
        """Wait for the layer that was sent. Store this rank's part of its sum, or add it in FP32."""
        if self.sent is None:
            return
        layer, arrived = self.sent
        local, total = self.state.local_part("grads", layer), arrived()
        if layer in self.zero:
            local[...] = total
            self.zero.remove(layer)
        else:
            local += total
        self.sent = None


class FetchedWeights(Mapping[str, Array]):
    """The weights by name at stage 3: reading one fetches its layer from all ranks, and drops the layer fetched before.

    All ranks must read in the same order. They do, since they run the same model.
    """

    def __init__(self, state: ShardedState) -> None:
        self.state = state
        self.forget()

    def forget(self) -> None:
        """Drop the fetched layer: the weights have changed."""
        self._layer: Layer | None = None
        self._values: Array = None

    def __getitem__(self, name: str) -> Array:
        layer = self.state.layer_of[name]
        if layer is not self._layer:
            self.forget()  # free the other layer before allocating this one
            self._layer, self._values = layer, self._fetch(layer)
        return layer.parameter(name, self._values)

    def _fetch(self, layer: Layer) -> Array:
        state, local = self.state, self.state.local_part("weights", layer)
        return state.comm.all_gather(local, layer.shares(state.shares), state.backend.xp.empty(layer.size, local.dtype))

    def __contains__(self, name: object) -> bool:
        return name in self.state.layer_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.state.layer_of)

    def __len__(self) -> int:
        return len(self.state.layer_of)


SHARDED_FROM = {"weights": 3, "grads": 2}
"""The first ZeRO stage that divides a kind of state among the ranks; 1 for every other kind."""


COMMUNICATION = {0: 2, 1: 2, 2: 2, 3: 3}
"""Elements per parameter that each rank sends per step, by ZeRO stage, for many ranks. Source: arXiv 1910.02054, section 7."""


OF_WEIGHTS = {0: 0, 1: 1, 2: 1, 3: 2}
"""The weights among them; the others are gradients."""


def exchanged(
    n_params: int, states: Bytes, stage: int, ranks: int, fetched_again: int = 0, grad_accum: int = 1
) -> Fraction:
    """Return the bytes that a rank receives per step: (N - 1) / N of COMMUNICATION elements per parameter.

    fetched_again: parameters that stage 3 fetches a third time: a tied embedding is used at both ends of the model.
    grad_accum: micro-batches per step. For each of them, stages 2 and 3 sum the gradients and stage 3 fetches the weights.
    """
    weights = OF_WEIGHTS[stage] * n_params * (grad_accum if stage == 3 else 1) + (fetched_again if stage == 3 else 0)
    gradients = (COMMUNICATION[stage] - OF_WEIGHTS[stage]) * n_params * (grad_accum if stage >= 2 else 1)
    return (weights * states["weights"] + gradients * states["grads"]) * Fraction(ranks - 1, ranks)


def per_rank(n_params: int, states: Bytes, stage: int = 0, ranks: int = 1) -> dict[str, int]:
    """Return the bytes of each kind of state on one rank: all of it, or ceil(parameters / ranks) elements if ZeRO divides it.

    In a recipe without separate masters (fp32, amp) the weights stay whole until stage 3: stage 1 takes 8 + 8/N bytes.
    The last rank's shard is padded to the size of the others. A kind of less than a byte per parameter consists of FP32
    numbers that several parameters share; their number is rounded up.
    Source: arXiv 1910.02054, section 5.
    """
    shard = -(-n_params // ranks)

    def whole(size: Fraction, n: int) -> int:
        return 4 * math.ceil(size * n / 4) if size < 1 else math.ceil(size * n)

    return {kind: whole(size, shard if stage >= SHARDED_FROM.get(kind, 1) else n_params) for kind, size in states.items()}


Bytes = Mapping[str, Fraction]
"""Kind of state -> bytes per parameter."""
