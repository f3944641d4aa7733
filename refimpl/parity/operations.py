"""The graph of a model's operations, and what it implies: from which tensors each tensor of a trace can be judged.

An output is computed from earlier outputs and parameters; the gradient of an output, from the gradients and inputs of the
operations that read it; the gradient of a parameter, from those of the operations that use it. Each of these is in the trace,
or is recomputed from tensors of the trace, or is unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from refimpl.backends.base import REFERENCE
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.parity.trace import in_batch
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe

SAME_BITS = ("add", "embedding", "relu", "reshape")
"""Operations whose outputs have the same bits in every implementation: they copy, or add two numbers and round once."""

LINEAR_IN_INPUTS = ("add", "linear", "reshape")
"""Operations whose input gradients do not depend on the inputs."""


@dataclass(frozen=True)
class Operation:
    """One operation: its kind and place, the places whose outputs it reads, and the parameters that it uses."""

    kind: str
    place: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]


def operations_of(model: Model) -> list[Operation]:
    """Return a model's operations in the order in which they run, the loss last, as its tape records them."""
    weights = {name: np.zeros(spec.shape, np.float32) for name, spec in model.parameters.items()}
    tape = Tape(Run(get_recipe("fp32").policy, REFERENCE), weights, model.tied)
    tokens = np.zeros((1, model.config["block_size"] if model.name == "mlp" else 1), np.int64)
    model.loss(tape, tokens, tokens)
    return [
        Operation(
            entry.op.name,
            entry.output.name,
            tuple(node.name for node in entry.inputs if node is not None),
            tuple(value.node.name for value in entry.params if value is not None),
        )
        for entry in tape.entries
    ]


@dataclass(frozen=True)
class Basis:
    """What a tensor is computed from when it is judged.

    recomputed: outputs or gradients that the trace does not hold and the replay computed; the tensor is then judged by the
    weaker bound. missing: a tensor without which it cannot be judged, and why; '' if it can.
    """

    recomputed: tuple[str, ...] = ()
    missing: str = ""

    @property
    def weak(self) -> bool:
        """Return whether only the weaker bound can be used."""
        return bool(self.recomputed)


def together(parts: Iterable[Basis]) -> Basis:
    """Return the basis of a tensor that is computed from several others."""
    recomputed: dict[str, None] = {}
    for part in parts:
        if part.missing:
            return part
        recomputed |= dict.fromkeys(part.recomputed)
    return Basis(tuple(recomputed))


IN_TRACE = Basis()


@dataclass
class Bases:
    """The basis of each tensor of stage 2 in one micro-batch: outputs, their gradients, and each parameter's gradient."""

    activations: dict[str, Basis] = field(default_factory=dict)
    activation_grads: dict[str, Basis] = field(default_factory=dict)
    grads: dict[str, Basis] = field(default_factory=dict)
    loss: Basis = IN_TRACE


def bases(
    operations: list[Operation], batch: int, traced: Mapping[str, Collection[str]], unknown: Mapping[str, str], scale: str = ""
) -> Bases:
    """Return the basis of each tensor of a micro-batch.

    traced: point -> the names in the trace. unknown: parameter whose weights are not known -> why.
    scale: why S is not known, or ''.
    """
    result = Bases()
    out: dict[str, Basis] = {}
    into: dict[str, Basis] = {}  # what an operation is computed from, in forward

    def kept(point: str, place: str, computed: Basis, exact: bool = False) -> Basis:
        """Return the basis for the readers of a tensor: the trace's tensor, or ours, which is equivalent if `exact`."""
        name = in_batch(place, batch)
        if name in traced[point]:
            return IN_TRACE
        return computed if computed.missing or exact else Basis((*computed.recomputed, f"{point} of {name}"))

    for op in operations:
        weights = [Basis(missing=unknown[name]) for name in op.parameters if name in unknown]
        into[op.place] = together([*(out[place] for place in op.inputs), *weights])
        out[op.place] = kept("2.activations", op.place, into[op.place], op.kind in SAME_BITS)
    *body, last = operations
    result.activations = {op.place: into[op.place] for op in body}
    result.loss = into[last.place]
    arriving: dict[str, list[Basis]] = {op.place: [] for op in operations}
    shares: dict[str, list[Basis]] = {}
    arriving[last.place] = [Basis(missing=scale)]
    for op in reversed(operations):
        gradient = together(arriving[op.place])
        if op is not last:
            result.activation_grads[op.place] = gradient
            gradient = kept("2.activation_grads", op.place, gradient)
        inputs = [out[place] for place in op.inputs]
        weights = [Basis(missing=unknown[name]) for name in op.parameters if name in unknown]
        for place in op.inputs:
            arriving[place].append(together([gradient, *weights, *([] if op.kind in LINEAR_IN_INPUTS else inputs)]))
        for name in op.parameters:
            shares.setdefault(name, []).append(together([gradient, *([] if name.endswith(".bias") else inputs)]))
    result.grads = {name: together(parts) for name, parts in shares.items()}
    return result
