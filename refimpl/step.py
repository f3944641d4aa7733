"""One step of mixed-precision training.

What differs between recipes (formats, masters, loss scale) is data in `precision/recipes.py`: no line below asks which recipe
runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.backends.numpy.threads import one_thread_per_product
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
    """The outcome of a step: numbers on the host, 0-d arrays on a device, where reading waits: read them only to log.

    loss: the mean, without S. lr: the learning rate of the update, made or skipped. loss_scale: the S of this step.
    grad_norm: of the unscaled gradients, before clipping. skipped: found_inf.
    """

    loss: Array
    lr: Array
    loss_scale: Array
    grad_norm: Array
    skipped: Array


# In 16 bits, an Inf or NaN is a result that step 3 checks for: NumPy need not warn of it. And the BLAS computes each product on
# one thread, since with several the order of sums could depend on their number.
@np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore")
@one_thread_per_product()
def train_step(
    model: Model,
    batches: Sequence[Batch],
    state: State,
    optimizer: Optimizer,
    loss_scale: LossScale,
    run: Run,
    max_norm: float = math.inf,
) -> StepResult:
    """Train on `batches`, micro-batches of (tokens, targets) and usually one, and update `state` in place.

    Source: Micikevicius et al. 2018, arXiv 1710.03740, sections 3.1 and 3.2. The four steps are numbered as in Raschka,
    'Accelerating Large Language Models with Mixed-Precision Techniques' (2023), which leaves out the lines marked (+).
    PyTorch: scaler.scale(loss).backward(); scaler.unscale_(opt); clip_grad_norm_(...); scaler.step(opt); scaler.update().
    """
    # 1. Weights down: FP32 masters -> 16-bit model weights.
    state.weights_down()

    # 2. Forward and backward in 16 bits.
    #    (+) Backward starts from the loss scale S instead of 1, so that small gradients do not underflow in 16 bits.
    S, lr = loss_scale.scale, optimizer.lr(state)
    loss = forward_backward(model, batches, state, S, run)

    # 3. Gradients up: 16-bit gradients -> FP32, block by block. Only recipes with `main_grads` store them; step 4 widens again.
    #    (+) Is any of them Inf or NaN?  (+) Their norm is computed after the division by S.
    inverse_scale = inverse_of(S)
    found_inf, norm = check_and_measure(state, inverse_scale)

    # 4. Update the FP32 masters, or skip.
    #    (+) Clip by the norm of the unscaled gradients.  (+) If found_inf is set, masters, moments and t stay.  (+) S adapts.
    coefficient = clip_coefficient(norm, max_norm)
    optimizer.update(state, inverse_scale, coefficient, found_inf)
    loss_scale.update(found_inf)

    return StepResult(loss, lr, S, norm, found_inf)


def forward_backward(model: Model, batches: Sequence[Batch], state: State, S: Array, run: Run) -> Array:
    """Run forward and backward over all micro-batches. Leave d(S L)/dw in `state.grads`, and return the mean loss L, 0-d.

    A micro-batch whose share of the mean is 1/n starts backward from S/n, so that the sum of the gradients is that of the mean.
    With several ranks, `reduce` sums gradients and losses over ranks; on one host it returns the loss.
    """
    state.zero_grad()
    total, xp = 0.0, run.backend.xp
    for (tokens, targets), n in zip(batches, divisors(model, batches, state), strict=True):
        tape = Tape(run, state.weight_views, model.tied)
        loss = model.loss(tape, tokens, targets)
        tape.backward(loss, grad_output=divided(S, n, xp), sink=state.accumulate_grad)
        total = total + divided(loss.array, n, xp)
    run.after_step()  # (FP8 with delayed scaling: the largest values of these passes make the next scales, skipped or not)
    return state.reduce(total)
