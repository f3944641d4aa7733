"""Judging a trace: is each step of somebody's run what the recipe says, and if not, where does it depart, and why?

Every step of the trace is taken once more by our code *from the trace's own values*: from its masters and moments before
the step, on its batch, and after each stage its tensors replace ours. So no difference is carried on, and each point is
bounded by what it can do by itself. `Bounds` derives the bounds. What a trace does not hold is not judged.

A trace that departs is explained by trying the known mistakes (`mistakes.py`): the same replay with a mistake switched
in; those with which everything up to there is within its bounds are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.backends import NUMPY
from refimpl.cast import cast, widen
from refimpl.config import Config
from refimpl.errors import UsageError
from refimpl.formats import FORMATS, format_of, is_float
from refimpl.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.mistakes import MISTAKES, meddle
from refimpl.policy import Policy, Run
from refimpl.recipes import get_recipe
from refimpl.show import ulp
from refimpl.state import State
from refimpl.step import Batch, through
from refimpl.trace import POINTS, Recorder, Trace, like

Array = Any
Tensors = Mapping[str, np.ndarray]

U = 2.0**-24  # half the spacing of FP32 numbers at 1: the relative error of one rounding


@dataclass(frozen=True)
class Finding:
    """One tensor of a trace beside ours: how it compares, and whether it is within its bound."""

    step: int
    point: str
    name: str
    identical: float  # share of elements with equal bits
    error: float  # the L2 of the difference as a multiple of its bound: above 1 departs
    ulps: float  # the largest difference in ulps of the tensor's format at its largest element
    elements: int

    @property
    def departs(self) -> bool:
        """Whether it is outside its bound."""
        return not self.error <= 1

    @property
    def where(self) -> str:
        """For a message: 'step 3, 2.grads of transformer.wte.weight'."""
        return f"step {self.step}, {self.point}" + (f" of {self.name}" if self.name else "")


def find(step: int, point: str, name: str, ours: Array, theirs: Array, bound: float) -> Finding:
    """Hold two tensors against a bound of the L2 of their difference. A different shape, Inf or NaN departs."""
    if np.shape(ours) != np.shape(theirs):
        return Finding(step, point, name, 0.0, math.inf, math.inf, max(1, np.size(theirs)))
    a, b = _fp64(ours), _fp64(theirs)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        difference = np.where(same, 0.0, a - b)
        distance = float(np.sqrt((difference * difference).sum()))
        unit = ulp(format_of(theirs), float(np.abs(b).max(initial=0.0))) if is_float(np.asarray(theirs)) else 1.0
        ulps = float(np.abs(difference).max(initial=0.0)) / unit
    error = 0.0 if same.all() else distance / bound if bound > 0 else math.inf
    return Finding(step, point, name, float(same.mean()) if same.size else 1.0, error, ulps, same.size)


def _fp64(x: Array) -> np.ndarray:
    x = np.asarray(x)
    return np.asarray(widen(x, "fp64")) if is_float(x) else np.array(x, float)


def _finite(x: Array) -> np.ndarray:
    """In double precision, with 0 for what is Inf or NaN: bounds are made of finite numbers."""
    x = _fp64(x)
    return np.where(np.isfinite(x), x, 0.0)


def _l2(x: Array) -> float:
    return float(np.linalg.norm(_finite(x)))


def _finite_in_both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both tensors, with 0 in the places where either is Inf or NaN."""
    if a.shape != b.shape:
        return a, b
    bad = ~(np.isfinite(_fp64(a)) & np.isfinite(_fp64(b)))
    a, b = a.copy(), b.copy()
    a[bad], b[bad] = 0, 0
    return a, b


def distance(a: Array, b: Array) -> float:
    """The L2 of the difference of two tensors, where both are finite."""
    return _l2(_fp64(a) - _fp64(b))


# -- one step, from the trace's own values -----------------------------------------------------------------------------


