"""refimpl's own definitions, run in FP64 on the host: the twins of the operations that it defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refimpl.backends.base import REFERENCE
from refimpl.precision.context import Run
from refimpl.precision.recipes import get_recipe

RUN = Run(get_recipe("fp64").policy, REFERENCE)


def define(function: Callable[..., Any], operation: str, *operands: Any, **static: Any) -> Any:
    """Return what a definition of refimpl/nn computes in FP64 from tensors, or from tuples with tensors in them, as tensors.

    function: forward or backward of an operation; operation: its name in a policy. Infinities and NaN are values here.
    """
    device = next(x.device for x in operands if isinstance(x, Tensor))
    with np.errstate(all="ignore"):
        found = function(*_arrays(operands), p=RUN.precision(operation, "audit"), **static)
    return _tensors(found, device)


def _arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()
    return tuple(_arrays(part) for part in value) if isinstance(value, tuple) else value


def _tensors(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return torch.as_tensor(np.asarray(value), device=device)
    return tuple(_tensors(part, device) for part in value) if isinstance(value, tuple) else value
