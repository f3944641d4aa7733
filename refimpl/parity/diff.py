"""Comparison of two traces: where the second departs from the recipe of the first, by how much, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.formats import FORMATS, format_of, is_float
from refimpl.parity.coverage import Coverage, coverage_of, is_input, steps_in_words, verdict
from refimpl.parity.findings import Finding
from refimpl.parity.judge import Judge, candidates, explanations
from refimpl.parity.mistakes import MISTAKES
from refimpl.parity.tolerances import fp64
from refimpl.parity.trace import BY_PARAMETER, POINTS, Trace, parse_key
from refimpl.parity.trace_checks import checked
from refimpl.parity.trace_settings import config_from, stated
from refimpl.training.columns import table
from refimpl.training.progress_bar import ProgressBar

GROUPS = 12
"""The number of reasons that are printed; `--json` has all."""


def diff_traces(a: Trace, b: Trace, quiet: bool = False) -> dict[str, Any]:
    """Print how trace `b` compares with the recipe that `a` was made with; return the verdict as `--json` writes it.

    One of the two must be a trace of refimpl, whose header holds the configuration; if only `b` is, `a` is judged. Initial
    states and batches that the judged trace lacks are taken from the other. quiet: show no progress. Errors: UsageError.
    """
    if not a.config and not b.config:
        raise UsageError("neither file holds a configuration: one of the two must come from `scripts/trace.py record`")
    reference, theirs = (a, b) if a.config else (b, a)
    config = replace(config_from(reference.config), mistake="none")
    model = stated(config, theirs.settings)[0].make_model()
    inputs = {name: x for name, x in reference.tensors.items() if is_input(name)}
    given, _ = checked(Trace({}, inputs), model)
    theirs, mapped = checked(theirs, model)
    whole = with_inputs_of(given, theirs)
    taken = sorted(parse_key(name)[0] for name in whole.tensors if name not in theirs.tensors and name.endswith("/0.tokens"))
    judge = Judge(config, whole)
    with ProgressBar(len(whole.steps), "step", "judging", quiet=quiet, stays=False) as bar:
        findings = list(judge.findings(bar.update))
    covered = coverage_of(theirs, findings, judge.reasons, ("4.lr",) if judge.own_rates else ())
    if not covered.tensors:
        raise UsageError("nothing in this trace can be judged: it holds at most initial states and batches")
    first = next((finding for finding in findings if finding.departs), None)
    ways = candidates(config, first) if first else []
    with ProgressBar(len(ways), "mistake", "explaining", quiet=quiet, stays=False) as bar:
        reasons = explanations(config, judge.theirs, first, bar.update) if first else []
    judge.notes = [*mapped, *judge.notes, *(f"the batch of {steps_in_words(taken)} is the reference's" for _ in taken[:1])]
    if model.config.get("bias", True) and config.model == "gpt" and not has_biases(theirs):
        judge.notes.append("no parameter of the trace is a bias: if the model has none, record the reference with --no-bias")
    print(report(reference, judge, findings, covered, reasons))
    said = verdict(findings, covered)
    return {
        "verdict": said, "agrees": said == "AGREES", "first_departure": vars(first) if first else None,
        "explained_by": reasons, "coverage": covered.as_data(), "notes": judge.notes,
    }  # fmt: skip


def with_inputs_of(reference: Trace, theirs: Trace) -> Trace:
    """Return the judged trace, with the batches and initial states that it lacks taken from the reference.

    If its weights, moments or number of updates at step 0 differ from the reference's, no initial state is taken; if its
    batch of any step differs, no batch is.
    """
    starts = {name: x for name, x in reference.tensors.items() if name.startswith("0/4.")}
    marks = [name for name in starts if name.startswith(("0/4.m", "0/4.v", "0/4.t")) and name in theirs.tensors]
    another = any(not np.array_equal(fp64(starts[name]), fp64(theirs.tensors[name])) for name in marks)
    batches = {name: x for name, x in reference.tensors.items() if name not in starts}
    if any(not np.array_equal(x, theirs.tensors[name]) for name, x in batches.items() if name in theirs.tensors):
        batches = {}
    return Trace(theirs.config, {**({} if another else starts), **batches, **theirs.tensors}, theirs.settings)


def has_biases(trace: Trace) -> bool:
    """Return whether a trace holds any bias, or no parameter at all."""
    names = [name for _, point, name in map(parse_key, trace.tensors) if point in BY_PARAMETER]
    return not names or any(name.endswith(".bias") for name in names)


def report(
    reference: Trace, judge: Judge, findings: Sequence[Finding], covered: Coverage, reasons: Sequence[str]
) -> str:
    """Return the printed report: both runs, each point, what was judged, the first departure and what explains it."""
    config = config_from(reference.config)
    lines = [f"recipe {config.recipe}, {config.model}", *judge.notes]
    lines += [_trajectory(reference, judge.theirs), ""]
    if findings:
        lines += ["each step replayed from the trace's own values:", shares(findings), ""]
    lines += [covered.sentence]
    for title, groups in (("not judged", covered.not_judged), ("by the weaker bound", covered.weakly)):
        lines += [f"  {title}: {group}" for group in groups[:GROUPS]]
        if len(groups) > GROUPS:
            rest = groups[GROUPS:]
            lines.append(f"  {title}: {sum(group.tensors for group in rest)} more tensors for other reasons (see --json)")
    first = next((finding for finding in findings if finding.departs), None)
    if first is not None:
        return "\n".join([*lines, *_departure(first, findings, reasons, judge)])
    if not findings:
        return "\n".join([*lines, "PARTLY JUDGED: nothing could be judged"])
    worst = max(findings, key=lambda f: f.error)
    near = f"closest to its bound is {worst.where}, at {worst.error:.2f} of it"
    if covered.complete:
        return "\n".join([*lines, f"AGREES: {near}"])
    what = [f"{covered.tensors - covered.judged} tensors were not judged"] if covered.not_judged else []
    weakly = sum(group.tensors for group in covered.weakly)
    what += [f"{weakly} were judged only by the weaker bound, which misses some known mistakes"] if weakly else []
    return "\n".join([*lines, f"PARTLY JUDGED: nothing departs, but {' and '.join(what)}; {near}"])


def _departure(first: Finding, findings: Sequence[Finding], reasons: Sequence[str], judge: Judge) -> list[str]:
    """Return lines on the first tensor that departs, the other points that depart in that step, and what explains it."""
    note = f"; {first.note}" if first.note else ""
    later = dict.fromkeys(f.point for f in findings if f.departs and f.step == first.step)
    lines = [
        f"DEPARTS first at {first.where}: {first.error:.3g} times its bound, at most {first.ulps:.3g} ulps "
        f"(of the largest element), {first.identical:.1%} of {first.elements} elements identical{note}",
        f"outside their bounds in that step: {', '.join(later)}",
    ]
    ours, theirs = (fmt_in(trace, first) for trace in (judge.ours, judge.theirs))
    if theirs in FORMATS and FORMATS[theirs].bits <= 16 and FORMATS.get(ours, FORMATS[theirs]).bits > 16:
        lines.append(f"the trace holds it in {theirs}, refimpl in {ours}: did the recorder round it?")
    lines += under_another_name(first, judge)
    for name in reasons:
        if name in MISTAKES:
            lines.append(f"explained by --mistake {name}: {MISTAKES[name].what}")
        else:
            lines.append(f"explained by {name}: if that is intended, it is not a mistake; record the reference with that flag")
    return lines if reasons else [*lines, "none of the known mistakes (python scripts/mistakes.py) explains it"]


def under_another_name(finding: Finding, judge: Judge) -> list[str]:
    """Return a sentence if another name of the same point holds a departing tensor's values, or the expected ones; else [].

    Tensors whose values are all equal, as biases are at first, are not considered.
    """
    step, point, here = finding.step, finding.point, finding.name
    theirs, ours = (trace.get(step, point, here) for trace in (judge.theirs, judge.ours))
    if not here or theirs is None or ours is None:
        return []
    others = {name: fp64(x) for name, x in judge.theirs.at(step, point).items() if name != here and np.ptp(fp64(x)) != 0}
    for name, x in others.items():
        if np.array_equal(x, fp64(theirs)):
            return [f"it has exactly the values of {point} of {name}: was one tensor recorded under both names?"]
        if np.array_equal(x, fp64(ours)):
            return [f"the expected values are recorded as {point} of {name}: are the names mixed up?"]
    return []


def fmt_in(trace: Trace, finding: Finding) -> str:
    """Return the format of a tensor in a trace; '' for integers and for a tensor that it does not hold."""
    array = trace.get(finding.step, finding.point, finding.name)
    return format_of(array) if array is not None and is_float(array) else ""


def _trajectory(a: Trace, b: Trace) -> str:
    """Return a table of the losses, loss scales and skipped steps that the two traces hold."""

    def cell(trace: Trace, step: int, point: str) -> str:
        x = trace.get(step, point)
        return "-" if x is None else f"{float(x):.6g}"

    header = ["step", "loss", "theirs", "scale", "theirs", "skipped", "theirs"]
    points = ("2.loss", "2.loss_scale", "3.found_inf")
    rows = [[str(step), *(cell(t, step, p) for p in points for t in (a, b))] for step in sorted({*a.steps, *b.steps})]
    return table(header, rows)


def shares(findings: Sequence[Finding]) -> str:
    """Return a table with one line per point: tensors, share of identical elements, and the finding closest to its bound."""
    rows = []
    for point in POINTS:
        here = [f for f in findings if f.point == point]
        if here:
            elements = sum(f.elements for f in here)
            same = sum(f.identical * f.elements for f in here) / max(1, elements)
            worst = max(here, key=lambda f: np.nan_to_num(f.error, nan=np.inf))
            weak = sum(bool(f.weak) for f in here)
            rows.append([point, str(len(here)), str(weak or ""), f"{same:.3%}", f"{worst.error:.3g}", worst.name])
    return table(["point", "tensors", "weakly", "identical", "of bound", "in"], rows)
