"""What a model is: its parameters as data, and two functions of a tape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape, Value
from refimpl.nn.indices import refuse_outside
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.numerics.arrays import Array

LOSS_MEANS = {
    "tokens": "the mean over all targets that count, in all micro-batches and ranks",
    "micro-batches": "the mean of the micro-batches' means, so that a target weighs more in a micro-batch with fewer of them",
}
"""What the loss of several micro-batches can be. Both are equal to the bit where all have equally many targets that count."""


LARGEST_SIZE = 2**31 - 1
"""The largest size that is accepted, whether or not it fits into memory."""


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Check the sizes of a model. Errors: UsageError for one outside 1 to LARGEST_SIZE."""
    for name, size in sizes.items():
        if not 1 <= size <= LARGEST_SIZE:
            raise UsageError(f"{name} is {size}: it must be {f'at most {LARGEST_SIZE}' if size > 1 else 'at least 1'}")


@dataclass(frozen=True)
class Parameter:
    """Shape and initial values of one parameter: N(0, std^2), or the constant `fill` where std is 0.

    decay: whether weight decay applies to it (matrices and embeddings, not biases and norms).
    """

    shape: tuple[int, ...]
    std: float = 0.0
    fill: float = 0.0

    @property
    def decay(self) -> bool:
        return len(self.shape) >= 2


@dataclass(frozen=True)
class Model:
    """A model, without its weights.

    parameters: name -> Parameter, in state_dict order. tied: second name of a parameter -> its first.
    logits(t, tokens, start=0) -> logits of the next token, start: the position of the first token; loss(t, tokens, targets) ->
    the mean loss. Neither casts anything.
    predicted(targets) -> the targets that enter the loss. ignore_index: the target that does not count.
    loss_mean: the loss of several micro-batches, one of LOSS_MEANS.
    """

    name: str
    config: Mapping[str, Any]
    parameters: Mapping[str, Parameter]
    tied: Mapping[str, str]
    logits: Callable[..., Value]
    loss: Callable[[Tape, Array, Array], Value]
    predicted: Callable[[Array], Array] = lambda targets: targets
    ignore_index: int = IGNORE_INDEX
    loss_mean: str = "tokens"

    @property
    def n_params(self) -> int:
        """Return the number of parameters; a tied one counts once."""
        return sum(math.prod(spec.shape) for spec in self.parameters.values())  # Python's integers do not overflow

    def n_targets(self, targets: Array) -> Array:
        """Return how many targets of a batch count in its loss: 0-d, on the device of the targets."""
        return (self.predicted(targets) != self.ignore_index).sum()

    def batch_on(self, backend: Any, tokens: np.ndarray, targets: np.ndarray) -> tuple[Array, Array]:
        """Copy a batch to the memory of a backend.

        Operations on a device cannot stop for a token or target out of range, so these are checked here, on the host.
        Errors: UsageError that names the first such one, its position, and the range.
        """
        if not backend.on_host:
            refuse_outside(tokens, self.config["vocab_size"], "token")
            refuse_outside(targets, self.config["vocab_size"], "target", self.ignore_index)
        return backend.from_host(tokens), backend.from_host(targets)

    def initial_weights(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return new FP32 weights, sampled in the order of the table."""
        weights = {}
        for name, spec in self.parameters.items():
            value = np.full(spec.shape, spec.fill, np.float32)
            if spec.std:
                rng.standard_normal(out=value, dtype=np.float32)
                value *= spec.std
            weights[name] = value
        return weights
