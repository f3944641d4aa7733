"""The precision report as a page: one HTML file that needs no network, no other file and no script. Needs matplotlib."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import ml_dtypes
import numpy as np

from refimpl.inspect_precision import Inspection
from refimpl.precision_figures import Picture, all_pictures
from refimpl.precision_tables import (
    COLUMNS,
    OTHER_COLUMNS,
    Compared,
    cast_of,
    other_formats_by_kind,
    other_formats_of,
    summary,
    totals,
    worst_sentence,
)
from refimpl.rounding import kind_of
from refimpl.verdicts import Verdict, verdicts

WORST = 20
"""So many tensors get their verdict on the page."""

CSS = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5a5a5a; --page: #fff; --band: #f3f4f6; --line: #d4d7dc }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --soft: #a8a8a8; --page: #16181b; --band: #212429; --line: #3a3f46 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 80rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { margin-top: 2.5rem; font-size: 1.3rem }
h3 { margin: 0 0 .5rem; font-size: 1rem }
p { max-width: 48rem; overflow-wrap: break-word }
sup { line-height: 0 }
pre, .scroll, figure svg { border: 1px solid var(--line); border-radius: 6px }
.figures { display: grid; gap: 1.5rem; max-width: 72rem }
.figures, figure:only-child { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
figure { margin: 0; min-width: 0 }
figure:only-child { grid-column: 1 / -1; display: grid; gap: 0 1.5rem; align-items: center }
figure:only-child h3 { grid-column: 1 / -1 }
figure svg { display: block; width: 100%; height: auto; background: #fff }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem }
.scroll { width: fit-content; max-width: 100%; overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th, td { white-space: nowrap }
tr:last-child > * { border-bottom: 0 }
thead th { background: var(--band) }
tbody th { font-weight: normal }
th:first-child, .text td, .text th { text-align: left }
.text td:nth-child(2) { white-space: normal; min-width: 15rem; max-width: 40rem }
@media (max-width: 40rem) {
  th:first-child { min-width: 8rem; white-space: normal; overflow-wrap: anywhere }
}
pre { padding: .7rem; overflow-x: auto; background: var(--band) }
summary { cursor: pointer }
"""


def page(inspection: Inspection, command: str) -> str:
    """The report. The same inspection and command give the same text.

    command: how a person makes it again; it is shown as it is.
    """
    pictures, ranked = all_pictures(inspection), verdicts(inspection)
    sections = [
        _section("What it found", _paragraphs(summary(inspection)), _kinds(inspection)),
        _section("Exponents", _paragraphs([EXPONENTS if pictures["exponents"] else NO_CASTS]), _figures(pictures["exponents"])),
        _section("Loss scales", _paragraphs([SWEEP if pictures["sweep"] else NO_CASTS]), _figures(pictures["sweep"])),
        _section("The run", _figures(pictures["run"])),
        _section("Updates", _paragraphs([UPDATES if pictures["updates"] else NO_UPDATES]), _figures(pictures["updates"])),
        _section("Tensors", *_tensors(inspection, ranked)),
        _section("Other formats", *_other_formats(inspection, ranked)) if inspection.what_if else "",
        _section("How to read this, and how it was made", *_reading(inspection, command)),
    ]
    title = f"Precision report: {inspection.config.model}, {inspection.config.recipe}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>{_text(title)}</h1>\n"
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


# -- texts -------------------------------------------------------------------------------------------------------------

NO_CASTS = "This recipe casts no tensor to a narrower format, so there is nothing to show."
NO_UPDATES = "Every step was skipped, so no update was made."
EXPONENTS = """\
How many of the values lie in each binade, from 2^e to 2^(e+1), before they are rounded: over all casts of that kind, at all \
steps that were looked at. The blue ground is the range of the format, lighter where it is subnormal; what lies to its left \
becomes zero, what lies to its right overflows. This is figure 3 of Micikevicius et al. 2018, drawn for this run."""
SWEEP = """\
A larger loss scale lifts small gradients over the smallest value of the format, until the largest ones overflow."""
UPDATES = """\
An update that is small beside its weight is rounded away in 16 bits. FP32 masters keep it. Weights without masters are \
imagined where the recipe has masters: each difference that an update makes to them is added to weights of 16 bits only."""
OTHER_FORMATS = """\
What other formats would have done to the same values. Tensors that go to a format of 8 bits or fewer are first multiplied by \
a power of two, one for each tensor, that takes the largest value just below that of the format, and what is still too large \
saturates. Wider formats take the values as they are: gradients times the loss scale of this run."""
SHARES = """\
Percentages are shares of the values that were not zero before rounding; overflowed and saturated are numbers of values. Each \
value is exact, rounded, flushed, overflowed or saturated; ties and subnormal values are counted besides. 'dw of block 3 \
mlp.c_fc' is the gradient of operand w of that layer; its 'cast' is the operation, and the place in it, where it is rounded."""


