"""Remarks on the last update of a loss scale, for reports."""

from __future__ import annotations

import math

from refimpl.optim.loss_scale import DynamicLossScale, GradualLossScale, LossScale


def explain(loss_scale: LossScale, before: float, found_inf: bool) -> str:
    """Return a remark on what the last `update` did to the scale and when the scale changes next. Waits for the device.

    before: S before the update. found_inf: whether the gradients of that step had an Inf or NaN.
    """
    if not isinstance(loss_scale, DynamicLossScale):
        return "does not adapt"
    if math.isinf(loss_scale.scale):
        return "infinite in FP32"
    if found_inf:
        return _explain_overflow(loss_scale, before)
    if isinstance(loss_scale, GradualLossScale):
        return _explain_gradual(loss_scale, before)
    return _explain_growth(loss_scale, before)


def _explain_overflow(loss_scale: DynamicLossScale, before: float) -> str:
    scaler, left = loss_scale.scaler, int(loss_scale.hysteresis_tracker)
    product = before * loss_scale.backoff_factor
    if scaler.stops == "at the floor" and bool(loss_scale.exhausted) and before <= scaler.floor:
        return f"an overflow at its floor, {scaler.floor:g}: ends the run"
    if scaler.stops == "to the floor" and bool(loss_scale.exhausted) and product <= scaler.floor:
        return f"stays: {before:g} * {loss_scale.backoff_factor:g} is not above its floor, {scaler.floor:g}: ends the run"
    if scaler.hysteresis > 1 and left:
        return f"an overflow that is tolerated: backs off at {'the next one' if left == 1 else f'number {left} from here'}"
    if int(loss_scale.overflows):
        return f"an overflow that is tolerated: below {scaler.tolerance:.0%} of the steps since it changed"
    if product < scaler.floor:
        return f"{'stays at' if before <= scaler.floor else 'backs off to'} {scaler.floor:g}, its floor"
    if product > scaler.ceiling:
        return f"backs off to {scaler.ceiling:g}, its ceiling"
    return f"{before:g} * {loss_scale.backoff_factor:g}: backs off"


def _explain_growth(loss_scale: DynamicLossScale, before: float) -> str:
    scaler, factor = loss_scale.scaler, loss_scale.growth_factor
    if float(loss_scale.scale) > before:
        at_ceiling = before * factor > scaler.ceiling
        return f"grows to {scaler.ceiling:g}, its ceiling" if at_ceiling else f"{before:g} * {factor:g}: grows"
    if not int(loss_scale.growth_tracker):  # the scale was due to grow
        at_ceiling = before >= scaler.ceiling
        return f"stays at {scaler.ceiling:g}, its ceiling" if at_ceiling else "stays: larger, it would be infinite in FP32"
    n = loss_scale.growth_interval - int(loss_scale.growth_tracker) + (scaler.late != "")
    return f"grows after {n} more good {'step' if n == 1 else 'steps in a row'}"


def _explain_gradual(loss_scale: GradualLossScale, before: float) -> str:
    if float(loss_scale.value) >= loss_scale.scaler.ceiling:
        return f"at {loss_scale.scaler.ceiling:g}, its ceiling"
    if bool(loss_scale.overflowed):
        return f"{before:g} * 2^(1/{loss_scale.growth_interval}): grows a little in every good step"
    return f"{before:g} * {loss_scale.growth_factor:g}: grows in every step until the first overflow"
