"""Effects of roundings: per value (`effects_of`), counted over a tensor (`Counts`), and over a run (`RoundingMonitor`).

A run with a monitor reports its roundings: the name of the site, the values before, and the values after. Nothing in this
module rounds for the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from refimpl.nn.ops import OPS
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of, widens_to


@dataclass(frozen=True)
class Effects:
    """The effect of one rounding on each value, as arrays of booleans.

    Exactly one of the first six holds for each value:
      exact        the value is one of the format (zero included) and did not change
      rounded      it became a neighboring value of the format
      flushed      it was not zero, and became zero
      overflowed   it was too large and became an infinity, or NaN if the format has no infinity
      saturated    it was too large and became the largest value
      arrived      it was Inf or NaN before this rounding
    The other two hold in addition:
      tie          it was halfway between two neighboring values, and became the even one
      subnormal    it became a subnormal value, which has fewer significant bits the smaller it is
    """

    exact: np.ndarray
    rounded: np.ndarray
    flushed: np.ndarray
    overflowed: np.ndarray
    saturated: np.ndarray
    arrived: np.ndarray
    tie: np.ndarray
    subnormal: np.ndarray


OUTCOMES = ("exact", "rounded", "flushed", "overflowed", "saturated", "arrived")
"""The effects that exclude each other."""


def effects_of(x: np.ndarray, y: np.ndarray, fmt: str) -> Effects:
    """Return the effect of rounding `x` to `y`, of format `fmt`, for each value.

    x, y: arrays of one shape, in any formats that FP64 holds. An error of half an ulp in the binade of x is a tie.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        before, after = widen(x, "fp64"), widen(y, "fp64")
        magnitude = np.abs(before)
        arrived = ~np.isfinite(before)
        same = (before == after) & ~arrived
        beyond = magnitude >= overflow_threshold(fmt)
        flushed = ~(same | arrived) & (after == 0)
        overflowed = ~(same | arrived) & ~np.isfinite(after)
        saturated = ~(same | arrived | overflowed | flushed) & beyond
        rounded = ~(same | arrived | flushed | overflowed | saturated)
        tie = (rounded | flushed) & (2 * np.abs(before - after) == _ulps(magnitude, fmt))
        subnormal = (after != 0) & (np.abs(after) < FORMATS[fmt].smallest_normal)
    return Effects(same, rounded, flushed, overflowed, saturated, arrived, tie, subnormal)


def overflow_threshold(fmt: str) -> float:
    """Return the smallest magnitude that does not round to a finite value of the format: 65520 for fp16.

    It is the tie half an ulp above the largest value if that value's fraction is odd, since the tie then rounds up. For e4m3,
    whose largest value 448 is even, it is the next FP64 number above the tie 464.
    """
    row = FORMATS[fmt]
    step = math.ldexp(row.eps, math.frexp(row.max)[1] - 1)
    middle = row.max + step / 2  # infinite for fp64, as it should be
    odd = row.max / step % 2 == 1
    return middle if odd or math.isinf(middle) else math.nextafter(middle, math.inf)


def _ulps(magnitude: np.ndarray, fmt: str) -> np.ndarray:
    """Return `formats.ulp` for arrays: the distance between the format's values in the binade of each magnitude."""
    row = FORMATS[fmt]
    _, exponents = np.frexp(np.maximum(magnitude, row.smallest_normal))
    ulps: np.ndarray = np.ldexp(1.0, exponents - 1 - row.fraction_bits)
    return ulps


LOWEST, HIGHEST = -150, 128
"""The binades [2^e, 2^(e+1)) that are counted have e from LOWEST, which includes all smaller ones, to HIGHEST."""


