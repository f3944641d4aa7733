"""Fast versions of updates for the host, with the same bits as the rules of the same names in `optim/`.

New arrays for the terms of a formula would cost as much as its arithmetic, so each term overwrites one that is not needed any
more. `state` is an `optim.state.State` (`optim` imports `backends`, so its type is not imported here) whose masters and moments
are FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array


def adamw(rule: Any, state: Any, inverse_scale: Array, clip: Array | float, scalars: Array, found_inf: Array) -> None:
    """Update masters and moments as `optim.adamw.AdamW` does."""
    (beta1, beta2), (_, step_size, root_correction) = rule.betas, scalars

    def formula(w: Array, g: Array, m: Array, v: Array) -> None:
        x = g - m
        x *= 1 - beta1
        m += x
        v *= beta2
        np.multiply(g, 1 - beta2, out=x)
        x *= g
        v += x
        np.sqrt(v, out=x)
        x /= root_correction
        x += rule.eps
        np.multiply(m, step_size, out=g)
        g /= x
        w -= g

    _each_block(formula, rule, state, inverse_scale, clip, scalars)


def sgd(rule: Any, state: Any, inverse_scale: Array, clip: Array | float, scalars: Array, found_inf: Array) -> None:
    """Update masters and moments as `optim.sgd.SGD` does."""
    _, lr = scalars

    def with_momentum(w: Array, g: Array, m: Array) -> None:
        m *= rule.momentum
        m += g
        np.multiply(m, lr, out=g)
        w -= g

    def without(w: Array, g: Array) -> None:
        g *= lr
        w -= g

    _each_block(with_momentum if rule.momentum else without, rule, state, inverse_scale, clip, scalars)


def _each_block(
    formula: Callable[..., None], rule: Any, state: Any, inverse_scale: Array, clip: Array | float, scalars: Array
) -> None:
    """Unscale and clip the gradients, decay the masters, and apply `formula` to them, block by block."""

    def update(block: slice) -> None:
        w, *moments = (state.flat(kind)[block] for kind in (state.master_kind, *rule.moments))
        g = state.backend.widen(state.grads[block], "fp32") * inverse_scale
        g *= clip
        for start, stop in state.decayed:
            decayed = w[max(start - block.start, 0) : max(stop - block.start, 0)]
            decayed *= scalars[0]
        formula(w, g, *moments)

    state.each_block(update)
