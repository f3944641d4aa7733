"""The memory that a tape holds, array by array: after forward, and when a block has been computed again in backward."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from refimpl.nn.autograd import Tape, Value
from refimpl.nn.checkpointing import Block
from refimpl.numerics.arrays import Array
from refimpl.step import Batch
from refimpl.training.setup import Training


@np.errstate(all="ignore")
def forward(training: Training, batch: Batch) -> Tape:
    """Return the tape of one micro-batch between forward and backward, as in `step.forward_backward`."""
    training.state.weights_down()
    tape = Tape(training.run, training.state.weight_views, training.model.tied)
    training.model.loss(tape, *batch)
    return tape


@np.errstate(all="ignore")
def computed_again(training: Training, tape: Tape) -> dict[str, int]:
    """Replay a tape, and return the bytes of activations by place when its last block has been computed again.

    The last operation of a block asks for that, and the gradient of the one before arrives next.
    """
    found: list[dict[str, int]] = []
    next_to_last = [entry.output.name for entry in tape.entries if isinstance(entry.saved, Block)][-2]

    def observe(kind: str, place: str, gradient: Array) -> Array:
        if place == next_to_last:
            found.append(tape_memory(tape)[0])
        return gradient

    training.run.observer = observe
    tape.backward(Value(None, tape.entries[-1].output), training.loss_scale.scale, lambda name, gradient: None)
    training.run.observer = None
    return found[0]


def tape_memory(tape: Tape) -> tuple[dict[str, int], int]:
    """Return the memory that a tape keeps alive: bytes of activations by place, and bytes of copies of weights.

    Memory that several entries share counts for the first of them; that of the weights themselves does not count.
    The layers of a model are added up: 'transformer.h.0.ln_1' and those of other layers count as 'transformer.h.i.ln_1'.
    """
    seen = {id(owner(w)) for w in tape.parameters.weights.values()}
    copies = owned_bytes((w.array for entry in tape.entries for w in entry.params if w and w.array is not None), seen)
    activations: dict[str, int] = {}
    for name, held in held_by(tape):
        nbytes = owned_bytes(arrays_in(held), seen)
        if nbytes:
            place = re.sub(r"\.\d+(?=\.|$)", ".i", name)
            activations[place] = activations.get(place, 0) + nbytes
    return activations, copies


def held_by(tape: Tape) -> Iterator[tuple[str, Any]]:
    """Yield what a tape holds, by place: what operations saved; of a block, what it reads or has computed again."""
    blocks = set[Block]()
    for entry in tape.entries:
        block = entry.saved
        if not isinstance(block, Block):
            yield entry.output.name, entry.saved
        elif block not in blocks:
            blocks.add(block)
            yield block.name, (block.kept, [read for _, read in block.calls])
            yield from ((output.name, saved) for output, saved in block.saved.items())


def arrays_in(saved: Any) -> Iterator[np.ndarray]:
    """Yield all arrays in the `saved` value of an operation: an array, or nested tuples that also hold shapes and names."""
    if isinstance(saved, np.ndarray):
        yield saved
    elif isinstance(saved, Mapping):
        yield from arrays_in(tuple(saved.values()))
    elif isinstance(saved, tuple | list):
        for part in saved:
            yield from arrays_in(part)


def owner(x: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory of `x`: `x` itself, or the array of which it is a view, which it keeps alive."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def owned_bytes(arrays: Iterable[np.ndarray], seen: set[int]) -> int:
    """Return the bytes of memory behind some arrays, without owners in `seen`, to which new owners are added."""
    nbytes = 0
    for x in map(owner, arrays):
        if id(x) not in seen:
            seen.add(id(x))
            nbytes += x.nbytes
    return nbytes
