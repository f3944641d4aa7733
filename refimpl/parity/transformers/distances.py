"""Logits and gradients of both against an FP64 reference: how far is ours, and how far transformers', and from each other?

The reference is our own model by recipe fp64, from the very weights that the 16-bit or FP32 pass reads: transformers has no
FP64 reference, since its norms, its softmax and its loss compute in FP32 in a model of FP64 too. Two correct passes are
about as far from it; one that computes another formula, or with other weights, is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import widen
from refimpl.parity.tolerances import U, distance, fp64, l2
from refimpl.precision.context import Run
from refimpl.precision.policy import Policy
from refimpl.precision.recipes import get_recipe

FACTOR = 2.0
"""How many times as far from FP64 as the other one the logits, and the median gradient, may be: as in `tolerances.Bounds`. One
gradient may be as many times as far as PyTorch's passes are by themselves, once more (`spread.py`)."""
FLOOR = 8 * U
"""A relative distance that a few FP32 roundings make."""
LOGITS = "logits"


class Pass(NamedTuple):
    """What a forward and a backward pass make. grads: of S times the loss, by parameter."""

    loss: float
    logits: Array
    grads: Mapping[str, Array]


def run_pass(
    model: Model, weights: Mapping[str, Array], policy: Policy, backend: Any, batch: tuple[np.ndarray, np.ndarray], S: float,
    kernels: Mapping[str, Op] = MappingProxyType({}),
) -> Pass:  # fmt: skip
    """Run our model forward, and backward from S. kernels: what stands in place of definitions."""
    logits: list[Array] = []
    grads: dict[str, Array] = {}

    def observe(point: str, place: str, array: Array) -> Array:
        if (point, place) == ("activations", "lm_head"):
            logits.append(array)
        return array

    tape = Tape(Run(policy, backend, observer=observe, overrides=kernels), weights, model.tied)
    with np.errstate(all="ignore"):
        loss = model.loss(tape, *batch)
        start = np.full((), S, np.float64 if policy.name == "fp64" else np.float32)
        tape.backward(loss, start, grads.__setitem__)
    return Pass(float(loss.array), logits[0], grads)


def reference(model: Model, weights: Mapping[str, Array], backend: Any, batch: tuple[np.ndarray, np.ndarray], S: float) -> Pass:
    """Return the pass in FP64, from the values of these weights."""
    wide = {name: widen(w, "fp64") for name, w in weights.items()}
    return run_pass(model, wide, get_recipe("fp64").policy, backend, batch, S)


@dataclass(frozen=True)
class Distance:
    """Relative L2 distances of one tensor: ours and transformers' from FP64, and from each other; the share of equal elements.

    kernel: how far from FP64 our pass is with other correct kernels in place of definitions. elements: of the tensor.
    """

    name: str
    elements: int
    ours: float
    theirs: float
    between: float
    identical: float
    kernel: float = 0.0

    def beyond(self, factor: float) -> bool:
        """Return whether one is more than `factor` times as far from FP64 as the other."""
        near = self.theirs <= factor * max(self.ours, self.kernel) + FLOOR and self.ours <= factor * self.theirs + FLOOR
        return not (near and math.isfinite(self.between))


def middle(distances: Sequence[Distance]) -> Distance:
    """Return the medians over some tensors."""
    parts = {name: median(getattr(d, name) for d in distances) for name in ("ours", "theirs", "between", "identical", "kernel")}
    return Distance(f"gradients, median of {len(distances)}", sum(d.elements for d in distances), **parts)


def measure(name: str, ours: Array, theirs: Array, exact: Array, kernel: Array | None = None) -> Distance:
    """Measure one tensor. An Inf or NaN in either makes the distances infinite: S is too large for this batch."""
    a, b, t = fp64(ours), fp64(theirs), fp64(exact)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Distance(name, t.size, math.inf, math.inf, math.inf, 0.0)
    size, pairs = l2(t) or 1.0, ((a, t), (b, t), (a, b), (t if kernel is None else kernel, t))
    ours, theirs, between, other = (distance(x, y) / size for x, y in pairs)
    return Distance(name, t.size, ours, theirs, between, float((a == b).mean()), other)
