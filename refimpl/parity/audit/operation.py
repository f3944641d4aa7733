"""`Operation`: what the recorder keeps of one operation. It holds no tensor: the size of a record does not depend on theirs."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PHASES = ("forward", "backward", "unscale", "clip", "step", "update", "other")
"""The parts of a training step. step: the optimizer; update: the loss scale; other: data, EMA, what a loop does by hand.

Outside modules and backward, forward is what makes a node of the autograd graph: the loss is forward, and its masks and shifted
labels are other (in a closure: step).
"""


class Keep(enum.Enum):
    """How much of an operation the recorder keeps: nothing, its facts, or its facts once an observer has seen its values."""

    NOTHING = 0
    FACTS = 1
    VALUES = 2


class Role(NamedTuple):
    """What a tensor is to the training: `Role("state", "fc.weight", "exp_avg")` is a moment of that parameter.

    kind: parameter, gradient, state (of an optimizer, with its key), buffer, or ema. name: the parameter's or buffer's.
    """

    kind: str
    name: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor without its values.

    storage: a number that tensors share if they share memory, and otherwise do not, unless one was made by no operation (as by
    from_numpy) where another has died; None where a tensor has no storage (sparse). offset: its first element in the storage.
    role: None for activations and temporaries.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    storage: int | None
    offset: int
    role: Role | None


@dataclass(slots=True)
class Operation:
    """One operation of a recorded step.

    name: as PyTorch writes it, 'aten.add.Tensor'. overload: PyTorch's own object, with schema and tags. arguments: by the names
    of the schema, tensors as `TensorFacts`, lists as tuples. written: the arguments that the operation writes to. outputs: as
    arguments; None until it has run. index: its place among all operations of the step, those not kept included.

    phase: one of PHASES. recomputed: a forward operation that checkpointing repeats in backward; count it once.
    module: path of the innermost module whose forward pass it belongs to, '' for the root, '(Name)' for a module outside the
    model, None outside any. In backward: the module of the forward operation that it differentiates.
    line, code_line: 'file:number' of the innermost frame in the user's own files, and in any file that is not PyTorch's: they
    differ where a library computes. In backward: those of the forward operation.
    node, sequence: name and sequence number of the autograd node that runs (in backward) or that the operation made.
    accumulates: the parameter to whose gradient AccumulateGrad adds here.
    error: why an observer failed on it, None if it did not.
    verdicts: what the judge says of its results. probed: what rules have measured on its values, by probe (rules/table.py).
    """

    index: int
    name: str
    overload: Any
    arguments: dict[str, Any]
    written: tuple[str, ...]
    phase: str
    recomputed: bool
    module: str | None
    line: str
    code_line: str
    node: str | None
    sequence: int | None
    accumulates: str | None
    outputs: Any = None
    error: str | None = None
    verdicts: tuple[Any, ...] = ()
    probed: dict[str, Any] = field(default_factory=dict)

    @property
    def completes_later(self) -> bool:
        """Whether the outputs may be unfinished when the operation returns: it is a collective, and somebody waits for it."""
        return self.name.startswith(("c10d.", "_c10d_functional."))

    @property
    def is_view(self) -> bool:
        """Whether it computes nothing: its results are in its arguments' memory, to which it does not write."""
        given = {t.storage for t in tensors_in(self.arguments)}
        made = [t.storage for t in tensors_in(self.outputs)]
        return not self.written and bool(made) and all(storage in given for storage in made)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that it reads, writes, or has a gradient or an optimizer state of; each once."""
        tensors = (*tensors_in(self.arguments), *tensors_in(self.outputs))
        roles = [t.role for t in tensors if t.role is not None and t.role.kind != "buffer"]
        names = [role.name for role in roles] + ([self.accumulates] if self.accumulates is not None else [])
        return tuple(dict.fromkeys(names))


def tensors_in(value: Any) -> Iterator[TensorFacts]:
    """Yield the tensors of an operation's arguments or outputs, in order."""
    if isinstance(value, TensorFacts):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
