"""training/html/: the frame of the pages, their tables, and the keys that these are sorted by."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from pages import MADE, SCRIPTS

from refimpl.training.html.page import document, number_in, section, table, text
from refimpl.training.html.style import SORT
from refimpl.training.program import command_line

ROWS = [["a", "0.57 %", "b"], ["b", "-", "c"], ["c", "12 %", "a"], ["d", "1,234", "B"]]


def test_the_head_says_how_the_page_was_made_and_what_is_on_it() -> None:
    page = document("A page", [section("What it found"), section("FP8 & more", "<p>x</p>\n")], MADE, "<p>first</p>\n")
    assert "Made on 2026-11-30 12:00 UTC with refimpl 0.1.0, Python 3.11.7, on a processor, 2 cores, by:" in page
    assert "<code>python x.py</code>" in page and "<script" not in page
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', page)
    assert links == [("what-it-found", "What it found"), ("fp8-more", "FP8 &amp; more")]
    assert [f'<section id="{anchor}">\n<h2>{title}</h2>' in page for anchor, title in links] == [True, True]
    assert page.index("</nav>") < page.index("<p>first</p>") < page.index("<section")


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("12 %", 12), ("0.57 %", 0.57), ("1,234,567", 1234567), ("31.5 dB", 31.5), ("-0.0134 *", -0.0134), ("+2e-05", 2e-5),
        ("2^-24 to 2^3", 2.0**-24), ("2^16", 65536), ("8.1 million", 8.1e6), ("<.1%", 0.05), ("512", 512),
        ("without an error", 1e300),
    ],
)  # fmt: skip
def test_cells_are_sorted_by_the_number_that_they_begin_with(cell: str, number: float) -> None:
    assert number_in(cell) == pytest.approx(number)


@pytest.mark.parametrize("cell", ["-", "", "fp16", "8bit", "dw of block 3", "never"])
def test_text_has_no_number(cell: str) -> None:
    assert math.isnan(number_in(cell))


def test_only_tables_that_are_sorted_have_keys_and_a_page_has_the_scripts_of_its_tables() -> None:
    plain, sortable = (table("t", ["name", "share", "word"], ROWS, sortable=which) for which in (False, True))
    assert "data-key" not in plain and re.findall(r'data-key="(.*?)"', sortable) == ["0.57", "12", "1234"]
    pages = [document("t", [section("s", text)], MADE) for text in (sortable, plain, "")]
    assert [[script in page for script in SCRIPTS] for page in pages] == [[True, False], [False, True], [False, False]]


def test_columns_of_words_are_marked_and_long_names_can_be_broken() -> None:
    rows = [["_foreach_norm.Scalar", "a", "-", "1.5"], ["b/c 0.5", "-", "-", "x"]]
    text = table("t", ["name", "words", "none", "some"], rows)
    assert re.findall(r"<t[hd]([^>]*)>(?:words|a|-|1.5|x|none|some)<", text) == [
        ' scope="col" class="words"', ' scope="col"', ' scope="col"', ' class="words"', "", "", ' class="words"', "", ""
    ]  # fmt: skip
    assert "_foreach_<wbr/>norm.<wbr/>Scalar" in text and "b/<wbr/>c 0.5" in text and "min-width: calc(16ch + 1rem)" in text


def test_verdicts_are_sorted_by_their_rank() -> None:
    rows = [["a", "fine"], ["b", "wrong: beyond the bound"], ["c", "2^3"], ["d", "not judged"]]
    text = table("t", ["name", "verdict"], rows, sortable=True, ranks=("wrong", "note", "fine"))
    assert re.findall(r"<td([^>]*)>", text) == [' data-key="1"', ' data-key="3"', ' data-key="8"', ""]


def test_powers_are_superscripts() -> None:
    raised = text("2^-24 to 2^(e+1), sum x^2 / sum (x - y)^2; a ^ b")
    assert raised == "2<sup>-24</sup> to 2<sup>e+1</sup>, sum x<sup>2</sup> / sum (x - y)<sup>2</sup>; a ^ b"


FAKE = """
const cell = text => ({textContent: text, dataset: /^[\\d.]/.test(text) ? {key: parseFloat(text.replace(",", ""))} : {}});
const rows = ROWS.map(texts => ({cells: texts.map(cell)}));
const heads = rows[0].cells.map(() => ({childNodes: [], attributes: {},
  append(button) { this.button = button },
  hasAttribute(name) { return name in this.attributes }, getAttribute(name) { return this.attributes[name] },
  setAttribute(name, value) { this.attributes[name] = value }, removeAttribute(name) { delete this.attributes[name] }}));
const body = {rows, append(...sorted) { this.rows = sorted }};
const tables = [{tHead: {rows: [{cells: heads}]}, tBodies: [body]}];
const document = {querySelectorAll: () => tables, createElement: () => ({append() {}})};
SORT
for (const i of [1, 1, 2, 2, 0]) {
  heads[i].button.onclick();
  const order = body.rows.map(row => row.cells[0].textContent).join("");
  console.log(JSON.stringify([order, heads.map(head => head.attributes["aria-sort"] ?? "")]));
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the script of the pages")
def test_a_click_sorts_numbers_from_the_largest_and_text_from_a_and_another_click_turns_it_around() -> None:
    program = FAKE.replace("ROWS", json.dumps(ROWS)).replace("SORT", SORT)
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True, timeout=60)
    orders, marks = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    assert orders == ("dcab", "acdb", "cadb", "bdac", "abcd")  # '-' stays last among numbers
    assert marks[0] == ["", "descending", ""] and marks[1] == ["", "ascending", ""] and marks[2] == ["", "", "ascending"]


def test_the_command_line_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["my train.py", "--lr", "1"])
    assert command_line() == "python 'my train.py' --lr 1"
    monkeypatch.setattr(sys, "argv", ["python -m refimpl audit", "x.py"])
    assert command_line() == "python -m refimpl audit x.py"
