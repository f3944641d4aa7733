"""What an operation is: a pair of plain functions over arrays, and the names of its parameters.

    forward(*inputs, *params, p, **static)         -> (y, saved)
    backward(dy, saved, *params, p, **static)      -> one gradient per input, then one per parameter

`p` holds the formats (see `context.OpPrecision`). Each function casts its operands, computes in the accumulation format, and
rounds each result once (attention has four). `saved` holds the activations that backward needs, in the format that they are
stored in. It never holds a parameter: those are arguments of backward too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refimpl.numerics.arrays import Array


def no_backward(*arrays: Any, **static: Any) -> tuple[Array | None, ...]:
    """Refuse to differentiate an operation on gradients. Errors: TypeError."""
    raise TypeError("this operation has no backward: gradients of gradients are not computed")


@dataclass(frozen=True)
class Op:
    """A named forward/backward pair.

    params: (name of a parameter in the model, name of its operand in the policy's row).
    key: that of its row in a policy, if it is not the name.
    """

    name: str
    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., tuple[Array | None, ...]] = no_backward
    params: tuple[tuple[str, str], ...] = ()
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.name)
