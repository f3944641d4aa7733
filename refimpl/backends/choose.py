"""Backends by name."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.backends.numpy.malloc import keep_freed_memory
from refimpl.errors import UsageError, unknown

BACKENDS = ("numpy", "reference", "cupy")
ON_HOST: Mapping[str, Backend] = {"numpy": NUMPY, "reference": REFERENCE}


def get_backend(name: str) -> Backend:
    """Return the backend of that name. Errors: UsageError where it is unknown, not installed, or has no device."""
    if name == "reference":
        return REFERENCE
    if name == "numpy":
        keep_freed_memory()
        return NUMPY
    if name == "cupy":
        from refimpl.backends.cupy.backend import cupy_backend

        return cupy_backend()
    raise UsageError(unknown("backend", name, BACKENDS))
