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

GROUPS = (
    masters, moments, formulas, weights, scale, sums, shared_weights, operations, chains, positions, overflow, kernels,
)  # fmt: skip
RULES: dict[str, Rule] = {r.code: r for group in GROUPS for r in vars(group).values() if isinstance(r, Rule)}
PROBES: dict[str, Probe] = {p.__name__: p for group in GROUPS for p in group.PROBES}
