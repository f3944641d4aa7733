"""Gradient accumulation over micro-batches with unequal numbers of targets: the share of each in the mean loss.

The loss of a micro-batch is the mean over its own targets, without ignored ones. The mean over the targets of all
micro-batches is the mean of those means only if all have equally many: Hugging Face's trainer assumed so until 2024
(transformers #34191).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.models.model import Model
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of, widest
from refimpl.optim.state import State

_PAIRS = "[(tokens, targets)] for one"


def check_batches(model: Model, batches: Sequence[tuple[Array, Array]]) -> None:
    """Check what does not need the values: that these are pairs, of integer arrays (B, T) if the model reads tokens.

    A model without a vocabulary may read anything. Errors: UsageError, also if there is no micro-batch.
    """
    if not isinstance(batches, Sequence):
        raise UsageError(f"batches is of type {type(batches).__name__}: it must be a list of micro-batches, {_PAIRS}")
    if not batches:
        raise UsageError("no micro-batches: a step needs at least one")
    for i, batch in enumerate(batches):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            what = f"has {len(batch)} parts" if isinstance(batch, tuple | list) else f"is of type {type(batch).__name__}"
            raise UsageError(f"micro-batch {i} {what}: each must be a pair in a list of them, {_PAIRS}")
        if "vocab_size" not in model.config:
            continue
        for name, array in zip(("tokens", "targets"), batch, strict=True):
            dtype = getattr(array, "dtype", type(array).__name__)
            if getattr(dtype, "kind", "") not in "iu" or not hasattr(array, "shape"):
                raise UsageError(f"{name} are of type {dtype}: they must be an array of integers")
            if len(array.shape) != 2 or 0 in array.shape:
                raise UsageError(f"{name} have the shape {array.shape}: it must be (B, T), B rows of T {name}")
        tokens, targets = batch
        if tokens.shape != targets.shape:
            raise UsageError(f"tokens {tokens.shape} and targets {targets.shape} must have equal shapes: one target per token")


@np.errstate(divide="ignore", invalid="ignore")
def divisors(model: Model, batches: Sequence[tuple[Array, Array]], state: State) -> list[Array]:
    """Return the divisor of each micro-batch's loss that makes the sum over micro-batches and ranks the mean over all targets.

    With N_i targets in micro-batch i (without ignored ones) and N in all micro-batches of all ranks, the divisor is N / N_i:
    Inf if N_i is 0, NaN if N is 0, and exactly the number of micro-batches if all N_i are equal. For a mean of means
    (`nn.models.model.LOSS_MEANS`) it is always that number. Each is a 0-d array on the device of the batches.
    Errors: UsageError, as `check_batches` says.
    PyTorch: a training loop does this by hand: cross_entropy(..., reduction='sum') / N.
    """
    check_batches(model, batches)
    n = len(batches) * state.ranks
    if n == 1 or model.loss_mean == "micro-batches":
        return [n] * len(batches)
    counts = [cast(model.n_targets(targets), state.math_format) for _, targets in batches]
    total = state.sum_over_ranks(sum(counts))
    return [total / count for count in counts]


def divided(x: Array, n: Array, xp: Any) -> Array:
    """Return x / n, for a loss or the loss scale x and a divisor n; 0 if n is Inf.

    So a micro-batch without targets adds nothing, although its own loss, a mean over no values, is NaN.
    """
    if isinstance(n, int | float):
        return x / n
    fmt = widest(format_of(x), format_of(n))
    return xp.where(xp.isinf(n), 0, widen(x, fmt) / widen(n, fmt))
