"""Indices that an array library would take without a word: -1 is the last row to NumPy, and CuPy wraps any number."""

from __future__ import annotations

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.precision.context import Bound


def check_indices(index: Array, size: int, what: str, p: Bound, ignored: int | None = None) -> None:
    """Refuse an index that is not in 0 to size - 1, nor the one that stands for 'none'.

    Only on the host. A device would have to be waited for: `Model.batch_on` looks at its batches before they are copied there,
    and the kernels read nothing out of bounds (a target out of range makes the loss NaN).
    Errors: UsageError that names the operation's place, the first such index, where it stands, and the range.
    """
    if p.run.backend.on_host:
        refuse_outside(index, size, f"{p.place}: {what}", ignored)


def refuse_outside(index: Array, size: int, what: str, ignored: int | None = None) -> None:
    """The same for any array on the host. Errors: UsageError."""
    if index.dtype.kind not in "iu":
        raise UsageError(f"{what} is {index.dtype}: it must be an integer, 0 to {size - 1}")
    outside = (index < 0) | (index >= size)
    if ignored is not None:
        outside &= index != ignored
    if outside.any():
        at = tuple(int(i) for i in np.unravel_index(outside.argmax(), outside.shape))
        or_ignored = "" if ignored is None else f", or {ignored} to be ignored"
        raise UsageError(f"{what} {index[at]} at {list(at)} is out of range: it must be 0 to {size - 1}{or_ignored}")
