"""Text that fits the terminal: lines wrapped at words, tables whose columns wrap or stack.

Only a terminal has a width. What goes to a file or a pipe has one line per statement and whole tables, for `grep` and `diff`.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

GAP = "  "
"""Between two columns of a table."""
HARD = "\N{NO-BREAK SPACE}"
UNKNOWN = 80
"""The columns of a terminal that does not say how many it has."""
PROSE = 24
"""The longest cell of a table that is never wrapped, and the least width of a column of longer ones."""
_HANGING = re.compile(r"\s*\S.*?\s{2,}(?=\S)")
"""A name and the spaces before its description, as in the help of a command."""


def terminal_width(stream: Any) -> int | None:
    """Return the columns of the terminal that a stream writes to; None for a file, a pipe or no stream.

    The environment variable COLUMNS overrides the terminal.
    """
    try:
        if not stream.isatty():
            return None
    except (AttributeError, ValueError):  # no stream, or a closed one
        return None
    try:
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns) or UNKNOWN
    except (OSError, ValueError):
        return UNKNOWN


def wrapped(line: str, width: int) -> str:
    """Return a line as lines of at most `width` columns, broken at spaces; a longer word stays whole.

    What follows a name and two spaces is indented as its beginning, or starts on the next line where little room is left; other
    lines go on with an indent of two more columns than their own.
    """
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    hanging = _HANGING.match(line)
    if hanging is None:
        return _filled(line, width, indent)
    if len(hanging[0]) <= min(width // 2, width - PROSE):
        return _filled(line, width, " " * len(hanging[0]))
    rest = f"{indent}  {line[hanging.end() :]}"
    return f"{_filled(hanging[0].rstrip(), width, indent)}\n{_filled(rest, width, f'{indent}  ')}"


def fit(line: str, stream: Any) -> str:
    """Return a line as `wrapped` at the width of the terminal that a stream writes to, and as it is for any other stream."""
    width = terminal_width(stream)
    return line if width is None else wrapped(line, width)


def _filled(text: str, width: int, indent: str) -> str:
    if len(text) <= width:
        return text
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
    bound = text.replace(" %", f"{HARD}%").replace(" dB", f"{HARD}dB")  # a number stays with its unit
    return "\n".join(textwrap.wrap(bound, width, subsequent_indent=indent, expand_tabs=False, **options)).replace(HARD, " ")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Return a text table to print: `whole_table` where it fits the terminal or there is none.

    Where it does not, headings and long cells are wrapped. If that is not enough, the columns stack: the first ones, then below
    them the next, each time with the first column. A table without headings does not stack.
    """
    width = terminal_width(sys.stdout)
    return whole_table(header, rows, indent) if width is None else fitted_table(header, rows, indent, width)


def whole_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Return a text table: columns as wide as their widest cell, two spaces apart; the last one is not padded."""
    return fitted_table(header, rows, indent, sys.maxsize)


def fitted_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str, width: int) -> str:
    """Return the table for a terminal of `width` columns, as `table` describes it."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    columns = list(zip(*lines, strict=True))
    least = [_least(column, bool(header)) for column in columns]
    room = width - len(indent)
    parts = []
    for chosen in _stacked(least, room) if header else [list(range(len(least)))]:
        widths = _widths([columns[i] for i in chosen], [least[i] for i in chosen], room, bool(header))
        parts.append(_text([[line[i] for i in chosen] for line in lines], widths, indent, bool(header)))
    return "\n\n".join(parts)


def _least(column: Sequence[str], has_header: bool) -> int:
    """Return the least width of a column: its longest short cell or longest word, or PROSE if it has longer cells."""
    cells = column[1:] if has_header else column
    words = [word for cell in column for word in cell.split()]
    longest = max((len(cell) for cell in cells), default=0)
    return max([min(longest, PROSE), *(len(word) for word in words)])


def _stacked(least: Sequence[int], room: int) -> Iterator[list[int]]:
    """Yield the columns of each part of a table: as many as have room, after the first column."""
    part: list[int] = []
    for i in range(len(least)):
        if len(part) > 1 and sum(least[k] + len(GAP) for k in part) + least[i] > room:
            yield part
            part = [0]
        part.append(i)
    yield part


def _widths(columns: Sequence[Sequence[str]], least: Sequence[int], room: int, has_header: bool) -> list[int]:
    """Return the widths of the columns: of their cells, or less in headings, then in the widest columns, so that they fit."""
    widths = [max(map(len, column)) for column in columns]
    body = [max(map(len, column[has_header:]), default=0) for column in columns]
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - room
    for floor in ([max(a, b) for a, b in zip(least, body, strict=True)], least):
        while excess > 0:
            widest = max(range(len(widths)), key=lambda i: (widths[i] > floor[i]) * widths[i])
            if widths[widest] <= floor[widest]:
                break
            widths[widest] -= 1
            excess -= 1
    return widths


def _text(lines: Sequence[Sequence[str]], widths: Sequence[int], indent: str, has_header: bool) -> str:
    result = []
    for number, line in enumerate(lines):
        cells = [_filled(cell, width, "").split("\n") for cell, width in zip(line, widths, strict=True)]
        for row in range(max(map(len, cells))):
            parts = [(cell[row] if row < len(cell) else "").ljust(width) for cell, width in zip(cells, widths, strict=True)]
            result.append((indent + GAP.join(parts)).rstrip())
        if has_header and number == 0:
            result.append(indent + GAP.join("-" * width for width in widths))
    return "\n".join(result)