@dataclass
class Counts:
    """Counts of the effects of roundings at one site. Counts of several tensors, or steps, can be added.

    signal, noise: sums of x^2 and (x - y)^2 over values that are finite before and after. zeros: number of x that are zero.
    binades: numbers of nonzero finite x in [2^e, 2^(e+1)), from e = LOWEST on. largest: the largest finite |x|.
    """

    fmt: str
    elements: int = 0
    zeros: int = 0
    exact: int = 0
    rounded: int = 0
    flushed: int = 0
    overflowed: int = 0
    saturated: int = 0
    arrived: int = 0
    tie: int = 0
    subnormal: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    binades: np.ndarray = field(default_factory=lambda: np.zeros(HIGHEST - LOWEST + 1, np.int64))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Count the effects of rounding `x` to `y`, in pieces that fit a cache."""
        x, y = x.reshape(-1), y.reshape(-1)
        for start in range(0, x.size, _PIECE):
            self._add_piece(x[start : start + _PIECE], y[start : start + _PIECE])

    def _add_piece(self, x: np.ndarray, y: np.ndarray) -> None:
        before, after = widen(x, "fp64"), widen(y, "fp64")
        effects = effects_of(before, after, self.fmt)
        for name in (*OUTCOMES, "tie", "subnormal"):
            setattr(self, name, getattr(self, name) + int(np.count_nonzero(getattr(effects, name))))
        self.elements += before.size
        self.zeros += before.size - int(np.count_nonzero(before))
        magnitude = np.abs(before)
        magnitude = magnitude[np.isfinite(magnitude) & (magnitude > 0)]
        finite = np.isfinite(before) & np.isfinite(after)
        signal, difference = before[finite], before[finite] - after[finite]
        self.signal += float(np.vdot(signal, signal))
        self.noise += float(np.vdot(difference, difference))
        if magnitude.size:
            self.largest = max(self.largest, float(magnitude.max()))
            exponents = np.frexp(magnitude)[1] - 1
            self.binades += np.bincount(exponents.clip(LOWEST, HIGHEST) - LOWEST, minlength=self.binades.size)

    def __iadd__(self, other: Counts) -> Counts:
        if other.fmt != self.fmt:
            raise ValueError(f"counts of {other.fmt} cannot be added to counts of {self.fmt}")
        for f in fields(self):
            if f.name not in ("fmt", "largest"):
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        self.largest = max(self.largest, other.largest)
        return self

    @property
    def snr(self) -> float:
        """Return the SNR, 10 log10(sum x^2 / sum (x - y)^2) dB: infinite without error, NaN without signal."""
        if self.noise == 0:
            return math.inf if self.signal else math.nan
        return 10 * math.log10(self.signal / self.noise)

    @property
    def exponents(self) -> tuple[int, int] | None:
        """Return the smallest and the largest e with a nonzero finite x in [2^e, 2^(e+1)), or None."""
        used = np.flatnonzero(self.binades)
        return (int(used[0]) + LOWEST, int(used[-1]) + LOWEST) if used.size else None

    def share(self, name: str) -> float:
        """Return the share of the finite nonzero values with an effect; 0 if there are no such values."""
        happened = getattr(self, name) - (self.zeros if name == "exact" else 0)
        return happened / self.nonzero if self.nonzero else 0.0

    @property
    def nonzero(self) -> int:
        """Return the number of finite nonzero values."""
        return self.elements - self.zeros - self.arrived

    def divided_by(self, scale: float) -> Counts:
        """Return the binades and the largest of the values divided by a loss scale, without outcomes.

        Exact for a power of two; another scale is replaced by the power of two below it.
        """
        power = math.frexp(scale)[1] - 1
        result = Counts(self.fmt, self.elements, self.zeros, arrived=self.arrived, largest=self.largest / scale)
        for e in np.flatnonzero(self.binades):
            result.binades[max(int(e) - power, 0)] += self.binades[e]
        return result

    def flushed_at(self, factor_exponent: int, fmt: str) -> float:
        """Return the share of nonzero values that would become zero in `fmt` if all were multiplied by 2^factor_exponent.

        These are the values below half of the smallest subnormal. The half itself, a tie that rounds to zero, is not counted,
        since its binade consists of values that survive.
        """
        half_exponent = math.frexp(FORMATS[fmt].smallest_subnormal)[1] - 2
        below = max(0, half_exponent - factor_exponent - LOWEST)
        return float(self.binades[:below].sum() / self.nonzero) if self.nonzero else 0.0

    def fits_at(self, factor_exponent: int, fmt: str) -> bool:
        """Return whether the largest value times 2^factor_exponent rounds to a finite value of `fmt`."""
        return math.ldexp(self.largest, factor_exponent) < overflow_threshold(fmt)


_PIECE = 1 << 16


class RoundingMonitor:
    """Counts all roundings of a step by site: pass it to `Training.set_monitor`, and `take` the counts after the step.

    what_if: other formats; the effects of rounding the same values to them are counted too. Formats of 8 bits and fewer
    saturate, and the tensor is first multiplied by a power of two that brings its largest value just below the format's;
    wider formats take the values unchanged. only: a predicate for the sites that are counted; by default all.
    """

    def __init__(
        self,
        what_if: Sequence[str] = (),
        to_host: Callable[[Array], np.ndarray] = np.asarray,
        only: Callable[[str], bool] = lambda site: True,
    ) -> None:
        self.what_if, self.to_host, self.only = what_if, to_host, only
        self.sites: dict[str, Counts] = {}
        self.others: dict[str, dict[str, Counts]] = {fmt: {} for fmt in what_if}

    def __call__(self, site: str, before: Array, after: Array) -> None:
        """Count one rounding; the run calls this at each."""
        if not self.only(site):
            return
        x, y = self.to_host(before), self.to_host(after)
        self.sites.setdefault(site, Counts(format_of(y))).add(x, y)
        for fmt, counts in self.others.items():
            if not widens_to(format_of(x), fmt):
                scaled = scaled_to_fit(x, fmt)
                counts.setdefault(site, Counts(fmt)).add(scaled, _round_as_if(scaled, fmt))

    def take(self) -> tuple[dict[str, Counts], dict[str, dict[str, Counts]]]:
        """Return the counts since the last call, site -> counts, and those of each other format; start again from zero."""
        result = self.sites, self.others
        self.sites, self.others = {}, {fmt: {} for fmt in self.what_if}
        return result


def scaled_to_fit(x: np.ndarray, fmt: str) -> np.ndarray:
    """Return `x` times the power of two that brings its largest finite magnitude closest below the largest value of `fmt`.

    For formats wider than 8 bits, or if all values are zero, return `x` itself.
    Source: the per-tensor scaling of Micikevicius et al. 2022, arXiv 2209.05433. Differs from the source: the scale is
    a power of two, so that scaling is exact.
    """
    if FORMATS[fmt].bits > 8:
        return x
    wide: np.ndarray = widen(x, "fp64")
    magnitude = np.abs(wide[np.isfinite(wide)])
    largest = float(magnitude.max(initial=0.0))
    if largest == 0:
        return x
    return wide * math.ldexp(1.0, math.floor(math.log2(FORMATS[fmt].max / largest)))


def _round_as_if(x: np.ndarray, fmt: str) -> np.ndarray:
    y: np.ndarray = cast(x, fmt, overflow="saturate" if FORMATS[fmt].bits <= 8 else None)
    return y


# -- kinds of sites ------------------------------------------------------------------------------------------------------

KINDS = ("weights", "activations", "activation gradients", "weight gradients", "updated states")
"""The kinds of tensors that are rounded, in the order of a step."""


def kind_of(site: str) -> str:
    """Return the kind of tensor that a site rounds: '...h.0.mlp.c_fc:linear.dw.dw' is of 'weight gradients'.

    A site is named `place:operation.parts.operand`; the gradient of operand x is called dx.
    """
    place, _, rest = site.partition(":")
    op, _, operand = rest.partition(".")
    operand = operand.removesuffix(".stored").rpartition(".")[2]
    if op in ("weights_down", "update"):
        return "weights" if op == "weights_down" else "updated states"
    if op == "fan_in":
        return "weight gradients" if {"weight", "bias"} & set(place.split(".")) else "activation gradients"
    of_gradient = operand.startswith("d")
    parameters = {"w"} if op == "cast" else {name for _, name in OPS[op].params}
    what = "weight" if operand.removeprefix("d") in parameters else "activation"
    return f"{what} gradients" if of_gradient else f"{what}s"


def by_kind(sites: Mapping[str, Counts]) -> Iterator[tuple[str, dict[str, Counts]]]:
    """Yield each kind that has sites, with these, in the order of KINDS."""
    for kind in KINDS:
        chosen = {site: counts for site, counts in sites.items() if kind_of(site) == kind}
        if chosen:
            yield kind, chosen
