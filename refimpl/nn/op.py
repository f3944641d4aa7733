"""What an operation is: a pair of plain functions over arrays, and the names of its parameters.

    forward(*inputs, *params, p, **static)         -> (y, saved)
    backward(dy, saved, *params, p, **static)      -> one gradient for each input, then for each parameter

`p` is the precision that the operation is handed (see `context.Bound`). The body of each function has one rhythm: cast
in, compute in the accumulation format, round out once. `saved` holds what backward needs of the activations, in the
format that they are stored in, and never a parameter: those are handed in again.
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
    """A named forward/backward pair. `params` maps a parameter's name in the model to its operand's name in the row."""

    name: str
    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., tuple[Array | None, ...]] = no_backward
    params: tuple[tuple[str, str], ...] = ()
