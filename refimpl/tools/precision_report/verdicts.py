"""What the counts of an inspection mean, in words: one sentence a tensor, the worst first."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from refimpl.numerics.formats import FORMATS
from refimpl.tools.precision_report.collect import Inspection, has_own_scale
from refimpl.tools.precision_report.counts import Counts, kind_of, overflow_threshold

NEGLIGIBLE = 1e-3
"""A smaller share of values is not called a loss. So much a scale of 32K left lost in Micikevicius et al. 2018, section 3."""


@dataclass(frozen=True)
class Verdict:
    """One site: what it rounds, how bad that is (for sorting: 1 and more where values overflowed), and a sentence."""

    site: str
    name: str
    kind: str
    severity: float
    text: str


def verdicts_of(inspection: Inspection) -> list[Verdict]:
    """A verdict for each site, the worst first."""
    result = []
    for site, counts in inspection.sites.items():
        if site in inspection.unscaled:
            severity, text = _of_gradient(counts, inspection.unscaled[site], inspection)
        else:
            severity, text = _of_value(counts)
        result.append(Verdict(site, plain_name(site), kind_of(site), severity, text))
    return sorted(result, key=lambda v: -v.severity)


def plain_name(site: str) -> str:
    """'transformer.h.3.mlp.c_fc:linear.dw.dw' -> 'dw of block 3 mlp.c_fc'."""
    place, _, rest = site.partition(":")
    place = re.sub(r"^(transformer\.)?h\.(\d+)\.", r"block \2 ", place).removeprefix("transformer.")
    if rest == "weights_down":
        return place
    if rest.startswith("update."):
        return f"{rest.removeprefix('update.')} of {place}"
    if rest == "fan_in.sum":
        return f"sum of gradients of {place.removesuffix('.grad')}"
    return f"{rest.removesuffix('.stored').rpartition('.')[2]} of {place}"


def _of_gradient(counts: Counts, unscaled: Counts, inspection: Inspection) -> tuple[float, str]:
    """What the loss scale did for a gradient, and what another one would do."""
    fmt, parts = counts.fmt, _arrived(counts)
    if counts.overflowed:
        parts.append(f"{counts.overflowed} of {counts.elements} values overflowed: there the loss scale was too large")
    if counts.arrived and not counts.nonzero:
        return _severity(counts, 0.0), f"{parts[0]}: they say nothing of a loss scale"
    at_one = unscaled.flushed_at(0, fmt)
    actual = counts.share("flushed")
    if at_one < NEGLIGIBLE:
        needs = "of the others" if counts.arrived else "needs no loss scale:"
        parts.append(f"{needs} at S = 1 {percent(at_one)} would become zero in {fmt}")
    else:
        parts.append(f"{percent(at_one)} would become zero in {fmt} at S = 1; {_remedy(unscaled, fmt)}")
    scales = sorted({row["loss_scale"] for row in inspection.sampled})
    if scales != [1.0]:
        parts.append(f"at the S of this run ({powers(scales)}) {percent(actual)} did")
    return _severity(counts, at_one), "; ".join(parts)


def _remedy(unscaled: Counts, fmt: str) -> str:
    """The loss scales that keep a gradient: from where all but NEGLIGIBLE of it survive to where its largest overflows."""
    enough = next((k for k in range(1, 64) if unscaled.flushed_at(k, fmt) < NEGLIGIBLE), 64)
    top = max((k for k in range(64) if unscaled.fits_at(k, fmt)), default=-1)
    if enough > top:
        return f"no S saves all but {percent(NEGLIGIBLE)} of it: it takes 2^{enough}, but it overflows above 2^{top}"
    return f"S >= 2^{enough} saves all but {percent(NEGLIGIBLE)} of it, and it overflows above 2^{top}"


def _of_value(counts: Counts) -> tuple[float, str]:
    """What became of weights, activations or states."""
    fmt, parts = counts.fmt, _arrived(counts)
    threshold = overflow_threshold(fmt)
    if counts.overflowed:
        parts.append(f"{counts.overflowed} of {counts.elements} values overflowed {fmt}")
    for name, word in (("flushed", "became zero"), ("saturated", "saturated"), ("subnormal", "became subnormal")):
        if counts.share(name) >= NEGLIGIBLE:
            parts.append(f"{percent(counts.share(name))} of the nonzero values {word} in {fmt}")
    if has_own_scale(counts):
        parts.append("divided by its own scale before")
    elif counts.largest and math.isfinite(threshold / counts.largest):
        room = math.floor(math.log2(threshold / counts.largest))
        if not counts.overflowed:
            parts.append(f"the largest, {counts.largest:.3g}, is 2^{room} times below overflow")
    if counts.nonzero or not counts.arrived:
        parts.append(f"signal-to-noise {decibels(counts.snr)}")
    return _severity(counts, counts.share("flushed")), "; ".join(parts)


def _arrived(counts: Counts) -> list[str]:
    """What is said of values that were Inf or NaN before they came to this cast."""
    if not counts.arrived:
        return []
    how_many = f"all {counts.elements}" if counts.arrived == counts.elements else f"{counts.arrived} of {counts.elements}"
    return [f"{how_many} values arrived as Inf or NaN"]


def _severity(counts: Counts, flushed: float) -> float:
    """Overflow first, then what came as Inf or NaN, what is flushed, and the noise; each in its own decade."""
    if counts.overflowed:
        return 3 + counts.overflowed / counts.elements
    if counts.arrived:
        return 2 + counts.arrived / counts.elements
    usual = 6.02 * (FORMATS[counts.fmt].fraction_bits + 1)  # what rounding of normal values leaves, roughly
    lost = max(0.0, usual - counts.snr) / usual if math.isfinite(counts.snr) else 0.0
    return max(flushed, counts.share("flushed"), counts.share("saturated")) + 0.01 * lost


def percent(share: float) -> str:
    """Two digits of the distance to the nearer end: 0.1234 -> '12 %', 0.00567 -> '0.57 %', 0.9966 -> '99.66 %'."""
    distance = min(share, 1 - share)
    if distance <= 0:
        return f"{100 * share:.0f} %"
    digits = max(0, 1 - math.floor(math.log10(100 * distance)))
    return f"{100 * share:.{digits}f} %"


def decibels(ratio: float) -> str:
    """73.64 -> '73.6 dB'; no error at all is said so."""
    return "without an error" if math.isinf(ratio) else "-" if math.isnan(ratio) else f"{ratio:.1f} dB"


def powers(scales: Sequence[float]) -> str:
    """The range of loss scales in order of size: '2^16', or '2^14 to 2^16'."""
    return power(scales[0]) if len(scales) == 1 else f"{power(scales[0])} to {power(scales[-1])}"


def power(scale: float) -> str:
    """65536 -> '2^16', 1000 -> '1000', 1 -> '1'."""
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 and exponent != 1 else f"{scale:g}"
