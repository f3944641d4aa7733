"""Known mistakes in steps 3 and 4: gradients up, and the update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of
from refimpl.optim.adamw import AdamW
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.optim.loss_scale import DynamicLossScale
from refimpl.optim.state import State
from refimpl.parity.hooks import UpdateArguments, WrappedOptimizer, plain_optimizer
from refimpl.parity.known_mistake import Mistake, need
from refimpl.parity.mistakes_forward import change_scale
from refimpl.training.setup import Training

# -- 3. gradients up, and what step 4 makes of them -------------------------------------------------------------------


def _has_loss_scale(training: Training) -> None:
    need(training.loss_scale.adapts or float(training.loss_scale.scale) != 1, "a loss scale")


def _unscales_in_update(training: Training) -> None:
    _has_loss_scale(training)
    need("main_grads" not in training.state.stored, "a recipe that unscales in the update, not into main_grads")


def _change_update(training: Training, change: Callable[[State, Array, Array | float, Array], UpdateArguments]) -> None:
    training.optimizer = WrappedOptimizer(training.optimizer, change)


def _scaled_clip(training: Training, state: State, inverse_scale: Array) -> Array | float:
    """Return the clip coefficient computed from the norm of the scaled gradients."""
    _, scaled_norm = check_and_measure(state, training.state.backend.xp.ones_like(inverse_scale))
    return clip_coefficient(scaled_norm, training.max_norm)


def _unscale_after_clip(training: Training) -> None:
    _unscales_in_update(training)
    need(math.isfinite(training.max_norm), "--clip above 0")
    one = training.state.backend.xp.ones((), dtype_of(training.state.math_format))
    _change_update(training, lambda state, inverse, clip, found: (inverse * _scaled_clip(training, state, inverse), one, found))


def _no_unscale(training: Training) -> None:
    _unscales_in_update(training)

    def change(state: State, inverse: Array, clip: Array | float, found: Array) -> UpdateArguments:
        return state.backend.xp.ones_like(inverse), _scaled_clip(training, state, inverse), found

    _change_update(training, change)


def _unscale_twice(training: Training) -> None:
    _unscales_in_update(training)
    _change_update(training, lambda state, inverse, clip, found: (inverse * inverse, clip, found))


def _ignore_inf(training: Training) -> None:
    _has_loss_scale(training)
    _change_update(training, lambda state, inverse, clip, found: (inverse, clip, state.backend.xp.zeros_like(found)))


def _t_advances_on_skip(training: Training) -> None:
    _has_loss_scale(training)
    last = training.optimizer.schedule.steps - 1

    def change(state: State, inverse: Array, clip: Array | float, found: Array) -> UpdateArguments:
        state.t = state.backend.xp.minimum(state.t + found, last)
        return inverse, clip, found

    _change_update(training, change)


class EveryStepSchedule(WrappedOptimizer):
    """A schedule that counts steps, skipped ones too, while Adam counts updates."""

    skipped = 0

    def lr(self, state: State) -> Array:
        self._plan(state)
        return super().lr(state)

    def update(self, state: State, inverse_scale: Array, clip: Array | float, found_inf: Array) -> None:
        self._plan(state)
        super().update(state, inverse_scale, clip, found_inf)
        self.skipped += int(state.backend.to_host(found_inf))

    def _plan(self, state: State) -> None:
        """Set the next update's learning rate to that of the number of steps."""
        optimizer, t = plain_optimizer(self), int(state.backend.to_host(state.t))
        rate = optimizer.schedule(t + self.skipped)
        optimizer.learning_rates[t] = rate
        optimizer.scalars[t] = optimizer.xp.asarray(np.array(optimizer.rule.scalars(rate, t + 1)))


def _scheduler_steps_on_skip(training: Training) -> None:
    _has_loss_scale(training)
    need(training.loss_scale.adapts, "a loss scale that adapts, such as dynamic")
    training.optimizer = EveryStepSchedule(training.optimizer, lambda state, *arguments: arguments)


def _unscale_by_updated_scale(training: Training) -> None:
    _unscales_in_update(training)
    need(training.loss_scale.adapts, "a loss scale that adapts, such as dynamic")

    def change(state: State, inverse: Array, clip: Array | float, found: Array) -> UpdateArguments:
        updated = copy.copy(training.loss_scale)
        updated.update(found)
        inverse = inverse_of(updated.scale)
        _, norm = check_and_measure(state, inverse)
        return inverse, clip_coefficient(norm, training.max_norm), found

    _change_update(training, change)


