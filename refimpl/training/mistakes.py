"""Known mistakes: what people get wrong in mixed-precision training, each as a change that can be switched into a run.

    python scripts/train.py --mistake unscale-after-clip
    python scripts/trace.py diff OURS THEIRS          says which of them makes two traces agree

Each is a few lines that replace one of the run's parts and say what one then sees. They teach, they test the tests (every
one of them must be noticed), and they explain a run of somebody else's that departs.
"""

from __future__ import annotations

from refimpl.errors import UsageError
from refimpl.training.known_mistake import Mistake, NoRoom
from refimpl.training.mistakes_forward import FORWARD
from refimpl.training.mistakes_update import UPDATE
from refimpl.training.setup import Training

MISTAKES: dict[str, Mistake] = {mistake.name: mistake for mistake in (*FORWARD, *UPDATE)}


def meddle(name: str, training: Training) -> None:
    """Make the named mistake in a run that has not begun. Errors: UsageError where the recipe leaves no room for it."""
    if name == "none":
        return
    try:
        MISTAKES[name].make(training)
    except NoRoom as error:
        raise UsageError(f"--mistake {name} needs {error}") from None


def announcement(name: str) -> str:
    """Return what a run with a mistake in it says of it, wherever its numbers are shown."""
    return f"MISTAKE switched in: {name}: {MISTAKES[name].what}"


def listing() -> str:
    """All mistakes, one paragraph each, as `scripts/mistakes.py` prints them."""
    indent = " " * 25
    return "\n".join(
        f"{m.name:<25}{m.what}\n{indent}-> {m.seen}\n{indent}   a trace departs at {m.departs}" for m in MISTAKES.values()
    )
