"""Step 3, gradients up: 16-bit gradients of the scaled loss -> FP32, checked for Inf/NaN, unscaled, measured.

It is a pass over the flat buffer in blocks, not an array: no FP32 copy of all gradients ever exists. The update widens
and unscales each block once more (`optim`). Only recipes after Apex O2 and Megatron-LM keep that copy, as main_grads.
"""

from __future__ import annotations

import math

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.optim.state import State, blocks, by_grain


def inverse_of(scale: Array) -> Array:
    """1/S as one fp32 number: divided in double precision, rounded once. PyTorch: GradScaler.unscale_."""
    return cast(1.0 / widen(scale, "fp64"), "fp32")


def check_and_measure(state: State, inverse_scale: Array) -> tuple[Array, Array]:
    """found_inf: whether any gradient is Inf or NaN, or 1/S is; norm: the L2 norm of all unscaled gradients. Both 0-d.

    The check looks at the *scaled* gradients, before the multiplication. The norm is a sum of squares in FP32: sums over
    fixed grains of the flat index, and then the sum of those, so that it depends on nothing but the values. Finite gradients
    beyond 1e19, whose squares overflow FP32, make it infinite and the clip coefficient zero, as in PyTorch.

    1/S is infinite for an S of 0, which a scale without a floor reaches, and below 2^-128. Every update would be NaN then.
    Differs from the source: PyTorch makes that update; here such a step is skipped.

    Source: Micikevicius et al. 2018, section 3.2. PyTorch: GradScaler.unscale_, then the norm that
    torch.nn.utils.clip_grad_norm_ computes (there: of the norms of the tensors; equal but for rounding).
    """
    passes, plain = state.backend.passes, state.math_format == "fp32" and "main_grads" not in state.stored
    squares, bad = (passes.get("measure", measure) if plain else measure)(state, inverse_scale)
    squares, bad = state.of_all_ranks(squares, bad)
    found_inf, norm = (passes.get("fold", fold) if plain else fold)(state, squares, bad)
    return found_inf, norm


def measure(state: State, inverse_scale: Array) -> tuple[Array, Array]:
    """Of each grain of the gradients: the sum of squares of the unscaled ones; whether a scaled one, or 1/S, is Inf or NaN."""
    xp, fmt, keeps = state.backend.xp, state.math_format, "main_grads" in state.stored
    factor = widen(inverse_scale, fmt)
    no_inverse = ~xp.isfinite(factor)

    def of_block(block: slice) -> tuple[Array, Array]:
        scaled = widen(state.block("grads", block), fmt)
        g = scaled * factor
        if keeps:
            state.block("main_grads", block)[...] = g
        squares = by_grain(g * g, lambda x: x.sum(-1), xp)
        return squares, by_grain(~xp.isfinite(scaled), lambda x: x.any(-1), xp) | no_inverse

    nothing = xp.zeros(0, factor.dtype), xp.zeros(0, np.bool_)  # what a rank finds that has no share
    squares, bad = zip(*(state.each_block(of_block) or [nothing]), strict=True)
    return xp.concatenate(squares), xp.concatenate(bad)


def fold(state: State, squares: Array, bad: Array) -> tuple[Array, Array]:
    """found_inf and the norm from what `measure` found in all grains."""
    return bad.any(), state.backend.xp.sqrt(squares.sum())


def unscaled(state: State, block: slice, inverse_scale: Array) -> Array:
    """The FP32 gradients of a block, divided by S: made from the 16-bit ones, or a copy where the state keeps them."""
    if "main_grads" in state.stored:
        return state.block("main_grads", block).copy()
    return widen(state.block("grads", block), state.math_format) * widen(inverse_scale, state.math_format)


def clip_coefficient(norm: Array, max_norm: float) -> Array | float:
    """min(1, max_norm / (norm + 1e-6)): what the unscaled gradients are multiplied by so that their norm is at most max_norm.

    max_norm = inf means no clipping. Clipping scaled gradients instead would clip almost every step.
    Source: Pascanu et al. 2013, arXiv 1211.5063. PyTorch: torch.nn.utils.clip_grad_norm_.
    """
    if math.isinf(max_norm):
        return 1.0
    coefficient = (1.0 / (norm + 1e-6)) * max_norm
    return coefficient.clip(None, 1.0)


def first_non_finite(state: State) -> str | None:
    """The first parameter whose gradient holds an Inf or a NaN, for a message; waits for the device, and for all ranks."""
    first = state.layout.size
    for block in blocks(state.local_slice):
        gradients = state.block("grads", block)
        bad = ~np.isfinite(state.backend.to_host(widen(gradients, state.math_format)))
        if bad.any():
            first = block.start + int(bad.argmax())
            break
    first = state.least_over_ranks(first)
    return state.layout.name_at(first) if first < state.layout.size else None
