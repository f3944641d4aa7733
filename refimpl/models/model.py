"""What a model is: its parameters as data, and two functions of a tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.tape import Tape, Value

Array = Any


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
    """

    name: str
    config: Mapping[str, int]
    parameters: Mapping[str, Parameter]
    tied: Mapping[str, str]
    logits: Callable[[Tape, Array], Value]
    loss: Callable[[Tape, Array, Array], Value]

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied one counts once."""
        return sum(int(np.prod(spec.shape)) for spec in self.parameters.values())

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
