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


@np.errstate(divide="ignore", invalid="ignore")
def divisors(model: Model, batches: Sequence[tuple[Array, Array]], state: State) -> list[Array]:
    """Return the divisor of each micro-batch's loss that makes the sum over micro-batches and ranks the mean over all targets.

    With N_i targets in micro-batch i (without ignored ones) and N in all micro-batches of all ranks, the divisor is N / N_i:
    Inf if N_i is 0, NaN if N is 0, and exactly the number of micro-batches if all N_i are equal. For a mean of means
    (`nn.models.model.LOSS_MEANS`) it is always that number. Each is a 0-d array on the device of the batches.
    Errors: UsageError without any micro-batch.
    PyTorch: a training loop does this by hand: cross_entropy(..., reduction='sum') / N.
    """
    if not batches:
        raise UsageError("no micro-batches: a step needs at least one")
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
