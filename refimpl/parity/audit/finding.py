"""`Finding`: one mistake in the user's loop: where it is, how much, what it does, and how to fix it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from refimpl.parity.audit.verdict import LEVELS


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake.

    code, name: of the rule that found it, as in the catalogue. level: one of verdict.LEVELS but 'fine'. step: the first audited
    step that shows it. module, line: where. number: the sentence with the measured figures. effect: what it does to
    training. fix: what to change. parameters: the names concerned. operation: index in its step of the one that shows it,
    None if it is not one operation. places: how many times it was seen, over all places and steps. modules: where, each once.
    """

    code: str
    name: str
    level: str
    step: int
    module: str | None
    line: str
    number: str
    effect: str
    fix: str
    parameters: tuple[str, ...] = ()
    operation: int | None = None
    places: int = 1
    modules: tuple[str, ...] = ()


def merged(known: dict[str, Finding], found: Finding) -> None:
    """Add a finding to those known, by code: the same mistake at many places is one finding, with the worst one's words."""
    modules = found.modules or (() if found.module is None else (found.module,))
    first = known.get(found.code)
    if first is None:
        known[found.code] = replace(found, modules=modules)
        return
    told = found if LEVELS.index(found.level) < LEVELS.index(first.level) else first
    everywhere = tuple(dict.fromkeys((*first.modules, *modules)))
    known[found.code] = replace(told, places=first.places + found.places, modules=everywhere)


def is_serious(level: str) -> bool:
    """Return whether a level is above 'note'."""
    return LEVELS.index(level) < LEVELS.index("note")
