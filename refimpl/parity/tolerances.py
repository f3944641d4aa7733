"""How far a correct run may be from ours at each point of a step: derived, not tuned."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.backends.base import NUMPY
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of, is_float, ulp
from refimpl.optim.state import Sink, State
from refimpl.parity.other_kernels import other_kernel
from refimpl.parity.trace import Recorder, Trace, in_batch, key
from refimpl.precision.context import Run
from refimpl.precision.policy import Policy
from refimpl.precision.recipes import get_recipe
from refimpl.step import Batch, forward_backward
from refimpl.training.setup import Training

U = 2.0**-24
"""Half the spacing of FP32 numbers at 1: the relative error of one rounding."""


def fp64(x: Array) -> np.ndarray:
    """Any array in double precision."""
    x = np.asarray(x)
    return np.asarray(widen(x, "fp64")) if is_float(x) else np.array(x, float)


def _finite(x: Array) -> np.ndarray:
    """In double precision, with 0 for what is Inf or NaN: bounds are made of finite numbers."""
    x = fp64(x)
    return np.where(np.isfinite(x), x, 0.0)


def l2(x: Array) -> float:
    """The L2 norm of what is finite in an array."""
    return float(np.linalg.norm(_finite(x)))


def distance(a: Array, b: Array) -> float:
    """The L2 of the difference of two tensors, where both are finite."""
    return l2(fp64(a) - fp64(b))


def update_bound(after: Array, before: Array, relative: float, fmt: str) -> float:
    """How far two orders of the same FP32 operations may end apart, in L2.

    Moments and masters are old + change. The change is a chain of at most 16 operations, each within u of its result and
    none a cancelling difference but the last sum, times a clip coefficient as exact as its norm: `relative` of the change.
    Decay and the last sum round once each, within u of the value (of its format): 2 u of the value on each side.
    """
    u = FORMATS[fmt].eps / 2
    return 2 * relative * distance(after, before) + 4 * u * (l2(after) + l2(before))


def _free(fmt: str, exact: Array) -> float:
    """Return the L2 of three results on the other side of a rounding, each an ulp of the largest element away."""
    return math.sqrt(3) * ulp(fmt, float(np.abs(_finite(exact)).max(initial=0.0)))


def _unfit(x: Array, fmt: str) -> int:
    """How many finite values of an array are no values of a format."""
    values = _finite(x)
    return int(np.count_nonzero(fp64(cast(values, fmt)) != values))


def norm_error(size: int) -> float:
    """Relative error of PyTorch's norm: a running FP32 sum in 8 lanes, (n/8 + 8) u, halved by the root; plus ours."""
    return (size / 8 + 16) * U


class Addends(State):
    """A state that keeps each micro-batch's gradients beside their sum."""

    addends: dict[str, list[Array]]

    def gradient_sink(self, first: bool) -> Sink:
        sink = super().gradient_sink(first)

        def keep(name: str, gradient: Array) -> None:
            self.addends.setdefault(name, []).append(np.array(gradient))
            sink(name, gradient)

        return keep


