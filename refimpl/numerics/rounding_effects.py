"""Effects of roundings: per value (`effects_of`), and counted over tensors (`Counts`). Nothing here rounds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from refimpl.numerics.casts import widen
from refimpl.numerics.formats import FORMATS


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

    def plain(self) -> dict[str, Any]:
        """Return the counts as plain data: without the binades, with the SNR in dB and the range of exponents."""
        data = {k: v for k, v in asdict(self).items() if k not in ("binades", "signal", "noise")}
        return {**data, "snr_db": self.snr, "exponents": self.exponents}

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

    @property
    def room(self) -> int | None:
        """Return the room of the largest value below overflow, as `room_below` has it."""
        return room_below(self.largest, self.fmt)

    def saving_scales(self, fmt: str) -> tuple[int, int]:
        """Return the exponents of the smallest and the largest loss scale that would do in `fmt`, for gradients at S = 1.

        The first is that of the smallest S > 1 that loses less than NEGLIGIBLE of the nonzero values (64 if none does), the
        second that of the largest S with which nothing overflows (-1 if even S = 1 is too large).
        """
        enough = next((k for k in range(1, 64) if self.flushed_at(k, fmt) < NEGLIGIBLE), 64)
        return enough, max((k for k in range(64) if self.fits_at(k, fmt)), default=-1)


def room_below(largest: float, fmt: str) -> int | None:
    """Return the largest k such that 2^k times a magnitude still rounds to a finite value of a format.

    Negative if it overflows as it is. None for 0, and in FP64.
    """
    threshold = overflow_threshold(fmt)
    if not largest or math.isinf(threshold):
        return None
    k = math.frexp(threshold)[1] - math.frexp(largest)[1]
    return k if math.ldexp(largest, k) < threshold else k - 1


_PIECE = 1 << 16

NEGLIGIBLE = 1e-3
"""A smaller share is not called a loss. A scale of 32K lost this share in Micikevicius et al. 2018, section 3."""

SWEEP = range(0, 26, 2)
"""The exponents of the loss scales of which reports say what they would save: 2^0 to 2^24."""

KINDS = ("weights", "activations", "activation gradients", "weight gradients", "updated states")
"""The kinds of tensors that are rounded, in the order of a step."""
