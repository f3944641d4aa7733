"""ZeRO: the model states divided among ranks, which train on parts of one batch.

    stage   divided among N ranks      bytes, of 2 + 2 + 4 + 4 + 4      elements a parameter that come to a rank in a step
    0       nothing                    16                               gradients summed: 2
    1       masters, m, v              4 + 12/N                         gradients to their shards, weights back: 1 + 1
    2       and gradients              2 + 14/N                         the same, as backward makes them
    3       and weights                16/N                             weights fetched twice, gradients to shards: 2 + 1

A shard is a slice of the flat index. Each rank updates its own, and step 1 hands the new weights round. All else is the page of
the algorithm, step.py: backward starts from S / N, so that the sum over ranks is the gradient of the mean over the whole batch
and nothing is divided afterwards; Inf and NaN are looked for in that sum, after its last rounding; the norm is folded from the
grains of all ranks. So every rank skips or clips as every other, and all stages give the same bits. Only with several
micro-batches they need not: stages 0 and 1 sum over micro-batches first and then over ranks, 2 and 3 the other way round.

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
from refimpl.numerics.casts import widen
from refimpl.optim.layout import GRAIN, HasParameters, Layout
from refimpl.optim.state import Sink, State
from refimpl.precision.state_encodings import MAIN, buffer_name


class ShardedState(State):
    """The states of one rank."""

    def __init__(
        self, model: HasParameters, stored: Mapping[str, str], backend: Backend, seed: int, comm: Comm, stage: int
    ) -> None:
        """stage: 0 to 3. Every rank makes its own, from the same arguments but for `comm`."""
        size = Layout.of(model).size
        self.comm, self.stage, self.ranks = comm, stage, comm.size
        self.shares = shares_of(size, comm.size, GRAIN)
        self.everything = slice(0, size)
        super().__init__(model, stored, backend, seed)
        self.layers = list(layers_of(self.layout))
        self.layer_of = {name: layer for layer in self.layers for name in layer.slots}
        self._buckets: Buckets | None = None
        self._fetched = FetchedWeights(self) if self._divided("weights") else None
        if self._fetched is not None:
            self.weight_views = self._fetched

    # -- what this rank holds -----------------------------------------------------------------------------------------

    def _divided(self, kind: str, part: str = MAIN) -> bool:
        return self.stage >= SHARDED_FROM.get(buffer_name(kind, part), 1)

    def stored_slice(self, kind: str, part: str = MAIN) -> slice:
        """This rank's share, or all."""
        return self.shares[self.comm.rank] if self._divided(kind, part) else self.everything

    def capacity(self, kind: str, part: str) -> int:
        """A full share, also where this rank's is shorter: shards are padded to one size."""
        return share_size(self.layout.size, self.ranks, GRAIN) if self._divided(kind, part) else self.layout.size

    def views(self, kind: str) -> dict[str, Array]:
        """Of a kind that is divided there are none."""
        return {} if self._divided(kind) else super().views(kind)

    def local_part(self, kind: str, layer: Layer) -> Array:
        """What of a layer lies in this rank's shard, as it is stored; a view."""
        share, first = layer.shares(self.shares)[self.comm.rank], layer.span.start
        return self.block(kind, slice(first + share.start, first + share.stop))

    # -- step 1: weights down -----------------------------------------------------------------------------------------

    def weights_down(self) -> None:
        """Each rank rounds its own masters; then the weights go round, at stage 3 only when they are used."""
        super().weights_down()
        if self._fetched is not None:
            self._fetched.forget()
        elif self.stage >= 1:
            self.comm.all_gather(self.local("weights"), self.shares, self.weights)

    # -- step 2: gradients --------------------------------------------------------------------------------------------

    def gradient_sink(self, first: bool) -> Sink:
        """Stages 0 and 1: the buffer of all gradients. Stages 2 and 3: buckets, which are gone when they are summed."""
        if not self._divided("grads"):
            return super().gradient_sink(first)
        self._buckets = Buckets(self, first)
        return self._buckets.put

    def reduce_gradients(self, last: bool) -> None:
        """The gradients become their sums over ranks: of this rank's share, at stage 0 of all."""
        if self._buckets is not None:
            self._buckets.finish()
            self._buckets = None
        elif last and self.stage == 0:
            self.grads[...] = self.comm.all_reduce(self.grads)
        elif last:
            self.local("grads")[...] = self.comm.reduce_scatter(self.grads, self.shares)()

    def mean_over_ranks(self, loss: Array) -> Array:
        """The mean of the ranks' losses, each a mean over as many examples."""
        return self.sum_over_ranks(loss) / self.ranks

    def sum_over_ranks(self, count: Array) -> Array:
        """A number of this rank's, 0-d -> the sum of all."""
        return self.comm.all_reduce(count.reshape(1)).reshape(())

    # -- step 3: gradients up -----------------------------------------------------------------------------------------

    def gather_grains(self, *grains: Array) -> tuple[Array, ...]:
        """What each rank found in the grains of its share -> of all grains, in their order."""
        if self.stage == 0:
            return grains
        shares = [slice(-(-share.start // GRAIN), -(-share.stop // GRAIN)) for share in self.shares]
        xp, count = self.backend.xp, shares[-1].stop
        return tuple(self.comm.all_gather(x, shares, xp.empty(count, x.dtype)) for x in grains)

    def min_over_ranks(self, index: int) -> int:
        """The smallest of all ranks' numbers, by the largest of their opposites."""
        return -int(self.comm.on_host.largest(np.array([-index]))[0])

    # -- checkpoints: the same whatever the number of ranks -----------------------------------------------------------

    def gather(self, kind: str, part: str) -> Array:
        """A buffer of all ranks together, which all must ask for."""
        if not self._divided(kind, part):
            return super().gather(kind, part)
        spec = self.encodings[kind].parts[part]
        mine = self.buffer_slices(kind, self.local_slice)[part]
        shares = [spec.slice(share) for share in self.shares]
        return self.comm.all_gather(mine, shares, self.backend.xp.empty(spec.size(self.layout.size), spec.dtype))

    def load_gathered(self, kind: str, part: str, values: Array) -> None:
        """The way back: this rank takes its share."""
        held, spec = self.stored_slice(kind, part), self.encodings[kind].parts[part]
        mine = spec.slice(held)
        self.buffers[buffer_name(kind, part)][: mine.stop - mine.start] = values[mine]


# -- layers: what stages 2 and 3 exchange at a time --------------------------------------------------------------------------


class Layer:
    """Consecutive parameters that are used together: a slice of the flat index, and each one's place in it."""

    def __init__(self, names: list[str], layout: Layout) -> None:
        slots = [layout.slots[name] for name in names]
        self.span = slice(slots[0][0], slots[-1][1])
        self.slots = {
            name: (start - self.span.start, stop - self.span.start, shape)
            for name, (start, stop, shape) in zip(names, slots, strict=True)
        }

    @property
    def size(self) -> int:
        """Parameters."""
        return self.span.stop - self.span.start

    def shares(self, all_shares: list[slice]) -> list[slice]:
        """What of the layer lies in each rank's shard, counted from the layer's start."""
        first, last = self.span.start, self.span.stop
        return [slice(*(min(max(edge, first), last) - first for edge in (s.start, s.stop))) for s in all_shares]

    def parameter(self, name: str, values: Array) -> Array:
        """The parameter's part of the layer's values, in its shape."""
        start, stop, shape = self.slots[name]
        return values[start:stop].reshape(shape)


def layers_of(layout: Layout) -> Iterator[Layer]:
    """The parameters of a model by layer: those of a numbered block, or of one module outside of them."""

    def layer(name: str) -> str:
        numbered = re.match(r"(.*?\.\d+)\.", name)
        return numbered[1] if numbered else name.rpartition(".")[0]

    for _, names in groupby(layout.slots, layer):
        yield Layer(list(names), layout)


class Buckets:
    """Stages 2 and 3: the gradients of one micro-batch, layer by layer.

    A layer's gradients are sent to the ranks that own them once the last of them is there, and waited for when the next layer
    is complete: by MPI they travel while backward goes on. So a rank holds those of two layers at a time.
    """

    def __init__(self, state: ShardedState, first: bool) -> None:
        self.state, self.first = state, first
        self.missing = {layer: set(layer.slots) for layer in state.layers}
        self.values: dict[Layer, Array] = {}
        self.sent: tuple[Layer, Pending] | None = None

    def put(self, name: str, gradient: Array) -> None:
        """Backward's sink: keep a gradient in the format of the buffer, and send the layer if it is complete."""
        layer = self.state.layer_of[name]
        widen(gradient, self.state.formats["grads"], out=layer.parameter(name, self._values(layer)))
        self.missing[layer].discard(name)
        if not self.missing[layer]:
            self._send(layer)

    def finish(self) -> None:
        """Send what is left (a parameter that was not used has a gradient of zero), and wait for all."""
        for layer in reversed(self.state.layers):
            if self.missing[layer]:
                self._values(layer)
                self._send(layer)
        self._arrive()

    def _values(self, layer: Layer) -> Array:
        if layer not in self.values:
            self.values[layer] = self.state.backend.xp.zeros(layer.size, self.state.grads.dtype)
        return self.values[layer]

    def _send(self, layer: Layer) -> None:
        self.missing[layer].clear()
        self._arrive()
        self.sent = layer, self.state.comm.reduce_scatter(self.values.pop(layer), layer.shares(self.state.shares))

    def _arrive(self) -> None:
        """Wait for the layer that was sent, and keep what of its sum belongs to this rank: stored, or added in FP32."""
        if self.sent is None:
            return
        layer, arrived = self.sent
        mine, total = self.state.local_part("grads", layer), arrived()
        if self.first:
            mine[...] = total
        else:
            mine += total
        self.sent = None


class FetchedWeights(Mapping[str, Array]):
    """Stage 3: the weights by name, of one layer at a time, which is fetched from all ranks when one of its names is asked for.

    All ranks must ask in the same order, and they do: they run the same model.
    """

    def __init__(self, state: ShardedState) -> None:
        self.state = state
        self.forget()

    def forget(self) -> None:
        """What is here is out of date."""
        self._layer: Layer | None = None
        self._values: Array = None

    def __getitem__(self, name: str) -> Array:
        layer = self.state.layer_of[name]
        if layer is not self._layer:
            self.forget()  # the other layer goes before this one comes
            self._layer, self._values = layer, self._fetch(layer)
        return layer.parameter(name, self._values)

    def _fetch(self, layer: Layer) -> Array:
        state, mine = self.state, self.state.local_part("weights", layer)
        return state.comm.all_gather(mine, layer.shares(state.shares), state.backend.xp.empty(layer.size, mine.dtype))

    def __contains__(self, name: object) -> bool:
        return name in self.state.layer_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.state.layer_of)

    def __len__(self) -> int:
        return len(self.state.layer_of)


SHARDED_FROM = {"weights": 3, "grads": 2}
"""The ZeRO stage from which a kind of state is divided among the ranks; every other kind from stage 1."""


COMMUNICATION = {0: 2, 1: 2, 2: 2, 3: 3}
"""Elements a parameter that each rank sends a step, by ZeRO stage, for many ranks. Source: arXiv 1910.02054, section 7."""


OF_WEIGHTS = {0: 0, 1: 1, 2: 1, 3: 2}
"""How many of them are weights; the others are gradients."""


def exchanged(
    n_params: int, states: Bytes, stage: int, ranks: int, fetched_again: int = 0, grad_accum: int = 1
) -> Fraction:
    """Bytes that come to each rank from the others in a step: COMMUNICATION elements a parameter, each (N - 1) / N times.

    fetched_again: parameters that stage 3 fetches more than twice: a tied embedding is used at both ends of the model.
    grad_accum: micro-batches a step, of each of which stages 2 and 3 sum the gradients, and stage 3 fetches the weights.
    """
    weights = OF_WEIGHTS[stage] * n_params * (grad_accum if stage == 3 else 1) + (fetched_again if stage == 3 else 0)
    gradients = (COMMUNICATION[stage] - OF_WEIGHTS[stage]) * n_params * (grad_accum if stage >= 2 else 1)
    return (weights * states["weights"] + gradients * states["grads"]) * Fraction(ranks - 1, ranks)


def per_rank(n_params: int, states: Bytes, stage: int = 0, ranks: int = 1) -> dict[str, int]:
    """Bytes of each kind of state on one rank: all of it, or ceil(parameters / ranks) elements where ZeRO divides it.

    stage 0   P (weights + grads + rest)          2 + 2 + 12        = 16
    stage 1   the optimizer's states divided      4 + 12/N
    stage 2   and the gradients                   2 + 14/N
    stage 3   and the weights                     16/N

    Where the weights are their own masters (fp32, amp) they stay whole until stage 3: stage 1 is 8 + 8/N.
    The last rank's shard is padded to the size of the others. Source: arXiv 1910.02054, section 5.
    What takes less than a byte a parameter is an FP32 number that several share, and the last ones need a whole one too.
    """
    shard = -(-n_params // ranks)

    def whole(size: Fraction, n: int) -> int:
        return 4 * math.ceil(size * n / 4) if size < 1 else math.ceil(size * n)

    return {kind: whole(size, shard if stage >= SHARDED_FROM.get(kind, 1) else n_params) for kind, size in states.items()}


Bytes = Mapping[str, Fraction]
"""Kind of state -> bytes a parameter."""
