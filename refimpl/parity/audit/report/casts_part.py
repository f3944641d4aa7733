"""What conversions did, as a section of the page: from the data of `Conversions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refimpl.parity.audit.report import wording
from refimpl.training.html.page import paragraphs, table

HEADS = (
    "kind", "operation", "formats", "phase", "calls", "elements", "exact", "rounded", "ties", "subnormal", "flushed",
    "overflowed", "saturated", "Inf, NaN before", "room", "SNR",
)  # fmt: skip
EXPLAINED = """\
Of the values that a conversion reads, shares are of those that are finite and not zero. Exact: nothing was lost. Subnormal: \
stored with fewer bits. Flushed: became zero. Overflowed: became infinite. Room: the largest power of two by which the \
largest value could be multiplied and still be finite. An operation other than a cast rounds its exact result to a narrower \
format, or to FP16."""
GRADIENTS = """\
What other loss scales would do to the FP16 gradients of the audited steps: the share that would become zero, and how many \
modules have a gradient that would overflow."""
TIGHT = 10
"""How many modules with the least room are listed."""
MOST_ROWS = 400
"""How many rows by module are on the page; audit.json has all."""


def casts_section(casts: Mapping[str, Any]) -> list[str]:
    """Return the parts of the section."""
    if not casts["totals"]:
        return [paragraphs(["No value was converted to another format."])]
    totals = [_row(row["kind"], row) for row in casts["totals"]]
    parts = [paragraphs([EXPLAINED]), table("All conversions", HEADS, totals, sortable=True)]
    if casts["loss_scales"]:
        parts += _loss_scales(casts)
    if casts["rooms"]:
        rows = [
            [wording.module_of(room["module"]) or "(no module)", room["phase"], room["format"], wording.ratio(room["largest"]),
             str(room["room"])]
            for room in casts["rooms"][:TIGHT]
        ]  # fmt: skip
        parts.append("<h3>Least room before overflow</h3>\n")
        parts.append(table("Least room", ("module", "phase", "format", "largest", "room"), rows))
    if casts["uncounted"]:
        formats = ", ".join(f"{wording.amount(n)} from or to {fmt}" for fmt, n in casts["uncounted"].items())
        parts.append(paragraphs([f"Not counted, for formats that refimpl does not know: {formats}."]))
    return [*parts, _by_module(casts["rows"])]


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    """Return one row; name: what stands in its first column."""
    shares = [wording.share(row["shares"][key]) for key in ("exact", "rounded", "tie", "subnormal", "flushed")]
    counts = [f"{row[key]:,}" for key in ("overflowed", "saturated", "arrived")]
    noise = row.get("snr_db")
    operation = row["operation"] if row["operation"] == "cast" else wording.short_name(row["operation"])
    return [
        name, operation + " (sample)" * row["sampled"] + _integers(row), f"{row['source']} -> {row['target']}", row["phase"],
        f"{row['calls']:,}", wording.amount(row["elements"]), *shares, *counts,
        "-" if row["room"] is None else str(row["room"]),
        f"{noise:.0f} dB" if isinstance(noise, int | float) else "-",
    ]  # fmt: skip


def _integers(row: Mapping[str, Any]) -> str:
    if row["integers"] is None:
        return ""
    before, after = row["integers"]
    return f", {before:,} integers became {after:,}"


def _loss_scales(casts: Mapping[str, Any]) -> list[str]:
    rows = [
        [f"2^{effect['exponent']}", wording.share(effect["flushed"]), str(len(effect["overflowing"]))]
        for effect in casts["loss_scales"]
    ]
    return [
        "<h3>Loss scales</h3>\n",
        paragraphs([casts["advice"][:1].upper() + casts["advice"][1:] + ".", GRADIENTS]),
        table("Loss scales", ("loss scale", "would become zero", "modules that would overflow"), rows),
    ]


def _by_module(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the conversions by module, those that lost the most first."""
    worst = sorted(rows, key=lambda row: (-row["overflowed"], -row["shares"]["flushed"], -row["shares"]["subnormal"]))
    shown = [[wording.module_of(row["module"]) or "(no module)", *_row(row["kind"], row)] for row in worst]
    heads = ("module", *HEADS)
    count = f"All {len(rows)}" if len(rows) <= MOST_ROWS else f"The {MOST_ROWS} worst of {len(rows)}"
    whole = table("Conversions by module", heads, shown[:MOST_ROWS], sortable=True)
    return f"<details>\n<summary>{count} conversions by module</summary>\n{whole}</details>\n"
