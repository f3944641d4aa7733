"""Findings of the judge: one tensor of a trace compared with ours, and the difference with its bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of, is_float, ulp
from refimpl.parity.tolerances import fp64


@dataclass(frozen=True)
class Finding:
    """One tensor of a trace compared with ours."""

    step: int
    point: str
    name: str
    identical: float  # share of elements with equal bits
    error: float  # the L2 of the difference as a multiple of its bound: above 1 departs
    ulps: float  # the largest difference in ulps of the tensor's format at its largest element
    elements: int
    weak: str = ""  # the tensor that the trace lacks, so that only the weaker bound could be used
    note: str = ""  # what is wrong with the format of its values

    @property
    def departs(self) -> bool:
        """Return whether the tensor is outside its bound, or its values have another format."""
        return bool(self.note) or not self.error <= 1

    @property
    def where(self) -> str:
        """Return the tensor's place in words: 'step 3, 2.grads of transformer.wte.weight'."""
        return f"step {self.step}, {self.point}" + (f" of {self.name}" if self.name else "")


def find(
    step: int, point: str, name: str, ours: Array, theirs: Array, bound: float, weak: str = "", note: str = ""
) -> Finding:
    """Compare two tensors: the L2 norm of their difference with `bound`. A different shape, Inf or NaN departs."""
    if np.shape(ours) != np.shape(theirs):
        return Finding(step, point, name, 0.0, math.inf, math.inf, max(1, np.size(theirs)))
    a, b = fp64(ours), fp64(theirs)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return Finding(step, point, name, 1.0, 0.0, 0.0, same.size, weak, note)
    with np.errstate(all="ignore"):
        difference = np.where(same, 0.0, a - b)
        distance = float(np.sqrt((difference * difference).sum()))
        unit = ulp(format_of(theirs), float(np.abs(b).max(initial=0.0))) if is_float(np.asarray(theirs)) else 1.0
        ulps = float(np.abs(difference).max(initial=0.0)) / unit
    error = distance / bound if bound > 0 else math.inf
    return Finding(step, point, name, float(same.mean()), error, ulps, same.size, weak, note)


def without_overflows(a: np.ndarray, b: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two gradients of a step that overflowed, with their Inf and NaN elements set to 0 where they may differ.

    These are the elements where both are Inf or NaN, and those where one is and the other is at least `least` in magnitude:
    the order of a sum decides only whether a result near the largest number of its format overflows. least = 0 accepts all.
    """
    if a.shape != b.shape:
        return a, b
    x, y = fp64(a), fp64(b)
    finite, both = np.isfinite(x) ^ np.isfinite(y), ~np.isfinite(x) & ~np.isfinite(y)
    near = finite & (np.abs(np.where(np.isfinite(x), x, y)) >= least)
    a, b = a.copy(), b.copy()
    a[both | near], b[both | near] = 0, 0
    return a, b
