"""`Step`: what is kept of one audited step, and `View`: what a rule may look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refimpl.parity.audit.operation import Operation


@dataclass(frozen=True, slots=True)
class OptimizerFacts:
    """An optimizer between two steps.

    kind: name of its class. groups: its param_groups without the tensors, each with 'names' of its parameters ('' for one that
    the model does not have). updates: the step counters of its states, by parameter. state_formats: (key, dtype) -> elements.
    """

    kind: str
    groups: tuple[Mapping[str, Any], ...]
    updates: Mapping[str, float]
    state_formats: Mapping[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class MasterFacts:
    """A 16-bit weight and an FP32 tensor that an optimizer has, which may be its master, between two steps.

    elements: of either; off: of the weight's, those that are not the rounded master; ulps: the largest distance, in units in
    the last place of the weight. trivial: whether the weight is 0 everywhere. weight_bits, master_bits: sums of their bits by
    place, which change if the tensors do.
    """

    elements: int
    off: int
    ulps: float
    trivial: bool
    weight_bits: int
    master_bits: int


@dataclass(frozen=True, slots=True)
class Border:
    """The state of a training between two steps. scale, growth_tracker: of the GradScaler, None without one (or disabled).

    initial_scale: the scale that it was made with. scheduler: the values of `last_epoch` of each scheduler. masters: by the
    weight's name and the other tensor's place in the optimizers.
    """

    scale: float | None
    growth_tracker: int | None
    optimizers: tuple[OptimizerFacts, ...]
    schedulers: tuple[int, ...]
    initial_scale: float | None = None
    masters: Mapping[tuple[str, str], MasterFacts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is not an operation: 'backward', 'optimizer.step', or 'autocast', which has been entered or left.

    index: that of the next operation. line: the user's. autocast: the format of an autocast around it, '' if none is on; of
    'autocast', the one that is on from there. which: of an optimizer, its place among the audited ones.
    """

    name: str
    index: int
    line: str
    autocast: str = ""
    which: int | None = None


@dataclass(slots=True, eq=False)
class Step:
    """An audited step. number: counted from 1, unaudited steps included. calls: in order.

    history: what happened to the gradients, once a rule has asked (factors.py).
    """

    number: int
    before: Border
    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    after: Border | None = None
    history: Any = None


@dataclass(frozen=True, slots=True)
class ParameterFacts:
    """A parameter of the model. groups: the places among the optimizers of those that own it."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class View:
    """What a rule looks at, at the end of each audited step.

    step: the one that has just ended. earlier: audited steps before it, the newest last; a few only. borders: of every step so
    far, audited or not, by step number: the state after it (0: at the beginning); those of unaudited steps have no scale.
    parameters: by name.
    """

    step: Step
    earlier: Sequence[Step]
    borders: Mapping[int, Border]
    parameters: Mapping[str, ParameterFacts]
