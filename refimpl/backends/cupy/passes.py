"""Fast versions of the passes over flat buffers for a GPU: steps 3 and 4 in three kernels, without waiting for the device.

`state` is an `optim.state.State` on the CuPy backend (`optim` imports `backends`, so its type is not imported here).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.backends.cupy.launch import THREADS, elementwise_grid, number
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of


def measure(state: Any, inverse_scale: Array) -> tuple[Array, Array]:
    """Return for each block of `state.grain` gradients the sum of squares, unscaled, and whether any, or 1/S, is Inf or NaN."""
    xp, grads, grain = state.backend.xp, state.grads, state.layout.grain
    count = -(-grads.size // grain)
    squares, bad = xp.empty(count, np.float32), xp.empty(count, np.bool_)
    sizes = np.int64(grads.size), np.int32(grain)
    state.backend.kernels(format_of(grads)).gradient_norm((count,), (THREADS,), grads, inverse_scale, squares, bad, *sizes)
    return squares, bad


def fold(state: Any, squares: Array, bad: Array) -> tuple[Array, Array]:
    """Return found_inf and the norm, both 0-d."""
    xp = state.backend.xp
    norm, found_inf = xp.empty((), np.float32), xp.empty((), np.bool_)
    kernels = state.backend.kernels(format_of(state.grads))
    kernels.gradient_norm_fold((1,), (THREADS,), squares, bad, norm, found_inf, np.int32(squares.size))
    return found_inf, norm


def adamw(rule: Any, state: Any, inverse_scale: Array, clip: Array | float, scalars: Array, found_inf: Array) -> None:
    """Update whole buffers as `optim.adamw.AdamW` does, in one kernel, which changes nothing where found_inf is set.

    It does not write 16-bit weights: step 1 casts the masters, at 6 more bytes of memory traffic per parameter, of 32.
    """
    beta1, beta2 = rule.betas
    w, m, v, grads = (state.flat(kind) for kind in (state.master_kind, "m", "v", "grads"))
    numbers = [number(x) for x in (1 - beta1, beta2, 1 - beta2, rule.eps)]
    if isinstance(clip, float):
        clip = state.backend.xp.full((), clip, np.float32)
    starts, stops = state.decayed_edges
    state.backend.kernels(format_of(grads)).adamw(
        elementwise_grid(grads.size), (THREADS,), w, m, v, grads, inverse_scale, clip, scalars, found_inf,
        starts, stops, np.int32(len(starts)), *numbers, np.int64(grads.size),
    )  # fmt: skip


CUPY_PASSES: Mapping[str, Any] = {"measure": measure, "fold": fold, "adamw": adamw}
