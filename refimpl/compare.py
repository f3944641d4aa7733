"""Two traces held against each other: where the second departs from the recipe of the first, by how much, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.config import Config
from refimpl.errors import UsageError
from refimpl.judge import Finding, explanations, judge
from refimpl.mistakes import MISTAKES
from refimpl.show import table
from refimpl.trace import POINTS, Trace


def diff(a: Trace, b: Trace) -> dict[str, Any]:
    """Print how trace `b` compares with the recipe that `a` was made with; return the verdict as `--json` writes it.

    One of the two must be a trace of refimpl, whose header holds the configuration; if only `b` is, `a` is judged. What the
    judged one lacks of the start and of the batches is taken from the other.
    """
    if not a.config and not b.config:
        raise UsageError("neither file says how it was made: one of the two must come from `scripts/trace.py record`")
    reference, theirs = (a, b) if a.config else (b, a)
    config = replace(Config.of(reference.config), mistake="none")
    given = {k: v for k, v in reference.tensors.items() if k.startswith("0/") or "/0." in k}
    theirs = Trace(theirs.config, {**given, **theirs.tensors})
    findings = judge(config, theirs)
    first = next((finding for finding in findings if finding.departs), None)
    reasons = explanations(config, theirs, first) if first else []
    print(report(reference, theirs, findings, first, reasons))
    return {"agrees": first is None, "first_departure": vars(first) if first else None, "explained_by": reasons}


def report(
    reference: Trace, theirs: Trace, findings: Sequence[Finding], first: Finding | None, reasons: Sequence[str]
) -> str:
    """What a person reads: the two runs side by side, each point, the first departure, and what explains it."""
    lines = [f"recipe {reference.config['recipe']}, {reference.config['model']}", _trajectory(reference, theirs), ""]
    lines += ["each step taken again from the trace's own values:", shares(findings), ""]
    if first is None:
        worst = max(findings, key=lambda f: f.error)
        return "\n".join([*lines, f"AGREES: nearest to its bound is {worst.where}, at {worst.error:.2f} of it"])
    lines.append(
        f"DEPARTS first at {first.where}: {first.error:.3g} times its bound, {first.ulps:.3g} ulps at most "
        f"(at the largest element), {first.identical:.1%} of {first.elements} elements identical"
    )
    later = dict.fromkeys(f.point for f in findings if f.departs and f.step == first.step)
    lines.append(f"in that step outside their bounds: {', '.join(later)}")
    lines += [f"explained by --mistake {name}: {MISTAKES[name].what}" for name in reasons]
    if not reasons:
        lines.append("none of the known mistakes (python scripts/mistakes.py) explains it")
    return "\n".join(lines)


def _trajectory(a: Trace, b: Trace) -> str:
    """Losses, scales and skipped steps of the two free runs, as far as they hold them."""

    def cell(trace: Trace, step: int, point: str) -> str:
        x = trace.get(step, point)
        return "-" if x is None else f"{float(x):.6g}"

    header = ["step", "loss", "theirs", "scale", "theirs", "skipped", "theirs"]
    points = ("2.loss", "2.loss_scale", "3.found_inf")
    rows = [[str(step), *(cell(t, step, p) for p in points for t in (a, b))] for step in sorted({*a.steps, *b.steps})]
    return table(header, rows)


def shares(findings: Sequence[Finding]) -> str:
    """A line a point: tensors, the share of identical elements, and the finding that is nearest to its bound."""
    rows = []
    for point in POINTS:
        here = [f for f in findings if f.point == point]
        if here:
            elements = sum(f.elements for f in here)
            same = sum(f.identical * f.elements for f in here) / max(1, elements)
            worst = max(here, key=lambda f: np.nan_to_num(f.error, nan=np.inf))
            rows.append([point, str(len(here)), f"{same:.3%}", f"{worst.error:.3g}", worst.name])
    return table(["point", "tensors", "identical", "of bound", "in"], rows)
