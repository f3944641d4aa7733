"""Figures as small SVGs inside an HTML page. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refimpl.training.html.style import OF_SCREEN

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


def legend_above(axes: Any) -> None:
    """Draw the legend above the axes, in as many columns as fit; the axes shrink, so that it covers nothing."""
    figure = axes.figure
    for ncols in (3, 2, 1):
        shape = {"ncols": ncols, "columnspacing": 1.2, "handlelength": 1.4, "labelspacing": 0.2}
        legend = figure.legend(loc="outside upper center", frameon=False, **shape)
        if legend.get_window_extent().width <= figure.bbox.width or ncols == 1:
            return
        legend.remove()


def as_svg(name: str, draw: Callable[[Any], None]) -> str:
    """Return what `draw` draws on matplotlib axes as SVG: the same bytes each time, with ids that begin with `name`.

    The colors of OF_SCREEN are those of the page's style sheet.
    """
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        figure.draw_without_rendering()  # a first layout may lead to other ticks, whose labels need other room
        figure.savefig(text, format="svg", metadata=NO_METADATA)
    drawn = text.getvalue().encode("ascii", "xmlcharrefreplace").decode()
    named = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn[drawn.index("<svg") :])
    fixed = "|".join(OF_SCREEN)
    return re.sub(rf"(?<=: )(?:{fixed})", lambda color: f"var(--{OF_SCREEN[color[0]]})", named)
