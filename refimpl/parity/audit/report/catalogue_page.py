"""The catalogue of rules as a page of docs/, from their docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from refimpl.parity.audit.rules.entry import Rule
from refimpl.parity.audit.rules.table import KNOWN_MISTAKES, RULES

GROUPS = {
    "A": "Weights, the optimizer and its states",
    "B": "Loss scale, unscaling, clipping",
    "C": "Sums of gradients",
    "D": "Single operations",
}
LABEL = re.compile(r"^(Seen|Number|Not reported|Not judged|Guard|Effect|Fix|Level|Source|Limits): ", re.MULTILINE)
"""What begins a paragraph of its own in the docstring of a rule."""
START = """\
# What the audit looks for

`python scripts/audit.py --catalogue` writes this page, from the docstrings of the rules in
[`parity/audit/rules/`](../refimpl/parity/audit/rules/__init__.py). [audit.md](audit.md) says how to read a finding.
Where `--mistake` is named, `python scripts/train.py --mistake NAME` makes the same mistake in refimpl's own training, and the
judge of [traces](traces.md) finds it too.
"""


def catalogue() -> str:
    """Return the page."""
    parts = [START]
    for letter, title in GROUPS.items():
        rules = sorted((rule for rule in RULES.values() if rule.code[0] == letter), key=lambda rule: int(rule.code[1:]))
        if rules:
            parts += [f"## {letter}. {title}\n", *map(_entry, rules)]
    return "\n".join(parts)


def _entry(rule: Rule) -> str:
    """Return one rule's entry: the first sentence of its docstring, and the other paragraphs as a list."""
    first, _, rest = rule.text.partition("\n\n")
    more = " Finding it takes two audited steps, or two micro-batches in one step." if rule.steps > 1 else ""
    lines = [f"### {rule.code} {rule.name}", "", _markdown(first) + more, "", *_paragraphs(rest)]
    if rule.code in KNOWN_MISTAKES:
        lines.append(f"- **In refimpl:** {', '.join(f'`--mistake {name}`' for name in KNOWN_MISTAKES[rule.code])}.")
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring as lines of a list. A label at the beginning of a line begins one, too."""
    for part in LABEL.sub(r"\n\n\1: ", text).split("\n\n"):
        if part.strip():
            yield "- " + LABEL.sub(r"**\1:** ", _markdown(part))


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("*", r"\*").replace("<", "&lt;")
