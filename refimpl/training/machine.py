"""The machine that a run or a measurement took place on."""

from __future__ import annotations

import platform
from pathlib import Path

from refimpl.backends.numpy.threads import cores


def processor() -> str:
    """Return the name of the processor, if the system provides it, and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores()} cores"
