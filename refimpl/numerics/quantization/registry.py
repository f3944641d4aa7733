"""Quantization schemes by name: what a row of a policy may say instead of a format.

    Precision({"x": "e4m3-tensor", "w": "e4m3-tensor"}, "fp32", "bf16")

A scheme is a function (tensor, axis that the product sums over, Place) -> QuantizedTensor. What schemes remember from step to
step, and where their random bits come from, is in `ScalingState`, one per run and kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.philox import random_bits, tensor_stream
from refimpl.numerics.quantization.fp8 import DelayedScaling, quantize_blocks, quantize_rows, quantize_tensor, quantize_tiles
from refimpl.numerics.quantization.mx import quantize_mx
from refimpl.numerics.quantization.nvfp4 import quantize_nvfp4
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor
from refimpl.numerics.quantization.rotation import BLOCK as ROTATED
from refimpl.numerics.quantization.rotation import random_signs, rotate


class Place(NamedTuple):
    """Where a tensor is quantized: the run's scaling state, and the tensor's name, e.g. 'transformer.h.0.mlp.c_fc.x'."""

    scales: ScalingState
    name: str


Scheme = Callable[[Array, int, Place], QuantizedTensor]


def _tensor(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take one scale for the tensor, from its own largest magnitude."""
    return quantize_tensor(x, fmt)


