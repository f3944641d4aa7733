"""Coverage of a verdict: which tensors of a trace were judged, which were not, and why.

    AGREES          every tensor of the trace but its inputs was judged and is within its bound
    DEPARTS         a tensor is outside its bound
    PARTLY JUDGED   no tensor is outside its bound, but some were not judged, or only by the weaker bound

Inputs are the states of step 0, tokens and targets. A replay starts from them, so they are not judged but counted apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.parity.findings import Finding
from refimpl.parity.trace import BATCH, BY_PARAMETER, BY_PLACE, POINTS, Trace, key, parse_key

EXIT_CODES = {"AGREES": 0, "DEPARTS": 1, "PARTLY JUDGED": 3}
"""Verdict -> exit code of `scripts/trace.py diff`; 2 is bad usage."""


@dataclass(frozen=True)
class Group:
    """Tensors of one point that share a reason, and the steps in which it applies."""

    point: str
    steps: tuple[int, ...]
    names: tuple[str, ...]
    tensors: int
    values: int
    reason: str

    def __str__(self) -> str:
        """Return 'steps 2 to 4, 3.unscaled of 12 parameters: ...'."""
        return f"{steps_in_words(self.steps)}, {self.point}{_names(self.point, self.names)}: {self.reason}"


@dataclass(frozen=True)
class Coverage:
    """How much of a trace was judged. `values` count the elements of tensors."""

    judged: int
    tensors: int
    judged_values: int
    values: int
    inputs: int
    not_judged: Sequence[Group]
    weakly: Sequence[Group]

    @property
    def complete(self) -> bool:
        """Return whether every tensor was judged, none by the weaker bound."""
        return not self.not_judged and not self.weakly

    @property
    def sentence(self) -> str:
        """Return 'judged 896 of 896 tensors, 100 % of the values'."""
        share = _percent(self.judged_values, self.values)
        inputs = f"; {self.inputs} more are inputs" if self.inputs else ""
        return f"judged {self.judged} of {self.tensors} tensors, {share} of the values{inputs}"

    def as_data(self) -> dict[str, Any]:
        """Return the coverage as `--json` writes it."""
        groups = {"not_judged": self.not_judged, "judged_by_the_weaker_bound": self.weakly}
        counts = {"judged": self.judged, "tensors": self.tensors, "judged_values": self.judged_values, "values": self.values}
        return {**counts, "inputs": self.inputs, **{name: [vars(group) for group in part] for name, part in groups.items()}}


def coverage_of(
    trace: Trace, findings: Iterable[Finding], reasons: Mapping[str, str], given: Collection[str] = ()
) -> Coverage:
    """Return which tensors of a trace were judged.

    reasons: name of a tensor -> why it was not judged. given: further points that are inputs.
    """
    found = {key(f.step, f.point, f.name): f for f in findings}
    own = {name: x.size for name, x in trace.tensors.items() if not is_input(name) and parse_key(name)[1] not in given}
    missed = [name for name in own if name not in found]
    weak = {name: f"{found[name].weak}: judged by the weaker bound" for name in own if name in found and found[name].weak}
    why = {name: reasons.get(name, "refimpl has no such tensor in this run") for name in missed}
    return Coverage(
        len(own) - len(missed), len(own), sum(own.values()) - sum(own[name] for name in missed), sum(own.values()),
        len(trace.tensors) - len(own), _groups(why, own), _groups(weak, own),
    )  # fmt: skip


def verdict(findings: Iterable[Finding], covered: Coverage) -> str:
    """Return the verdict: a key of EXIT_CODES."""
    if any(finding.departs for finding in findings):
        return "DEPARTS"
    return "AGREES" if covered.complete else "PARTLY JUDGED"


def is_input(name: str) -> bool:
    """Return whether a replay starts from a tensor."""
    step, point, _ = parse_key(name)
    return step == 0 or point in BATCH


def _groups(reasons: Mapping[str, str], sizes: Mapping[str, int]) -> list[Group]:
    """Return tensors grouped by point and reason, in the order of points."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault((parse_key(name)[1], reason), []).append(name)
    groups = []
    for (point, reason), members in by_reason.items():
        parsed = [parse_key(name) for name in members]
        steps, names = sorted({step for step, _, _ in parsed}), dict.fromkeys(name for _, _, name in parsed)
        groups.append(Group(point, tuple(steps), tuple(names), len(members), sum(sizes[name] for name in members), reason))
    return sorted(groups, key=lambda group: list(POINTS).index(group.point))


def steps_in_words(steps: Sequence[int]) -> str:
    """Return steps in words: 'step 2', 'steps 1 to 4', 'steps 1, 3'."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if list(steps) == list(range(steps[0], steps[-1] + 1)):
        return f"steps {steps[0]} to {steps[-1]}"
    return f"steps {', '.join(map(str, steps))}"


def _names(point: str, names: Collection[str]) -> str:
    """Return ' of transformer.wte.weight', ' of 12 parameters', or '' for a point that has one tensor."""
    if point not in BY_PARAMETER and point not in BY_PLACE:
        return ""
    if len(names) == 1:
        return f" of {next(iter(names))}"
    return f" of {len(names)} {'parameters' if point in BY_PARAMETER else 'operations'}"


def _percent(part: int, whole: int) -> str:
    """Return a percentage with one decimal; '100 %' only of all and '0 %' only of none."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"
