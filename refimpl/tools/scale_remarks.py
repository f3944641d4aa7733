"""Remarks on the last update of a loss scale, for reports."""

from __future__ import annotations

import math

from refimpl.optim.loss_scale import DynamicLossScale, LossScale
from refimpl.optim.loss_scalers import SCALER_RULES, GradualLossScale, ProjectLossScale, ScalerRule


def explain(loss_scale: LossScale, before: float, found_inf: bool) -> str:
    """Return a remark on what the last `update` did to the scale and when the scale changes next. Waits for the device.

    before: S before the update. found_inf: whether the gradients of that step had an Inf or NaN.
    """
    if not isinstance(loss_scale, DynamicLossScale):
        return "does not adapt"
    if math.isinf(loss_scale.scale):
        return "infinite in FP32"
    if found_inf:
        tolerated = _explain_exception(loss_scale, before) if isinstance(loss_scale, ProjectLossScale) else ""
        return tolerated or f"{before:g} * {loss_scale.backoff_factor:g}: backs off"
    if isinstance(loss_scale, GradualLossScale):
        return _explain_gradual(loss_scale, before)
    rule = loss_scale.rule if isinstance(loss_scale, ProjectLossScale) else SCALER_RULES["torch"]
    return _explain_good_step(loss_scale, rule, before)


def _explain_exception(loss_scale: ProjectLossScale, before: float) -> str:
    """Return why an overflow did not multiply S by the backoff factor, or '' if it did."""
    rule, left = loss_scale.rule, int(loss_scale.left)
    product = before * loss_scale.backoff_factor
    if rule.stops == "at the floor" and bool(loss_scale.exhausted) and before <= rule.floor:
        return f"an overflow at its floor, {rule.floor:g}: ends the run"
    if rule.stops == "to the floor" and bool(loss_scale.exhausted) and product <= rule.floor:
        return f"stays: {before:g} * {loss_scale.backoff_factor:g} is not above its floor, {rule.floor:g}: ends the run"
    if rule.hysteresis > 1 and left:
        return f"an overflow that is tolerated: backs off at {'the next one' if left == 1 else f'number {left} from here'}"
    if int(loss_scale.overflows):
        return f"an overflow that is tolerated: below {rule.tolerance:.0%} of the steps since it changed"
    if product < rule.floor:
        return f"{'stays at' if before <= rule.floor else 'backs off to'} {rule.floor:g}, its floor"
    if product > rule.ceiling:
        return f"backs off to {rule.ceiling:g}, its ceiling"
    return ""


def _explain_good_step(loss_scale: DynamicLossScale, rule: ScalerRule, before: float) -> str:
    factor = loss_scale.growth_factor
    if float(loss_scale.scale) > before:
        at_ceiling = before * factor > rule.ceiling
        return f"grows to {rule.ceiling:g}, its ceiling" if at_ceiling else f"{before:g} * {factor:g}: grows"
    if not int(loss_scale.good_steps):  # the scale was due to grow
        at_ceiling = before >= rule.ceiling
        return f"stays at {rule.ceiling:g}, its ceiling" if at_ceiling else "stays: larger, it would be infinite in FP32"
    n = loss_scale.growth_interval - int(loss_scale.good_steps) + (rule.late != "")
    return f"grows after {n} more good {'step' if n == 1 else 'steps in a row'}"


def _explain_gradual(loss_scale: GradualLossScale, before: float) -> str:
    if float(loss_scale.scale) >= loss_scale.rule.ceiling:
        return f"at {loss_scale.rule.ceiling:g}, its ceiling"
    if bool(loss_scale.overflowed):
        return f"{before:g} * 2^(1/{loss_scale.growth_interval}): grows a little in every good step"
    return f"{before:g} * {loss_scale.growth_factor:g}: grows in every step until the first overflow"
