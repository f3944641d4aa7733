"""One step of mixed-precision training: the algorithm, on one page.

What differs between recipes (formats, masters, loss scale) is data in `precision/recipes.py`; no line below asks which recipe
runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.numerics.arrays import Array
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.optim.loss_scale import LossScale
from refimpl.optim.micro_batches import divided, divisors
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.state import State
from refimpl.precision.context import Run

Batch = tuple[Array, Array]


@dataclass(frozen=True)
class StepResult:
    """What happened in a step: 0-d arrays, still on the device; read them when you log, not every step."""

    loss: Array
    lr: Array
    loss_scale: Array
    grad_norm: Array
    skipped: Array


# In 16 bits an Inf or a NaN is a result that step 3 looks for, not a mistake to warn of.
@np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore")
def train_step(
    model: Model,
    batches: Sequence[Batch],
    state: State,
    optimizer: Optimizer,
    loss_scale: LossScale,
    run: Run,
    max_norm: float = math.inf,
) -> StepResult:
    """Train on `batches` (micro-batches of (tokens, targets), usually one), and update `state` in place.

    Source: the four steps of the note 'Mixed-precision training in LLM'. Lines marked (+) are what it leaves out:
    Micikevicius et al. 2018, section 3.2, and for the way that S adapts PyTorch's GradScaler.
    PyTorch: scaler.scale(loss).backward(); scaler.unscale_(opt); clip_grad_norm_(...); scaler.step(opt); scaler.update().
    """
    # 1. Weights down: FP32 masters -> 16-bit model weights.
    state.weights_down()

    # 2. Forward and backward in 16 bits.
    #    (+) Backward starts from the loss scale S instead of 1, so that small gradients do not vanish in 16 bits.
    S, lr = loss_scale.scale, optimizer.lr(state)
    loss = forward_backward(model, batches, state, S, run)

    # 3. Gradients up: 16-bit gradients -> FP32, block by block; step 4 widens each block once more instead of keeping it.
    #    (+) Is any of them Inf or NaN?  (+) Their norm is taken after the division by S.
    inverse_scale = inverse_of(S)
    found_inf, norm = check_and_measure(state, inverse_scale)

    # 4. Update the FP32 masters, or skip.
    #    (+) Clip by the norm of the unscaled gradients.  (+) Where found_inf is set nothing moves.  (+) S adapts.
    optimizer.update(state, inverse_scale, clip_coefficient(norm, max_norm), found_inf)
    loss_scale.update(found_inf)

    return StepResult(loss, lr, S, norm, found_inf)


def forward_backward(model: Model, batches: Sequence[Batch], state: State, S: Array, run: Run) -> Array:
    """Run forward and backward over all micro-batches. Leave d(S L)/dw in `state.grads`, and return the mean loss L, 0-d.

    Backward of a micro-batch that makes up 1/n of the mean starts from S/n, so that the gradients add up to that of the mean.
    With several ranks, `reduce_gradients` sums them over ranks; on one host it does nothing.
    """
    total, xp = 0.0, run.backend.xp
    for i, ((tokens, targets), n) in enumerate(zip(batches, divisors(model, batches, state), strict=True)):
        tape = Tape(run, state.weight_views, model.tied)
        loss = model.loss(tape, tokens, targets)
        tape.backward(loss, grad_output=divided(S, n, xp), sink=state.gradient_sink(first=i == 0))
        state.reduce_gradients(last=i == len(batches) - 1)
        total = total + divided(loss.array, n / state.ranks, xp)
    run.scales.after_pass()  # (FP8 with delayed scaling: the largest values of this pass make the scales of the next)
    return state.mean_over_ranks(total)
