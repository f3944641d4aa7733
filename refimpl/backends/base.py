"""The array library of a run, and the primitives that are not the same call in every library.

Several backends work side by side in one process, so there is no global `xp`: each run has its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from refimpl.numerics import casts
from refimpl.numerics.arrays import Array

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Backend:
    """An array library and its primitives, in a readable form that works with any library.

    With it, a run executes the definitions in `nn/` and `optim/`. A faster backend names in `ops` and `passes`
    what it replaces; each entry rounds at the places of the definition of the same name.
    """

    name: str
    xp: Any
    on_host: bool = False  # whether Python reads values without waiting, and blocks fit a CPU cache

    cast: ClassVar[Callable[..., Array]] = staticmethod(casts.cast)
    widen: ClassVar[Callable[..., Array]] = staticmethod(casts.widen)

    @property
    def ops(self) -> Mapping[str, Any]:
        """Return fast versions of operations, as `nn.op.Op`, by the name of their definition."""
        return {}

    @property
    def passes(self) -> Mapping[str, Callable[..., Any]]:
        """Return fast versions of passes over flat buffers, by name: `measure` and `fold` of gradients.py, `adamw`, `sgd`."""
        return {}

    def each(self, f: Callable[[T], R], parts: Iterable[T], size: int) -> list[R]:
        """Return [f(part) for part in parts], for independent parts with `size` elements in total."""
        return [f(part) for part in parts]

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        """Multiply a (..., M, K) and b (..., K, N) in the accumulation format `acc`: widen both, multiply, do not round.

        Leading axes of 1 are repeated. Products of two FP16 values, and of two BF16 values unless they leave the range of FP32,
        are exact in FP32. So tensor cores compute the same, except for the order and the rounding of their sums.
        """
        return self.xp.matmul(self.widen(a, acc), self.widen(b, acc))

    def from_host(self, x: np.ndarray) -> Array:
        """Copy a NumPy array to the backend's memory (for NumPy no copy is made)."""
        return self.xp.asarray(x)

    def to_host(self, x: Array) -> np.ndarray:
        """Copy an array to the host, waiting for the device."""
        return np.asarray(x if self.xp is np else self.xp.asnumpy(x))


REFERENCE = Backend("reference", np, on_host=True)
"""NumPy, and the definitions without any fast version."""
