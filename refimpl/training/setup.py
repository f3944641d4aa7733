"""The objects of a training run that `step.train_step` takes, as one object; and faults, which change them on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from refimpl.errors import UsageError, unknown
from refimpl.nn.models.model import Model
from refimpl.optim.loss_scale import LossScale
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.state import State
from refimpl.precision.context import Monitor, Run
from refimpl.step import Batch, StepResult, train_step


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
