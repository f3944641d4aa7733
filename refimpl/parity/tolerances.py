"""Derived bounds: how far a correct run may differ from ours at each point of a step."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of, is_float, ulp
from refimpl.optim.state import State
from refimpl.parity.other_kernels import OTHER_KERNELS
from refimpl.parity.trace import Recorder, Trace, in_batch, key
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe
from refimpl.step import Batch, forward_backward
from refimpl.training.setup import Training

U = 2.0**-24
"""Half the spacing of FP32 numbers at 1: the relative error of one rounding."""


def fp64(x: Array) -> np.ndarray:
    """Return any array in FP64."""
    x = np.asarray(x)
    return np.asarray(widen(x, "fp64")) if is_float(x) else np.array(x, float)


def _finite(x: Array) -> np.ndarray:
    """Return an array in FP64, with 0 for Inf and NaN: bounds are computed from finite numbers."""
    x = fp64(x)
    return np.where(np.isfinite(x), x, 0.0)


def l2(x: Array) -> float:
    """Return the L2 norm of the finite elements of an array."""
    return float(np.linalg.norm(_finite(x)))


def distance(a: Array, b: Array) -> float:
    """Return the L2 norm of the difference of two tensors, over elements where both are finite."""
    return l2(fp64(a) - fp64(b))


def update_bound(after: Array, before: Array, relative: float, fmt: str) -> float:
    """Return the bound, in L2, of the difference of an updated state between two orders of the same FP32 operations.

    Moments and masters are old + change. The change is a chain of at most 16 operations, each within u of its result and
    without cancellation but for the last sum, times a clip coefficient as accurate as its norm: `relative` of the change.
    Decay and the last sum round once each, within u of the value (of its format): 2 u of the value on each side.
    """
    u = FORMATS[fmt].eps / 2
    return 2 * relative * distance(after, before) + 4 * u * (l2(after) + l2(before))


def _free(fmt: str, exact: Array) -> float:
    """Return the L2 norm of three results rounded the other way, each off by one ulp of the largest element."""
    return math.sqrt(3) * ulp(fmt, float(np.abs(_finite(exact)).max(initial=0.0)))


def _unfit(x: Array, fmt: str) -> int:
    """Return how many finite values of an array a format does not hold."""
    if x.dtype == FORMATS[fmt].dtype:
        return 0
    values = _finite(x)
    return int(np.count_nonzero(fp64(cast(values, fmt)) != values))


def norm_error(size: int) -> float:
    """Return the relative error of PyTorch's norm, a running FP32 sum in 8 lanes (n/8 + 8) u, halved by the root; plus ours."""
    return (size / 8 + 16) * U


class Addends(State):
    """A state that keeps the gradients of each micro-batch beside their sum."""

    addends: dict[str, list[Array]]

    def accumulate_grad(self, name: str, gradient: Array) -> None:
        self.addends.setdefault(name, []).append(np.array(gradient))
        super().accumulate_grad(name, gradient)


