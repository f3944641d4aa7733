"""The mean loss of a model on a text, and the validation of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from refimpl.backends.numpy.threads import one_thread_per_product
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.training.config import Config
from refimpl.training.data import sample_batch, sequential_batches
from refimpl.training.setup import EVALUATION, Training, generator

FINAL_EVAL_BLOCKS = 1024

Batches = Iterable[tuple[np.ndarray, np.ndarray]]


@np.errstate(over="ignore", under="ignore", invalid="ignore")
@one_thread_per_product()
def mean_loss(model: Model, state: State, run: Run, batches: Batches) -> float:
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


def validation_loss(
    training: Training, config: Config, valid: np.ndarray, final: bool, stopping: Callable[[], bool]
) -> float | None:
    """Return the mean loss on the same sampled validation batches each time, or if `final` on the first 1024 blocks of it.

    valid: the validation part of the corpus. Return None if `stopping()`, called before each batch, returned True.
    """
    training.state.weights_down()
    if final:
        sizes = config.batch_size, config.block_size
        batches: Batches = sequential_batches(valid, *sizes, FINAL_EVAL_BLOCKS, config.no_target)
    else:
        batches = validation_batches(config, valid, config.seed)
    cut = False

    def until_stopped() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal cut
        for batch in batches:
            cut = stopping()
            if cut:
                return
            yield batch

    loss = mean_loss(training.model, training.state, training.run, until_stopped())
    return None if cut else loss


def validation_batches(config: Config, valid: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the batches of an evaluation, sampled from the validation part: the same ones for the same seed."""
    sizes, rng = (config.batch_size, config.block_size), generator(seed, EVALUATION)
    return (sample_batch(valid, *sizes, rng, config.no_target) for _ in range(config.eval_batches))
