"""The class of an experiment: a question, a run that answers it with numbers, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """The result of an experiment: a small table, a conclusion, and the numbers for both and for the picture."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    conclusion: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """run(seed) answers the question; draw(axes, data) draws the answer on matplotlib axes.

    steps: training steps of an experiment that takes long. It is called as run(seed, tick), with a callback after each step.
    """

    name: str
    question: str
    source: str
    run: Callable[..., Result]
    draw: Callable[[Any, Mapping[str, Any]], None]
    steps: int = 0
