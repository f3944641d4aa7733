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
    "tokens": "the mean over all targets that count, in whichever micro-batch or rank they are",
    "micro-batches": "the mean of the micro-batches' means, so that a target counts for more the fewer there are beside it",
}
"""What the loss of several micro-batches can be. Where all have as many targets that count, the two are the same to the bit."""


LARGEST_SIZE = 2**31 - 1
"""Larger ones are no sizes of arrays; what the memory can hold is another matter."""


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Errors: UsageError for a size that no model can have."""
    for name, size in sizes.items():
        if not 1 <= size <= LARGEST_SIZE:
            raise UsageError(f"{name} is {size}: it must be {f'at most {LARGEST_SIZE}' if size > 1 else 'at least 1'}")


@dataclass(frozen=True)
class Parameter:
    """Shape and initial values of one parameter: N(0, std^2), or the constant `fill` where std is 0.

    `decay`: whether weight decay acts on it (matrices and embeddings, not biases and norms).
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

    parameters: name -> Parameter, in state_dict order. tied: a second name of a parameter -> its first.
    logits(t, tokens) -> logits of the next byte; loss(t, tokens, targets) -> the mean loss. Neither ever casts.
    predicted(targets) -> those of the targets that the loss looks at. ignore_index: the target that stands for 'none'.
    loss_mean: over what a step of several micro-batches has the mean, `LOSS_MEANS`.
    """

    name: str
    config: Mapping[str, Any]
    parameters: Mapping[str, Parameter]
    tied: Mapping[str, str]
    logits: Callable[[Tape, Array], Value]
    loss: Callable[[Tape, Array, Array], Value]
    predicted: Callable[[Array], Array] = lambda targets: targets
    ignore_index: int = IGNORE_INDEX
    loss_mean: str = "tokens"

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied one counts once."""
        return sum(math.prod(spec.shape) for spec in self.parameters.values())  # Python's integers do not overflow

    def n_targets(self, targets: Array) -> Array:
        """How many of a batch's targets its loss is the mean over: 0-d, where the targets lie."""
        return (self.predicted(targets) != self.ignore_index).sum()

    def batch_on(self, backend: Any, tokens: np.ndarray, targets: np.ndarray) -> tuple[Array, Array]:
        """Copy a batch to where a backend computes.

        On a device no operation can stop for a token or target that is out of range, so the batch is looked at here, on the
        host. Errors: UsageError that names the first one, where it stands, and the range.
        """
        if not backend.on_host:
            refuse_outside(tokens, self.config["vocab_size"], "token")
            refuse_outside(targets, self.config["vocab_size"], "target", self.ignore_index)
        return backend.from_host(tokens), backend.from_host(targets)

    def initial_weights(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Fresh FP32 weights, drawn in the order of the table."""
        weights = {}
        for name, spec in self.parameters.items():
            value = np.full(spec.shape, spec.fill, np.float32)
            if spec.std:
                rng.standard_normal(out=value, dtype=np.float32)
                value *= spec.std
            weights[name] = value
        return weights
