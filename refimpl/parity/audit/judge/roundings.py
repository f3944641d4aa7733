"""What bounds are made of, beside gamma: the errors of functions, of sums as they are in practice, of formats."""

from __future__ import annotations

import math

import torch

from refimpl.parity.audit.judge.again import LANES, U

FUNCTION = 4 * U
"""exp, log, tanh, rsqrt: 2 ulp, each 2 u. PyTorch's vectorized functions state 1 ulp (SLEEF u10, MKL) or 2 (its own exp_u20),
CUDA's expf, logf and rsqrtf 1 to 2."""
FLUSHED = 2.0**-126
"""Numbers below the smallest normal one of FP32 may be flushed to 0."""


def spread(n: float) -> float:
    """Return the relative error that a sum of n terms has in practice.

    Independent roundings make sqrt(n) u. Roundings of equal terms in one partial sum go the same way, (n / LANES) u at most;
    six times what is returned is allowed before a result is worse than it need be, so a sixth of that is enough.
    """
    return max(math.sqrt(n), n / (6 * LANES)) * U


def unit(dtype: torch.dtype) -> float:
    """Return u of a format, the relative error of one rounding: half its eps."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """Return the smallest positive number of a format."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps)