# -- sections ----------------------------------------------------------------------------------------------------------


def _kinds(inspection: Inspection) -> str:
    rows = [
        [total.kind, total.fmt, str(total.sites), *(column.cell(total.counts) for column in COLUMNS)]
        for total in totals(inspection.sites)
    ]
    heads = ["kind", "format", "tensors", *(column.heading for column in COLUMNS)]
    return _table("All casts by kind of tensor", heads, rows) if rows else ""


def _tensors(inspection: Inspection, ranked: Sequence[Verdict]) -> list[str]:
    if not ranked:
        return [_paragraphs([NO_CASTS])]
    worst = [[v.name, v.text, v.kind, cast_of(v.site)] for v in ranked[:WORST]]
    every = [
        [site, kind_of(site), counts.fmt, *(column.cell(counts) for column in COLUMNS)]
        for site, counts in inspection.sites.items()
    ]
    heads = ["tensor", "kind", "format", *(column.heading for column in COLUMNS)]
    return [
        _paragraphs([worst_sentence(ranked, WORST)]),
        _table("The worst tensors", ["tensor", "verdict", "kind", "cast"], worst, text=True),
        f"<details>\n<summary>All {len(ranked)} tensors, in the order of a step</summary>\n",
        _table("All tensors", heads, every),
        "</details>\n",
    ]


def _other_formats(inspection: Inspection, ranked: Sequence[Verdict]) -> list[str]:
    if not inspection.sites:
        return [_paragraphs([NO_CASTS])]
    by_kind, worst = other_formats_by_kind(inspection), other_formats_of(inspection, ranked[:WORST])
    return [
        _paragraphs([OTHER_FORMATS]),
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
    return _table(caption, [what, "format", *(column.heading for column in OTHER_COLUMNS)], rows)


def _reading(inspection: Inspection, command: str) -> list[str]:
    meanings = [[column.heading, column.meaning] for column in COLUMNS]
    config = [[name, "-" if value is None else str(value)] for name, value in asdict(inspection.config).items()]
    versions = f"Made with NumPy {np.__version__} and ml_dtypes {ml_dtypes.__version__} by:"
    return [
        _paragraphs([SHARES]),
        _table("What the columns mean", ["column", "meaning"], meanings, text=True),
        _paragraphs([versions]),
        f"<pre><code>{_escape(command)}</code></pre>\n",
        "<details>\n<summary>The configuration of the run</summary>\n",
        _table("Configuration", ["flag", "value"], config, text=True),
        "</details>\n",
    ]


# -- HTML --------------------------------------------------------------------------------------------------------------


def _escape(text: str) -> str:
    """Text as HTML. What is not ASCII is written as a number, so that the file reads the same in every encoding."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _text(text: str) -> str:
    """The same, with powers of two raised (2^-24 or 2^(e+1)), and numbers kept on one line with their units."""
    raised = re.sub(r"2\^(?:(-?\w+)|\(([^)]+)\))", r"2<sup>\1\2</sup>", _escape(text))
    return re.sub(r"(\d) (%|dB)", r"\1&nbsp;\2", raised).replace("S = ", "S&nbsp;=&nbsp;")


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{''.join(parts)}</section>\n"


def _paragraphs(sentences: Iterable[str]) -> str:
    return "".join(f"<p>{_text(sentence)}</p>\n" for sentence in sentences)


def _figures(pictures: Sequence[Picture]) -> str:
    figures = "".join(
        f"<figure>\n<h3>{_text(picture.title)}</h3>\n"
        f'{picture.svg.replace("<svg ", f"""<svg role="img" aria-label="{_escape(picture.label)}" """, 1)}'
        f"<figcaption>{_text(picture.caption)}</figcaption>\n</figure>\n"
        for picture in pictures
    )
    return f'<div class="figures">\n{figures}</div>\n' if figures else ""


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """A table in a box that scrolls sideways. text: words, not numbers.

    The first cell of a row is its heading; where it is empty, the heading before spans this row too.
    """
    kind = ' class="text"' if text else ""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in heads)
    body = []
    for i, row in enumerate(rows):
        span = next((n for n, later in enumerate(rows[i + 1 :], 1) if later[0]), len(rows) - i)
        heading = f'<th scope="row" rowspan="{span}">{_text(row[0])}</th>' if row[0] else ""
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        body.append(f"<tr>{heading}{cells}</tr>\n")
    return (
        f'<div class="scroll" role="region" aria-label="{_escape(caption)}" tabindex="0">\n'
        f"<table{kind}>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>\n"
    )
