"""How a page was made: when, with which versions, where, and by which command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from platform import python_version

from refimpl import __version__
from refimpl.training.machine import processor


@dataclass(frozen=True)
class Made:
    """What the head of a page says on its origin. versions: by name of the package."""

    command: str
    date: str
    versions: Mapping[str, str]
    machine: str

    @property
    def sentence(self) -> str:
        """Return the origin without the command, which the page shows below it."""
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"Made on {self.date} with {packages}, on {self.machine}, by:"


def made_now(command: str, *packages: str) -> Made:
    """Return what a page made now says. packages: those whose versions it gives beside refimpl's and Python's."""
    versions = {"refimpl": __version__, "Python": python_version()} | {name: version(name) for name in packages}
    return Made(command, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", versions, processor())