class Judge:
    """Replays the steps of a trace under one configuration, with or without a mistake, and yields a finding a tensor.

    The parts keep what a trace cannot hold and what goes on from step to step: the number of updates, the counter of the
    loss scale, and whatever else a mistake forgets to renew.
    """

    def __init__(self, config: Config, theirs: Trace, mistake: str = "none") -> None:
        self.config, self.theirs, self.ours = config, theirs, Trace()
        self.parts = config.make_parts(NUMPY)
        self.recorder = Recorder(self.parts, self.ours, follow=theirs)
        meddle(mistake, self.parts)
        start = theirs.at(0, "4.master")
        if start:
            self._put_state(0)

    def findings(self) -> Iterator[Finding]:
        """All tensors of all steps, in the order in which a step computes them."""
        for step in range(1, max(self.theirs.steps, default=0) + 1):
            self.recorder.step = step
            with np.errstate(all="ignore"):
                yield from self._step(step)

    def _step(self, step: int) -> Iterator[Finding]:
        parts, theirs = self.parts, self.theirs
        known = self._put_state(step - 1)
        if known:
            parts.state.weights_down()
            self.recorder.weights(parts.state)
            yield from self._equal(step, "1.weights")
        weights = self._take(step, "1.weights", parts.state.weight_views) or known
        batches = theirs.inputs(step)
        self.recorder.put("2.loss_scale", "", parts.loss_scale.scale)
        yield from self._equal(step, "2.loss_scale")
        S = theirs.get(step, "2.loss_scale")
        S = parts.loss_scale.scale if S is None else cast(S, "fp32")
        if weights and batches and any(theirs.at(step, p) or theirs.get(step, p) is not None for p in POINTS if p[0] == "2"):
            yield from self._through(step, batches, S)
        found: Array = theirs.get(step, "3.found_inf")
        if self._take(step, "2.grads", parts.state.grad_views):
            found = yield from self._update(step, S, known)
        else:  # nothing to update from: time goes on all the same
            parts.state.t = parts.state.t + (1 if found is None else 1 - int(bool(found)))
        parts.loss_scale.update(np.bool_(found))
        self.ours.put(step, "4.scale", "", parts.loss_scale.scale)
        yield from self._equal(step, "4.scale")

    def _put_state(self, step: int) -> bool:
        """Our masters and moments become theirs after a step; False when they are not all there."""
        state, complete = self.parts.state, True
        for kind in ("m", "v", "master"):
            buffer = state.master if kind == "master" else state.buffers.get(kind)
            if buffer is not None and not (kind != "master" and step == 0 and not self.theirs.at(0, f"4.{kind}")):
                complete &= self._take(step, f"4.{kind}", state.layout.views(buffer))
        return complete

    def _take(self, step: int, point: str, views: Mapping[str, Array]) -> bool:
        """Our arrays become theirs, if all of them are there. Errors: UsageError for another shape."""
        tensors = self.theirs.at(step, point)
        if not views.keys() <= tensors.keys():
            return False
        for name, view in views.items():
            view[...] = like(tensors[name], view)
        return True

    def _pairs(self, step: int, point: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, ours, theirs) of a point, in our order, as far as both have it."""
        ours = self.ours.at(step, point)
        single = self.ours.get(step, point)
        for name, array in (ours if single is None else {"": single}).items():
            other = self.theirs.get(step, point, name)
            if other is not None:
                yield name, array, other

    def _equal(self, step: int, point: str) -> Iterator[Finding]:
        for name, ours, theirs in self._pairs(step, point):
            yield find(step, point, name, ours, theirs, 0.0)

    # -- stage 2 ----------------------------------------------------------------------------------------------------

    def _through(self, step: int, batches: list[Batch], S: Array) -> Iterator[Finding]:
        """Forward and backward. See `Bounds` for the two judges."""
        parts, theirs = self.parts, self.theirs
        loss = through(parts.model, batches, parts.state, S, parts.run)
        self.recorder.put("2.loss", "", loss)
        self.recorder.grads(parts.state)
        bounds = Bounds(self, step, batches, S)
        traced = self.ours.at(step, "2.activations").keys()
        whole = len(batches) == 1 and traced <= theirs.at(step, "2.activations").keys()
        backward = traced <= theirs.at(step, "2.activation_grads").keys()
        overflowed = self._overflowed(self.ours, step) and self._overflowed(theirs, step)
        for point, stepwise in (("2.activations", whole), ("2.loss", whole), ("2.activation_grads", whole and backward),
                                ("2.grads", whole and backward)):  # fmt: skip
            for name, a, b in self._pairs(step, point):
                if overflowed:  # which elements overflow depends on the order of the sums
                    a, b = _finite_in_both(a, b)
                yield find(step, point, name, a, b, bounds.of(point, name, a, b, stepwise))

    def _overflowed(self, trace: Trace, step: int) -> bool:
        return not all(np.isfinite(_fp64(g)).all() for g in trace.at(step, "2.grads").values())

    # -- stages 3 and 4 ---------------------------------------------------------------------------------------------

    def _update(self, step: int, S: Array, known: bool) -> Any:
        """From their gradients on. A generator that returns whether the step was skipped."""
        parts, state = self.parts, self.parts.state
        before = {kind: buffer.copy() for kind, buffer in state.buffers.items()}
        inverse = inverse_of(S)
        found, norm = check_and_measure(state, inverse)
        parts.optimizer.update(state, inverse, clip_coefficient(norm, parts.max_norm), found)
        self.recorder.put("3.norm", "", norm)
        self.recorder.states(parts)
        relative = norm_error(state.layout.size)
        for name, a, b in self._pairs(step, "3.unscaled"):
            # Exact, but for a mistake that has a clip coefficient in it already.
            exact = np.array_equal(a, widen(state.grad_views[name], state.math_format) * inverse, equal_nan=True)
            yield find(step, "3.unscaled", name, a, b, 0.0 if exact else relative * _l2(a))
        yield from self._equal(step, "3.found_inf")
        for point in ("3.norm", "4.clip"):
            for name, a, b in self._pairs(step, point):
                yield find(step, point, name, a, b, relative * _l2(a))
        for name, a, b in self._pairs(step, "4.lr"):
            yield find(step, "4.lr", name, a, b, 4 * U * _l2(a))
        if known:
            yield from self._states(step, before, relative)
        return found

    def _states(self, step: int, before: dict[str, Array], norm_relative: float) -> Iterator[Finding]:
        state = self.parts.state
        clipped = float(self.ours.tensors.get(f"{step}/4.clip", np.array(1.0))) < 1
        relative = (norm_relative if clipped else 0.0) + 16 * U
        for kind in ("m", "v", "master"):
            stored = "weights" if kind == "master" and "master" not in state.buffers else kind
            if stored in before:
                starts = state.layout.views(before[stored])
                for name, a, b in self._pairs(step, f"4.{kind}"):
                    yield find(step, f"4.{kind}", name, a, b, update_bound(a, starts[name], relative, state.formats[stored]))


# -- bounds ------------------------------------------------------------------------------------------------------------


def update_bound(after: Array, before: Array, relative: float, fmt: str) -> float:
    """How far two orders of the same FP32 operations may end apart, in L2.

    Moments and masters are old + change. The change is a chain of at most 16 operations, each within u of its result and
    none a cancelling difference but the last sum, times a clip coefficient as exact as its norm: `relative` of the change.
    Decay and the last sum round once each, within u of the value (of its format): 2 u of the value on each side.
    """
    u = FORMATS[fmt].eps / 2
    return 2 * relative * distance(after, before) + 4 * u * (_l2(after) + _l2(before))


def norm_error(size: int) -> float:
    """Relative error of PyTorch's norm: a running FP32 sum in 8 lanes, (n/8 + 8) u, halved by the root; plus ours."""
    return (size / 8 + 16) * U


