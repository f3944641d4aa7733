"""The layers of a model on one batch: outliers of what linear layers read, what narrow formats make of it, and FP16's room.

A forward pass shows the operands of each linear layer, x (M, K) and w (F, K), of which both products and norms are made. A
forward and backward pass with a monitor shows the largest value at each rounding to 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.nn.autograd import Tape, selected
from refimpl.nn.op import Op
from refimpl.nn.ops import linear
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.numerics.quantization.registry import SCHEMES, Place
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.numerics.rounding_effects import room_below
from refimpl.precision.context import OpPrecision, Run
from refimpl.precision.recipes import get_recipe
from refimpl.step import Batch, forward_backward
from refimpl.tools.precision_report.counts import kind_of, layer_of, within_layer
from refimpl.training.setup import Training

NARROW = ("fp8", "fp8-rows", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
"""The recipes whose formats are compared: a linear layer's x and w are quantized as for its forward product."""
TOP = 1e-3
"""The share of channels that counts as the top."""
ENOUGH = 2
"""Powers of two below FP16's overflow that a layer should have: a larger loss scale or another batch may take them."""

# -- one tensor --------------------------------------------------------------------------------------------------------


def top_share(x: np.ndarray, top: float = TOP) -> float:
    """Return the share of the sum of squares that is in the top channels, those with the largest sums of squares.

        sum over the top channels of s_k  /  sum over all channels of s_k,      s_k = sum over rows of x_mk^2

    x (M, K): K channels, of which ceil(top K) are the top, at least one. 0 for zeros, NaN for values that are not finite.
    Channels that are alike have ceil(top K) / K. Source: Dettmers et al. 2022, arXiv 2208.07339 (outlier features).
    """
    squares = np.sort(_sums_of_squares(x))[::-1]
    total = float(squares.sum())
    return float(squares[: max(1, math.ceil(top * squares.size))].sum()) / total if total else 0.0


def peak_over_rms(x: np.ndarray) -> float:
    """Return the largest magnitude over the root of the mean square; 0 for zeros, NaN for values that are not finite.

    Between 1, where all magnitudes are equal, and the root of the number of values, where one of them is all there is.
    """
    mean = float(_sums_of_squares(x).sum()) / max(x.size, 1)
    with np.errstate(invalid="ignore"):
        return float(np.abs(x).max(initial=0)) / math.sqrt(mean) if mean else 0.0


def _sums_of_squares(x: np.ndarray) -> np.ndarray:
    """Return the sum of squares of each channel of x (M, K), in FP64."""
    sums = np.zeros(x.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):
        for piece in _pieces(x):
            wide = widen(piece, "fp64")
            sums += np.einsum("mk,mk->k", wide, wide)
    return sums


