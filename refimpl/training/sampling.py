"""Sample text from a trained model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.backends.numpy.threads import one_thread_per_product
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.numerics.casts import widen
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.training.data import BYTES

START = b"\n"


@np.errstate(over="ignore", under="ignore", invalid="ignore")
@one_thread_per_product()
def sample(
    model: Model,
    state: State,
    run: Run,
    n_bytes: int,
    rng: np.random.Generator,
    prompt: bytes = START,
    temperature: float = 0.8,
    stopping: Callable[[], bool] = lambda: False,
) -> bytes:
    """Return n_bytes sampled one after another from softmax(logits / temperature); temperature 0 takes the most likely byte.

    The model reads the last block_size bytes. Ids above 255 are not bytes and are never sampled. `rng` gives one random number
    per byte. Sampling ends early if `stopping()`, called before each byte, returns True, or if the logits are not finite.
    """
    block, run = model.config["block_size"], run.frozen()
    text = bytearray(prompt or START)
    start = len(text)
    for _ in range(n_bytes):
        if stopping():
            break
        context = bytes(text[-block:])
        if model.name == "mlp":  # it needs a full block
            context = context.rjust(block, START)
        tokens = np.frombuffer(context, np.uint8)[None, :]
        t = Tape(run, state.weight_views, model.tied, record=False)
        logits = model.logits(t, run.backend.from_host(tokens)).array
        last = widen(run.backend.to_host(logits.reshape(-1, logits.shape[-1])[-1, :BYTES]), "fp64")
        if not np.isfinite(last.max()):  # some logits may be -Inf: a probability of 0
            break
        text.append(_sample_index(last, temperature, rng.random()))
    return bytes(text[start:])


def _sample_index(logits: np.ndarray, temperature: float, u: float) -> int:
    """Return the index at which the cumulative distribution exceeds u."""
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / temperature).cumsum()
    return int(min(np.searchsorted(weights, u * weights[-1], side="right"), len(logits) - 1))
