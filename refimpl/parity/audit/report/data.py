"""What an audit found, as plain data: the content of audit.json. docs/audit.md describes every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from refimpl.parity.audit.borders import compiled_frames, compiled_parts
from refimpl.parity.audit.finding import Finding, is_serious
from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.report.flags import versions
from refimpl.parity.audit.report.operands import Kept
from refimpl.parity.audit.report.operation_table import Kind
from refimpl.parity.audit.report.wording import whole_steps
from refimpl.parity.audit.verdict import LEVELS
from refimpl.training.html.made import made_now
from refimpl.training.program import command_line

if TYPE_CHECKING:
    from refimpl.parity.audit.session import Audit

VERSION = 1
"""Of the data: keys may be added to it without a new version, but none removed or given another meaning."""
MOST_MODULES = 50
"""How many modules and parameters of a finding are listed."""


def contents(audit: Audit) -> dict[str, Any]:
    """Return what an audit has found so far."""
    recipe = audit.recipe()
    replays = kept_operations(audit)
    names = {key: name for name, (_, keys) in replays.items() for key in keys}
    ranked = sorted(audit.findings.values(), key=lambda found: (LEVELS.index(found.level), found.step, found.code))
    training = _training(audit)
    return {
        "refimpl-audit": VERSION,
        "verdict": _verdict(ranked, training),
        "training": training,
        "findings": [{**_finding(found), "replay": names.get(found.code)} for found in ranked],
        "coverage": _coverage(audit.judge),
        "operations": [{**row, "replay": names.get(kind)} for kind, row in audit.table.data()],
        "recipe": recipe.data() if recipe is not None else None,
        "casts": audit.conversions.data(),
        "flags": audit.flags,
        "versions": versions(),
        "made": asdict(made_now(command_line(), "numpy", "torch")),
        "replays": [kept.data(name) for name, (kept, _) in replays.items()],
        "failures": [{"text": text, "count": count} for text, count in audit.failures.most_common()],
    }


def kept_operations(audit: Audit) -> dict[str, tuple[Kept, list[str | Kind]]]:
    """Return the operations that were kept, by a name of their own, with the codes and the kinds of operations they are of."""
    found: dict[int, tuple[Kept, list[str | Kind]]] = {}
    keys: list[tuple[str | Kind, Kept]] = [*audit.operands.of_findings.items(), *audit.operands.worst.items()]
    for key, kept in keys:
        found.setdefault(id(kept), (kept, []))[1].append(key)
    return {f"r{i}": each for i, each in enumerate(found.values())}


def _training(audit: Audit) -> dict[str, Any]:
    """Return what was audited: the objects, the steps, and which program ran."""
    parameters = list(audit.model.parameters())
    formats: Counter[str] = Counter()
    for p in parameters:
        formats[str(p.dtype).removeprefix("torch.")] += p.numel()
    compiled = sorted(compiled_parts(audit.model))
    scaler = audit.scaler is not None and audit.scaler.is_enabled()
    return {
        "model": type(audit.model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "formats": dict(formats),
        "optimizers": [type(o).__name__ for o in audit.optimizers],
        "scaler": type(audit.scaler).__name__ if scaler else None,
        "schedulers": [type(s).__name__ for s in audit.schedulers],
        "steps": audit.number + bool(audit.unended),
        "audited": list(audit.audited),
        "unended": audit.unended,
        "compiled": compiled,
        "compiled_frames": compiled_frames(),
    }


def _verdict(findings: Iterable[Finding], training: Mapping[str, Any]) -> str:
    """Return the verdict; where nothing was found, whether all rules were asked."""
    if any(is_serious(found.level) for found in findings):
        return "findings"
    if not training["audited"]:
        return "nothing audited"
    return "nothing above note" if whole_steps(training) else "no step ended"


def _finding(found: Finding) -> dict[str, Any]:
    data = asdict(found)
    for key in ("modules", "parameters"):
        data[key] = list(data[key][:MOST_MODULES])
    return {**data, "modules_count": len(found.modules), "parameters_count": len(found.parameters)}


def _coverage(judge: Judge) -> dict[str, Any]:
    """Return how many elements of results in floating point were judged, and why others were not."""
    total = judge.judged + judge.unjudged.total()
    return {
        "elements": total,
        "judged": judge.judged,
        "share": judge.judged / total if total else None,
        "unjudged": [{"reason": reason, "elements": n} for reason, n in judge.unjudged.most_common()],
    }
