"""Known mistakes in mixed-precision training, each as a change that can be injected into a run.

    python scripts/train.py --mistake unscale-after-clip
    python scripts/trace.py diff OURS THEIRS          says which of them makes two traces agree

Each is a few lines that replace one object of the run, and a sentence on what is seen of it. They teach; they test the tests,
which must notice every one of them; and they explain why another implementation departs.
"""

from __future__ import annotations

from refimpl.errors import UsageError, unknown
from refimpl.parity.known_mistake import Mistake
from refimpl.parity.mistakes_forward import FORWARD
from refimpl.parity.mistakes_update import UPDATE
from refimpl.training.setup import Training

MISTAKES: dict[str, Mistake] = {mistake.name: mistake for mistake in (*FORWARD, *UPDATE)}


def inject(name: str, training: Training) -> None:
    """Inject the named mistake into a run that has not begun; 'none' changes nothing.

    Errors: UsageError for an unknown name, or if the run lacks what the mistake needs.
    """
    if name == "none":
        return
    if name not in MISTAKES:
        raise UsageError(unknown("mistake", name, MISTAKES))
    MISTAKES[name].inject(training)


def listing() -> str:
    """Return all mistakes as text, one paragraph each."""
    return "\n".join(
        f"{m.name}\n    {m.what}\n    -> {m.seen}\n       a trace departs at {m.departs}" for m in MISTAKES.values()
    )