class UnloadedScale(DynamicLossScale):
    """A loss scale that is not restored from a checkpoint."""

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Load nothing."""


def _scaler_not_restored(training: Training) -> None:
    change_scale(training, UnloadedScale)


class GrowOnlyScale(DynamicLossScale):
    """A loss scale that is never told of an overflow, so that it only grows."""

    def update(self, found_inf: Array) -> None:
        """Count every step as a good one."""
        super().update(found_inf & False)


def _scale_never_backs_off(training: Training) -> None:
    change_scale(training, GrowOnlyScale)


# -- 4. update ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpsInsideRoot(AdamW):
    """Adam with sqrt(v + eps) instead of sqrt(v) + eps, so that eps = 1e-8 acts as 1e-4."""

    def update_block(self, w: Array, g: Array, moments: Sequence[Array], scalars: Array, xp: Any) -> None:
        (m, v), (beta1, beta2) = moments, self.betas
        m += (1 - beta1) * (g - m)
        v *= beta2
        v += (1 - beta2) * g * g
        w -= scalars[1] * m / xp.sqrt(v / (scalars[2] * scalars[2]) + self.eps)


@dataclass(frozen=True)
class CoupledDecay(AdamW):
    """Adam with L2 regularization: the decay goes through the moments, and weights with large gradients decay less."""

    def decay(self, w: Array, g: Array, scalars: Array) -> None:
        g += self.weight_decay * w


@dataclass(frozen=True)
class NoBiasCorrection(AdamW):
    """Adam with uncorrected moments: the first update is (1 - beta1) / sqrt(1 - beta2) times as large."""

    def scalars(self, lr: float, t: int) -> tuple[float, ...]:
        return super().scalars(lr, t)[0], lr, 1.0


def _rule(kind: type[AdamW]) -> Callable[[Training], None]:
    def make(training: Training) -> None:
        rule = training.optimizer.rule
        need(isinstance(rule, AdamW), "--optimizer adamw")
        if kind is CoupledDecay:
            need(getattr(rule, "weight_decay", 0) > 0, "--weight-decay above 0")
        training.optimizer.use(kind(**{f.name: getattr(rule, f.name) for f in fields(rule)}))  # type: ignore[arg-type]

    return make


def _decay_all(training: Training) -> None:
    need(getattr(training.optimizer.rule, "weight_decay", 0) > 0, "--weight-decay above 0")
    training.state.decayed = ((0, training.state.layout.size),)


def _eps_in_16_bits(training: Training) -> None:
    rule = training.optimizer.rule
    need(isinstance(rule, AdamW), "--optimizer adamw")
    assert isinstance(rule, AdamW)
    eps = float(widen(cast(training.state.backend.xp.asarray(rule.eps), "fp16"), "fp32"))  # 1e-8 is below FP16's 6e-8: zero
    training.optimizer.use(replace(rule, eps=eps))


UPDATE = (
    Mistake("no-unscale", "the gradients are never divided by the loss scale",
            "hidden by Adam and clipping, which cancel any factor; with SGD and no clipping the run diverges",
            "3.unscaled", _no_unscale),
    Mistake("unscale-twice", "the gradients are divided by the loss scale twice",
            "with SGD learning stops; Adam hides it unless gradients fall below eps", "3.unscaled", _unscale_twice),
    Mistake("unscale-by-updated-scale", "gradients are divided by the scale after its update, not by that of their loss",
            "after the scale has grown, one step uses half the gradient, which Adam and clipping hide", "3.unscaled",
            _unscale_by_updated_scale),
    Mistake("ignore-inf", "an Inf or a NaN in the gradients does not skip the step",
            "the first overflow makes weights NaN, and the loss stays NaN", "3.found_inf", _ignore_inf),
    Mistake("unscale-after-clip", "gradients are clipped while they are still scaled, and divided afterwards",
            "each step is clipped S times too strongly: SGD does not learn; Adam hides it until updates reach eps",
            "3.unscaled",
            _unscale_after_clip),
    Mistake("scale-never-backs-off", "the loss scale is not lowered after an overflow",
            "from the first overflow on, every step is skipped", "4.scale", _scale_never_backs_off),
    Mistake("scaler-not-restored", "a resumed run begins with a new loss scale, not with that of its checkpoint",
            "after each resume, steps are skipped until the scale has come down again", "2.loss_scale",
            _scaler_not_restored),
    Mistake("t-advances-on-skip", "a skipped step counts as an update",
            "bias corrections and learning rate are a step ahead", "4.lr", _t_advances_on_skip),
    Mistake("scheduler-steps-on-skip", "the learning rate's schedule counts skipped steps, while Adam does not",
            "the learning rate is a step further ahead after each overflow", "4.lr", _scheduler_steps_on_skip),
    Mistake("decay-all", "norms and biases decay too, not only matrices",
            "gains of norms drift from 1 toward 0, a little in each step", "4.master", _decay_all),
    Mistake("eps-inside-root", "Adam divides by sqrt(v + eps), not by sqrt(v) + eps",
            "parameters with gradients below 1e-4 hardly move", "4.master", _rule(EpsInsideRoot)),
    Mistake("eps-in-16-bits", "Adam's eps is stored in FP16, where 1e-8 is zero",
            "0/0 = NaN for a parameter whose gradients were all zero", "4.master", _eps_in_16_bits),
    Mistake("coupled-decay", "weight decay is added to the gradient (Adam with L2), not to the weight (AdamW)",
            "weights with large gradients are decayed less than the others", "4.m", _rule(CoupledDecay)),
    Mistake("no-bias-correction", "Adam's moments are not corrected for their start at zero",
            "the first updates are too small or too large", "4.master", _rule(NoBiasCorrection)),
)  # fmt: skip
"""The mistakes in the order of the step's lines that they change."""
