"""The CuPy backend: the same operations on an NVIDIA GPU. It has not been run on a GPU by the project yet."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from refimpl.backends import Backend
from refimpl.errors import UsageError


class CupyBackend(Backend):
    """CuPy's arrays; only the way back to the host differs."""

    def to_host(self, x: Any) -> np.ndarray:
        """Copy from the device; waits for it."""
        return np.asarray(self.xp.asnumpy(x))


def cupy_backend() -> Backend:
    """The CuPy backend, or a UsageError that says what is missing."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise UsageError(
            "backend cupy: CuPy is not installed; pip install '.[cuda12]' or '.[cuda13]', by your CUDA version"
        ) from None
    if not cupy.cuda.is_available():
        raise UsageError("backend cupy: CuPy is installed, but no NVIDIA GPU answers; use --backend numpy")
    return CupyBackend("cupy", cupy)
