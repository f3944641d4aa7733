"""The mean loss of a model on a text, and the validation of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from refimpl.backends.numpy.threads import one_thread_per_product
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.optim.state import State
from refimpl.precision.context import Run
from refimpl.training.config import Config
from refimpl.training.data import Corpus, sample_batch, sequential_batches
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.setup import EVALUATION, Training, generator

WHOLE_TEXT = 2**37
"""The most parameters * tokens of the validation part for which a run ends with the loss of all of it: seconds, not minutes."""
SLOW = 5.0
"""Seconds after which an evaluation shows its own progress bar."""

Batches = Iterable[tuple[np.ndarray, np.ndarray]]
MeasuredBatches = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Tokens, targets, and the number of bytes that each target stands for, all (B, T)."""


@dataclass(frozen=True)
class TextLoss:
    """The loss on a text: the mean over its tokens, and nats per token * tokens / bytes / ln 2.

    Only bits per byte can be compared between tokenizers.
    """

    nats_per_token: float
    bits_per_byte: float

    def described(self, unit: str) -> str:
        """Return both as text, 1.2345 nats per byte (1.781 bits per byte). unit: what a token is called."""
        return f"{self.nats_per_token:.4f} nats per {unit} ({self.bits_per_byte:.4f} bits per byte)"


@np.errstate(over="ignore", under="ignore", invalid="ignore")
@one_thread_per_product()
def mean_loss(model: Model, state: State, run: Run, batches: Batches) -> float:
    """Return the mean loss over all targets of the batches (tokens, targets), in nats per token; NaN without any target."""
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


def text_loss(model: Model, state: State, run: Run, batches: MeasuredBatches) -> TextLoss:
    """Return the loss over all targets of the batches, and the same per byte; NaN without any target."""
    tokens = n_bytes = 0

    def counted() -> Batches:
        nonlocal tokens, n_bytes
        for x, y, lengths in batches:
            counts = model.predicted(y) != model.ignore_index
            tokens += int(counts.sum())
            n_bytes += int(model.predicted(lengths)[counts].sum())
            yield x, y

    nats = mean_loss(model, state, run, counted())
    return TextLoss(nats, nats * tokens / n_bytes / math.log(2) if n_bytes else float("nan"))


def reads_whole_text(model: Model, corpus: Corpus) -> bool:
    """Return whether a run ends with the loss of the whole validation part too: if the part is not too long for the model.

    That loss compares with those of n-gram models, and of other tokenizers, which are over the same text.
    """
    return model.n_params * corpus.valid.size <= WHOLE_TEXT


def validation_loss(
    training: Training, config: Config, corpus: Corpus, whole: bool, stopping: Callable[[], bool], shows: bool = False
) -> TextLoss | None:
    """Return the loss on the same sampled validation batches each time, or if `whole` on all blocks of the part.

    Return None if `stopping()`, called before each batch, returned True. shows: show a progress bar after SLOW seconds.
    """
    training.state.weights_down()
    sizes = config.batch_size, config.block_size
    if whole:
        batches = whole_text(corpus.valid, corpus.valid_lengths, sizes, None, config.no_target)
        total = count_batches(corpus.valid, sizes)
    else:
        batches, total = validation_batches(config, corpus, config.seed), config.eval_batches
    cut = False

    def until_stopped() -> MeasuredBatches:
        nonlocal cut
        with ProgressBar(total, "batch", "evaluation", delay=SLOW, quiet=not shows, stays=False) as bar:
            for batch in batches:
                cut = stopping()
                if cut:
                    return
                yield batch
                bar.update(1)

    loss = text_loss(training.model, training.state, training.run, until_stopped())
    return None if cut else loss


def validation_batches(config: Config, corpus: Corpus, seed: int) -> MeasuredBatches:
    """Yield the batches of an evaluation, sampled from the validation part: the same ones for the same seed."""
    sizes, rngs = (config.batch_size, config.block_size), [generator(seed, EVALUATION) for _ in range(2)]
    for _ in range(config.eval_batches):  # equal generators draw equal blocks of the tokens and of their lengths
        x, y = sample_batch(corpus.valid, *sizes, rngs[0], config.no_target)
        yield x, y, sample_batch(corpus.valid_lengths, *sizes, rngs[1])[1]


def count_batches(ids: np.ndarray, sizes: tuple[int, int]) -> int:
    """Return the number of batches that `whole_text` yields without a limit."""
    batch_size, block_size = sizes
    return -(-((ids.size - 1) // block_size) // batch_size)


def whole_text(
    ids: np.ndarray, lengths: np.ndarray, sizes: tuple[int, int], limit: int | None = None, no_target: int | None = None
) -> MeasuredBatches:
    """Yield the consecutive blocks of a text, as `sequential_batches` does. ids, lengths: its tokens and their bytes."""
    blocks = zip(sequential_batches(ids, *sizes, limit, no_target), sequential_batches(lengths, *sizes, limit), strict=True)
    return ((x, y, of_targets) for (x, y), (_, of_targets) in blocks)
