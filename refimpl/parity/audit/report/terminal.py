"""The summary of an audit for the terminal: at most 40 lines of 80 columns, findings first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.report import wording

COLUMNS, LINES = 80, 40


def summary(data: Mapping[str, Any], page: str) -> list[str]:
    """Return the lines. data: as in audit.json. page: the path of the HTML page, '' without one."""
    before = _wrapped("refimpl audit: " + wording.training_line(data["training"]), 2, most=3)
    after = [*_rest(data), *(_wrapped(f"all of it: {page}", 2, most=2) if page else ())]
    findings = list(_findings(data, LINES - len(before) - len(after) - 2))
    return [*before, "", *findings, "", *after][:LINES]


def _findings(data: Mapping[str, Any], room: int) -> Iterator[str]:
    """Yield the verdict, as many findings as there is room for, the others by code, and the notes by name."""
    serious = [found for found in data["findings"] if is_serious(found["level"])]
    notes = [found for found in data["findings"] if not is_serious(found["level"])]
    last = _wrapped("notes: " + "; ".join(f"{n['code']} {n['name']}" for n in notes), 2, most=2) if notes else []
    verdict = _wrapped(wording.verdict_sentence(data), 2, most=3)
    yield from verdict
    room -= len(verdict) + len(last)
    for i, found in enumerate(serious):
        lines = _finding(found)
        left = serious[i + 1 :]
        if len(lines) + bool(left) > room:
            others = serious[i:]
            yield from _wrapped(f"and {len(others)} more: " + ", ".join(f"{o['code']} {o['name']}" for o in others), 2, most=1)
            break
        room -= len(lines)
        yield from lines
    yield from last


def _finding(found: Mapping[str, Any]) -> list[str]:
    head = _wrapped(f"{found['code']} {found['name']}: {found['level']}, {wording.seen(found)}", 2, most=2)
    rest = [*_wrapped(found["number"], 5, most=3, first=5), *_wrapped("fix: " + found["fix"], 5, most=2, first=5)]
    return head + rest


def _rest(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines on operations, coverage, flags and what failed."""
    if data["recipe"] is not None:
        yield from _wrapped(f"recipe: {data['recipe']['sentence']}", 2, most=3)
    rows = data["operations"]
    bad = [row for row in rows if is_serious(row["level"])]
    if rows:
        yield from _wrapped(f"operations: {len(rows)} kinds, {len(bad)} of them worse than correct FP32 arithmetic", 2, most=1)
    for row in bad[:3]:
        name, where = wording.short_name(row["operation"]), wording.module_of(row["worst"]["module"])
        yield from _wrapped(f"{name} ({wording.formats(row)}) {row['phase']} {where}: {row['level']}, {row['reason']}", 5, 2, 2)
    casts = data["casts"]
    if casts["advice"]:
        yield from _wrapped(f"FP16 gradients: {casts['advice']}", 2, most=2)
    if casts["rooms"] and casts["rooms"][0]["room"] <= LITTLE_ROOM:
        least = casts["rooms"][0]
        where = wording.module_of(least["module"]) or "no module"
        largest = f"least room before overflow: 2^{least['room']}, {wording.ratio(least['largest'])} in {least['format']}"
        yield from _wrapped(f"{largest}, {least['phase']} of {where}", 2, most=2)
    yield from _wrapped(_covered(data["coverage"]), 2, most=3)
    for sentence in (wording.unended_sentence(data["training"]),):
        yield from _wrapped(sentence, 2, most=3) if sentence else ()
    if data["training"]["compiled"] or data["training"]["compiled_frames"]:
        yield from _wrapped(wording.program_sentence(data["training"]), 2, most=3)
    values = {flag["name"].removeprefix("torch.").removeprefix("backends."): flag["value"] for flag in data["flags"]}
    shown = [f"{name} {values[name]}" for name in SHOWN if name in values]
    yield from _wrapped("flags: " + ", ".join(shown), 2, most=2) if shown else ()
    if data["failures"]:
        n = sum(failure["count"] for failure in data["failures"])
        times = f"{n} times" if n > 1 else "once"
        yield from _wrapped(
            f"the audit itself failed {times}, and the training continued: {data['failures'][0]['text']}", 2, 2
        )


LITTLE_ROOM = 8
"""Powers of two below overflow that are worth a line."""
SHOWN = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32", "get_float32_matmul_precision", "get_default_dtype")
"""The flags in the summary; the page has all."""


def _covered(coverage: Mapping[str, Any]) -> str:
    if not coverage["elements"]:
        return "coverage: no result in floating point was seen"
    text = f"coverage: {wording.share(coverage['share'])} of {wording.amount(coverage['elements'])} float elements judged"
    reasons = [
        f"{wording.share(each['elements'] / coverage['elements'])} {each['reason']}" for each in coverage["unjudged"][:3]
    ]
    return text + ("; not judged: " + "; ".join(reasons) if reasons else "")


def _wrapped(text: str, indent: int, most: int, first: int = 0) -> list[str]:
    """Return a text as lines; first, indent: spaces before the first one and the others. What is beyond `most` lines is cut."""
    return textwrap.wrap(
        " ".join(text.split()), COLUMNS, initial_indent=" " * first, subsequent_indent=" " * indent, max_lines=most,
        placeholder=" ...", break_on_hyphens=False,
    )  # fmt: skip
