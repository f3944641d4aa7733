"""`Rule`: one entry of the catalogue of mistakes, and what a rule may measure while an operation runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Values

Find = Callable[[View], Iterator[Finding]]
Probe = Callable[[Values], Any]
"""Measures an operation's values: what it returns, if not None, is kept as `operation.probed[its name]`.

It runs after the judge, so the twins are there. It must be cheap on operations that it does not measure.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """One mistake. name: that of the known mistake of traces (parity/mistakes.py), where they are one thing.

    steps: how many steps or micro-batches must be audited before it shows. find: is called at the end of each audited step,
    and, if unended, of one that an exception has ended.
    """

    code: str
    name: str
    steps: int
    find: Find
    unended: bool = False

    @property
    def text(self) -> str:
        """What the catalogue says of it."""
        return inspect.getdoc(self.find) or ""


def rule(code: str, name: str, steps: int = 1, unended: bool | None = None) -> Callable[[Find], Rule]:
    """Return a decorator that makes a function a rule. unended: by default, for those of single operations, D, in one step."""
    return lambda find: Rule(code, name, steps, find, code.startswith("D") and steps == 1 if unended is None else unended)
