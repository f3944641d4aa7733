"""Inference with a trained model: sample text, and compute the loss of a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.numerics.casts import widen
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.training.console import printable
from refimpl.training.data import map_file, sequential_batches

START = b"\n"
BYTES = 256
"""The number of token ids that are bytes. A model may have more ids, which are not used."""


def check_has_bytes(vocab_size: int, whose: str) -> None:
    """Raise UsageError for a vocabulary of fewer than 256 ids, whose meaning is not known here."""
    if vocab_size < BYTES:
        raise UsageError(
            f"{whose} is {vocab_size}, but text is read and written as bytes, which needs {BYTES} ids: train a model of "
            "characters or other tokens again on bytes"
        )


@np.errstate(over="ignore", under="ignore", invalid="ignore")
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


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def mean_loss(model: Model, state: State, run: Run, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the mean loss over all targets of the batches (tokens, targets), in nats per byte; NaN without any target."""
    total, n, run = 0.0, 0, run.frozen()
    for tokens, targets in batches:
        count = int(model.n_targets(targets))
        if count == 0:
            continue
        t = Tape(run, state.weight_views, model.tied, record=False)
        loss = model.loss(t, run.backend.from_host(tokens), run.backend.from_host(targets))
        total += float(loss.array) * count
        n += count
    return total / n if n else float("nan")


def generate_text(checkpoint: Path, prompt: str, n_bytes: int, temperature: float, seed: int, loss: Path | None) -> None:
    """Print a sample of a checkpoint's model, or the loss of a file under it. Errors: UsageError."""
    from refimpl.training.checkpoint_states import load_for_inference

    if n_bytes < 0 or seed < 0 or not 0 <= temperature < math.inf:
        raise UsageError("--bytes, --seed and --temperature must be 0 or more, and finite")
    model, state, run = load_for_inference(checkpoint)
    vocab_size = model.config["vocab_size"]
    check_has_bytes(vocab_size, f"the vocabulary of {checkpoint}")
    if vocab_size > BYTES:
        note = f"note: {vocab_size - BYTES} of this model's {vocab_size} token ids are not bytes and are not sampled;"
        print(f"{note} the sample is text only if the model was trained on bytes", file=sys.stderr)
    if loss is not None:
        text = map_file(loss)
        block_size = model.config["block_size"]
        if len(text) <= block_size:
            raise UsageError(f"{loss} has {len(text)} bytes; this model needs at least {block_size + 1}")
        nats = mean_loss(model, state, run, sequential_batches(text, 16, block_size))
        print(f"{loss}: {nats:.4f} nats per byte, {nats / math.log(2):.4f} bits per byte")
        return
    rng, given = np.random.Generator(np.random.PCG64(seed)), prompt.encode("utf-8", "surrogateescape")
    sampled = sample(model, state, run, n_bytes, rng, given, temperature)
    print(printable(given + sampled))
    if len(sampled) < n_bytes:
        print(f"note: the logits are not finite after {len(sampled)} bytes: nothing can be sampled from them", file=sys.stderr)
