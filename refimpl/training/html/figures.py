"""Figures as small SVGs inside an HTML page. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIZE = (4.3, 3.1)  # inches: text stays legible with two figures per row on a desktop, and with one on a phone
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
}  # fmt: skip
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Picture:
    """A figure. name: prefix of its ids; label: description for screen readers; caption: what to conclude."""

    name: str
    title: str
    label: str
    caption: str
    svg: str


def as_svg(name: str, draw: Callable[[Any], None]) -> str:
    """Return what `draw` draws on matplotlib axes as SVG: the same bytes each time, with ids that begin with `name`."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        figure.savefig(text, format="svg", metadata=NO_METADATA)
    drawn = text.getvalue().encode("ascii", "xmlcharrefreplace").decode()
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn[drawn.index("<svg") :])
