"""Rules C: sums of gradients, over micro-batches, uses of a weight, and ranks."""

from __future__ import annotations

from refimpl.parity.audit.rules.entry import Probe

PROBES: tuple[Probe, ...] = ()
