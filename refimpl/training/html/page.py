"""Parts of an HTML page that is one file and needs no network, no other file and no script. Functions return text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from refimpl.training.html.figures import Picture

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


def document(title: str, sections: Iterable[str], more_css: str = "") -> str:
    """Return the whole page. more_css: rules that only this page needs."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{CSS}{more_css}</style>\n</head>\n<body>\n<main>\n<h1>{text(title)}</h1>\n"
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def escape(words: str) -> str:
    """Return text as HTML; characters beyond ASCII become references, so that the file's encoding does not matter."""
    return html.escape(words).encode("ascii", "xmlcharrefreplace").decode()


def text(words: str) -> str:
    """Return text as HTML with powers of two as superscripts (2^-24 or 2^(e+1)) and no break between a number and its unit."""
    raised = re.sub(r"2\^(?:(-?\w+)|\(([^)]+)\))", r"2<sup>\1\2</sup>", escape(words))
    return re.sub(r"(\d) (%|dB)", r"\1&nbsp;\2", raised).replace("S = ", "S&nbsp;=&nbsp;")


def section(title: str, *parts: str) -> str:
    """Return a section with its title."""
    return f"<section>\n<h2>{text(title)}</h2>\n{''.join(parts)}</section>\n"


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


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """Return a table in a box that scrolls sideways. words: cells are text, not numbers.

    The first cell of a row is its heading; if it is empty, the heading above spans this row too.
    """
    kind = ' class="text"' if words else ""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in heads)
    body = []
    for i, row in enumerate(rows):
        span = next((n for n, later in enumerate(rows[i + 1 :], 1) if later[0]), len(rows) - i)
        heading = f'<th scope="row" rowspan="{span}">{text(row[0])}</th>' if row[0] else ""
        cells = "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        body.append(f"<tr>{heading}{cells}</tr>\n")
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">\n'
        f"<table{kind}>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>\n"
    )
