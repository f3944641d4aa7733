"""Pictures as PNG files. They need matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.outputs import Target, target

NO_PICTURE = "(no picture: it needs matplotlib, pip install matplotlib)"


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of that size in inches, or None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_for_flag(
    path: Path, default: Path, overwrite: bool, width: float, height: float, flag: str = "--plot"
) -> tuple[Any, Target]:
    """Return an empty figure, and the file of `--plot PATH`, or of another flag, that it will be written to.

    Errors: UsageError without matplotlib, for a name that does not end in .png, or if the file cannot be written.
    """
    if path.suffix != ".png":
        raise UsageError(f"{flag} {path}: the picture is a PNG, so its name must end in .png")
    figure = new_figure(width, height)
    if figure is None:
        raise UsageError("the picture needs matplotlib: pip install matplotlib")
    return figure, target(flag, None if path is default else path, default, overwrite)


def legend_beside(axes: Any, **style: Any) -> None:
    """Draw the legend beside the axes, where it covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, **style)


def log_in_plain_numbers(axes: Any) -> None:
    """Make the vertical axis logarithmic, with labels such as 0.5 and 200 in place of powers of ten."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(path, format="png", dpi=110)
