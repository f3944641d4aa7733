"""The class of a known mistake, and what the modules that define them share. `mistakes.py` has the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refimpl.errors import UsageError
from refimpl.numerics.formats import FORMATS
from refimpl.training.setup import Training


@dataclass(frozen=True)
class Mistake:
    """A known mistake: its name, what is done wrong, what is seen of it, and the point of a trace that departs first.

    make: changes a run that has not begun. Errors: NotApplicable if the run lacks what the mistake needs.
    """

    name: str
    what: str
    seen: str
    departs: str
    make: Callable[[Training], None]

    def inject(self, training: Training) -> None:
        """Inject the mistake into a run that has not begun. Errors: UsageError if the run lacks what the mistake needs."""
        try:
            self.make(training)
        except NotApplicable as error:
            raise UsageError(f"--mistake {self.name} needs {error}") from None

    @property
    def announcement(self) -> str:
        """The line that a run with this mistake prints beside its numbers."""
        return f"MISTAKE injected: {self.name}: {self.what}"


class NotApplicable(Exception):
    """The run lacks what a mistake needs, which is the message."""


def need(present: bool, what: str) -> None:
    """Raise NotApplicable unless what a mistake needs is present."""
    if not present:
        raise NotApplicable(what)


def low_format(training: Training) -> str:
    """Return the 16-bit format of the operands of the run's products. Errors: NotApplicable if there is none."""
    row = training.run.policy.row("linear.y")
    fmt = row.input("x")
    plain = fmt in FORMATS and FORMATS[fmt].bits == 16 and row.acc == "fp32"
    need(plain, "a recipe whose products are in 16 bits with FP32 sums, such as fp16 or amp-bf16")
    return fmt