def _pieces(x: np.ndarray) -> list[np.ndarray]:
    rows = max(1, _VALUES // max(1, x.shape[-1]))
    return [x[start : start + rows] for start in range(0, len(x), rows)]


_VALUES = 1 << 18  # of a tensor that are looked at together


@dataclass(frozen=True)
class Effect:
    """What quantization makes of a tensor.

    error: the relative error, the root of  sum (q - x)^2 / sum x^2  for x that became q. A few large values may make up both
    sums, and then it says nothing of the others: flushed, the share of the nonzero values that became zero, does.
    """

    error: float
    flushed: float

    @property
    def snr(self) -> float:
        """Return the SNR in dB, -20 log10(error): infinite without an error, NaN for values that are not finite."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


def effect_of(x: np.ndarray, scheme: str) -> Effect:
    """Return what a scheme of `quantization/registry.py` makes of x (M, K), quantized along K."""
    q = SCHEMES[scheme](x, 1, Place(ScalingState(), "")).dequantize()
    signal = noise = 0.0
    flushed = nonzero = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for before, after in zip(_pieces(x), _pieces(q), strict=True):
            wide = widen(before, "fp64")
            difference = widen(after, "fp64") - wide
            signal, noise = signal + float((wide * wide).sum()), noise + float((difference * difference).sum())
            flushed += int(np.count_nonzero((after == 0) & (before != 0)))
            nonzero += int(np.count_nonzero(before))
    if not math.isfinite(signal) or math.isnan(noise):
        return Effect(math.nan, math.nan)
    return Effect(math.sqrt(noise / signal) if signal else 0.0, flushed / max(1, nonzero))


# -- all layers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """An operand of a linear layer. name: that of the layer in its block. effects: recipe of NARROW -> what it makes of it."""

    name: str
    top: float
    peak: float
    effects: Mapping[str, Effect]


@dataclass(frozen=True)
class Room:
    """The rounding with the least room below FP16's overflow among those of one pass in one layer.

    site: its site. largest: the largest finite value before it. room: as `room_below` has it; None if values arrived as Inf
    or NaN, so that an earlier one overflowed.
    """

    site: str
    largest: float
    room: int | None

    @property
    def is_little(self) -> bool:
        """Return whether the room is less than ENOUGH powers of two, or values have overflowed."""
        return self.room is None or self.room < ENOUGH


@dataclass
class Layer:
    """What was found in one layer: a block, the embedding, or the head.

    inputs, weights: the operands of its linear layers; those that read the same tensor are one, named after the first.
    forward, backward: the least room of weights and activations, and of gradients, which are times the loss scale; None where
    nothing is rounded to 16 bits.
    """

    name: str
    inputs: list[Operand] = field(default_factory=list)
    weights: list[Operand] = field(default_factory=list)
    forward: Room | None = None
    backward: Room | None = None

    @property
    def worst(self) -> Operand | None:
        """Return the input with the largest share in its top channels, or None."""
        return max(self.inputs, key=lambda operand: operand.top, default=None)

    def worst_effect(self, what: str, recipe: str) -> Effect:
        """Return the largest error and the largest share of zeros that a recipe's formats make. what: inputs or weights."""
        effects = [operand.effects[recipe] for operand in getattr(self, what)]
        return Effect(max(one.error for one in effects), max(one.flushed for one in effects))

    def little_room(self) -> list[tuple[str, Room]]:
        """Return the passes, forward or backward, with little room in FP16, and the rounding."""
        passes = (("forward", self.forward), ("backward", self.backward))
        return [(name, room) for name, room in passes if room is not None and room.is_little]


def inspect_layers(training: Training, batches: Sequence[Batch]) -> list[Layer]:
    """Return what is found in each layer on the first of these micro-batches, in the order of the forward pass.

    The gradients in the state are overwritten; nothing else changes.
    """
    layers: dict[str, Layer] = {}
    training.state.weights_down()
    operands = Operands(training.run.frozen(), training.state.backend.to_host, layers)
    with np.errstate(all="ignore"):
        t = Tape(operands.observed, training.state.weight_views, training.model.tied, record=False)
        training.model.loss(t, *batches[0])
    largest = LargestBySite(training.state.backend.to_host)
    training.set_monitor(largest)
    with np.errstate(all="ignore"):
        training.state.weights_down()
        forward_backward(training.model, batches[:1], training.state, training.loss_scale.scale, training.run.frozen())
    training.set_monitor(None)
    for site, (value, finite) in largest.sites.items():
        _note_room(layers.setdefault(layer_of(site), Layer(layer_of(site))), site, value, finite)
    return sorted(layers.values(), key=_order)


def _order(layer: Layer) -> tuple[int, int]:
    if layer.name.startswith("block "):
        return 1, int(layer.name.removeprefix("block "))
    return (0, 0) if layer.name == "embedding" else (2, 0)


def _note_room(layer: Layer, site: str, largest: float, finite: bool) -> None:
    """Keep the room of a site if it is the least of its pass."""
    what = "backward" if kind_of(site).endswith("gradients") else "forward"
    room = room_below(largest, "fp16")
    if finite and room is None:  # all zero
        return
    new, old = Room(site, largest, room if finite else None), getattr(layer, what)
    if old is None or _urgency(new) < _urgency(old):
        setattr(layer, what, new)


def _urgency(room: Room) -> float:
    """Return a number to sort by: an overflow comes before the values that arrived as Inf or NaN because of it."""
    return -0.5 if room.room is None else room.room


class LargestBySite:
    """The largest value before each rounding to 16 bits, by site: pass it to `Training.set_monitor`.

    sites: site -> the largest finite magnitude, and whether all were finite. Values that are rounded to 8 bits or fewer have
    been divided by a scale of their own, and are left out.
    """

    def __init__(self, to_host: Any = np.asarray) -> None:
        self.to_host = to_host
        self.sites: dict[str, tuple[float, bool]] = {}

    def __call__(self, site: str, before: Array, after: Array) -> None:
        """Note one rounding; the run calls this at each."""
        if FORMATS[format_of(after)].bits <= 8:
            return
        magnitude = np.abs(widen(self.to_host(before), "fp64"))
        finite = np.isfinite(magnitude)
        largest, all_finite = self.sites.get(site, (0.0, True))
        self.sites[site] = max(largest, float(magnitude[finite].max(initial=0))), all_finite and bool(finite.all())


class Operands:
    """Looks at the operands of the linear layers of one forward pass.

    observed: the run for that pass, in which `linear` notes its operands in `layers` before it computes.
    """

    def __init__(self, run: Run, to_host: Any, layers: dict[str, Layer]) -> None:
        self.run, self.to_host, self.layers = run, to_host, layers
        self.observed = replace(run, overrides={**run.overrides, "linear": Op("linear", self._forward, params=linear.params)})
        self._last: Array = None

    def _forward(self, x: Array, w: Array, b: Array | None, p: OpPrecision) -> tuple[Array, Any]:
        name = layer_of(p.place)
        layer = self.layers.setdefault(name, Layer(name))
        inside = within_layer(p.place)
        if x is not self._last:  # q, k and v read the same tensor
            layer.inputs.append(_operand(inside, self.to_host(x).reshape(-1, x.shape[-1]), "x"))
        layer.weights.append(_operand(inside, self.to_host(w), "w"))
        self._last = x
        return selected(linear, self.run, p.place).forward(x, w, b, p=p)


def _operand(name: str, x: np.ndarray, which: str) -> Operand:
    wide: np.ndarray = cast(x, "fp32")  # exact, but for the recipe fp64
    effects = {recipe: effect_of(wide, get_recipe(recipe).policy.row("linear.y").input(which)) for recipe in NARROW}
    return Operand(name, top_share(wide), peak_over_rms(wide), effects)
