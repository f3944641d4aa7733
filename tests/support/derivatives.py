"""The formulas of operations in FP64: backward against finite differences of forward, forward against a definition.

In double precision rounding is out of the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from op_calls import bound

from refimpl.nn.op import Op
from refimpl.nn.ops import OPS

Array = np.ndarray

STEP = 1e-5
"""Of the central difference. Values and third derivatives here are of order 1, so it errs by STEP^2 = 1e-10 in truncation
and by 2^-53 / STEP = 1e-11 in rounding: four decimal places below the tolerance."""

TOLERANCE = 1e-6
"""Relative. A hundred times and more what the difference errs by, a thousandth of the 1e-3 by which a gradient is broken."""

PLAIN = 1e-12
"""Relative, for two ways to evaluate one formula in fp64: some hundred roundings of 2^-53 = 1e-16, and room for a
cancellation of two digits."""


@dataclass(frozen=True)
class Call:
    """One call of an operation: floats are differentiated, integers (tokens) are not, None is a parameter left out."""

    op: str
    label: str
    inputs: tuple[Array, ...] = ()
    params: tuple[Array | None, ...] = ()
    static: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}: {self.label}"

    @property
    def operands(self) -> tuple[Array | None, ...]:
        return (*self.inputs, *self.params)


def away_from_zero(x: Array) -> Array:
    """relu has a kink at 0: no difference quotient may straddle it."""
    return x + 0.1 * np.sign(x)


def differentiable(call: Call) -> list[int]:
    """Positions of the operands that have a gradient."""
    return [i for i, x in enumerate(call.operands) if x is not None and x.dtype == np.float64]


def gradient_error(op: Op, call: Call) -> float:
    """How far <backward(dy), direction> is from the central difference of <dy, forward>, relative to the larger.

    dy and the direction, over all differentiable inputs and parameters at once, are random (seeded by the call).
    """
    rng = np.random.default_rng(len(call.label) + 100 * len(call.op))
    p = bound("fp64", op.name)
    which = differentiable(call)
    direction = {i: rng.standard_normal(call.operands[i].shape) for i in which}

    y, saved = op.forward(*call.operands, p=p, **call.static)
    dy = rng.standard_normal(np.shape(y))[()]
    gradients = op.backward(dy, saved, *call.params, p=p, **call.static)
    assert len(gradients) == len(call.operands)
    for i, x in enumerate(call.operands):
        assert (gradients[i] is not None) == (i in which)
        assert gradients[i] is None or gradients[i].shape == x.shape
    analytic = sum(float((gradients[i] * direction[i]).sum()) for i in which)

    def along(step: float) -> float:
        moved = [x + step * direction[i] if i in direction else x for i, x in enumerate(call.operands)]
        return float((op.forward(*moved, p=p, **call.static)[0] * dy).sum())

    numeric = (along(STEP) - along(-STEP)) / (2 * STEP)
    return abs(analytic - numeric) / max(abs(analytic), abs(numeric))


def check_derivative(call: Call) -> None:
    """Backward is the derivative of forward. The control: any one gradient that is a thousandth too large is noticed.

    One of several gradients carries at least a hundredth of the derivative (seeded): 1e-5, ten tolerances.
    """
    right = OPS[call.op]
    assert gradient_error(right, call) <= TOLERANCE
    for which in differentiable(call):

        def backward(*args: Any, which: int = which, **kwargs: Any) -> tuple[Array | None, ...]:
            gradients = list(right.backward(*args, **kwargs))
            gradients[which] = gradients[which] * 1.001
            return tuple(gradients)

        assert gradient_error(replace(right, backward=backward), call) > 10 * TOLERANCE, which


def normal_numbers(seed: int = 0) -> Callable[..., Array]:
    """Return a function from a shape to the next normal numbers of one generator."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.standard_normal(shape)


def forward(op: str, *operands: Array | None, **static: Any) -> Array:
    return OPS[op].forward(*operands, p=bound("fp64", op), **static)[0]


def assert_close(got: Array, expected: Any) -> None:
    expected = np.asarray(expected)
    assert np.shape(got) == expected.shape
    assert np.abs(got - expected).max() <= PLAIN * max(1.0, np.abs(expected).max())


def draw(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def softmax_of(row: Array) -> list[float]:
    e = [math.exp(v) for v in row]
    return [v / math.fsum(e) for v in e]
