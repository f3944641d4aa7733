"""Step 3, gradients up: check the gradients of the scaled loss for Inf and NaN, and compute the norm of the unscaled ones.

This is a pass over the flat buffer in blocks: no FP32 copy of all gradients exists, and the update widens and unscales each
block again (`optimizer.py`). Only recipes that follow Apex O2 and Megatron-LM store that copy, as main_grads.
"""

from __future__ import annotations

import math

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.optim.layout import by_grain
from refimpl.optim.state import State


def inverse_of(scale: Array) -> Array:
    """Return 1/S in FP32: divided in double precision, rounded once. PyTorch: GradScaler.unscale_."""
    return cast(1.0 / widen(scale, "fp64"), "fp32")


def check_and_measure(state: State, inverse_scale: Array) -> tuple[Array, Array]:
    """Return found_inf, whether any gradient or 1/S is Inf or NaN, and the L2 norm of all unscaled gradients. Both are 0-d.

    The check reads the *scaled* gradients, before the multiplication. The norm is a sum of squares in FP32, first over each
    grain of the flat index and then over the grains, so that it depends on the values alone. Finite gradients above 1e19,
    whose squares overflow FP32, make it infinite and the clip coefficient zero, as in PyTorch. Where the recipe has
    main_grads, the unscaled gradients are stored there.

    Source: Micikevicius et al. 2018, arXiv 1710.03740, section 3.2.
    PyTorch: GradScaler.unscale_, then the norm in torch.nn.utils.clip_grad_norm_ (the norm of the tensors' norms, which
    differs by rounding only).
    Differs from the source: 1/S is infinite for S = 0, which a scale without a floor reaches, and for S <= 2^-128. PyTorch
    then updates every weight to NaN; here the step is skipped.
    """
    fast = state.backend.passes if state.math_format == "fp32" and "main_grads" not in state.stored else {}
    squares, bad = fast.get("measure", measure)(state, inverse_scale)
    squares, bad = state.gather_grains(squares, bad)  # with several ranks, those of all
    found_inf, norm = fast.get("fold", fold)(state, squares, bad)
    return found_inf, norm


def measure(state: State, inverse_scale: Array) -> tuple[Array, Array]:
    """Return, per grain: the sum of squares of the unscaled gradients; whether a scaled one, or 1/S, is Inf or NaN.

    Store the unscaled gradients in main_grads, if the recipe has them.
    """
    xp, fmt, keeps = state.backend.xp, state.math_format, "main_grads" in state.stored
    factor = widen(inverse_scale, fmt)
    no_inverse = ~xp.isfinite(factor)

    def of_block(block: slice) -> tuple[Array, Array]:
        scaled = state.backend.widen(state.grads[block], fmt)
        g = scaled * factor
        if keeps:
            state.flat("main_grads")[block][...] = g
        squares = by_grain(g * g, lambda x: x.sum(-1), xp)
        return squares, by_grain(~xp.isfinite(scaled), lambda x: x.any(-1), xp) | no_inverse

    nothing = xp.zeros(0, factor.dtype), xp.zeros(0, np.bool_)  # for a rank whose share is empty
    squares, bad = zip(*(state.each_block(of_block) or [nothing]), strict=True)
    return xp.concatenate(squares), xp.concatenate(bad)


def fold(state: State, squares: Array, bad: Array) -> tuple[Array, Array]:
    """Return found_inf and the norm, given what `measure` returned for all grains."""
    return bad.any(), state.backend.xp.sqrt(squares.sum())


def unscaled(state: State, block: slice, inverse_scale: Array) -> Array:
    """Return the gradients of a block, divided by S, in FP32 (FP64 in recipe fp64): from main_grads, if there are any."""
    if "main_grads" in state.stored:
        return state.flat("main_grads")[block].copy()
    return state.backend.widen(state.grads[block], state.math_format) * widen(inverse_scale, state.math_format)


def clip_coefficient(norm: Array, max_norm: float) -> Array | float:
    """Return min(1, max_norm / (norm + 1e-6)), which scales the unscaled gradients to a norm of at most max_norm.

    max_norm = inf disables clipping. The norm must be that of the unscaled gradients: with S = 65536, that of the scaled ones
    would exceed max_norm in almost every step.
    Errors: UsageError for a max_norm that is not above 0.
    Source: Pascanu et al. 2013, arXiv 1211.5063. PyTorch: torch.nn.utils.clip_grad_norm_.
    """
    if not max_norm > 0:
        raise UsageError(f"max_norm is {max_norm}: it must be above 0; inf means no clipping")
    if math.isinf(max_norm):
        return 1.0
    coefficient = (1.0 / (norm + 1e-6)) * max_norm
    return coefficient.clip(None, 1.0)
