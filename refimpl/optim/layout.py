"""Where each parameter lies in the flat buffers of the model states, and the blocks in which the buffers are processed.

All parameters lie end to end, in state_dict order, without padding. So one loop updates them all, and a shard is a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array


class ParameterSpec(Protocol):
    """The part of `nn.models.model.Parameter` that a layout needs: its shape, and whether weight decay acts on it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def decay(self) -> bool: ...


class HasParameters(Protocol):
    """The part of a model that a layout needs: its table of parameters."""

    @property
    def parameters(self) -> Mapping[str, ParameterSpec]: ...


EMBEDDINGS = {"wte", "wpe", "embed_tokens"}
"""The names of the embedding tables in all models of this project."""

BLOCK = 1 << 18
"""Elements per block on the host: few enough to fit a cache, many enough to occupy a thread."""

DEVICE_BLOCK = 1 << 24
"""Elements per block on a device: many enough that launching kernels takes no time beside them; the FP32 temporaries, 64 MiB
each, stay small beside the states."""

GRAIN = 1 << 10
"""Elements of the flat index that are summed by themselves first, in a sum over all of them. Blocks, and the shards of ranks,
begin at multiples of GRAIN. So no sum depends on the number of blocks, threads or ranks."""


@dataclass(frozen=True)
class Layout:
    """The place of each parameter in the flat buffers: name -> (start, stop, shape)."""

    slots: Mapping[str, tuple[int, int, tuple[int, ...]]]
    decayed: tuple[tuple[int, int], ...]  # the ranges that weight decay acts on, in order; adjacent ranges are joined
    size: int

    @property
    def embeddings(self) -> int:
        """The number of parameters in the embedding tables at the start of the flat index."""
        first = takewhile(lambda name: EMBEDDINGS & {*name.split(".")}, self.slots)
        return max((self.slots[name][1] for name in first), default=0)

    @property
    def grain(self) -> int:
        """GRAIN, for passes of backends, which may not import this package."""
        return GRAIN

    @classmethod
    def of(cls, model: HasParameters) -> Layout:
        """Return the layout of a model: its parameters in the order of their table."""
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
        """Return name -> view of that parameter in a flat buffer, in its shape.

        first: the number of parameters in the buffer, if it holds only the first ones.
        """
        slots = {name: slot for name, slot in self.slots.items() if first is None or slot[1] <= first}
        return {name: buffer[start:stop].reshape(shape) for name, (start, stop, shape) in slots.items()}

    def parameters_in(self, start: int, stop: int) -> Iterator[tuple[str, slice, slice]]:
        """Yield (name, elements, place) of each parameter in the range of the flat index from start to stop.

        elements: those of its elements that are in the range. place: where they are, relative to `start`.
        """
        for name, (first, last, _) in self.slots.items():
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                yield name, slice(begin - first, end - first), slice(begin - start, end - start)

    def checked(self, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """Return one of the weights by name. Errors: UsageError if it is missing or has another shape."""
        shape = self.slots[name][2]
        try:
            values = weights[name]
        except KeyError:
            raise UsageError(f"no weights for {name!r}: there must be an array of shape {shape}") from None
        if values.shape != shape:
            raise UsageError(f"the weights for {name!r} have the shape {values.shape}: it must be {shape}")
        return values

    def name_at(self, index: int) -> str:
        """Return the name of the parameter at an index of the flat buffers."""
        return next(name for name, (start, stop, _) in self.slots.items() if start <= index < stop)


def blocks(size: int, on_host: bool = True) -> Iterator[slice]:
    """Yield the blocks that cover a flat array: BLOCK elements each, or DEVICE_BLOCK on a device."""
    step = BLOCK if on_host else DEVICE_BLOCK
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def by_grain(x: Array, fold: Callable[[Array], Array], xp: Any) -> Array:
    """Apply `fold` to the last axis of each grain: x (n,) -> (ceil(n / GRAIN),). The last grain may be shorter."""
    whole = x.size // GRAIN * GRAIN
    folded = fold(x[:whole].reshape(-1, GRAIN))
    return folded if whole == x.size else xp.concatenate([folded, fold(x[whole:].reshape(1, -1))])
