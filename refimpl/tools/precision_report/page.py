"""The precision report as one HTML file, which needs no network and no other file. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from refimpl.tools.precision_report.collect import Inspection
from refimpl.tools.precision_report.counts import kind_of
from refimpl.tools.precision_report.figures import all_pictures
from refimpl.tools.precision_report.layer_tables import layer_parts
from refimpl.tools.precision_report.sweep_figures import sweep_text
from refimpl.tools.precision_report.tables import (
    COLUMNS,
    OTHER_COLUMNS,
    Compared,
    other_formats_by_kind,
    other_formats_of,
    summary,
    totals,
    worst_sentence,
)
from refimpl.tools.precision_report.update_figures import update_texts
from refimpl.tools.precision_report.verdict_columns import ORDER, verdict_table
from refimpl.tools.precision_report.verdicts import Verdict, verdicts_of
from refimpl.training.html.figures import Picture
from refimpl.training.html.made import Made
from refimpl.training.html.page import document, figures, paragraphs, section, table

WORST = 20
"""The number of tensors with a verdict on the page."""


def precision_page(inspection: Inspection, made: Made) -> str:
    """Return the page. The same arguments give the same text."""
    pictures, ranked = all_pictures(inspection), verdicts_of(inspection)
    sections = [
        section("What it found", paragraphs(summary(inspection)), _kinds(inspection)),
        section("Exponents", paragraphs([EXPONENTS if pictures["exponents"] else NO_CASTS]), figures(pictures["exponents"])),
        section("Loss scales", paragraphs([sweep_text(inspection)]), figures(pictures["sweep"])),
        section("The run", figures(pictures["run"])),
        section("Updates", paragraphs(update_texts(inspection)), figures(pictures["updates"])),
        *([section("Layers", *_layers(inspection, pictures["layers"]))] if inspection.layers else []),
        section("Tensors", *_tensors(inspection, ranked)),
        *([section("Other formats", *_other_formats(inspection, ranked))] if inspection.what_if else []),
        section("Explanation of the columns, and configuration", *_reading(inspection)),
    ]
    config = inspection.config
    mistake = "" if config.mistake == "none" else f", with the MISTAKE {config.mistake}"
    title = f"Precision report: {config.model}, {config.recipe}{mistake}"
    return document(title, sections, made)


# -- texts -------------------------------------------------------------------------------------------------------------

NO_CASTS = "This recipe casts no tensor to a narrower format, so there is nothing to show."
EXPONENTS = """\
The number of values per binade, from 2^e to 2^(e+1), before rounding, over all casts of that kind at all inspected steps. \
Values that are rounded to 8 bits or fewer are counted after division by their scale. The blue background is the range of the \
format, lighter where it is subnormal; values to its left become zero, values to its right overflow. This is figure 3 of \
Micikevicius et al. 2018 for this run."""
OTHER_FORMATS = """\
The same values rounded to other formats. Tensors for a format of 8 bits or fewer are first multiplied by a power of two, one \
per tensor, that brings the largest value just below that of the format; values that are still too large saturate. Wider \
formats take the values unchanged: gradients times the loss scale of this run. Values that this run quantizes are divided by \
its scales first."""
SHARES = """\
Percentages are shares of the values that were finite and not zero before rounding; overflowed, saturated and arrived are \
numbers of values. Each value is exact, rounded, flushed, overflowed or saturated, or arrived as Inf or NaN; ties and \
subnormal values are counted in addition. 'dw of block 3 mlp.c_fc' is the gradient of operand w of that layer; its 'cast' is \
the operation, and the place in it, where it is rounded."""


# -- sections ----------------------------------------------------------------------------------------------------------


def _kinds(inspection: Inspection) -> str:
    rows = [
        [total.kind, total.fmt, str(total.sites), *(column.cell(total.counts) for column in COLUMNS)]
        for total in totals(inspection.sites)
    ]
    heads = ["kind", "format", "tensors", *(column.heading for column in COLUMNS)]
    return table("All casts by kind of tensor", heads, rows) if rows else ""


def _layers(inspection: Inspection, pictures: Sequence[Picture]) -> list[str]:
    parts = [figures(pictures)]
    for text, (heads, rows) in layer_parts(inspection.layers, inspection.scale):
        parts += [paragraphs([text]), table(text.partition(":")[0], heads, rows)]
    return parts


def _tensors(inspection: Inspection, ranked: Sequence[Verdict]) -> list[str]:
    if not ranked:
        return [paragraphs([NO_CASTS])]
    every = [
        [site, kind_of(site), counts.fmt, *(column.cell(counts) for column in COLUMNS)]
        for site, counts in inspection.sites.items()
    ]
    heads = ["tensor", "kind", "format", *(column.heading for column in COLUMNS)]
    return [
        paragraphs([worst_sentence(ranked, WORST), ORDER]),
        table("The worst tensors", *verdict_table(inspection, ranked[:WORST]), sortable=True),
        f"<details>\n<summary>All {len(ranked)} tensors, in the order of the step</summary>\n",
        table("All tensors", heads, every, sortable=True),
        "</details>\n",
    ]


def _other_formats(inspection: Inspection, ranked: Sequence[Verdict]) -> list[str]:
    if not inspection.sites:
        return [paragraphs([NO_CASTS])]
    by_kind, worst = other_formats_by_kind(inspection), other_formats_of(inspection, ranked[:WORST])
    return [
        paragraphs([OTHER_FORMATS]),
        _comparison("By kind of tensor", "kind", by_kind),
        "<h3>The worst tensors</h3>\n",
        _comparison("The worst tensors in other formats", "tensor", worst),
    ]


def _comparison(caption: str, what: str, compared: Sequence[tuple[str, Compared]]) -> str:
    rows = []
    for name, formats in compared:
        for i, (fmt, counts) in enumerate(formats):
            cells = [column.cell(counts) if counts else "-" for column in OTHER_COLUMNS]
            rows.append([name if i == 0 else "", fmt + (" (this run)" if i == 0 else ""), *cells])
    return table(caption, [what, "format", *(column.heading for column in OTHER_COLUMNS)], rows)


def _reading(inspection: Inspection) -> list[str]:
    meanings = [[column.heading, column.meaning] for column in COLUMNS]
    config = [[name, "-" if value is None else str(value)] for name, value in asdict(inspection.config).items()]
    return [
        paragraphs([SHARES]),
        table("What the columns mean", ["column", "meaning"], meanings, sentences=True),
        "<details>\n<summary>The configuration of the run</summary>\n",
        table("Configuration", ["flag", "value"], config, sentences=True),
        "</details>\n",
    ]
