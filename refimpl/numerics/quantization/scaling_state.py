"""What quantization remembers during a run: the state of delayed scaling, and how far random bits have been used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.philox import random_bits, tensor_stream
from refimpl.numerics.quantization.fp8 import DelayedScaling


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

    def replay(self) -> ScalingState:
        """Return a copy for computing this pass again from here on: it draws the same bits, and remembers nothing."""
        return replace(self, is_frozen=True, _draws=dict(self._draws))

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
