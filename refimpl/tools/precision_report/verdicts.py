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
    """The verdict on one site. severity: for sorting; 2 and more for Inf or NaN, 3 and more if values overflowed."""

    site: str
    name: str
    kind: str
    severity: float
    text: str


def verdicts_of(inspection: Inspection) -> list[Verdict]:
    """Return a verdict for each site, the worst first."""
    result = []
    for site, counts in inspection.sites.items():
        if site in inspection.unscaled:
            severity, text = _of_gradient(counts, inspection.unscaled[site], inspection)
        else:
            severity, text = _of_value(counts)
        result.append(Verdict(site, plain_name(site), kind_of(site), severity, text))
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


def _of_gradient(counts: Counts, unscaled: Counts, inspection: Inspection) -> tuple[float, str]:
    """Return the severity and the sentence for a gradient: the effect of the loss scale, and of others."""
    fmt, parts = counts.fmt, _arrived(counts)
    if counts.overflowed:
        parts.append(f"{counts.overflowed} of {counts.elements} values overflowed: the loss scale was too large")
    if counts.arrived and not counts.nonzero:
        return _severity(counts, 0.0), f"{parts[0]}, so nothing can be said about a loss scale"
    at_one = unscaled.flushed_at(0, fmt)
    actual = counts.share("flushed")
    parts.append(scale_sentence(unscaled, fmt, others=counts.arrived > 0))
    scales = sorted({row["loss_scale"] for row in inspection.sampled})
    if scales != [1.0]:
        parts.append(f"at the S of this run ({powers(scales)}) {percent(actual)} did")
    return _severity(counts, at_one), "; ".join(parts)


def _of_value(counts: Counts) -> tuple[float, str]:
    """Return the severity and the sentence for weights, activations or states."""
    fmt, parts = counts.fmt, _arrived(counts)
    if counts.overflowed:
        parts.append(f"{counts.overflowed} of {counts.elements} values overflowed {fmt}")
    for name, word in (("flushed", "became zero"), ("saturated", "saturated"), ("subnormal", "became subnormal")):
        if counts.share(name) >= NEGLIGIBLE:
            parts.append(f"{percent(counts.share(name))} of the nonzero values {word} in {fmt}")
    if has_own_scale(counts):
        parts.append("divided by its own scale first")
    elif counts.room is not None and not counts.overflowed:
        parts.append(f"the largest, {counts.largest:.3g}, is 2^{counts.room} times below overflow")
    if counts.nonzero or not counts.arrived:
        parts.append(f"signal-to-noise {decibels(counts.snr)}")
    return _severity(counts, counts.share("flushed")), "; ".join(parts)


def _arrived(counts: Counts) -> list[str]:
    """Return a part of the sentence on values that were Inf or NaN before this cast, or []."""
    if not counts.arrived:
        return []
    how_many = f"all {counts.elements}" if counts.arrived == counts.elements else f"{counts.arrived} of {counts.elements}"
    return [f"{how_many} values arrived as Inf or NaN"]


def _severity(counts: Counts, flushed: float) -> float:
    """Return the severity: overflow ranks first, then values that arrived as Inf or NaN, flushed values, and noise."""
    if counts.overflowed:
        return 3 + counts.overflowed / counts.elements
    if counts.arrived:
        return 2 + counts.arrived / counts.elements
    usual = 6.02 * (FORMATS[counts.fmt].fraction_bits + 1)  # about the SNR in dB of rounding normal values
    lost = max(0.0, usual - counts.snr) / usual if math.isfinite(counts.snr) else 0.0
    return max(flushed, counts.share("flushed"), counts.share("saturated")) + 0.01 * lost
