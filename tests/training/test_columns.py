"""Lines and tables for a terminal of any width, and whole ones for a file."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from progress_bars import Terminal

from refimpl.training.columns import fitted_table, table, terminal_width, whole_table, wrapped
from refimpl.training.console import Output

HEADER = ["recipe", "bytes", "minus fp32", "ms per step", "what it is for"]
ROWS = [
    ["adam-8bit-fp32-embeddings", "10.0", "+0.0134 **", "152", "8-bit moments, but for embeddings, whose rows are rarely read"],
    ["fp32", "16", "", "73", "everything in FP32"],
]


def test_a_table_without_a_terminal_is_whole_and_leaves_no_trailing_blanks() -> None:
    assert table(["a", "long"], [["xyz", "1"], ["", "2"]], "  ") == "  a    long\n  ---  ----\n  xyz  1\n       2"
    assert whole_table((), [["a", "b"], ["cc", ""]]) == "a   b\ncc"
    assert max(map(len, table(HEADER, ROWS).split("\n"))) > 110 and table(["a"], []) == "a\n-"


@pytest.mark.parametrize("width", range(52, 160, 4))
def test_a_table_fits_any_terminal_and_loses_no_word(width: int) -> None:
    lines = fitted_table(HEADER, ROWS, " ", width + 1).split("\n")
    assert max(map(len, lines)) <= width + 1
    shown = " ".join(lines).split()
    for cells in (HEADER, *ROWS):
        for cell in cells:
            assert all(shown.count(word) >= cell.split().count(word) for word in cell.split())
    parts = sum(line.startswith(" fp32") for line in lines)
    assert shown.count("recipe") == parts == sum(line.startswith(" adam") for line in lines)
    assert (parts == 1) == (width >= 76)


def test_headings_wrap_before_cells_do() -> None:
    narrow = fitted_table(HEADER[:4], [row[:4] for row in ROWS], "", 56)
    assert narrow.split("\n")[:2] == ["recipe                     bytes  minus fp32  ms per", " " * 46 + "step"]
    assert fitted_table((), [["a", "two words"]], "", 5) == "a  two words"  # short cells stay whole


@pytest.mark.parametrize("width", [24, 37, 60, 80])
def test_lines_keep_their_words_and_fit(width: int) -> None:
    rng = np.random.default_rng(width)
    for _ in range(50):
        words = ["x" * int(n) for n in rng.integers(1, 12, 40)]
        line = " " * int(rng.integers(0, 6)) + " ".join(words)
        if rng.random() < 0.5:
            line = line.replace(" x", "    x", 2)
        shown = wrapped(line, width)
        assert shown.split() == words and max(map(len, shown.split("\n"))) <= width
    assert wrapped("y" * 200, width) == "y" * 200  # a path, which can be copied


def test_what_follows_a_name_hangs_below_itself() -> None:
    assert wrapped("  --lr X  the learning rate after warm-up", 36) == "  --lr X  the learning rate after\n          warm-up"
    assert wrapped("  --learning-rate X  of the updates", 22) == "  --learning-rate X\n      of the updates"
    assert wrapped("it lost 12.5 % of them", 12) == "it lost\n  12.5 % of\n  them"


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    assert [terminal_width(stream) for stream in (None, io.StringIO(), closed)] == [None] * 3
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width(Terminal()) == 80  # it does not say
    monkeypatch.setenv("COLUMNS", "60")
    assert terminal_width(Terminal()) == 60 and terminal_width(io.StringIO()) is None
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert max(map(len, table(HEADER, ROWS).split("\n"))) <= 60


def test_output_wraps_whole_lines_on_a_terminal_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    for stream, shown in ((Terminal(), "one two\n  three four\nab"), (io.StringIO(), "one two three four\nab")):
        output = Output(stream, False, False)
        print("one two", "three four", file=output)
        print("a", end="", file=output)
        print("b", end="", flush=True, file=output)
        assert stream.getvalue() == shown
        print(" and what is streamed is not wrapped", file=output)
        assert stream.getvalue() == f"{shown} and what is streamed is not wrapped\n"
        print("one two three four", file=output)
        assert stream.getvalue().endswith("one two\n  three four\n") == isinstance(stream, Terminal)


def test_the_bar_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    stream = Terminal()
    Output(stream, True, False).write("\r 50%|#####     | 1/2")
    assert stream.getvalue() == "\r 50%|#####     | 1/2"
