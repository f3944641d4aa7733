"""Rules D: single operations."""

from __future__ import annotations

from refimpl.parity.audit.rules.entry import Probe

PROBES: tuple[Probe, ...] = ()
