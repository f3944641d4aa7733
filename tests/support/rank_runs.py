"""Trainings of several ranks for the tests, on whatever ranks they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.distributed.collectives import Comm, Serial, shares_of
from refimpl.distributed.threads import run_ranks
from refimpl.parity.trace import batches_of
from refimpl.training.checkpoint_states import state_arrays
from refimpl.training.config import Config
from refimpl.training.setup import Training, start

SIZES: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 12, "lr": 1e-3, "warmup": 1, "steps": 4,
    "init_scale": 2.0**18,
}  # fmt: skip


@dataclass
class Trained:
    """What a rank has at the end: loss, norm and skip of each step, the whole states, and what they and the ranks took."""

    steps: list[tuple[float, float, bool]]
    arrays: dict[str, np.ndarray]
    training: Training
    received: int

    def same_as(self, other: Trained) -> bool:
        """Whether two runs have the same bits."""
        return repr(self.steps) == repr(other.steps) and all(
            self.arrays[name].tobytes() == array.tobytes() for name, array in other.arrays.items()
        )


def train(config: Config, comm: Comm, before: Callable[[Training, Comm], None] | None = None) -> Trained:
    """Train, each rank on its rows of the batches. before: called with the training before the first step."""
    training, rows, steps = start(config, comm), shares_of(config.batch_size, comm.size)[comm.rank], []
    if before is not None:
        before(training, comm)
    received = comm.received.total()
    backend = training.state.backend
    for batches in batches_of(config, None):
        result = training.step([(backend.from_host(x[rows]), backend.from_host(y[rows])) for x, y in batches])
        steps.append((float(result.loss), float(result.grad_norm), bool(result.skipped)))
    received = comm.received.total() - received
    training.state.weights_down()
    return Trained(steps, state_arrays(training.state), training, received)


def on_ranks(config: Config, ranks: int, before: Callable[[Training, Comm], None] | None = None) -> list[Trained]:
    """The same on threads."""
    return [train(config, Serial(), before)] if ranks == 1 else run_ranks(ranks, lambda comm: train(config, comm, before))
