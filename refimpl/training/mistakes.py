"""Known mistakes in mixed-precision training, each as a change that can be injected into a run.

    python scripts/train.py --mistake unscale-after-clip
    python scripts/trace.py diff OURS THEIRS          says which of them makes two traces agree

Each is a few lines that replace one object of the run, and a sentence on what is seen of it. They teach; they test the tests,
which must notice every one of them; and they explain why another implementation departs.
"""

from __future__ import annotations

from refimpl.errors import UsageError
from refimpl.training.known_mistake import Mistake, NotApplicable
from refimpl.training.mistakes_forward import FORWARD
from refimpl.training.mistakes_update import UPDATE
from refimpl.training.setup import Training

MISTAKES: dict[str, Mistake] = {mistake.name: mistake for mistake in (*FORWARD, *UPDATE)}


def inject(name: str, training: Training) -> None:
    """Inject the named mistake into a run that has not begun. Errors: UsageError if the run lacks what the mistake needs."""
    if name == "none":
        return
    try:
        MISTAKES[name].make(training)
    except NotApplicable as error:
        raise UsageError(f"--mistake {name} needs {error}") from None


def announcement(name: str) -> str:
    """Return the line that a run with an injected mistake prints beside its numbers."""
    return f"MISTAKE injected: {name}: {MISTAKES[name].what}"


def listing() -> str:
    """Return all mistakes as text, one paragraph each."""
    indent = " " * 25
    return "\n".join(
        f"{m.name:<25}{m.what}\n{indent}-> {m.seen}\n{indent}   a trace departs at {m.departs}" for m in MISTAKES.values()
    )