class Bounds:
    """Bounds of forward and backward, in L2, for one step.

    *As a whole* (the weaker bound): both sides approximate one true value, which a run in FP64 gives. With e the smaller of
    their two distances from it, and the other side at most twice as far (2 e), the two are within 3 e of each other. The loss
    is one number and may be close to the true one by chance, so its e is the mean of the rows' errors. This bound can miss a
    single extra or missing rounding.

    *Operation by operation*, if the trace holds every input of an operation: our operation computes from the trace's values,
    so the two sides differ only by the order of its sums. The reference is the same operation with the same roundings and its
    sums in FP64. With e our distance from it, theirs may be 3 e away: a few times as many results that are rounded the other
    way. Three such results, one ulp of the largest element each, are allowed in addition. This bound finds a single extra or
    missing rounding. FP32 results have no such rounding, and their e depends on the order of summation by chance: for them the
    larger of the two bounds holds.

    In fused attention correct kernels differ by more than the order of sums, so 5/4 of the distance to another correct kernel
    (`other_kernels`) is added. That distance comes from n results that are rounded the other way; n results of a third kernel
    have an L2 norm within 1 / (2 sqrt(n)) of it (one standard deviation). The quarter alone is five of these at n = 100; with
    the three results it is five from n = 10 on, and about four at n = 1.

    The gradient of a parameter over n micro-batches is a sum of n such results, each with its own allowance, plus the FP32
    roundings of n - 1 additions on either side, each within u of a partial sum, which in no order exceeds the sum of the
    addends' norms.

    *Formats*: if all our values fit 16 bits, theirs must too; if ours do not, theirs must not either, since results of an FP32
    operation or sum do not all fit 16 bits by chance. A 16-bit value may be stored in a wider format.
    """

    def __init__(self, training: Training, ours: Trace, theirs: Trace, step: int, batches: list[Batch], S: Array) -> None:
        """Prepare the bounds of a step. training: the run that computed `ours`; its weights are the trace's."""
        self.training, self.ours, self.theirs = training, ours, theirs
        self.step, self.batches, self.S = step, batches, S
        self._exact_sums: Trace | None = None
        self._other_kernel: Trace | None = None
        self._truth: Trace | None = None
        self._addends: dict[str, list[Array]] = {}

    def of(self, point: str, name: str, ours: Array, theirs: Array, weak: bool) -> float:
        """Return the bound of a tensor's difference. weak: ours was not computed from the trace's own values alone."""
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
        """Return a message if their values have another format than ours, else ''.

        Eight values that do not fit 16 bits are not chance, nor is one if all our values, eight or more, fit.
        """
        low = self._low
        if FORMATS[low].bits > 16 or np.shape(ours) != np.shape(theirs):
            return ""
        a, b = (_unfit(x, low) for x in (ours, theirs))
        if a >= 8 and b == 0:
            return f"all values fit {low}: they should have more bits"
        if a == 0 and b > 0 and np.count_nonzero(_finite(ours)) >= 8:
            return f"{b} values do not fit {low}: they should have been rounded to it"
        return ""

    def _of_loss(self, ours: Array, weak: bool) -> float:
        """Return the bound of the loss by either rule, plus the error of its FP32 sum over rows in some order."""
        rows = sum(int(self.training.model.n_targets(targets)) for _, targets in self.batches)
        e = self._row_error() if weak else distance(ours, self.exact_sums.tensors[f"{self.step}/2.loss"])
        return 3 * e + 2 * math.sqrt(rows) * U * l2(ours)  # each addition errs by u at most, in a random direction

    def _of_sum(self, name: str) -> tuple[float, str]:
        """Return the part of a gradient's bound due to micro-batches, and the format that their gradients were rounded to."""
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
        """Return the largest number of the format of products."""
        return FORMATS[self._low].max

    @property
    def _low(self) -> str:
        """Return the format that products read: 16 bits in every recipe but fp32."""
        low = self.training.run.policy.row("linear.y").input("x")
        return low if low in FORMATS else self.training.state.formats["grads"]

    def _rounded_to(self, x: Array) -> str:
        """Return the format of products if it holds the values, as of many FP32 tensors under autocast; else the tensor's."""
        low = self._low
        fits = x.dtype == FORMATS[low].dtype or np.array_equal(fp64(cast(x, low)), fp64(x), equal_nan=True)
        return low if fits else format_of(x)

    @property
    def exact_sums(self) -> Trace:
        """Return our step, from the trace's values, with all sums in FP64."""
        if self._exact_sums is None:
            run = self.training.run
            rows = {key: replace(row, acc="fp64") if row.acc == "fp32" else row for key, row in run.policy.rows.items()}
            exact, exact_run = self._same_weights(), Run(replace(run.policy, rows=rows), run.backend, overrides=run.overrides)
            self._exact_sums, self._addends = self._run(exact, exact_run, self.S, follow=True), exact.addends
        return self._exact_sums

    @property
    def other_kernel(self) -> Trace:
        """Return our step, from the trace's values, with fused attention as another correct kernel computes it."""
        if self._other_kernel is None:
            run = self.training.run
            other = Run(run.policy, run.backend, overrides={**run.overrides, **OTHER_KERNELS})
            self._other_kernel = self._run(self._same_weights(), other, self.S, follow=True)
        return self._other_kernel

    @property
    def truth(self) -> Trace:
        """Return the step in FP64, from the weights of the trace."""
        if self._truth is None:
            recipe, training = get_recipe("fp64"), self.training
            backend = training.run.backend
            exact = State(training.model, recipe.state_encodings(()), backend)
            widen(training.state.weights, "fp64", out=exact.weights)
            self._truth = self._run(exact, Run(recipe.policy, backend), np.asarray(np.float64(self.S)), follow=False)
        return self._truth

    def _same_weights(self) -> Addends:
        """Return our state with its own gradients. It has the class of our state, so that a mistake in the state is in both."""
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
        """Return the mean over rows of |our loss - the true loss|, computed from the logits of each run."""
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
    """Return -log softmax(logits)[target] of each row, in FP64, from the stored logits."""
    z = fp64(logits).reshape(target.size, -1)
    top = z.max(-1)
    losses: np.ndarray = np.log(np.exp(z - top[:, None]).sum(-1)) + top - z[np.arange(target.size), target]
    return losses
