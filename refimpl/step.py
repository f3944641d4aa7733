"""One step of mixed-precision training: the algorithm, on one page.

Everything that this page names is one short function in one file. What differs between recipes (formats, masters, loss
scale) is data in `recipes.py`; no line below asks which recipe runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.optim.loss_scale import LossScale
from refimpl.optim.micro_batches import divided, divisors
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.state import State
from refimpl.precision.policy import Run

Array = Any
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

    # 2. Through: forward and backward in 16 bits.
    #    (+) Backward starts from the loss scale S instead of 1, so that small gradients do not vanish in 16 bits.
    S, lr = loss_scale.scale, optimizer.lr(state)
    loss = through(model, batches, state, S, run)

    # 3. Gradients up: 16-bit gradients -> FP32, block by block; nothing is stored, step 4 widens each block once more.
    #    (+) Is any of them Inf or NaN?  (+) Their norm is taken after the division by S.
    inverse_scale = inverse_of(S)
    found_inf, norm = check_and_measure(state, inverse_scale)

    # 4. Update the FP32 masters, or skip.
    #    (+) Clip by the norm of the unscaled gradients.  (+) Where found_inf is set nothing moves.  (+) S adapts.
    optimizer.update(state, inverse_scale, clip_coefficient(norm, max_norm), found_inf)
    loss_scale.update(found_inf)

    return StepResult(loss, lr, S, norm, found_inf)


def through(model: Model, batches: Sequence[Batch], state: State, S: Array, run: Run) -> Array:
    """Forward and backward over all micro-batches; leaves d(S L)/dw in `state.grads`, and returns the mean loss L, 0-d.

    A micro-batch that makes up 1/n of the mean is seeded with S/n, so that the sum is the gradient of the mean. (+) With
    several ranks, each has micro-batches of its own, and each has the sum over ranks of its share of the gradients.
    """
    total, xp = 0.0, run.backend.xp
    for i, ((tokens, targets), n) in enumerate(zip(batches, divisors(model, batches, state), strict=True)):
        tape = Tape(run, state.weight_views, model.tied)
        loss = model.loss(tape, tokens, targets)
        tape.backward(loss, seed=divided(S, n, xp), sink=state.gradient_sink(first=i == 0))
        state.reduce_gradients(last=i == len(batches) - 1)
        total = total + divided(loss.array, n / state.ranks, xp)
    run.scales.after_pass()  # (FP8 with delayed scaling: the largest values of this pass make the scales of the next)
    return state.mean_over_ranks(total)
