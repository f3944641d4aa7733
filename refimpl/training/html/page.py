"""Parts of an HTML page that is one file and needs no network and no other file. Functions return text.

A script sorts its tables and says which of them scroll; without it the page shows all of them.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refimpl.training.html.figures import Picture
from refimpl.training.html.made import Made
from refimpl.training.html.style import CSS, HINT, SORT


@dataclass(frozen=True)
class Section:
    """A part of a page that the list of contents names. html: what follows its heading."""

    title: str
    html: str

    @property
    def anchor(self) -> str:
        """Return the id that links to it."""
        return "-".join(re.findall(r"[a-z0-9]+", self.title.lower()))


def document(title: str, sections: Sequence[Section], made: Made, start: str = "", more_css: str = "") -> str:
    """Return the whole page. start: what stands before the first section. more_css: rules that only this page needs."""
    links = "".join(f'<li><a href="#{each.anchor}">{text(each.title)}</a></li>\n' for each in sections)
    body = "".join(f'<section id="{each.anchor}">\n<h2>{text(each.title)}</h2>\n{each.html}</section>\n' for each in sections)
    script = f"<script>{HINT}{SORT if SORTABLE in body else ''}</script>\n" if BOX in body else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}{more_css}</style>\n</head>\n<body>\n<main>\n<h1>{text(title)}</h1>\n"
        f'<div class="made"><p>{text(made.sentence)}</p>\n<pre><code>{escape(made.command)}</code></pre>\n</div>\n'
        f'<nav aria-label="Contents">\n<ul>\n{links}</ul>\n</nav>\n{start}{body}</main>\n{script}</body>\n</html>\n'
    )


def escape(words: str) -> str:
    """Return text as HTML; characters beyond ASCII become references, so that the file's encoding does not matter."""
    return html.escape(words).encode("ascii", "xmlcharrefreplace").decode()


def text(words: str) -> str:
    """Return text as HTML with superscripts (2^-24, 2^(e+1), x^2) and no break between a number and its unit."""
    raised = re.sub(r"(?<=[\w)])\^(?:(-?\w+)|\(([^)]+)\))", r"<sup>\1\2</sup>", escape(words))
    return re.sub(r"(\d) (%|dB)", r"\1&nbsp;\2", raised).replace("S = ", "S&nbsp;=&nbsp;")


def section(title: str, *parts: str) -> Section:
    """Return a section of these parts."""
    return Section(title, "".join(parts))


def paragraphs(sentences: Iterable[str]) -> str:
    """Return one paragraph per sentence."""
    return "".join(f"<p>{text(sentence)}</p>\n" for sentence in sentences)


def figures(pictures: Sequence[Picture]) -> str:
    """Return figures with captions, as many per row as fit; '' for none."""
    figures = "".join(
        f"<figure>\n<h3>{text(picture.title)}</h3>\n"
        f'{picture.svg.replace("<svg ", f"""<svg role="img" aria-label="{escape(picture.label)}" """, 1)}'
        f"<figcaption>{text(picture.caption)}</figcaption>\n</figure>\n"
        for picture in pictures
    )
    return f'<div class="figures">\n{figures}</div>\n' if figures else ""


BOX, SORTABLE = '<div class="scroll"', '<table class="sortable'
LEAST = 16
"""The width in characters that longer headings of rows keep, where they are broken into lines for the other columns' sake."""


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    sentences: bool = False,
    sortable: bool = False,
    ranks: Sequence[str] = (),
) -> str:
    """Return a table in a box that scrolls. sentences: the second column has them. sortable: by a click on a heading.

    The first cell of a row is its heading; if it is empty, the heading above spans this row too, unless it is sortable.
    ranks: what cells may begin with that are sorted in this order, the first one as the largest.
    """
    kinds = " ".join(["sortable"] * sortable + ["sentences"] * sentences)
    least = min(LEAST, max(len(row[0]) for row in (heads, *rows)))
    words = [_is_text([row[i] for row in rows]) for i in range(len(heads))]
    marks = [f' style="min-width: calc({least}ch + 1rem)"', *(' class="words"' if each else "" for each in words[1:])]
    head = "".join(f'<th scope="col"{mark}>{text(cell)}</th>' for cell, mark in zip(heads, marks, strict=True))
    body = []
    for i, row in enumerate(rows):
        span = next((n for n, later in enumerate(rows[i + 1 :], 1) if later[0]), len(rows) - i)
        heading = f'<th scope="row" rowspan="{span}">{_breakable(text(row[0]))}</th>' if row[0] else ""
        cells = "".join(
            f"<td{mark}{_key(cell, ranks) if sortable else ''}>{text(cell)}</td>"
            for cell, mark in zip(row[1:], marks[1:], strict=True)
        )
        body.append(f"<tr>{heading}{cells}</tr>\n")
    return (
        f'<p class="hint" hidden></p>\n'
        f'{BOX} role="region" aria-label="{escape(caption)}" tabindex="0">\n'
        f"<table{f' class={chr(34)}{kinds}{chr(34)}' if kinds else ''}>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>\n"
    )


def _breakable(name: str) -> str:
    """Return HTML in which a long name may be broken after its underscores, dots, slashes and colons, and numbers may not."""
    return re.sub(r"(?<=[a-z0-9_])([_/:]|\.(?!\d)|(?<!\d)\.)(?=[a-z0-9])", r"\1<wbr/>", name, flags=re.IGNORECASE)


def _is_text(cells: Sequence[str]) -> bool:
    """Return whether the cells of a column hold text, and no numbers."""
    return any(cell not in ("", "-") for cell in cells) and all(math.isnan(number_in(cell)) for cell in cells)


def _key(cell: str, ranks: Sequence[str]) -> str:
    """Return the attribute by which a cell is sorted, if it begins with a number or a rank."""
    number = next((float(len(ranks) - i) for i, rank in enumerate(ranks) if cell.startswith(rank)), number_in(cell))
    return "" if math.isnan(number) else f' data-key="{number:.6g}"'


NUMBER = re.compile(
    r"(?P<below><)?(?P<base>2\^)?(?P<digits>[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)(?P<words>.*)", re.DOTALL
)
WORDS = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}


def number_in(cell: str) -> float:
    """Return the number that a cell begins with: 12 for '12 %' and 2^-24 for '2^-24 to 2^3'. NaN for text."""
    if cell in ("inf", "exact", "without an error"):
        return 1e300  # larger than all others; JavaScript knows no 'inf'
    found = NUMBER.fullmatch(cell)
    if found is None or re.match(r"\w", found["words"]):
        return math.nan
    number = float(found["digits"].replace(",", ""))
    if found["base"]:
        return math.ldexp(1.0, int(number))
    return number * WORDS.get(found["words"].strip(), 1.0) * (0.5 if found["below"] else 1.0)
