"""Verdicts as columns of numbers: what each tensor loses, and which loss scales would save it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refimpl.numerics.rounding_effects import NEGLIGIBLE, Counts
from refimpl.numerics.rounding_words import decibels, percent, power
from refimpl.tools.precision_report.collect import Inspection
from refimpl.tools.precision_report.verdicts import Verdict

ORDER = """\
The order: first the tensors of which values overflowed; then those whose values arrived as Inf or NaN; then by a share of the \
nonzero values, the largest of those that became zero, that saturated, and that would have become zero at S = 1. The \
signal-to-noise ratio counts only below what normal values keep in the format at the least, and for a hundredth. 'loses by' \
says what decided. A click on a heading sorts by that column."""


@dataclass(frozen=True)
class VerdictColumn:
    """One column: its heading, and the text of a cell from the counts and, for 16-bit gradients, those divided by S."""

    heading: str
    cell: Callable[[Counts, Counts | None], str]


def _of_run(name: str) -> Callable[[Counts, Counts | None], str]:
    return lambda counts, _: percent(counts.share(name))


def _number(name: str) -> Callable[[Counts, Counts | None], str]:
    return lambda counts, _: f"{getattr(counts, name):,}"


def _zero_at_one(counts: Counts, unscaled: Counts | None) -> str:
    return "-" if unscaled is None or not counts.nonzero else percent(unscaled.flushed_at(0, counts.fmt))


def _scale_needed(counts: Counts, unscaled: Counts | None) -> str:
    if unscaled is None or not counts.nonzero:
        return "-"
    if unscaled.flushed_at(0, counts.fmt) < NEGLIGIBLE:
        return "1"
    enough, top = unscaled.saving_scales(counts.fmt)
    return power(2.0**enough) if enough <= top else "none"


def _overflows_above(counts: Counts, unscaled: Counts | None) -> str:
    if unscaled is None or not counts.nonzero:
        return "-"
    top = unscaled.saving_scales(counts.fmt)[1]
    return power(2.0**top) if top >= 0 else "<1"


VERDICT_COLUMNS = (
    VerdictColumn("zero at S = 1", _zero_at_one),
    VerdictColumn("S needed", _scale_needed),
    VerdictColumn("overflows above S", _overflows_above),
    VerdictColumn("became zero", _of_run("flushed")),
    VerdictColumn("subnormal", _of_run("subnormal")),
    VerdictColumn("saturated", _of_run("saturated")),
    VerdictColumn("overflowed", _number("overflowed")),
    VerdictColumn("arrived", _number("arrived")),
    VerdictColumn("SNR", lambda counts, _: decibels(counts.snr)),
)
"""S needed: the smallest that saves all but NEGLIGIBLE without overflow. became zero and the columns after it: in this run."""


def verdict_table(inspection: Inspection, ranked: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: the tensor, what it loses by, and the columns in which any of the tensors has something."""
    counts = [(inspection.sites[v.site], inspection.unscaled.get(v.site)) for v in ranked]
    columns = [(column.heading, [column.cell(*each) for each in counts]) for column in VERDICT_COLUMNS]
    columns = [(heading, cells) for heading, cells in columns if any(cell not in ("-", "0", "0 %") for cell in cells)]
    rows = [
        [v.name, v.reason, *(cells[i] for _, cells in columns), v.kind, inspection.sites[v.site].fmt, v.site.partition(":")[2]]
        for i, v in enumerate(ranked)
    ]
    return ["tensor", "loses by", *(heading for heading, _ in columns), "kind", "format", "cast"], rows
