"""Our definitions on transformers' own numbers, rounding by rounding.

The model runs by its definitions, forward and backward. Each time an operation rounds to 16 bits, the result is compared with
the one that transformers has made there, and the operation continues with that one. So no difference is carried from one
rounding to the next: what is compared is one rounding, of a number computed from transformers' own inputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from refimpl.backends.base import REFERENCE
from refimpl.nn.autograd import Tape
from refimpl.nn.models.model import Model
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of
from refimpl.numerics.formats import FORMATS, format_of, ulp, widens_to
from refimpl.parity.audit.verdict import Verdict
from refimpl.parity.tolerances import fp64
from refimpl.parity.trace import like
from refimpl.parity.transformers.recording import Recording, Result
from refimpl.parity.transformers.sites import Counterpart, Finder, sizes_of
from refimpl.precision.context import OpPrecision, Run
from refimpl.precision.policy import Policy

ENOUGH = 0.999
"""The share of results that must be identical."""
FREE = 3
"""So many more may be rounded the other way: tensors are small, and one in a thousand of 64 is none."""
ROUNDED_OTHERWISE = 4
"""How many times as many results may differ as FP32 sums leave not correctly rounded: by the audit's estimate (its `verdict`),
or counted beside our operation in FP64."""
LARGEST = 14
"""How many results as large as the largest may be rounded the other way beyond what the number of those that may differ
explains.

Derivation. Both sides compute one rounding from the same numbers, so that result i differs with a small probability p_i
whether or not others do, and then by one ulp of its own, u_i <= u, that of the largest. The squared L2 norm of the difference
is a sum of independent terms, u_i^2 or 0, with mean M = sum p_i u_i^2. Bernstein's inequality bounds its tail:

    P(sum > M + t) <= exp(-t^2 / (2 u^2 (M + t/3)))

If A results may differ, twice as many as are expected to over both sides, M <= A mean(u_i^2) / 2: the errors of sums do not
grow with the result, so that large results are no likelier to differ than small ones. The bound A mean(u_i^2) + k u^2 leaves
t >= M + k u^2, for which the exponent is at least 9 k / 8, whatever M is. A pass of a model of 30 layers has some 3000
roundings: with k = 14 one of them is outside by chance in 4 of 10,000 passes.

