"""Rules D7 to D11: where Inf and NaN come from."""

from __future__ import annotations

from refimpl.parity.audit.origins import nonfinite
from refimpl.parity.audit.rules.entry import Probe

PROBES: tuple[Probe, ...] = (nonfinite,)
