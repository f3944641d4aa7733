"""A run whose gradients overflow in every step, whatever its loss scale, while its loss stays finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.nn.op import Op
from refimpl.nn.ops import cross_entropy
from refimpl.training.setup import Training


def overflow_always(training: Training) -> None:
    """Make backward of the loss give infinities."""

    def backward(dloss: Any, saved: Any, **more: Any) -> tuple[Any, None]:
        dz, _ = cross_entropy.backward(dloss, saved, **more)
        dz[...] = np.inf
        return dz, None

    training.run.overrides = {"cross_entropy": Op("cross_entropy", cross_entropy.forward, backward)}