The bound of an operation of a trace (`tolerances.Bounds`) is none here. It has 3 such results, and a multiple of our own
distance from exact sums, which is 0 where only theirs are rounded the other way. Each that differs is so by either side with
probability 1/2: all of m by theirs with 2^-m. So where the largest make most of the norm, 4 are too many by chance in 1 of 16
tensors. And a trace's operation may have several roundings, of which one that differs changes the next.
"""


@dataclass(frozen=True)
class Compared:
    """One rounding of ours beside its counterpart; result is None if there is none.

    elements: how many are not zero on both sides. differ: how many of them are not identical. ulps: the largest distance of two
    elements, in numbers of the format. largest: the largest difference, in ulps of the largest element. squares: the sum of the
    squares of the differences, in that unit. spacing: the mean square of the elements' own ulps, in that unit. off: how many of
    ours are not what our operation makes with its arithmetic in FP64; counted where without it the rounding would depart.
    """

    place: str
    site: str
    elements: int
    differ: int = 0
    ulps: int = 0
    largest: float = 0.0
    squares: float = 0.0
    spacing: float = 0.0
    result: Result | None = None
    note: str = ""
    off: int = 0

    @property
    def verdict(self) -> Verdict | None:
        """Return what the audit says of the counterpart."""
        verdicts = () if self.result is None else self.result.operation.verdicts
        return next((v for v in verdicts if self.result is not None and v.result == self.result.name), None)

    @property
    def allowed(self) -> float:
        """Return how many results may differ."""
        expected = None if self.verdict is None else self.verdict.expected
        estimated = (1 - expected) * self.elements if expected is not None else 0.0
        return FREE + max((1 - ENOUGH) * self.elements, ROUNDED_OTHERWISE * max(estimated, self.off))

    @property
    def norm(self) -> float:
        """Return the L2 norm of the differences as a multiple of its bound."""
        return math.sqrt(self.squares / (self.allowed * self.spacing + LARGEST))

    @property
    def departs(self) -> bool:
        """Return whether more results differ, or by more, than sums in another order explain.

        Each that differs is a rounding to the other neighbor, one ulp of the largest element at most where terms cancel.
        """
        return bool(self.note) or self.differ > self.allowed or self.largest > 1 or self.norm > 1


def compared(place: str, site: str, ours: Array, theirs: Counterpart | None) -> Compared:
    """Compare a result bit by bit; NaN is equal to NaN."""
    if theirs is None:
        return Compared(place, site, ours.size)
    if theirs.array.size != ours.size or format_of(theirs.array) != format_of(ours):
        what = f"{format_of(ours)} {ours.shape} here, {theirs.result.facts.dtype} {theirs.array.shape} there"
        return Compared(place, site, ours.size, ours.size, result=theirs.result, note=what)
    other, fmt = theirs.array.reshape(ours.shape), format_of(ours)
    x, y = _ordered(ours), _ordered(other)
    places = np.abs(x - y)
    places[np.isnan(ours) & np.isnan(other)] = 0
    counted, differ = np.count_nonzero(x | y), np.count_nonzero(places)
    if not differ:
        return Compared(place, site, int(counted), result=theirs.result)
    b = fp64(other)
    apart = np.abs(fp64(ours) - b)[places > 0] / ulp(fmt, float(np.abs(b[np.isfinite(b)]).max(initial=0.0)))
    apart[~np.isfinite(apart)] = math.inf
    largest, squares = float(apart.max()), float((apart * apart).sum())
    most = int(places.max())
    return Compared(place, site, int(counted), int(differ), most, largest, squares, _spacing(y, fmt), theirs.result)


def _ordered(x: Array) -> Array:
    """Return the place of each 16-bit number among all of its format: neighbors differ by 1, and -0 is 0."""
    code = np.asarray(bits_of(np.ascontiguousarray(x)), np.int64)
    size = code & 0x7FFF
    return np.where(code & 0x8000, -size, size)


def _spacing(ordered: Array, fmt: str) -> float:
    """Return the mean square of the ulps of the numbers that are not zero, in ulps of the largest finite one."""
    exponents = np.abs(ordered[ordered != 0]) >> FORMATS[fmt].fraction_bits
    finite = exponents[exponents < 2 ** FORMATS[fmt].exponent_bits - 1]
    counts = np.bincount(np.maximum(finite, 1))  # subnormal numbers have the spacing of the smallest exponent
    return float((counts * 4.0 ** np.arange(1 - len(counts), 1)).sum() / max(1, counts.sum()))


class Following(OpPrecision):
    """The precision of an operation whose 16-bit roundings are compared and then replaced."""

    run: FollowingRun

    def __getitem__(self, part: str) -> OpPrecision:
        if part not in self._parts:
            self._parts[part] = Following(self.run, f"{self.op}.{part}", self.place)
        return self._parts[part]

    def round_to(self, x: Array, fmt: str, site: str) -> Array:
        y = super().round_to(x, fmt, site)
        if widens_to(format_of(x), fmt) or FORMATS[fmt].bits > 16:
            return y
        return self.run.follow(self.place, f"{self.op}.{site}", y)


@dataclass
class FollowingRun(Run):
    """A run whose operations go on with the results of a recording.

    compared: each rounding, in order. kept: our results by their place in that order, of those in `wanted`, or that depart.
    """

    finder: Finder = field(kw_only=True)
    wanted: Collection[int] = field(default=(), kw_only=True)
    compared: list[Compared] = field(default_factory=list, kw_only=True)
    kept: dict[int, Array] = field(default_factory=dict, kw_only=True)
    _counts: dict[str, int] = field(default_factory=dict, kw_only=True)

    def precision(self, op: str, place: str) -> OpPrecision:
        """Return the precision of an operation, which compares."""
        if (op, place) not in self._precisions:
            self._precisions[op, place] = Following(self, op, place)
        return self._precisions[op, place]

    def follow(self, place: str, site: str, y: Array) -> Array:
        """Compare a rounded result with its counterpart, and return that, or ours where there is none."""
        count = self._counts.get(f"{place}:{site}", 0)
        self._counts[f"{place}:{site}"] = count + 1
        theirs = self.finder.find(place, site.partition(".")[0], site, count)
        result = compared(place, site, y, theirs)
        if result.departs or len(self.compared) in self.wanted:
            self.kept[len(self.compared)] = y
        self.compared.append(result)
        return y if theirs is None or result.note else np.ascontiguousarray(theirs.array.reshape(y.shape))


def replay(
    model: Model, weights: Mapping[str, Array], policy: Policy, recording: Recording, batch: tuple[np.ndarray, np.ndarray],
    S: float, kernels: Mapping[str, Op],
) -> list[Compared]:  # fmt: skip
    """Run forward and backward along a recording, and return each rounding beside its counterpart.

    weights: in the format that the operations read. kernels: what stands in place of definitions.
    """
    tokens, targets = batch

    def observe(point: str, place: str, array: Array) -> Array:
        theirs = recording.trace.get(1, f"2.{point}", place)
        return array if array.ndim == 0 or theirs is None else like(theirs, array, place)

    def run_by(policy: Policy, wanted: Collection[int] = ()) -> FollowingRun:
        finder = Finder(recording, sizes_of(model, tokens))
        run = FollowingRun(policy, REFERENCE, observer=observe, overrides=kernels, finder=finder, wanted=wanted)
        tape = Tape(run, weights, model.tied)
        with np.errstate(all="ignore"):
            loss = model.loss(tape, tokens, targets)
            tape.backward(loss, np.full((), S, np.float32), lambda name, gradient: None)
        return run

    run = run_by(policy)
    if run.kept:
        rows = {key: replace(row, acc="fp64") if row.acc == "fp32" else row for key, row in policy.rows.items()}
        exact = run_by(replace(policy, rows=rows), run.kept).kept
        for i, ours in run.kept.items():
            same = exact[i].shape == ours.shape and format_of(exact[i]) == format_of(ours)
            off = int(np.count_nonzero(_ordered(exact[i]) != _ordered(ours))) if same else 0
            run.compared[i] = replace(run.compared[i], off=off)
    return run.compared
