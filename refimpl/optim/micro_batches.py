"""What each micro-batch of a step makes up of the mean loss: gradient accumulation with unequal numbers of targets.

The loss of one micro-batch is the mean over its own targets that are not ignored. The mean over all of them is no mean of those
means, unless all are over as many: Hugging Face's trainer had that wrong until 2024 (transformers #34191).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.nn.models.model import Model
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of, widest
from refimpl.optim.state import State


@np.errstate(divide="ignore", invalid="ignore")
def divisors(model: Model, batches: Sequence[tuple[Array, Array]], state: State) -> list[Array]:
    """By what to divide each micro-batch's loss, so that the sum over micro-batches and ranks is the mean over all targets.

    With N_i targets that count in micro-batch i and N in all micro-batches of all ranks, it makes up N_i / N: the divisor is
    N / N_i. Where all N_i are equal it is exactly the number of micro-batches, and that it is always for a mean of means
    (`models.LOSS_MEANS`). It is Inf where N_i is 0, NaN where N is. Each is 0-d, where the batches lie, so that nothing waits
    for a device.
    PyTorch: a loop does this by hand: cross_entropy(..., reduction='sum') / N.
    """
    n = len(batches) * state.ranks
    if n == 1 or model.loss_mean == "micro-batches":
        return [n] * len(batches)
    counts = [cast(model.n_targets(targets), state.math_format) for _, targets in batches]
    total = state.sum_over_ranks(sum(counts))
    return [total / count for count in counts]


def divided(x: Array, n: Array, xp: Any) -> Array:
    """x / n, the loss scale or a loss by a divisor; 0 where n is Inf: a micro-batch without a target that counts adds nothing,
    although its own loss, a mean of nothing, is NaN.
    """
    if isinstance(n, int | float):
        return x / n
    fmt = widest(format_of(x), format_of(n))
    return xp.where(xp.isinf(n), 0, widen(x, fmt) / widen(n, fmt))
