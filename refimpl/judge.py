"""Judging a trace: is each step of somebody's run what the recipe says, and if not, where does it depart, and why?

Every step of the trace is taken once more by our code *from the trace's own values*: from its masters and moments before
the step, on its batch, and after each stage its tensors replace ours. So no difference is carried on, and each point is
bounded by what it can do by itself (`bounds.py`). What a trace does not hold is not judged.

A trace that departs is explained by trying the known mistakes (`mistakes.py`): the same replay with a mistake switched
in; those with which everything up to there is within its bounds are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.backends import NUMPY
from refimpl.bounds import Bounds, U, fp64, l2, norm_error, update_bound
from refimpl.cast import cast, widen
from refimpl.config import Config
from refimpl.errors import UsageError
from refimpl.formats import FORMATS, format_of, is_float
from refimpl.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.mistakes import MISTAKES, meddle
from refimpl.recipes import RECIPES
from refimpl.show import ulp
from refimpl.step import Batch, through
from refimpl.trace import POINTS, Recorder, Trace, like

Array = Any


JUDGED = tuple(
    name for name, recipe in RECIPES.items() if recipe.policy.in_formats and {*recipe.state_storages().values()} <= {*FORMATS}
)
"""Recipes whose every rounding is to nearest, to a format, and whose sums are in FP32: what the bounds are derived for."""


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
    a, b = fp64(ours), fp64(theirs)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        difference = np.where(same, 0.0, a - b)
        distance = float(np.sqrt((difference * difference).sum()))
        unit = ulp(format_of(theirs), float(np.abs(b).max(initial=0.0))) if is_float(np.asarray(theirs)) else 1.0
        ulps = float(np.abs(difference).max(initial=0.0)) / unit
    error = 0.0 if same.all() else distance / bound if bound > 0 else math.inf
    return Finding(step, point, name, float(same.mean()) if same.size else 1.0, error, ulps, same.size)


# -- one step, from the trace's own values -----------------------------------------------------------------------------


def _finite_in_both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both tensors, with 0 in the places where either is Inf or NaN."""
    if a.shape != b.shape:
        return a, b
    bad = ~(np.isfinite(fp64(a)) & np.isfinite(fp64(b)))
    a, b = a.copy(), b.copy()
    a[bad], b[bad] = 0, 0
    return a, b


class Judge:
    """Replays the steps of a trace under one configuration, with or without a mistake, and yields a finding a tensor.

    The parts keep what a trace cannot hold and what goes on from step to step: the number of updates, the counter of the
    loss scale, and whatever else a mistake forgets to renew.
    """

    def __init__(self, config: Config, theirs: Trace, mistake: str = "none") -> None:
        self.theirs, self.ours = theirs, Trace()
        self.last_step = min(max(theirs.steps, default=0), config.steps or 0)  # as far as the learning rate is planned
        if config.recipe not in JUDGED:
            raise UsageError(f"traces of recipe {config.recipe} cannot be judged, only those of {', '.join(JUDGED)}")
        self.parts = config.make_parts(NUMPY)
        self.recorder = Recorder(self.parts, self.ours, follow=theirs)
        meddle(mistake, self.parts)
        self._skips_known = True  # of every step so far; if not, nobody knows the loss scale and the number of updates

    def findings(self) -> Iterator[Finding]:
        """All tensors of all steps, in the order in which a step computes them."""
        for step in range(1, self.last_step + 1):
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
        if self._skips_known:
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
            self._skips_known &= found is not None or not parts.loss_scale.adapts
            parts.state.t = parts.state.t + (1 if found is None else 1 - int(bool(found)))
        parts.loss_scale.update(np.bool_(found))
        if self._skips_known:
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
            view[...] = like(tensors[name], view, f"{point} of {name}")
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
        bounds = Bounds(parts, self.ours, theirs, step, batches, S)
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
        return not all(np.isfinite(fp64(g)).all() for g in trace.at(step, "2.grads").values())

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
            yield find(step, "3.unscaled", name, a, b, 0.0 if exact else relative * l2(a))
        yield from self._equal(step, "3.found_inf")
        for point in ("3.norm", "4.clip"):
            for name, a, b in self._pairs(step, point):
                yield find(step, point, name, a, b, relative * l2(a))
        if not self._skips_known:
            return found
        for name, a, b in self._pairs(step, "4.lr"):
            yield find(step, "4.lr", name, a, b, 4 * U * l2(a))  # computed in double precision, perhaps kept in FP32
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
