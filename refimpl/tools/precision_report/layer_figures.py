"""The figures of the layers of an inspection: outliers, and what narrow formats make of inputs, by block. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.numerics.rounding_words import percent
from refimpl.tools.precision_report.layers import NARROW, TOP, Layer, Operand
from refimpl.training.html.figures import STYLE, Picture, as_svg, legend_above
from refimpl.training.outputs import Target
from refimpl.training.palette import CYCLE, colors_of
from refimpl.training.pictures import figure_for_flag, log_in_plain_numbers

PLOT = Path("runs/layers.png")
SIZE = (11.0, 7.0)
"""Width and height of that picture in inches."""


def layer_pictures(layers: Sequence[Layer]) -> list[Picture]:
    """Return the figures of blocks with linear layers; [] for fewer than two."""
    if len(_blocks(layers)) < 2:
        return []
    return [
        Picture(name, title, f"{title}, by block", caption(layers), as_svg(name, partial(draw, layers=layers)))
        for name, title, draw, caption in PANELS
    ]


def plot_for_flag(path: Path, overwrite: bool) -> tuple[Any, Target]:
    """Return an empty figure for `draw_layers`, and the file of --plot. Errors: UsageError, as of `figure_for_flag`."""
    return figure_for_flag(path, PLOT, overwrite, *SIZE)


def draw_layers(figure: Any, layers: Sequence[Layer], title: str) -> None:
    """Draw all figures of the layers on one, for a PNG. Errors: UsageError for fewer than two blocks with linear layers."""
    import matplotlib

    if len(_blocks(layers)) < 2:
        raise UsageError("--plot shows layers: the model needs at least two blocks")
    with matplotlib.rc_context(STYLE):
        for panel, (_, name, draw, _) in zip(figure.subfigures(2, 2).flat, PANELS, strict=True):
            axes = panel.subplots()
            axes.set_title(name, fontsize=10)  # a title of the panel would be drawn over the legend
            draw(axes, layers)
        figure.suptitle(title, fontsize=11)


def _blocks(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.name.startswith("block ") and layer.inputs]


def _draw_operands(axes: Any, layers: Sequence[Layer], value: Callable[[Operand], float]) -> None:
    """Draw one line per input of a block, against the number of the block."""
    blocks = _blocks(layers)
    names = list(dict.fromkeys(operand.name for layer in blocks for operand in layer.inputs))
    for i, name in enumerate(names):
        points = [(n, value(one)) for n, layer in enumerate(blocks) for one in layer.inputs if one.name == name]
        axes.plot(*zip(*points, strict=True), ".-", color=CYCLE[i % len(CYCLE)], lw=1.2, ms=4, label=name)
    _finish(axes)


def _draw_effects(axes: Any, layers: Sequence[Layer], value: Callable[[Layer, str], float]) -> None:
    """Draw one line per recipe of NARROW, against the number of the block.

    Lines may cover each other: later ones are thinner, and every third is dashed.
    """
    blocks = _blocks(layers)
    for i, (color, name) in enumerate(zip(colors_of(NARROW), NARROW, strict=True)):
        line = ".--" if i % 3 == 2 else ".-"
        axes.plot([value(layer, name) for layer in blocks], line, color=color, lw=5 - 0.8 * i, ms=4, label=name)
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    legend_above(axes)


def _draw_peaks(axes: Any, layers: Sequence[Layer]) -> None:
    _draw_operands(axes, layers, lambda one: one.peak)
    log_in_plain_numbers(axes)
    axes.set_ylabel("largest / rms")


def _draw_tops(axes: Any, layers: Sequence[Layer]) -> None:
    _draw_operands(axes, layers, lambda one: 100 * one.top)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("% of the sum of squares")


def _draw_snr(axes: Any, layers: Sequence[Layer]) -> None:
    _draw_effects(axes, layers, lambda layer, name: layer.worst_effect("inputs", name).snr)
    axes.set_ylabel("SNR in dB")


def _draw_flushed(axes: Any, layers: Sequence[Layer]) -> None:
    _draw_effects(axes, layers, lambda layer, name: 100 * layer.worst_effect("inputs", name).flushed)
    axes.set_ylabel("% that become zero")


def _peaks_caption(layers: Sequence[Layer]) -> str:
    name, one = max(((layer.name, one) for layer in _blocks(layers) for one in layer.inputs), key=lambda found: found[1].peak)
    return f"The largest is {one.peak:.3g}, of the input of {one.name} in {name}."


def _tops_caption(layers: Sequence[Layer]) -> str:
    name, one = max(((layer.name, one) for layer in _blocks(layers) for one in layer.inputs), key=lambda found: found[1].top)
    return f"The largest is {percent(one.top)}, of the input of {one.name} in {name}."


def _snr_caption(layers: Sequence[Layer]) -> str:
    lowest = {name: min(_finite(layer.worst_effect("inputs", name).snr for layer in _blocks(layers))) for name in NARROW}
    return "The lowest of all blocks: " + ", ".join(f"{name} {value:.1f} dB" for name, value in lowest.items()) + "."


def _finite(values: Any) -> list[float]:
    return [value for value in values if not math.isnan(value)] or [math.nan]


def _flushed_caption(layers: Sequence[Layer]) -> str:
    most = {name: max(_finite(layer.worst_effect("inputs", name).flushed for layer in _blocks(layers))) for name in NARROW}
    shares = ", ".join(f"{name} {'-' if math.isnan(share) else percent(share)}" for name, share in most.items())
    return f"The most of all blocks: {shares}."


PANELS: tuple[tuple[str, str, Callable[..., None], Callable[..., str]], ...] = (
    ("layers-peaks", "Largest value over rms of the inputs of linear layers", _draw_peaks, _peaks_caption),
    ("layers-tops", f"Share of the top {100 * TOP:g} % of channels", _draw_tops, _tops_caption),
    ("layers-snr", "Lowest SNR of the inputs in narrow formats", _draw_snr, _snr_caption),
    ("layers-flushed", "Largest share of the inputs that becomes zero", _draw_flushed, _flushed_caption),
)
"""Each figure: its name, title, what draws it, and its caption."""
