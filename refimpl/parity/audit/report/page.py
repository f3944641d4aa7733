"""The report of an audit as one HTML file, from the data of audit.json; it needs no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.report import wording
from refimpl.parity.audit.report.casts_part import casts_section
from refimpl.parity.audit.report.recipe_part import recipe_section
from refimpl.parity.audit.verdict import LEVELS
from refimpl.training.html.made import Made
from refimpl.training.html.page import Section, document, paragraphs, section, table, text

CSS = """
:root { --wrong: #b3261e; --worse: #a85a00; --biased: #7a4d9e; --note: #5a5a5a }
@media (prefers-color-scheme: dark) {
  :root { --wrong: #ff8a80; --worse: #ffb74d; --biased: #ce9ff0; --note: #a8a8a8 }
}
article { border: 1px solid var(--line); border-left: .35rem solid var(--note); border-radius: 6px; max-width: 60rem }
article { padding: .7rem .9rem; margin: 1rem 0; overflow-wrap: anywhere }
article p { margin: .4rem 0 }
article p.where { color: var(--soft); font-size: .9rem }
article b.level { color: var(--note) }
article.wrong { border-left-color: var(--wrong) }
article.worse { border-left-color: var(--worse) }
article.biased { border-left-color: var(--biased) }
.wrong b.level { color: var(--wrong) }
.worse b.level { color: var(--worse) }
.biased b.level { color: var(--biased) }
"""
REPLAY = "Its operands are kept: python scripts/audit.py --replay audit.json judges this operation once more."
WORST = 30
"""How many kinds of operations the first table has; the second one has all."""


def audit_page(data: Mapping[str, Any]) -> str:
    """Return the page. The same data give the same text."""
    training = data["training"]
    sections = [
        _findings(data),
        *([section("Recipe", *recipe_section(data["recipe"]))] if data["recipe"] is not None else []),
        section("Operations", *_operations(data["operations"])),
        section("Casts", *casts_section(data["casts"])),
        section("Coverage", *_coverage(data["coverage"])),
        section("Flags in force", *_flags(data)),
        *([section("What failed in the audit itself", *_failures(data["failures"]))] if data["failures"] else []),
    ]
    start = paragraphs([wording.training_line(training) + ".", wording.program_sentence(training)])
    return document(f"Audit: {training['model']}", sections, Made(**data["made"]), start, CSS)


def _findings(data: Mapping[str, Any]) -> Section:
    serious = [found for found in data["findings"] if is_serious(found["level"])]
    notes = [found for found in data["findings"] if not is_serious(found["level"])]
    said = [wording.verdict_sentence(data) + ("." if serious else " Coverage, below, says over what.")]
    said += filter(None, [wording.unended_sentence(data["training"])])
    parts = [paragraphs(said), *map(_article, serious)]
    if notes:
        parts += ["<h3>Notes</h3>\n", *map(_article, notes)]
    return section("Findings", *parts)


def _article(found: Mapping[str, Any]) -> str:
    """Return one finding."""
    lines = [("", found["number"]), ("Effect: ", found["effect"]), ("Fix: ", found["fix"])]
    body = "".join(f"<p><b>{head}</b>{text(words)}</p>\n" for head, words in lines if words)
    more = [
        ("Modules", found["modules"], found["modules_count"]),
        ("Parameters", found["parameters"], found["parameters_count"]),
    ]
    for head, names, count in more:
        if count > 1:
            named = ", ".join(wording.module_of(name) for name in names) + (", ..." if count > len(names) else "")
            body += f"<details>\n<summary>{head}: {count}</summary>\n<p>{text(named)}</p>\n</details>\n"
    if found["replay"]:
        body += f"<p class=\"where\">{text(REPLAY)}</p>\n"
    where = wording.seen({**found, "line": wording.place(found["line"], 3)})
    return (
        f'<article class="{found["level"].split()[0]}">\n<h3>{text(found["code"] + " " + found["name"])}</h3>\n'
        f'<p class="where"><b class="level">{text(found["level"])}</b>, {text(where)}</p>\n{body}</article>\n'
    )


OPERATIONS = """\
Each result of an operation is compared with the same operation in FP64 on the same inputs. Error / bound above 1 is \
proved wrong: the bound is what correct FP32 sums and one rounding to the format of the result can do at most. Correctly \
rounded is the share of results that are the nearest number of their format to the FP64 result, and in parentheses the \
share that FP32 sums leave. Excess is the mean of the difference from it, in units in the last place. Bits are the \
effective bits of a product: 21 to 22 in FP32, 11 with TF32, 8 with one BF16 product."""


def _operations(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return [paragraphs(["No operation was judged."])]
    heads = (
        "operation", "verdict", "formats", "phase", "error / bound", "correctly rounded", "excess", "bits", "results",
        "elements", "compared", "definition", "worst at",
    )  # fmt: skip

    def of(caption: str, chosen: Sequence[Mapping[str, Any]]) -> str:
        return table(caption, heads, [_operation(row) for row in chosen], sentences=True, sortable=True, ranks=LEVELS)

    parts = [paragraphs([OPERATIONS]), of("The worst operations", rows[:WORST])]
    if len(rows) > WORST:
        every = of("All operations", rows)
        parts.append(f"<details>\n<summary>All {len(rows)} kinds of operations</summary>\n{every}</details>\n")
    return parts


def _operation(row: Mapping[str, Any]) -> list[str]:
    """Return one row of the table of operations."""
    expected = row["expected_correctly_rounded"]
    equal = wording.share(row["correctly_rounded"]) + (f" ({wording.share(expected)})" if expected is not None else "")
    note = f" ({row['note']})" if row["note"] not in ("", row["reason"]) else ""
    verdict = ": ".join(filter(None, (row["level"], row["reason"]))) + note
    worst = row["worst"]
    where = ", ".join(filter(None, (f"step {worst['step']}", wording.module_of(worst["module"]), wording.place(worst["line"]))))
    bits = "-" if row["effective_bits"] is None else f"{row['effective_bits']:.1f}"
    return [
        wording.short_name(row["operation"]), verdict, wording.formats(row), row["phase"],
        wording.ratio(row["error_over_bound"]), equal, wording.ratio(row["excess_ulp"]), bits,
        f"{row['results']:,}", wording.amount(row["elements"]),
        wording.share(row["checked"] / row["elements"] if row["elements"] else None), ", ".join(row["definition"]), where,
    ]  # fmt: skip


def _coverage(coverage: Mapping[str, Any]) -> list[str]:
    if not coverage["elements"]:
        return [paragraphs(["No result in floating point was seen."])]
    said = (
        f"{wording.share(coverage['share'])} of {wording.amount(coverage['elements'])} elements of results in floating point "
        f"were judged. Views, allocations and random numbers compute nothing, and do not count. Nothing that was not judged is "
        f"called good."
    )
    rows = [
        [each["reason"], wording.share(each["elements"] / coverage["elements"]), wording.amount(each["elements"])]
        for each in coverage["unjudged"]
    ]
    return [paragraphs([said]), table("Not judged", ("reason", "share", "elements"), rows) if rows else ""]


def _flags(data: Mapping[str, Any]) -> list[str]:
    rows = [[flag["name"], flag["meaning"], str(flag["value"])] for flag in data["flags"]]
    ran = ", ".join(f"{name} {value}" for name, value in data["versions"].items())
    return [
        paragraphs([f"Ran on {ran}."]),
        table("Flags", ("flag", "meaning", "value"), rows, sentences=True) if rows else "",
    ]


def _failures(failures: Sequence[Mapping[str, Any]]) -> list[str]:
    said = "Exceptions in the audit do not reach the training. What they kept it from examining is not judged."
    return [paragraphs([said]), table("Failures", ("exception", "times"), [[f["text"], f"{f['count']:,}"] for f in failures])]
