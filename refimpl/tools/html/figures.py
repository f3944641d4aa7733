"""Figures as small SVGs that stand in an HTML page as text. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIZE = (4.3, 3.1)  # inches: two beside each other on a desktop, one on a phone, and the text in it legible on both
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
}  # fmt: skip
BLUE, ORANGE, GREEN, PURPLE, RED, GRAY = "#0072b2", "#e69f00", "#009e73", "#8c4799", "#c7321b", "#777777"
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Picture:
    """A figure. name: begins all its ids; label: what it shows, for who cannot see it; caption: what to conclude."""

    name: str
    title: str
    label: str
    caption: str
    svg: str


def as_svg(name: str, draw: Callable[[Any], None]) -> str:
    """What `draw` draws into the axes it is given: the same bytes each time, with ids that no other figure has."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        figure.savefig(text, format="svg", metadata=NO_METADATA)
    drawn = text.getvalue().encode("ascii", "xmlcharrefreplace").decode()
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn[drawn.index("<svg") :])