class Bounds:
    """Bounds of forward and backward, in L2, for one step.

    *As a whole*: both sides are roundings of one true value, which a run in FP64 gives. With e the smaller of the two
    distances from it, and the other side at most half as accurate (2 e), the two are within 3 e of each other. The loss is
    one number, near the truth by luck at times: its e is the mean over rows of each row's.

    *Operation by operation*, where the trace holds every activation (and every gradient of one): each operation computes
    from the trace's own values, so that the two sides differ by the order of their sums alone. The judge is the same
    operation with the same rounding points and its sums in FP64. With e the distance of ours from it, theirs may be 3 e
    away: a few times as many results that fall on the other side of a rounding. A few such results, 3 ulps of the largest
    element, are free. This finds a single rounding too many or too few. Values that are FP32 to the last bit have no such
    rounding, and their e is the luck of an order of summation: for them the larger of the two bounds holds.
    """

    def __init__(self, judge: Judge, step: int, batches: list[Batch], S: Array) -> None:
        self.judge, self.step, self.batches, self.S = judge, step, batches, S
        self._exact_sums: Trace | None = None
        self._truth: Trace | None = None

    def of(self, point: str, name: str, ours: Array, theirs: Array, stepwise: bool) -> float:
        """The bound of a tensor's difference."""
        if point == "2.loss":
            return self._of_loss(ours, stepwise)
        fmt = min((self._rounded_to(x) for x in (ours, theirs)), key=lambda name: FORMATS[name].bits)
        by_operation = self._by_operation(point, name, ours, fmt) if stepwise else 0.0
        if stepwise and fmt != "fp32":
            return by_operation
        return max(by_operation, self._as_a_whole(point, name, ours, theirs))

    def _of_loss(self, ours: Array, stepwise: bool) -> float:
        """Both rules for the one number that is kept in FP32 always, plus its sum over rows in some order."""
        exact = self.exact_sums.get(self.step, "2.loss")
        assert exact is not None
        rows = math.prod(self.batches[0][1].shape) * len(self.batches)
        e = distance(ours, exact) if stepwise else self._row_error()
        return 3 * e + 2 * math.sqrt(rows) * U * _l2(ours)  # each addition errs by u at most, in a random direction

    def _by_operation(self, point: str, name: str, ours: Array, fmt: str) -> float:
        exact = self.exact_sums.get(self.step, point, name)
        assert exact is not None
        return 3 * distance(ours, exact) + 3 * ulp(fmt, float(np.abs(_finite(exact)).max(initial=0.0)))

    def _as_a_whole(self, point: str, name: str, ours: Array, theirs: Array) -> float:
        exact = self.truth.get(self.step, point, name)
        assert exact is not None
        floor = FORMATS[self._low].smallest_subnormal * math.sqrt(exact.size)  # what underflow can add or remove
        return 3 * min(distance(ours, exact), distance(theirs, exact)) + floor + 4 * U * _l2(exact)

    @property
    def _low(self) -> str:
        """The format that products read: 16 bits, but in fp32."""
        parts = self.judge.parts
        low = parts.run.policy.row("linear.y").input("x")
        return low if low in FORMATS else parts.state.formats["grads"]

    def _rounded_to(self, x: Array) -> str:
        """The format that a tensor's values really have: under autocast many an FP32 tensor holds 16-bit values."""
        return self._low if np.array_equal(_fp64(cast(x, self._low)), _fp64(x), equal_nan=True) else format_of(x)

    @property
    def exact_sums(self) -> Trace:
        """Our step with the sums of all operations in FP64, from the trace's values."""
        if self._exact_sums is None:
            run, state = self.judge.parts.run, self.judge.parts.state
            rows = {key: replace(row, acc="fp64") if row.acc == "fp32" else row for key, row in run.policy.rows.items()}
            exact = State(self.judge.parts.model, {kind: state.formats[kind] for kind in ("weights", "grads")}, NUMPY)
            exact.weights[...] = state.weights
            exact_run = Run(Policy("exact sums", rows), NUMPY, overrides=run.overrides)
            self._exact_sums = self._run(exact, exact_run, self.S, follow=True)
        return self._exact_sums

    @property
    def truth(self) -> Trace:
        """The step in FP64 from the weights of the trace."""
        if self._truth is None:
            recipe, parts = get_recipe("fp64"), self.judge.parts
            exact = State(parts.model, recipe.state_formats(()), NUMPY)
            widen(parts.state.weights, "fp64", out=exact.weights)
            self._truth = self._run(exact, Run(recipe.policy, NUMPY), np.asarray(np.float64(self.S)), follow=False)
        return self._truth

    def _run(self, state: State, run: Run, S: Array, follow: bool) -> Trace:
        trace, parts = Trace(), self.judge.parts
        recorder = Recorder(replace(parts, state=state, run=run), trace, self.judge.theirs if follow else None)
        recorder.step = self.step
        loss = through(parts.model, self.batches, state, S, run)
        recorder.put("2.loss", "", loss)
        recorder.grads(state)
        return trace

    def _row_error(self) -> float:
        """The mean over rows of |our loss of the row - the true one|, from the logits as each run has them."""
        name = "lm_head"
        ours, truth = (trace.get(self.step, "2.activations", name) for trace in (self.judge.ours, self.truth))
        assert ours is not None and truth is not None
        targets = self.batches[0][1]
        target = (targets if ours.ndim == 3 else targets[:, -1]).reshape(-1)
        return float(np.abs(_row_losses(ours, target) - _row_losses(truth, target)).mean())


