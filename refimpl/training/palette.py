"""The colors of all pictures. A format has the same one in each of them.

Source: Okabe and Ito 2008, Color Universal Design: eight colors that people of every kind of color vision tell apart,
without the yellow, which is too light for lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"
GRAY = "#777777"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GRAY)
"""Colors of lines that stand for no format, in this order."""

FORMAT_COLORS = {
    "fp64": BLACK, "fp32": GRAY, "fp16": BLUE, "bf16": ORANGE, "e4m3": GREEN, "e5m2": RED, "e2m1": PURPLE, "tf32": SKY,
    "e3m2": "#80592c", "e2m3": "#b8a23c", "e8m0": "#5b3c88",
}  # fmt: skip
"""The last three have colors of their own, since the palette has no more. They never stand alone: a label is beside them."""
ALIASES = {"fp8": "e4m3", "mxfp8": "e4m3", "mxfp6": "e3m2", "mxfp4": "e2m1", "nvfp4": "e2m1"}
"""The format of the products of recipes that are named after a standard."""


def format_in(name: str) -> str | None:
    """Return the first format that a name has as a word: 'bf16' for 'pure-bf16' and 'sum in bf16', or None."""
    words = (ALIASES.get(word, word) for word in re.findall(r"[a-z0-9]+", name.lower()))
    return next((word for word in words if word in FORMAT_COLORS), None)


def colors_of(names: Sequence[str]) -> list[str]:
    """Return a color for each name: that of its format for the first with this format, and others for the rest.

    Where there are more names than colors, colors repeat.
    """
    own: dict[int, str] = {}
    for i, name in enumerate(names):
        color = FORMAT_COLORS.get(format_in(name) or "")
        if color is not None and color not in own.values():
            own[i] = color
    free = [color for color in CYCLE if color not in own.values()] or list(CYCLE)
    left = [i for i in range(len(names)) if i not in own]
    return [own[i] if i in own else free[left.index(i) % len(free)] for i in range(len(names))]