def _delayed(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take one scale for the tensor, from its largest magnitude in past steps."""
    return place.scales.delayed_scaling(place.name, fmt).quantize(x)


def _rows(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a scale for each row (column) that the product sums over."""
    return quantize_rows(x, fmt, axis)


def _tiles(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a scale for each 128 elements that the product sums over."""
    return quantize_tiles(x, fmt, axis)


def _blocks(fmt: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a scale for each 128 x 128 elements."""
    return quantize_blocks(x, fmt)


def _mx(fmt: str, rule: str, x: Array, axis: int, place: Place) -> QuantizedTensor:
    """Take a power of two for each 32 elements."""
    return quantize_mx(x, fmt, axis, rule)


def _nvfp4(x: Array, axis: int, place: Place, square: bool = False, stochastic: bool = False) -> QuantizedTensor:
    """Take an e4m3 scale for each 16 (or 16 x 16) elements, and an FP32 scale for the tensor."""
    bits = place.scales.random_bits(place.name, x.shape) if stochastic else None
    return quantize_nvfp4(x, axis, square=square, bits=bits)


SCHEMES: Mapping[str, Scheme] = {
    "e4m3-tensor": partial(_tensor, "e4m3"),
    "e5m2-tensor": partial(_tensor, "e5m2"),
    "e4m3-delayed": partial(_delayed, "e4m3"),
    "e5m2-delayed": partial(_delayed, "e5m2"),
    "e4m3-rows": partial(_rows, "e4m3"),
    "e4m3-1x128": partial(_tiles, "e4m3"),
    "e4m3-128x128": partial(_blocks, "e4m3"),
    **{f"mx-{fmt}-{rule}": partial(_mx, fmt, rule)
       for fmt in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1") for rule in ("floor", "ceil", "rceil", "even")},
    "nvfp4": _nvfp4,
    "nvfp4-16x16": partial(_nvfp4, square=True),
    "nvfp4-sr": partial(_nvfp4, stochastic=True),
    "nvfp4-rotated": _nvfp4,
    "nvfp4-rotated-sr": partial(_nvfp4, stochastic=True),
}  # fmt: skip
"""Name in a policy -> scheme. The functions that they call name their sources."""

ROTATING = frozenset({"nvfp4-rotated", "nvfp4-rotated-sr"})
"""Schemes that rotate a tensor first. Both operands of a product need one of them, so that the rotations cancel."""


@dataclass
class ScalingState:
    """What quantization remembers during one run.

    seed, passes: the random bits depend on the seed and on the number of training passes so far. delayed: the state of delayed
    scaling, by tensor name and format. is_frozen: use the state but do not change it (evaluation).
    over_ranks: maps the magnitudes of one rank to the largest of all ranks (`Comm.largest`), so that all have the same scales.
    """

    seed: int = 0
    passes: int = 0
    delayed: dict[str, DelayedScaling] = field(default_factory=dict)
    is_frozen: bool = False
    over_ranks: Callable[[Array], Array] = lambda largest: largest
    _draws: dict[str, int] = field(default_factory=dict)
    _streams: dict[int, str] = field(default_factory=dict, repr=False)

    def quantize(self, scheme: str, x: Array, axis: int, name: str) -> QuantizedTensor:
        """Quantize the tensor of that name. axis: the axis that the product sums over."""
        return SCHEMES[scheme](self.source(scheme, x, axis), axis, Place(self, name))

    def source(self, scheme: str, x: Array, axis: int) -> Array:
        """Return what a scheme rounds: x, rotated where the scheme rotates and the summed axis is a multiple of 16."""
        return rotate(x, random_signs(self.seed), axis) if scheme in ROTATING and x.shape[axis] % ROTATED == 0 else x

    def delayed_scaling(self, name: str, fmt: str) -> DelayedScaling:
        """Return the state of one tensor in one format, new at its first use."""
        key = f"{name}.{fmt}"
        state = self.delayed.get(key) or DelayedScaling(fmt)
        if self.is_frozen:
            return replace(state, amax_history=state.amax_history.copy())
        self.delayed[key] = state
        return state

    def random_bits(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return 32 random bits per element, different for each tensor, each use of it in a pass, and each pass.

        Errors: ValueError for a tensor whose name has the same stream as another's, and would get the same bits.
        """
        stream = tensor_stream(name)
        if self._streams.setdefault(stream, name) != name:
            raise ValueError(f"{name} and {self._streams[stream]} would get the same random bits: rename one of them")
        use = self._draws[name] = self._draws.get(name, -1) + 1
        n = int(np.prod(shape))
        return random_bits(self.seed, self.passes, use << 40, n, stream).reshape(shape)

    def after_pass(self) -> None:
        """Make the scales of the next pass from the largest magnitudes of this one. Does nothing if frozen."""
        self._draws.clear()
        if self.is_frozen:
            return
        states = [self.delayed[name] for name in sorted(self.delayed)]
        if states:
            largest = self.over_ranks(np.array([state.amax_history[0] for state in states], np.float32))
            for state, magnitude in zip(states, largest, strict=True):
                state.amax_history[0] = magnitude
                state.update()
        self.passes += 1

    def frozen(self) -> ScalingState:
        """Return a copy for evaluation, which remembers nothing."""
        return replace(self, is_frozen=True, _draws={})

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that a checkpoint keeps beside `passes`: name.format.array -> array."""
        return {f"{name}.{key}": array for name, state in self.delayed.items() for key, array in state.arrays().items()}

    def load(self, passes: int, arrays: Mapping[str, Array]) -> None:
        """Restore `passes`, and what `arrays` returned. Errors: ValueError, before any change, for missing or wrong arrays."""
        kept: dict[str, dict[str, Array]] = {}
        for name, array in arrays.items():
            tensor, _, key = name.rpartition(".")
            kept.setdefault(tensor, {})[key] = array.copy()
        delayed = {}
        for tensor, state in kept.items():
            name, _, fmt = tensor.rpartition(".")
            fresh = DelayedScaling(fmt)
            if not name or state.keys() != fresh.arrays().keys():
                raise ValueError(f"{tensor} is not the complete state of a tensor: {', '.join(state)}")
            for key, array in fresh.arrays().items():
                if state[key].ndim != array.ndim or state[key].dtype != array.dtype or not state[key].size:
                    raise ValueError(f"{tensor}.{key} is {state[key].dtype} {state[key].shape}")
            delayed[tensor] = DelayedScaling(fmt, len(state["amax_history"]), **state)
        self.passes, self.delayed = passes, delayed
