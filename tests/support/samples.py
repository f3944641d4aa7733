"""What a model writes, as bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.nn.models.model import Model
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.training.sampling import Choice, Writer
from refimpl.training.tokenizer import BYTES


def sample(
    model: Model, state: State, run: Run, n: int, temperature: float = 0.8, stopping: Callable[[], bool] = lambda: False
) -> bytes:
    """Return at most n bytes that the model writes after a line end."""
    writer = Writer(model, state, run, BYTES, np.frombuffer(b"\n", np.uint8))
    list(writer.text(n, np.random.default_rng(0), Choice(temperature), stopping))
    return bytes(writer.tokens[1:])
