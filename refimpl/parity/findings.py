"""What a judge finds: one tensor of a trace beside ours, held against its bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of, is_float, ulp
from refimpl.parity.tolerances import fp64


@dataclass(frozen=True)
class Finding:
    """One tensor of a trace beside ours: how it compares, and whether it is within its bound."""

    step: int
    point: str
    name: str
    identical: float  # share of elements with equal bits
    error: float  # the L2 of the difference as a multiple of its bound: above 1 departs
    ulps: float  # the largest difference in ulps of the tensor's format at its largest element
    elements: int
    weak: str = ""  # what the trace lacks, so that only the weaker bound could be used
    note: str = ""  # what is wrong with the format of its values

    @property
    def departs(self) -> bool:
        """Whether it is outside its bound, or its values have another format."""
        return bool(self.note) or not self.error <= 1

    @property
    def where(self) -> str:
        """For a message: 'step 3, 2.grads of transformer.wte.weight'."""
        return f"step {self.step}, {self.point}" + (f" of {self.name}" if self.name else "")


def find(
    step: int, point: str, name: str, ours: Array, theirs: Array, bound: float, weak: str = "", note: str = ""
) -> Finding:
    """Hold two tensors against a bound of the L2 of their difference. A different shape, Inf or NaN departs."""
    if np.shape(ours) != np.shape(theirs):
        return Finding(step, point, name, 0.0, math.inf, math.inf, max(1, np.size(theirs)))
    a, b = fp64(ours), fp64(theirs)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        difference = np.where(same, 0.0, a - b)
        distance = float(np.sqrt((difference * difference).sum()))
        unit = ulp(format_of(theirs), float(np.abs(b).max(initial=0.0))) if is_float(np.asarray(theirs)) else 1.0
        ulps = float(np.abs(difference).max(initial=0.0)) / unit
    error = 0.0 if same.all() else distance / bound if bound > 0 else math.inf
    return Finding(step, point, name, float(same.mean()) if same.size else 1.0, error, ulps, same.size, weak, note)


def without_overflows(a: np.ndarray, b: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two gradients of a step that overflowed, with 0 where both are Inf or NaN, and where one is and need not be.

    The order of a sum decides only whether a result near the largest number of its format overflows: where one of the two is
    finite it must be at least `least`, or the other is wrong (0 where nothing is known of what the sums were made of).
    """
    if a.shape != b.shape:
        return a, b
    x, y = fp64(a), fp64(b)
    finite, both = np.isfinite(x) ^ np.isfinite(y), ~np.isfinite(x) & ~np.isfinite(y)
    near = finite & (np.abs(np.where(np.isfinite(x), x, y)) >= least)
    a, b = a.copy(), b.copy()
    a[both | near], b[both | near] = 0, 0
    return a, b