class Bounds:
    """Bounds of forward and backward, in L2, for one step.

    *As a whole*: both sides are roundings of one true value, which a run in FP64 gives. With e the smaller of the two
    distances from it, and the other side at most half as accurate (2 e), the two are within 3 e of each other. The loss is
    one number, near the truth by luck at times: its e is the mean over rows of each row's. This is the weaker bound: it lets
    a rounding too many or too few pass.

    *Operation by operation*, where the trace holds all that an operation is computed from: it computes from the trace's own
    values, so that the two sides differ by the order of its sums alone. The judge is the same operation with the same rounding
    points and its sums in FP64. With e the distance of ours from it, theirs may be 3 e away: a few times as many results that
    fall on the other side of a rounding. Three such results, an ulp of the largest element each, are free. This finds a single
    rounding too many or too few. Values that are FP32 to the last bit have no such rounding, and their e is the luck of an
    order of summation: for them the larger of the two bounds holds.

    In fused attention correct kernels differ by more than sums: 5/4 of the distance to another correct one (`other_kernels`)
    is added. That one comes of n roundings that went the other way; as many others have an L2 within 1 / (2 sqrt(n)) of it (one
    standard deviation): a quarter is five of them at n = 100, below which those that are free add as much.

    The gradient of a parameter over n micro-batches is a sum of n such results, each with a few free ones of its own, and of
    the FP32 roundings of n - 1 additions on either side, each within u of a partial sum that no order makes larger than the
    sum of the addends' norms.

    *Formats*: where our values all fit 16 bits, theirs must, and where ours do not, theirs must not either; what an
    FP32 operation or sum leaves does not fit 16 bits by chance. A 16-bit value may be stored in a wider format.
    """

    def __init__(self, training: Training, ours: Trace, theirs: Trace, step: int, batches: list[Batch], S: Array) -> None:
        """training: what `ours` was computed with; its weights are the trace's."""
        self.training, self.ours, self.theirs = training, ours, theirs
        self.step, self.batches, self.S = step, batches, S
        self._exact_sums: Trace | None = None
        self._other_kernel: Trace | None = None
        self._truth: Trace | None = None
        self._addends: dict[str, list[Array]] = {}

    def of(self, point: str, name: str, ours: Array, theirs: Array, weak: bool) -> float:
        """Return the bound of a tensor's difference. weak: it was not computed from the trace's own values alone."""
        if point == "2.loss":
            return self._of_loss(ours, weak)
        if weak:
            return self._as_a_whole(point, name, ours, theirs)
        exact = self.exact_sums.get(self.step, point, name)
        assert exact is not None
        if point == "2.grads" and len(self.batches) > 1:
            by_operation, fmt = self._of_sum(name)
        else:
            fmt = min((self._rounded_to(x) for x in (ours, theirs)), key=lambda name: FORMATS[name].bits)
            by_operation = _free(fmt, exact)
        by_operation += 3 * distance(ours, exact)
        if self.training.run.policy.fused_attention:
            by_operation += 1.25 * distance(ours, self.other_kernel.tensors[key(self.step, point, name)])
        return by_operation if fmt != "fp32" else max(by_operation, self._as_a_whole(point, name, ours, theirs))

    def wrong_format(self, ours: Array, theirs: Array) -> str:
        """Return what is wrong with the format of their values beside ours, in words; '' where nothing is.

        Eight values that do not fit 16 bits are no accident, nor is one beside eight or more that all fit.
        """
        low = self._low
        if FORMATS[low].bits > 16 or np.shape(ours) != np.shape(theirs):
            return ""
        (a, b), present = (_unfit(x, low) for x in (ours, theirs)), np.count_nonzero(_finite(ours))
        if a >= 8 and b == 0:
            return f"all values fit {low}: they should have been kept in more bits"
        if a == 0 and b > 0 and present >= 8:
            return f"{b} values do not fit {low}: they should have been rounded to it"
        return ""

    def _of_loss(self, ours: Array, weak: bool) -> float:
        """Both rules for the one number that is kept in FP32 always, plus its sum over rows in some order."""
        rows = sum(int(self.training.model.n_targets(targets)) for _, targets in self.batches)
        e = self._row_error() if weak else distance(ours, self.exact_sums.tensors[f"{self.step}/2.loss"])
        return 3 * e + 2 * math.sqrt(rows) * U * l2(ours)  # each addition errs by u at most, in a random direction

    def _of_sum(self, name: str) -> tuple[float, str]:
        """What micro-batches add to the bound of a gradient, and the format that each one's gradient was rounded to."""
        addends = self._addends[name]
        fmt = max((self._rounded_to(x) for x in addends), key=lambda fmt: FORMATS[fmt].bits)
        sums = 2 * (len(addends) - 1) * U * sum(l2(x) for x in addends)
        return sums + sum(_free(fmt, x) for x in addends), fmt

    def _as_a_whole(self, point: str, name: str, ours: Array, theirs: Array) -> float:
        exact = self.truth.get(self.step, point, name)
        assert exact is not None
        floor = FORMATS[self._low].smallest_subnormal * math.sqrt(exact.size)  # what underflow can add or remove
        return 3 * min(distance(ours, exact), distance(theirs, exact)) + floor + 4 * U * l2(exact)

    @property
    def overflow(self) -> float:
        """The largest number of the format that products leave."""
        return FORMATS[self._low].max

    @property
    def _low(self) -> str:
        """The format that products read: 16 bits, but in fp32."""
        low = self.training.run.policy.row("linear.y").input("x")
        return low if low in FORMATS else self.training.state.formats["grads"]

    def _rounded_to(self, x: Array) -> str:
        """The format that a tensor's values really have: under autocast many an FP32 tensor holds 16-bit values."""
        return self._low if np.array_equal(fp64(cast(x, self._low)), fp64(x), equal_nan=True) else format_of(x)

    @property
    def exact_sums(self) -> Trace:
        """Our step with the sums of all operations in FP64, from the trace's values."""
        if self._exact_sums is None:
            run = self.training.run
            rows = {key: replace(row, acc="fp64") if row.acc == "fp32" else row for key, row in run.policy.rows.items()}
            exact, exact_run = self._same_weights(), Run(Policy("exact sums", rows), NUMPY, overrides=run.overrides)
            self._exact_sums, self._addends = self._run(exact, exact_run, self.S, follow=True), exact.addends
        return self._exact_sums

    @property
    def other_kernel(self) -> Trace:
        """Our step with fused attention as another correct kernel computes it, from the trace's values."""
        if self._other_kernel is None:
            run = self.training.run
            other = Run(run.policy, NUMPY, overrides={**run.overrides, "attention": other_kernel})
            self._other_kernel = self._run(self._same_weights(), other, self.S, follow=True)
        return self._other_kernel

    @property
    def truth(self) -> Trace:
        """The step in FP64 from the weights of the trace."""
        if self._truth is None:
            recipe, training = get_recipe("fp64"), self.training
            exact = State(training.model, recipe.state_encodings(()), NUMPY)
            widen(training.state.weights, "fp64", out=exact.weights)
            self._truth = self._run(exact, Run(recipe.policy, NUMPY), np.asarray(np.float64(self.S)), follow=False)
        return self._truth

    def _same_weights(self) -> Addends:
        """Our state with gradients of its own. It is of our state's kind, so that a mistake in that is in both."""
        other: Any = copy.copy(self.training.state)
        other.__class__ = type("Exact", (Addends, type(other)), {})
        other.buffers = {**other.buffers, "grads": np.zeros_like(other.grads)}
        other.grad_views, other.addends = other.views("grads"), {}
        result: Addends = other
        return result

    def _run(self, state: State, run: Run, S: Array, follow: bool) -> Trace:
        trace, training = Trace(), self.training
        recorder = Recorder(replace(training, state=state, run=run), trace, self.theirs if follow else None)
        recorder.step = self.step
        loss = forward_backward(training.model, self.batches, state, S, run)
        recorder.put("2.loss", "", loss)
        recorder.grads(state)
        return trace

    def _row_error(self) -> float:
        """The mean over rows of |our loss of the row - the true one|, from the logits as each run has them."""
        model, errors = self.training.model, []
        for i, (_, targets) in enumerate(self.batches, 1):
            ours, truth = (trace.get(self.step, "2.activations", in_batch("lm_head", i)) for trace in (self.ours, self.truth))
            assert ours is not None and truth is not None
            target = model.predicted(targets).reshape(-1)
            counts = target != model.ignore_index
            errors.append(np.abs(_row_losses(ours, target * counts) - _row_losses(truth, target * counts))[counts])
        if model.loss_mean == "micro-batches":
            return float(np.mean([each.mean() for each in errors if each.size] or [0.0]))
        together = np.concatenate(errors)
        return float(together.mean()) if together.size else 0.0


def _row_losses(logits: Array, target: Array) -> np.ndarray:
    """-log softmax(logits)[target] of each row, in FP64 from the logits as they are stored."""
    z = fp64(logits).reshape(target.size, -1)
    top = z.max(-1)
    losses: np.ndarray = np.log(np.exp(z - top[:, None]).sum(-1)) + top - z[np.arange(target.size), target]
    return losses
