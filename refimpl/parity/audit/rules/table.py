"""The catalogue: the rules and probes of all groups."""

from __future__ import annotations

from refimpl.parity.audit.rules import (
    chains,
    formulas,
    kernels,
    masters,
    moments,
    operations,
    overflow,
    positions,
    scale,
    shared_weights,
    sums,
    weights,
)
from refimpl.parity.audit.rules.entry import Probe, Rule
from refimpl.parity.mistakes import MISTAKES

GROUPS = (
    masters, moments, formulas, weights, scale, sums, shared_weights, operations, chains, positions, overflow, kernels,
)  # fmt: skip
RULES: dict[str, Rule] = {r.code: r for group in GROUPS for r in vars(group).values() if isinstance(r, Rule)}
PROBES: dict[str, Probe] = {p.__name__: p for group in GROUPS for p in group.PROBES}
KNOWN_MISTAKES: dict[str, tuple[str, ...]] = {code: (r.name,) for code, r in RULES.items() if r.name in MISTAKES}
"""By code, the known mistakes of traces (parity/mistakes.py) that a rule finds: of one name, unless there are several.

One has no rule: 'decay-all' is a setting that may be meant.
"""
KNOWN_MISTAKES["A10"] = ("no-bias-correction", "coupled-decay", "eps-inside-root")
KNOWN_MISTAKES["B2"] += ("unscale-each-micro-batch",)
KNOWN_MISTAKES["D4"] = ("rope-angles-in-16-bits",)
KNOWN_MISTAKES["D5"] = ("rope-frequencies-in-16-bits",)
KNOWN_MISTAKES["D14"] = ("residual-truncated",)
KNOWN_MISTAKES["D16"] = ("sum-in-16-bits",)
