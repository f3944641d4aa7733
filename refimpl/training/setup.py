"""The start of a run: the objects that `step.train_step` takes, as one object; random numbers; faults injected on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from refimpl.backends.choose import get_backend
from refimpl.distributed.collectives import Comm
from refimpl.errors import UsageError, unknown
from refimpl.nn.models.model import Model
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.optim.adamw import AdamW
from refimpl.optim.loss_scale import LossScale
from refimpl.optim.loss_scalers import make_loss_scale
from refimpl.optim.optimizer import Optimizer, Rule
from refimpl.optim.schedule import Schedule
from refimpl.optim.state import State
from refimpl.precision.context import Monitor, Run
from refimpl.precision.recipes import get_recipe
from refimpl.step import Batch, StepResult, train_step
from refimpl.training.checkpoint_states import start_from

if TYPE_CHECKING:
    from refimpl.training.config import Config
    from refimpl.training.init_from import First

# Each use of random numbers has its own stream, so that evaluating or sampling more often changes neither batches nor weights.
INIT, BATCHES, EVALUATION, SAMPLE = range(4)


def generator(seed: int, stream: int) -> np.random.Generator:
    """Return the random number generator of one stream, independent of the other streams of the same seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream,))))


@dataclass
class Training:
    """The model, states, optimizer, loss scale and policy of a run. Any of them can be replaced before the first step.

    grad_accum: micro-batches per step.
    """

    model: Model
    state: State
    optimizer: Optimizer
    loss_scale: LossScale
    run: Run
    max_norm: float
    grad_accum: int = 1

    def set_monitor(self, monitor: Monitor | None) -> None:
        """Call `monitor` at every rounding of a tensor from now on, in operations and of states. None: stop."""
        self.run.monitor = self.state.monitor = monitor

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """Make one training step."""
        return train_step(self.model, batches, self.state, self.optimizer, self.loss_scale, self.run, self.max_norm)


def make_training(
    model: Model,
    recipe: str,
    schedule: Schedule,
    rule: Rule | None = None,
    *,
    loss_scale: LossScale | None = None,
    max_norm: float = 1.0,
    grad_accum: int = 1,
    backend: str = "numpy",
    seed: int = 0,
) -> Training:
    """Return a training of a model before its first step, with new weights: those of `train.py --seed` for the same sizes.

    recipe: one of RECIPES, by name. rule: AdamW() if None. loss_scale: the recipe's if None. max_norm: where gradients are
    clipped, math.inf for nowhere. grad_accum: the number of micro-batches of each step. backend: 'numpy', 'reference', which
    runs the definitions alone, or 'cupy'. seed: for the initial weights, and for stochastic rounding.
    Errors: UsageError for an unknown recipe or backend.
    """
    where, row, rule = get_backend(backend), get_recipe(recipe), rule or AdamW()
    state = State(model, row.state_encodings(rule.moments, grad_accum), where, seed)
    state.load_weights(model.initial_weights(generator(seed, INIT)), rounded=row.masters_from == "rounded")
    optimizer, scale = Optimizer(rule, schedule, where.xp), loss_scale or make_loss_scale(row.loss_scale, xp=where.xp)
    run = Run(row.policy, where, scales=ScalingState(seed))
    return Training(model, state, optimizer, scale, run, max_norm, grad_accum)


class Fault(Protocol):
    """Something that a run does wrong on purpose. The known mistakes of `parity/mistakes.py` are of this kind."""

    @property
    def announcement(self) -> str:
        """The line that says so beside the numbers of the run."""

    def inject(self, training: Training) -> None:
        """Change a run that has not begun. Errors: UsageError if the run lacks what the fault needs."""


NO_FAULTS: Mapping[str, Fault] = {}


def find_fault(name: str, faults: Mapping[str, Fault]) -> Fault | None:
    """Return the fault of --mistake, None for 'none'. faults: those that there are. Errors: UsageError for another name."""
    if name != "none" and name not in faults:
        raise UsageError(unknown("mistake", name, ("none", *faults)))
    return faults.get(name)


def start(
    config: Config, comm: Comm | None = None, faults: Mapping[str, Fault] = NO_FAULTS, first: First | None = None
) -> Training:
    """Return a run before its first step, with initial weights, and with the fault of --mistake injected.

    comm: this process's rank, if there are several. faults: those that --mistake may name. first: weights to start from, in
    place of new ones. Errors: UsageError.
    """
    fault = find_fault(config.mistake, faults)
    training = config.make_training(config.make_backend(), comm)
    if fault is not None:
        fault.inject(training)
    if first is not None:
        start_from(*first, training.model, training.state, config.rounds_masters)
        return training
    weights = training.model.initial_weights(generator(config.seed, INIT))
    training.state.load_weights(weights, rounded=config.rounds_masters)
    return training
