"""The judge: does each step of a trace follow the recipe, and if not, where does it depart, and why?

Our code replays every step *from the trace's own values*: it starts from the trace's masters and moments before the step, on
the trace's batch, and after each stage the trace's tensors replace ours. So no difference accumulates, and the bound of each
point covers that point alone (`tolerances.py`). Parameters and operations are judged one by one: a tensor that is missing
affects only those that depend on it. Tensors that cannot be judged are listed with the reason (`coverage.py`).

A departure is explained by replaying with each known mistake (`mistakes.py`): the mistakes with which everything up
to the departure is within its bounds are named.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from refimpl.backends.choose import ON_HOST
from refimpl.backends.numpy.backend import NUMPY
from refimpl.errors import UsageError
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.parity.findings import Finding, find, without_overflows
from refimpl.parity.hooks import plain_optimizer
from refimpl.parity.mistakes import MISTAKES, inject
from refimpl.parity.operations import Basis, Operation, bases, operations_of, together
from refimpl.parity.replay_start import resume_from, start_from
from refimpl.parity.tolerances import Bounds, U, fp64, l2, norm_error, update_bound
from refimpl.parity.trace import BY_PLACE, POINTS, SCALE_STATE, Recorder, Trace, in_batch, key, like, split_batch
from refimpl.parity.trace_checks import checked
from refimpl.parity.trace_settings import OWN_RATES, stated
from refimpl.precision.policy_variants import ATTENTION
from refimpl.precision.recipes import RECIPES
from refimpl.step import forward_backward
from refimpl.training.config import Config
from refimpl.training.progress_bar import Tick, no_tick

JUDGED = tuple(
    name for name, recipe in RECIPES.items() if recipe.policy.in_formats and {*recipe.state_encodings().values()} <= {*FORMATS}
)
"""Recipes that the bounds are derived for: every rounding is to nearest, to a format, and sums are in FP32."""


# -- the replay of a step ----------------------------------------------------------------------------------------------


class ByUpdate:
    """A table of any length, indexed by the number of updates made: a row is computed when it is read."""

    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row, self.changed = row, dict[int, Any]()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, t: Any) -> np.ndarray:
        return np.array(self.changed.get(int(t), self.row(int(t))), np.float64)

    def __setitem__(self, t: Any, row: Any) -> None:
        self.changed[int(t)] = row


class Judge:
    """Replays the steps of a trace under one configuration, with or without a mistake, and yields one finding per tensor.

    `training` carries state from step to step: the number of updates, the loss scale with its counters, and whatever a mistake
    fails to reset. `lost` says why the number of updates and the loss scale are not known; it is '' while they are.
    `reasons` says of each tensor that was not judged why; it is complete when all findings have been read.

    The optimizer, schedule and loss scale that a trace states, and its number of micro-batches, replace the configuration's.
    `notes` lists these changes and the names that were mapped.

    kernels: operations that the judged program is known to compute otherwise than by their definitions: those stand in place.
    Errors: UsageError for a recipe that no bounds are derived for, and for anything malformed in the trace.
    """

    def __init__(
        self, config: Config, theirs: Trace, mistake: str = "none", kernels: Mapping[str, Op] = MappingProxyType({})
    ) -> None:
        if config.recipe not in JUDGED:
            raise UsageError(f"traces of recipe {config.recipe} cannot be judged, only those of {', '.join(JUDGED)}")
        config, changed = stated(config, theirs.settings)
        model = config.make_model()
        self.theirs, mapped = checked(theirs, model)
        self.operations: list[Operation] = operations_of(model)
        # Inputs of attention: their gradients are rounded on the way, so that they can overflow without being large.
        self._inside = {place for op in self.operations if op.kind.endswith("attention") for place in op.inputs}
        n = max((len(self.theirs.inputs(step) or ()) for step in self.theirs.steps), default=0)
        if n and n != config.grad_accum:
            config, changed = replace(config, grad_accum=n), [*changed, f"the trace has {n} micro-batches per step"]
        self.notes = [*mapped, *changed]
        self.own_rates = theirs.settings.get("schedule") == OWN_RATES
        backend = ON_HOST.get(config.backend, NUMPY)  # a trace from a device is judged on the host
        self.training, self.ours = config.make_training(backend), Trace()
        self.training.run.overrides = {**kernels}
        self.recorder = Recorder(self.training, self.ours, follow=self.theirs)
        inject(mistake, self.training)
        start_from(self.theirs, self.training)
        self.lost = ""
        self.reasons: dict[str, str] = {}

    def findings(self, tick: Tick = no_tick) -> Iterator[Finding]:
        """Yield a finding for each tensor of each step, in the order in which a step computes them.

        tick: callback after each step.
        """
        previous = 0
        for step in self.theirs.steps:
            if step != previous + 1:
                self.lost = f"step {previous + 1} is missing"
            self.recorder.step = previous = step
            with np.errstate(all="ignore"):
                yield from self._step(step)
            tick()

    def _step(self, step: int) -> Iterator[Finding]:
        training, theirs = self.training, self.theirs
        unknown = self._put_states(step - 1)
        yield from self._weights(step)
        if not self.lost:
            self.recorder.put("2.loss_scale", "", training.loss_scale.scale)
            yield from self._equal(step, "2.loss_scale")
        self._give_reason(step, "2.loss_scale", self.lost)
        S, no_scale = theirs.get(step, "2.loss_scale"), ""
        if S is None:
            S = training.loss_scale.scale
            no_scale = "2.loss_scale is missing" if self.lost and training.loss_scale.adapts else ""
        S = cast(S, "fp32")
        weights = {name: f"1.weights of {name} is missing" for name in self._unread}
        yield from self._forward_backward(step, S, weights, no_scale)
        found = yield from self._update(step, S, no_scale, unknown)
        yield from self._counters(step, found)

    def _put_states(self, step: int) -> dict[tuple[str, str], str]:
        """Set our masters and moments to the trace's after a step. Return (kind, parameter) -> message for those missing."""
        state, unknown = self.training.state, dict[tuple[str, str], str]()
        for kind in ("m", "v", "master"):
            buffer = state.master if kind == "master" else state.buffers.get(kind)
            if buffer is None or (kind != "master" and step == 0 and not self.theirs.at(0, f"4.{kind}")):
                continue  # the moments of a run that begins are zero
            given = self._take(step, f"4.{kind}", state.layout.views(buffer))
            for name in state.layout.slots.keys() - given:
                unknown[kind, name] = f"4.{kind} of {name} after step {step} is missing"
        return unknown

    def _weights(self, step: int) -> Iterator[Finding]:
        """Judge stage 1, and set `_unread` to the parameters whose weights are not known."""
        state = self.training.state
        masters = self.theirs.at(step - 1, "4.master").keys() & state.layout.slots.keys()
        if masters:
            state.weights_down()
            for name in state.layout.slots:
                if name in masters:
                    self.recorder.put("1.weights", name, state.weight_views[name])
            yield from self._equal(step, "1.weights")
        given = self._take(step, "1.weights", state.weight_views)
        self._unread = [name for name in state.layout.slots if name not in given | masters]
        for name in given - masters:
            self._give_reason(step, "1.weights", f"4.master of {name} after step {step - 1} is missing", name)

    def _take(self, step: int, point: str, views: Mapping[str, Array]) -> set[str]:
        """Set our arrays to the trace's where it has them. Return their names."""
        tensors = self.theirs.at(step, point)
        for name, tensor in tensors.items():
            views[name][...] = like(tensor, views[name], f"{point} of {name}")
        return set(tensors)

    def _pairs(self, step: int, point: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield (name, ours, theirs) for the tensors of a point that both traces hold, in our order."""
        ours = self.ours.at(step, point)
        single = self.ours.get(step, point)
        for name, array in (ours if single is None else {"": single}).items():
            other = self.theirs.get(step, point, name)
            if other is not None:
                yield name, array, other

    def _equal(self, step: int, point: str) -> Iterator[Finding]:
        for name, ours, theirs in self._pairs(step, point):
            yield find(step, point, name, ours, theirs, 0.0)

    def _give_reason(self, step: int, point: str, reason: str, name: str | None = None) -> None:
        """Record why a tensor was not judged, or all tensors of a point (name None); do nothing if reason is ''."""
        if reason:
            names = (list(self.theirs.at(step, point)) or [""]) if name is None else [name]
            for each in names:
                self.reasons.setdefault(key(step, point, each), reason)

    # -- stage 2 ----------------------------------------------------------------------------------------------------

    def _forward_backward(self, step: int, S: Array, unread: Mapping[str, str], no_scale: str) -> Iterator[Finding]:
        """Judge forward and backward. See `Bounds` for the two bounds."""
        training, theirs, points = self.training, self.theirs, ("2.activations", "2.loss", "2.activation_grads", "2.grads")
        if not any(theirs.at(step, point) or theirs.get(step, point) is not None for point in points):
            return
        batches = theirs.inputs(step)
        if batches is None:
            for point in points:
                self._give_reason(step, point, "0.tokens or 0.targets is missing")
            return
        loss = forward_backward(training.model, batches, training.state, S, training.run)
        self.recorder.put("2.loss", "", loss)
        self.recorder.grads(training.state)
        bounds = Bounds(training, self.ours, theirs, step, batches, S)
        known = self._bases(step, len(batches), unread, no_scale)
        overflowed = self._overflowed(self.ours, step) and self._overflowed(theirs, step)
        for point in points:
            for name, a, b in self._pairs(step, point):
                basis = known[point, name]
                missing = basis.missing or (next(iter(unread.values()), "") if basis.weak else "")
                if missing:
                    self._give_reason(step, point, missing, name)
                    continue
                if overflowed and point in ("2.activation_grads", "2.grads"):
                    alone = not basis.weak and len(batches) == 1 and name not in self._inside
                    a, b = without_overflows(a, b, bounds.overflow / 4 if alone else 0.0)
                lacking = f"{basis.recomputed[0]} is missing" if basis.weak else ""
                note = "" if point == "2.loss" else bounds.wrong_format(a, b)
                yield find(step, point, name, a, b, bounds.of(point, name, a, b, basis.weak), lacking, note)
        for point in BY_PLACE:
            for name in theirs.at(step, point):
                if split_batch(name)[1] > len(batches):
                    self._give_reason(step, point, f"the batch of the step has {len(batches)} micro-batches", name)

    def _bases(self, step: int, n: int, unread: Mapping[str, str], no_scale: str) -> dict[tuple[str, str], Basis]:
        """Return the basis of each tensor of stage 2, for all micro-batches."""
        traced = {point: self.theirs.at(step, point).keys() for point in BY_PLACE}
        batches = [bases(self.operations, i, traced, unread, no_scale) for i in range(1, n + 1)]
        result = {("2.loss", ""): together(batch.loss for batch in batches)}
        for i, batch in enumerate(batches, 1):
            result |= {("2.activations", in_batch(place, i)): basis for place, basis in batch.activations.items()}
            result |= {("2.activation_grads", in_batch(place, i)): basis for place, basis in batch.activation_grads.items()}
        return result | {("2.grads", name): together(batch.grads[name] for batch in batches) for name in batches[0].grads}

    def _overflowed(self, trace: Trace, step: int) -> bool:
        return not all(np.isfinite(fp64(g)).all() for g in trace.at(step, "2.grads").values())

    # -- stages 3 and 4 ---------------------------------------------------------------------------------------------

    def _update(self, step: int, S: Array, no_scale: str, unknown: Mapping[tuple[str, str], str]) -> Any:
        """Judge stages 3 and 4, from the trace's gradients, parameter by parameter.

        The generator's return value is whether the step was skipped, or None if that is not known.
        """
        training, state, relative = self.training, self.training.state, norm_error(self.training.state.layout.size)
        state.grads[...] = 0
        given = self._take(step, "2.grads", state.grad_views)
        absent = {name: f"2.grads of {name} is missing" for name in state.layout.slots if name not in given}
        skipped = self._skipped(step, given, absent)
        if not given or no_scale:  # nothing to update from, but the update still counts
            self._no_update(step, "2.grads of all parameters are missing" if not given else no_scale)
            state.t = state.t + (not skipped)
            return skipped
        before = {kind: buffer.copy() for kind, buffer in state.buffers.items()}
        inverse = inverse_of(S)
        found, norm = check_and_measure(state, inverse)
        clip, no_clip = clip_coefficient(norm, training.max_norm), ""
        if absent:
            clip, no_clip = self._their_clip(step, next(iter(absent.values())))
            found = np.bool_(skipped)
        no_rate = self._plan(step)
        training.optimizer.update(state, inverse, clip, found)
        self.recorder.put("3.norm", "", norm)
        self.recorder.states(training)
        yield from self._unscaled(step, inverse, relative, absent)
        yield from self._norm(step, relative, next(iter(absent.values()), ""))
        if not self.lost and not no_rate:
            for name, a, b in self._pairs(step, "4.lr"):
                yield find(step, "4.lr", name, a, b, 4 * U * l2(a))  # computed in FP64, perhaps stored in FP32
        self._give_reason(step, "4.lr", self.lost or no_rate)
        reason = "" if skipped else self.lost or no_clip or (no_rate if self.theirs.get(step, "4.lr") is None else "")
        if skipped is None:
            reason = "3.found_inf is missing: it is not known whether the step was skipped"
        for kind in ("4.m", "4.v", "4.master"):
            self._give_reason(step, kind, reason)
        if not reason:
            yield from self._states(step, before, relative, {} if skipped else absent, unknown)
        return skipped

    def _skipped(self, step: int, given: set[str], absent: Mapping[str, str]) -> bool | None:
        """Return whether a step was skipped, by its gradients or by 3.found_inf; None if neither decides it."""
        views, found_inf = self.training.state.grad_views, self.theirs.get(step, "3.found_inf")
        if any(not np.isfinite(fp64(views[name])).all() for name in given):
            return True
        scale = self.training.loss_scale
        if absent and found_inf is None and (scale.adapts or float(scale.scale) != 1):
            return None
        return bool(absent and found_inf)

    def _no_update(self, step: int, reason: str) -> None:
        """Record that nothing of stages 3 and 4 but the loss scale can be judged."""
        for point in ("3.unscaled", "3.found_inf", "3.norm", "4.clip", "4.lr", "4.m", "4.v", "4.master"):
            self._give_reason(step, point, reason)

    def _their_clip(self, step: int, absent: str) -> tuple[Array | float, str]:
        """Return the clip coefficient when some gradients are missing, and why it is not known, or ''.

        It is computed from the trace's norm, or else taken from the trace.
        """
        norm, clip = self.theirs.get(step, "3.norm"), self.theirs.get(step, "4.clip")
        if math.isinf(self.training.max_norm):
            return 1.0, ""
        if norm is not None:
            return clip_coefficient(cast(norm, self.training.state.math_format), self.training.max_norm), ""
        if clip is not None:
            return cast(clip, self.training.state.math_format), ""
        return 1.0, f"{absent}, and so are 3.norm and 4.clip"

    def _plan(self, step: int) -> str:
        """Use the trace's learning rate if it differs from the schedule's.

        Return why the schedule has no rate for this step, or ''.
        """
        optimizer = plain_optimizer(self.training.optimizer)
        schedule, rule, now = optimizer.schedule, optimizer.rule, int(self.training.state.t)
        own, rate = self.theirs.get(step, "4.lr"), schedule(now)
        if own is not None and abs(float(own) - rate) > 4 * U * rate:
            rate = float(own)
        optimizer.learning_rates = ByUpdate(schedule)
        optimizer.scalars = ByUpdate(lambda t: rule.scalars(schedule(t), t + 1))
        optimizer.scalars[now] = rule.scalars(rate, now + 1)
        if self.own_rates:
            return "the trace states its own learning rates"
        return f"the schedule ends after {schedule.steps} updates" if now >= schedule.steps else ""

    def _unscaled(self, step: int, inverse: Array, relative: float, absent: Mapping[str, str]) -> Iterator[Finding]:
        state = self.training.state
        for name, reason in absent.items():
            self._give_reason(step, "3.unscaled", reason, name)
        for name, a, b in self._pairs(step, "3.unscaled"):
            if name not in absent:
                # Exact, unless a mistake has multiplied a clip coefficient into it.
                plain = widen(state.grad_views[name], state.math_format) * inverse
                exact = np.array_equal(a, plain, equal_nan=True)
                yield find(step, "3.unscaled", name, a, b, 0.0 if exact else relative * l2(a))

    def _norm(self, step: int, relative: float, absent: str) -> Iterator[Finding]:
        """Judge the results that depend on all gradients: found_inf, the norm and the clip coefficient."""
        overflow = any(not np.isfinite(fp64(g)).all() for g in self.theirs.at(step, "2.grads").values())
        if overflow or not absent:
            yield from self._equal(step, "3.found_inf")
        self._give_reason(step, "3.found_inf", absent)
        self._give_reason(step, "3.norm", absent)
        no_clip = absent if self.theirs.get(step, "3.norm") is None else ""
        self._give_reason(step, "4.clip", no_clip)
        for point in ("3.norm", "4.clip"):
            if not (absent if point == "3.norm" else no_clip):
                for name, a, b in self._pairs(step, point):
                    yield find(step, point, name, a, b, relative * l2(a))

    def _states(
        self, step: int, before: dict[str, Array], norm_relative: float, absent: Mapping[str, str],
        unknown: Mapping[tuple[str, str], str],
    ) -> Iterator[Finding]:  # fmt: skip
        """Judge moments, each computed from itself and the gradient, and masters, computed from all of these."""
        state, kinds = self.training.state, ("m", "v", "master")
        clipped = float(self.ours.tensors.get(f"{step}/4.clip", np.array(1.0))) < 1
        relative = (norm_relative if clipped else 0.0) + 16 * U
        for kind in kinds:
            stored = "weights" if kind == "master" and "master" not in state.buffers else kind
            starts = state.layout.views(before[stored]) if stored in before else {}
            for name, a, b in self._pairs(step, f"4.{kind}") if starts else ():
                needs = [unknown.get((each, name), "") for each in (kinds if kind == "master" else (kind,))]
                reason = absent.get(name, "") or next(filter(None, needs), "")
                if reason:
                    self._give_reason(step, f"4.{kind}", reason, name)
                else:
                    yield find(step, f"4.{kind}", name, a, b, update_bound(a, starts[name], relative, state.formats[stored]))

    def _counters(self, step: int, skipped: bool | None) -> Iterator[Finding]:
        """Judge the loss scale and the number of updates after the step; if they are not known, go on with the trace's."""
        training, points = self.training, (*SCALE_STATE, "4.t")
        if skipped is None:
            self.lost = self.lost or f"it is not known whether step {step} was skipped (3.found_inf is missing)"
        training.loss_scale.update(np.bool_(skipped))
        self.recorder.counters(training)
        for point in points:
            if not self.lost:
                yield from self._equal(step, point)
            self._give_reason(step, point, self.lost)
        if self.lost and resume_from(self.theirs, training, step):
            self.lost = ""


# -- verdict and explanation -------------------------------------------------------------------------------------------


def judge_trace(
    config: Config, theirs: Trace, mistake: str = "none", kernels: Mapping[str, Op] = MappingProxyType({})
) -> list[Finding]:
    """Return all findings on a trace. Errors: UsageError if it is of another model or recipe, or nothing can be judged."""
    found = list(Judge(config, theirs, mistake, kernels).findings())
    if not found:
        raise UsageError("nothing in this trace can be judged: docs/traces.md says what else each point requires")
    return found


def candidates(config: Config, first: Finding) -> dict[str, tuple[Config, str]]:
    """Return what may explain a departure: known mistakes, and other ways to compute attention."""
    order, in_attention = list(POINTS), first.point.startswith("2.") and config.model != "mlp"
    ways = [kind for kind in ATTENTION if kind != config.attention and in_attention]
    # A step starts from the trace's own values, so a mistake changes nothing before the point where it shows, except for
    # the counters that the replay carries from step to step.
    carried = first.point in ("2.loss_scale", "4.lr", "4.t", *SCALE_STATE)
    tried = [m.name for m in MISTAKES.values() if carried or order.index(m.departs) <= order.index(first.point)]
    others = {f"--attention {kind}": (replace(config, attention=kind), "none") for kind in ways}
    return {name: (config, name) for name in tried} | others


def explanations(config: Config, theirs: Trace, first: Finding, tick: Tick = no_tick) -> list[str]:
    """Return the names of the known mistakes that explain a departure best. tick: callback after each of `candidates`.

    A mistake explains it if the departing tensor, and all before it, are within their bounds when the replay makes the same
    mistake. The best ones are those whose replay stays within the bounds longest. Another way to compute attention
    ('--attention fused') is not a mistake; it is returned, alone, if its replay comes closest to the departing tensor.
    """
    order, reach = list(POINTS), dict[str, tuple[tuple[float, int], float]]()
    for name, (other, mistake) in candidates(config, first).items():
        end, error = _reach(other, theirs, mistake, first)
        if error <= 1 and end > (first.step, order.index(first.point)):
            reach[name] = end, error
        tick()
    errors = {name: error for name, (end, error) in reach.items() if end == max(end for end, _ in reach.values())}
    nearest = min(errors, key=lambda name: errors[name], default="none")
    return [nearest] if nearest not in {"none", *MISTAKES} else [name for name in errors if name in MISTAKES]


def _reach(config: Config, theirs: Trace, mistake: str, first: Finding) -> tuple[tuple[float, int], float]:
    """Return the step and point at which a replay with a mistake departs, and the error of the tensor of `first` in it.

    The step is infinite if it never departs, and the error if it does not judge that tensor or cannot make the mistake.
    """
    error, order = math.inf, list(POINTS)
    try:
        judge = Judge(config, theirs, mistake)
    except UsageError:  # the recipe leaves no room for it
        return (math.inf, 0), error
    for finding in judge.findings():
        if finding.departs:
            return (finding.step, order.index(finding.point)), error
        if (finding.step, finding.point, finding.name) == (first.step, first.point, first.name):
            error = finding.error
    return (math.inf, 0), error
