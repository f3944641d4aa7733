"""The start of a replay: the number of updates made before, and the loss scale with its counters, as a trace states them."""

from __future__ import annotations

import math

import numpy as np

from refimpl.errors import UsageError
from refimpl.parity.trace import SCALE_STATE, Trace, key
from refimpl.training.setup import Training


def start_from(trace: Trace, training: Training) -> None:
    """Set the number of updates and the loss scale of a run to those that the trace holds at step 0.

    A trace that holds neither begins at the start of a run. One whose moments at step 0 are not zero, or whose 0/4.t is not
    zero, begins in the middle. Errors: UsageError that names what such a trace lacks.
    """
    moments = any(np.any(array != 0) for kind in ("4.m", "4.v") for array in trace.at(0, kind).values())
    t = trace.get(0, "4.t")
    if moments and t is None:
        raise UsageError(
            "the moments at step 0 are not zero, so the trace begins in the middle of a run: "
            "it needs 0/4.t, the number of updates made before"
        )
    if moments and float(t or 0) == 0:
        raise UsageError("0/4.t is 0, but the moments at step 0 are not zero: it must be the number of updates made before")
    begun = t is not None and float(t) > 0
    for kind in ("m", "v"):
        read = any(trace.at(step, point) for step in trace.steps for point in (f"4.{kind}", "4.master"))
        given = moments and trace.at(0, f"4.{kind}")
        if begun and read and not given and kind in training.state.stored:
            raise UsageError(f"0/4.t is {float(t or 0):g}, so the trace begins in the middle of a run: it needs 0/4.{kind}")
    training.state.t = np.asarray(np.int64(0 if t is None else int(t)))
    if training.loss_scale.adapts:
        _start_scale(trace, training, int(training.state.t))


def _start_scale(trace: Trace, training: Training, t: int) -> None:
    """Set the loss scale to that of step 0, unless it is not positive and finite: no run begins with such a scale."""
    stated = {name: trace.get(0, point) for point, name in SCALE_STATE.items()}
    state = training.loss_scale.state_dict()
    needs = f"0/4.t is {t}, so the trace begins in the middle of a run: it needs 0/"
    scales = any(trace.get(step, point) is not None for step in trace.steps for point in ("2.loss_scale", "4.scale"))
    if t and stated["scale"] is None and scales:
        raise UsageError(f"{needs}4.scale, the loss scale at that point")
    # At most t good steps in a row came before: if t and the trace's own steps are too few, S cannot grow.
    can_grow = t + len(trace.steps) >= int(state["growth_interval"])
    if t and stated["_growth_tracker"] is None and can_grow:
        after = f"of {state['growth_interval']} after which it grows"
        raise UsageError(f"{needs}4.growth_tracker, the good steps since the loss scale last changed, {after}")
    overflows = any(trace.get(step, "3.found_inf") for step in trace.steps)
    if t and stated["_hysteresis_tracker"] is None and "_hysteresis_tracker" in state and overflows:
        raise UsageError(f"{needs}4.hysteresis_tracker, the number of overflows until the loss scale is reduced")
    values = {name: float(array) for name, array in stated.items() if array is not None and name in state}
    if not 0 < values.get("scale", 1.0) < math.inf:
        del values["scale"]
    whole = {name: value if name == "scale" else int(value) for name, value in values.items()}
    training.loss_scale.load_state_dict({**state, **whole})


def resume_from(trace: Trace, training: Training, step: int) -> bool:
    """Set the number of updates and the loss scale to those after a step of a trace; return whether it holds all of them."""
    state = training.loss_scale.state_dict()
    points = [point for point, name in SCALE_STATE.items() if name in state and training.loss_scale.adapts]
    if any(trace.get(step, point) is None for point in (*points, "4.t")):
        return False
    there = {key(0, point): trace.tensors[key(step, point)] for point in (*points, "4.t")}
    training.state.t = np.asarray(np.int64(there.pop("0/4.t")))
    if points:
        _start_scale(Trace({}, there), training, 0)
    return True
