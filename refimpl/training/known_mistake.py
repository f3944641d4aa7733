"""What a known mistake is, and what the modules that make them share. `mistakes.py` has the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refimpl.numerics.formats import FORMATS
from refimpl.training.setup import Training


@dataclass(frozen=True)
class Mistake:
    """A mistake by name: what is done wrong, what one sees, and the point of a trace where it shows first.

    make: puts it into the parts of a run that has not begun. Errors: NoRoom where the run leaves no room for it.
    """

    name: str
    what: str
    seen: str
    departs: str
    make: Callable[[Training], None]


class NoRoom(Exception):
    """What a mistake needs and the run does not have."""


def need(present: bool, what: str) -> None:
    """Errors: NoRoom where what a mistake needs is not present."""
    if not present:
        raise NoRoom(what)


def low_format(training: Training) -> str:
    """The 16-bit format that the run's products read. Errors: NoRoom."""
    row = training.run.policy.row("linear.y")
    fmt = row.input("x")
    plain = fmt in FORMATS and FORMATS[fmt].bits == 16 and row.acc == "fp32"
    need(plain, "a recipe whose products are in 16 bits with FP32 sums, such as fp16 or amp-bf16")
    return fmt
