"""Verdicts on the tensors of an inspection: one sentence per tensor, the worst first."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from refimpl.numerics.formats import FORMATS
from refimpl.numerics.rounding_effects import NEGLIGIBLE, Counts
from refimpl.numerics.rounding_words import decibels, percent, powers, scale_sentence
from refimpl.tools.precision_report.collect import Inspection, has_own_scale
from refimpl.tools.precision_report.counts import kind_of


@dataclass(frozen=True)
class Verdict:
    """The verdict on one site.

    severity: for sorting; 2 and more for Inf or NaN, 3 and more if values overflowed. reason: what decided it.
    """

    site: str
    name: str
    kind: str
    severity: float
    reason: str
    text: str


def verdicts_of(inspection: Inspection) -> list[Verdict]:
    """Return a verdict for each site, the worst first."""
    result = []
    for site, counts in inspection.sites.items():
        if site in inspection.unscaled:
            unscaled = inspection.unscaled[site]
            (severity, reason), text = _rank(counts, unscaled), _of_gradient(counts, unscaled, inspection)
        else:
            (severity, reason), text = _rank(counts), _of_value(counts)
        result.append(Verdict(site, plain_name(site), kind_of(site), severity, reason, text))
    return sorted(result, key=lambda v: -v.severity)


def plain_name(site: str) -> str:
    """Return the name of a site's tensor: 'transformer.h.3.mlp.c_fc:linear.dw.dw' -> 'dw of block 3 mlp.c_fc'."""
    place, _, rest = site.partition(":")
    place = re.sub(r"^(?:(?:transformer|model)\.)?(?:(?:h|layers)\.(\d+)\.)?", _block, place)
    if rest == "weights_down":
        return place
    if rest.startswith("update."):
        return f"{rest.removeprefix('update.')} of {place}"
    if rest == "fan_in.sum":
        return f"sum of gradients of {place.removesuffix('.grad')}"
    return f"{rest.removesuffix('.stored').rpartition('.')[2]} of {place}"


def _block(found: re.Match[str]) -> str:
    return "" if found[1] is None else f"block {found[1]} "


def _of_gradient(counts: Counts, unscaled: Counts, inspection: Inspection) -> str:
    """Return the sentence for a gradient: the effect of the loss scale, and of others."""
    fmt, parts = counts.fmt, _arrived(counts)
    if counts.overflowed:
        parts.append(f"{counts.overflowed} of {counts.elements} values overflowed: the loss scale was too large")
    if counts.arrived and not counts.nonzero:
        return f"{parts[0]}, so nothing can be said about a loss scale"
    actual = counts.share("flushed")
    parts.append(scale_sentence(unscaled, fmt, others=counts.arrived > 0))
    scales = sorted({row["loss_scale"] for row in inspection.sampled})
    if scales != [1.0]:
        parts.append(f"at the S of this run ({powers(scales)}) {percent(actual)} did")
    return "; ".join(parts)


def _of_value(counts: Counts) -> str:
    """Return the sentence for weights, activations or states."""
    fmt, parts = counts.fmt, _arrived(counts)
    if counts.overflowed:
        parts.append(f"{counts.overflowed} of {counts.elements} values overflowed {fmt}")
    if has_own_scale(counts) and counts.nonzero:
        zero, saturated, subnormal = (percent(counts.share(name)) for name in ("flushed", "saturated", "subnormal"))
        parts.append(
            f"divided by its own scale, {zero} of the nonzero values became zero in {fmt}, {saturated} saturated and "
            f"{subnormal} became subnormal; the others keep {FORMATS[fmt].fraction_bits + 1} significant bits"
        )
    elif not has_own_scale(counts):
        for name, word in (("flushed", "became zero"), ("saturated", "saturated"), ("subnormal", "became subnormal")):
            if counts.share(name) >= NEGLIGIBLE:
                parts.append(f"{percent(counts.share(name))} of the nonzero values {word} in {fmt}")
    if not has_own_scale(counts) and counts.room is not None and not counts.overflowed:
        parts.append(f"the largest, {counts.largest:.3g}, is 2^{counts.room} times below overflow")
    if counts.nonzero or not counts.arrived:
        parts.append(f"signal-to-noise {decibels(counts.snr)}")
    return "; ".join(parts)


def _arrived(counts: Counts) -> list[str]:
    """Return a part of the sentence on values that were Inf or NaN before this cast, or []."""
    if not counts.arrived:
        return []
    how_many = f"all {counts.elements}" if counts.arrived == counts.elements else f"{counts.arrived} of {counts.elements}"
    return [f"{how_many} values arrived as Inf or NaN"]


def _rank(counts: Counts, unscaled: Counts | None = None) -> tuple[float, str]:
    """Return the severity and what decided it: overflow, then Inf or NaN that arrived, then the largest share, and noise.

    unscaled: a gradient divided by its loss scale, of which the share that would become zero at S = 1 counts.
    """
    if counts.overflowed:
        return 3 + counts.overflowed / counts.elements, "overflow"
    if counts.arrived:
        return 2 + counts.arrived / counts.elements, "Inf or NaN before"
    least = 6.02 * (FORMATS[counts.fmt].fraction_bits + 1)  # dB: an error of half an ulp at each power of two
    noise = 0.01 * max(0.0, least - counts.snr) / least if math.isfinite(counts.snr) else 0.0
    at_one = 0.0 if unscaled is None else unscaled.flushed_at(0, counts.fmt)
    shares = {"zeros": counts.share("flushed"), "zeros at S = 1": at_one, "saturation": counts.share("saturated")}
    largest = max(shares, key=lambda name: shares[name])
    severity = shares[largest] + noise
    return severity, "nothing" if severity == 0 else "noise" if noise > shares[largest] else largest