def _row_losses(logits: Array, target: Array) -> np.ndarray:
    """-log softmax(logits)[target] of each row, in FP64 from the logits as they are stored."""
    z = _fp64(logits).reshape(target.size, -1)
    top = z.max(-1)
    losses: np.ndarray = np.log(np.exp(z - top[:, None]).sum(-1)) + top - z[np.arange(target.size), target]
    return losses


# -- verdict and explanation -------------------------------------------------------------------------------------------


def judge(config: Config, theirs: Trace, mistake: str = "none") -> list[Finding]:
    """All findings on a trace. Errors: UsageError when it is another model's or recipe's, or leaves nothing to judge."""
    found = list(Judge(config, theirs, mistake).findings())
    if not found:
        raise UsageError("nothing in this trace can be judged: see docs/traces.md for what each point needs beside it")
    return found


def explanations(config: Config, theirs: Trace, first: Finding) -> list[str]:
    """The known mistakes with which the trace is within its bounds, up to and including the step where it departs."""
    names = []
    for name in MISTAKES:
        try:
            findings = Judge(config, theirs, name).findings()
            if all(not f.departs for f in _until(findings, first.step)):
                names.append(name)
        except UsageError:  # the recipe leaves no room for it
            continue
    return names


def _until(findings: Iterator[Finding], step: int) -> Iterator[Finding]:
    for finding in findings:
        if finding.step > step:
            return
        yield finding
