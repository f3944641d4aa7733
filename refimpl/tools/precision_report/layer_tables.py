"""Tables and sentences on the layers of an inspection, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from refimpl.numerics.rounding_words import power
from refimpl.tools.precision_report.counts import within_layer
from refimpl.tools.precision_report.layers import ENOUGH, NARROW, TOP, Effect, Layer, Room

Rows = tuple[list[str], list[list[str]]]
"""The headings of a table, and its rows."""

SHOWN = 8
"""Layers that the sentence on FP16's room names."""


def outlier_rows(layers: Sequence[Layer]) -> Rows:
    """Return a row per layer with linear layers: its input with the largest share in the top channels."""
    heads = ["layer", "input of", f"top {100 * TOP:g} %", "largest / rms"]
    worst = [(layer.name, layer.worst) for layer in layers]
    return heads, [[name, one.name, _percent(one.top), _number(one.peak)] for name, one in worst if one is not None]


def effect_rows(layers: Sequence[Layer], what: str) -> Rows:
    """Return a row per layer: for each of NARROW the lowest SNR in dB and the largest share of zeros. what: inputs, weights."""
    shown = [layer for layer in layers if getattr(layer, what)]
    rows = [[layer.name, *(_effect(layer.worst_effect(what, name)) for name in NARROW)] for layer in shown]
    return ["layer", *NARROW], rows


def room_rows(layers: Sequence[Layer]) -> Rows:
    """Return a row per layer that rounds to 16 bits: the least room in forward and in backward, and where it is."""
    shown = [layer for layer in layers if layer.forward or layer.backward]
    rows = [[layer.name, *_room(layer.forward), *_room(layer.backward)] for layer in shown]
    return ["layer", "forward", "in", "backward", "in"], rows


def _effect(effect: Effect) -> str:
    if math.isnan(effect.error):
        return "-"
    return f"{'exact' if math.isinf(effect.snr) else f'{effect.snr:.1f}'} {_share(effect.flushed)}"


def _share(share: float) -> str:
    """Return a share in five characters at most: 0 %, <.1%, 1.2%, 100%."""
    if share == 0:
        return "0%"
    return "<.1%" if share < 0.0005 else f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _room(room: Room | None) -> tuple[str, str]:
    return ("-", "-") if room is None else (room_text(room), _cut(part_of(room.site)))


def _cut(name: str) -> str:
    """Return a name that fits its column, so that a row fits a terminal of 80 columns."""
    return name if len(name) <= WIDTH else f"{name[: WIDTH - 3]}..."


WIDTH = 23


def room_text(room: Room) -> str:
    """Return the room as text: '2^3', or that values overflow, or arrived as Inf or NaN."""
    return "Inf/NaN" if room.room is None else "overflow" if room.room < 0 else f"2^{room.room}"


def part_of(site: str) -> str:
    """Return where a rounding is within its layer: 'mlp.down_proj dw' for 'model.layers.3.mlp.down_proj:linear.dw.dw'."""
    place, _, rest = site.partition(":")
    place = within_layer(place).removeprefix("model.").removeprefix("transformer.")
    return place if rest == "weights_down" else f"{place} {rest.removesuffix('.stored').rpartition('.')[2]}"


def room_sentence(layers: Sequence[Layer], scale: float) -> str:
    """Return the sentence that names the layers with little room in FP16. scale: the loss scale."""
    if not any(layer.forward or layer.backward for layer in layers):
        return "This recipe rounds nothing to 16 bits, so that the room in FP16 is not known: choose another, such as fp16."
    little = [(layer.name, found) for layer in layers if (found := layer.little_room())]
    gradients = f"gradients are times S = {power(scale)}" if scale != 1 else "there is no loss scale"
    if not little:
        return f"Every layer has room for {ENOUGH} powers of two and more below the overflow of FP16; {gradients}."
    named = [f"{name} ({', '.join(f'{what}: {room_text(room)} in {part_of(room.site)}' for what, room in found)})"
             for name, found in little[:SHOWN]]  # fmt: skip
    more = f", and {len(little) - SHOWN} more" if len(little) > SHOWN else ""
    return (
        f"{len(little)} of {len(layers)} layers have less than {ENOUGH} powers of two of room below the overflow of FP16, "
        f"where {gradients}: {'; '.join(named)}{more}."
    )


OUTLIERS = (
    f"Outliers: of the inputs of each layer's linear layers, the one with the largest share of the sum of squares in the top "
    f"{100 * TOP:g} % of its channels (at least one), and its largest value over the root of its mean square."
)
EFFECTS = (
    "Narrow formats, {what} of linear layers: the lowest SNR in dB of the layer, and the largest share of "
    "nonzero values that become zero. A few large values may make up an SNR; then the zeros tell what becomes of the others."
)
ROOM = (
    "Room in FP16: the powers of two between the largest value at a rounding and the overflow, of weights and activations in "
    "forward, of gradients in backward. There it depends on the loss scale, which if it is dynamic grows until they overflow."
)


def layer_parts(layers: Sequence[Layer], scale: float) -> list[tuple[str, Rows]]:
    """Return each table of the layers with the text before it; of those without rows nothing. scale: the loss scale."""
    parts = [(OUTLIERS, outlier_rows(layers))]
    parts += [(EFFECTS.format(what=what), effect_rows(layers, what)) for what in ("inputs", "weights")]
    parts.append((f"{ROOM} {room_sentence(layers, scale)}", room_rows(layers)))
    return [(text, rows) for text, rows in parts if rows[1]]


def layers_data(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return the layers as plain data."""
    return [
        {
            "layer": layer.name,
            **{what: [_operand_data(one) for one in getattr(layer, what)] for what in ("inputs", "weights")},
            **{what: _room_data(getattr(layer, what)) for what in ("forward", "backward")},
        }
        for layer in layers
    ]


def _operand_data(one: Any) -> dict[str, Any]:
    formats = {name: {**asdict(effect), "snr_db": effect.snr} for name, effect in one.effects.items()}
    return {"name": one.name, "top_share": one.top, "largest_over_rms": one.peak, "formats": formats}


def _room_data(room: Room | None) -> dict[str, Any] | None:
    return None if room is None else {"site": room.site, "largest": room.largest, "fp16_room": room.room}
