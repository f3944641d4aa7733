"""The style sheet of the pages, and the scripts of their tables."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --text: #1c1c1c; --soft: #5a5a5a; --page: #fff; --band: #f3f4f6; --line: #d4d7dc; \
--shade: #8a9099; --lost: #f7dcd7; --subnormal: #e9f1fa; --normal: #c9def2; --seeds: #e4e4e4; --last-bit: #a8a8a8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --soft: #a8a8a8; --page: #16181b; --band: #212429; --line: #3a3f46; --shade: #060708; \
--lost: #3d2a27; --subnormal: #1a222a; --normal: #1c2f42; --seeds: #2c3036; --last-bit: #5c626b }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 80rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { margin-top: 2.5rem; font-size: 1.3rem }
h3 { margin: 0 0 .5rem; font-size: 1rem }
p { max-width: 48rem; overflow-wrap: break-word }
sup { line-height: 0 }
a { color: inherit }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0; padding: 0; list-style: none }
.made { margin-bottom: .3rem; color: var(--soft); font-size: .9rem }
pre, .scroll, figure svg { border: 1px solid var(--line); border-radius: 6px }
.figures { display: grid; gap: 1.5rem; max-width: 72rem }
.figures, figure:only-child { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
figure { margin: 0; min-width: 0; display: grid; grid-template-rows: subgrid; grid-row: span 3; row-gap: 0 }
figure:only-child { grid-column: 1 / -1; grid-template-rows: auto; gap: 0 1.5rem; align-items: start }
figure:only-child h3 { grid-column: 1 / -1 }
figure svg { display: block; width: 100%; height: auto; fill: var(--text) }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem }
.scroll { width: fit-content; max-width: 100%; max-height: 85vh; overflow: auto; margin: 1rem 0 }
.scroll { background: linear-gradient(to left, var(--page) 40%, transparent) right / 3rem 100% no-repeat local, \
linear-gradient(to left, var(--shade), transparent) right / .9rem 100% no-repeat scroll }
.hint { margin: 1rem 0 -.7rem; color: var(--soft); font-size: .9rem }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th, td { white-space: nowrap }
tr:last-child > * { border-bottom: 0 }
thead th { position: sticky; top: 0; z-index: 2; background: var(--band); border-bottom: 1px solid var(--line) }
th:first-child { position: sticky; left: 0; z-index: 1; border-right: 1px solid var(--line) }
thead th:first-child { z-index: 3 }
tbody th { font-weight: normal; background: var(--page) }
th:first-child, .words { text-align: left }
th:first-child { max-width: 24rem; white-space: normal; overflow-wrap: anywhere }
.sentences td:nth-child(2) { white-space: normal; min-width: min(15rem, 45vw); max-width: 40rem }
th button { all: unset; cursor: pointer; text-decoration: underline dotted }
th button:focus-visible { outline: 2px solid }
th[aria-sort] button { text-decoration: underline }
th[aria-sort=descending] button::after { content: " \\2193" }
th[aria-sort=ascending] button::after { content: " \\2191" }
@media print {
  .scroll { max-height: none }
}
pre { padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--band) }
summary { cursor: pointer }
"""

OF_SCREEN = {
    "#000000": "text", "#ffffff": "page", "#444444": "soft", "#f7dcd7": "lost", "#e9f1fa": "subnormal", "#c9def2": "normal",
    "#e4e4e4": "seeds", "#a8a8a8": "last-bit",
}  # fmt: skip
"""The colors of figures that are others on dark screens, by name in the style sheet. All colors of data are seen on both."""

HINT = """
const tell = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const hint = box.previousElementSibling, more = [];
    if (box.scrollWidth > box.clientWidth) more.push("sideways for more columns");
    if (box.scrollHeight > box.clientHeight) more.push("down for more rows");
    hint.hidden = more.length === 0;
    hint.textContent = "Scroll " + more.join(", ") + ":";
  }
};
addEventListener("resize", tell);
document.addEventListener("toggle", tell, true);
tell();
"""
"""Shows the hint before each table that is larger than its box: now, and when the window or what is unfolded changes."""

SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const rows = [...body.rows], keys = new Map(rows.map(row => [row, row.cells[i].dataset.key]));
      const numbers = rows.some(row => keys.get(row) !== undefined);
      const down = head.hasAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : numbers;
      const text = row => row.cells[i].textContent;
      const compare = numbers ? (a, b) => keys.get(a) - keys.get(b) : (a, b) => text(a).localeCompare(text(b));
      const last = numbers ? rows.filter(row => keys.get(row) === undefined) : [];
      const sorted = rows.filter(row => !last.includes(row)).sort((a, b) => down ? compare(b, a) : compare(a, b));
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...sorted, ...last);
    };
  });
}
"""
"""Makes buttons of the headings of sortable tables. Cells with a data-key are numbers, and others come after them."""
