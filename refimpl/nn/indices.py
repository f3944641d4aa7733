"""Checks of indices that array libraries accept silently: NumPy takes -1 as the last row, CuPy wraps any number."""

from __future__ import annotations

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.precision.context import OpPrecision


def check_indices(index: Array, size: int, what: str, p: OpPrecision, ignored: int | None = None) -> None:
    """Raise an error for an index outside 0 to size - 1 that is not `ignored`.

    Only the host checks, since a device would have to be waited for. `Model.batch_on` checks a batch before it copies it to a
    device, and kernels read nothing out of bounds (a target out of range makes the loss NaN).
    Errors: UsageError that names the operation's place, the first such index, its position, and the range.
    """
    if p.run.backend.on_host:
        refuse_outside(index, size, f"{p.place}: {what}", ignored)


def check_targets(logits: Array, targets: Array, p: OpPrecision, ignore_index: int) -> None:
    """Raise UsageError for targets of another shape, and for one that is out of range and not ignored."""
    if targets.shape != logits.shape[:-1]:
        raise UsageError(f"{p.place}: targets {targets.shape} for logits {logits.shape}: there must be one per row of logits")
    check_indices(targets, logits.shape[-1], "target", p, ignore_index)


def refuse_outside(index: Array, size: int, what: str, ignored: int | None = None) -> None:
    """Raise an error as `check_indices` does, for any array on the host. Errors: UsageError."""
    if index.dtype.kind not in "iu":
        raise UsageError(f"{what} is {index.dtype}: it must be an integer, 0 to {size - 1}")
    outside = (index < 0) | (index >= size)
    if ignored is not None:
        outside &= index != ignored
    if outside.any():
        at = tuple(int(i) for i in np.unravel_index(outside.argmax(), outside.shape))
        or_ignored = "" if ignored is None else f", or {ignored} to be ignored"
        raise UsageError(f"{what} {index[at]} at {list(at)} is out of range: it must be 0 to {size - 1}{or_ignored}")
