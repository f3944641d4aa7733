"""Elementwise operations: add, the activation functions, and the sum of two gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def add_forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = a + b. Leading axes of a that b lacks are broadcast (the position embedding).

    a (..., S), b (S) -> y (..., S); mixed formats are promoted to the wider one. PyTorch: torch.add.
    """
    ac, bc = p.cast(a, "a"), p.cast(b, "b")
    return p.round(p.widen(ac) + p.widen(bc), "y", a, b), (format_of(a), b.shape, format_of(b))


def add_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, Array]:
    """Return da = dy,  db = dy summed over the axes along which b was broadcast."""
    a_format, b_shape, b_format = saved
    db = dy if dy.shape == b_shape else p.widen(dy).reshape(-1, *b_shape).sum(0)
    return p.round_grad(dy, "a", a_format), p.round_grad(db, "b", b_format)


def fan_in_forward(a: Array, b: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return a + b, two gradients of one tensor that is used twice. The tape calls this; it is not differentiated itself.

    a, b (...) of one format -> (...) of that format. PyTorch: the engine's accumulation of gradients.
    """
    return p.round(p.widen(a) + p.widen(b), "sum", a, b), None


def relu_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = max(x, 0); NaN stays NaN. PyTorch: torch.relu."""
    y = p.round(p.xp.maximum(p.widen(p.cast(x, "x")), 0), "y", x)
    return y, (y, format_of(x))


def relu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy where y > 0 or y is NaN, else 0 (also at x = 0)."""
    y, x_format = saved
    return (p.round_grad(p.xp.where(p.widen(y) <= 0, 0, p.widen(dy)), "x", x_format),)


def silu_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x sigmoid(x) = x / (1 + exp(-x)).

    Source: Elfwing et al. 2017, arXiv 1702.03118. PyTorch: torch.nn.functional.silu.
    """
    xc = p.cast(x, "x")
    z = p.widen(xc)
    return p.round(z / (1 + p.xp.exp(-z)), "y", x), (xc, format_of(x))


def silu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy s (1 + x (1 - s)),  s = sigmoid(x)."""
    x, x_format = saved
    z = p.widen(x)
    s = 1 / (1 + p.xp.exp(-z))
    return (p.round_grad(p.widen(dy) * s * (1 + z * (1 - s)), "x", x_format),)


def swiglu_forward(gate: Array, up: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = R(R(silu(gate)) up), with silu(g) = g sigmoid(g), rounded before the product and after it.

    gate, up (...) -> y (...). Source: Shazeer 2020, arXiv 2002.05202. PyTorch: F.silu(gate) * up.
    """
    gc, uc = p.cast(gate, "gate"), p.cast(up, "up")
    g = p.widen(gc)
    s = p.round(g / (1 + p.xp.exp(-g)), "silu", gate)
    return p.round(p.widen(s) * p.widen(uc), "y", gate, up), (gc, uc, format_of(gate), format_of(up))


def swiglu_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array, Array]:
    """Return dup = dy s  and  dgate = R(dy up) sigmoid(g) (1 + g (1 - sigmoid(g))), with s = R(silu(gate)) once more."""
    gate, up, gate_format, up_format = saved
    g, dy, s_format = p.widen(gate), p.widen(dy), p.result_format(gate_format)
    sigmoid = 1 / (1 + p.xp.exp(-g))
    s = p.widen(p.round_to(g / (1 + p.xp.exp(-g)), s_format, "silu"))
    ds = p.widen(p.round_to(dy * p.widen(up), s_format, "ds"))
    dgate = ds * sigmoid * (1 + g * (1 - sigmoid))
    return p.round_grad(dgate, "gate", gate_format), p.round_grad(dy * s, "up", up_format)


BETA = math.sqrt(2 / math.pi)
KAPPA = 0.044715


def gelu_tanh_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the GELU of GPT-2.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415. PyTorch: torch.nn.functional.gelu(x, approximate='tanh').
    """
    xc = p.cast(x, "x")
    z = p.widen(xc)
    return p.round(0.5 * z * (1 + p.xp.tanh(BETA * (z + KAPPA * (z * z * z)))), "y", x), (xc, format_of(x))


def gelu_tanh_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy ((1 + t)/2 + x/2 (1 - t^2) sqrt(2/pi) (1 + 3 0.044715 x^2)), with the tanh t computed again."""
    x, x_format = saved
    z = p.widen(x)
    t = p.xp.tanh(BETA * (z + KAPPA * (z * z * z)))
    slope = (3 * KAPPA * BETA) * (z * z) + BETA  # the derivative of the argument of tanh
    return (p.round_grad(p.widen(dy) * (0.5 * ((1 + t) + slope * z * (1 - t * t))), "x", x_format),)


def gelu_new_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return the formula of gelu_tanh as transformers' GPT-2 computes it: step by step, each rounded to the result's format.

        y = R(R(x/2) R(1 + t)),  t = R(tanh(R(beta R(x + R(kappa x^3)))))

    x^3 is rounded like the other steps, in BF16 after each of its two products. In FP16 the gradient is NaN where 3 x^2 is
    infinite, above |x| = 147.
    Source: transformers, activations.py. PyTorch: NewGELUActivation, the activation_function 'gelu_new'.
    """
    xc = p.cast(x, "x")
    half, outer, _ = _gelu_new_factors(xc, p.result_format(format_of(x)), p)
    return p.round(half * outer, "y", x), (xc, format_of(x))


def _gelu_new_factors(x: Array, fmt: str, p: OpPrecision) -> tuple[Array, Array, Array]:
    """Return R(x/2), R(1 + t) and t, widened."""
    z = p.widen(x)
    square = _rounded(z * z, fmt, "x2", p) if fmt == "bf16" else z * z  # PyTorch's CPU kernel of x^3 has that one more
    cubic = _rounded(KAPPA * _rounded(square * z, fmt, "x3", p), fmt, "cubic", p)
    t = _rounded(p.xp.tanh(_rounded(BETA * _rounded(z + cubic, fmt, "inner", p), fmt, "scaled", p)), fmt, "tanh", p)
    return _rounded(0.5 * z, fmt, "half", p), _rounded(1 + t, fmt, "outer", p), t


def _rounded(z: Array, fmt: str, site: str, p: OpPrecision) -> Array:
    """Round an intermediate result, and widen it again."""
    return p.widen(p.round_to(z, fmt, site))


def gelu_new_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return the derivative of each step, rounded like the step; x has three uses, whose gradients are added in this order:

        dx = R(R(dc + R(R(kappa dc) R(3 R(x^2)))) + R(dy R(1 + t) / 2)),  dc = R(beta R(R(dy R(x/2)) (1 - t^2)))

    PyTorch: the same bits, but where dy R(1 + t) / 2 is subnormal, which it rounds before the division too.
    """
    x, x_format = saved
    z, dy, fmt, own = p.widen(x), p.widen(dy), p.result_format(x_format), format_of(x)
    half, outer, t = _gelu_new_factors(x, fmt, p)
    dt = _rounded(_rounded(dy * half, fmt, "douter", p) * (1 - t * t), fmt, "dtanh", p)
    dc = _rounded(BETA * dt, fmt, "dinner", p)
    power = _rounded(3 * _rounded(z * z, fmt, "x2", p), fmt, "3x2", p)
    dcube = _rounded(_rounded(KAPPA * dc, fmt, "dcubic", p) * power, own, "dx.x3", p)
    dx = _rounded(_rounded(dc, own, "dx.inner", p) + dcube, own, "dx.sum", p)
    return (p.round_grad(dx + _rounded(0.5 * dy * outer, own, "dx.half", p), "x", x_format),)


_math_erf = np.frompyfunc(math.erf, 1, 1)


def erf(z: Array, p: OpPrecision) -> Array:
    """Return the error function: in fp64 from the C library, in fp32 by a polynomial with absolute error below 1.5e-7.

    Source: Abramowitz and Stegun 1964, formula 7.1.26; PyTorch's vectorized CPU kernel uses the same.
    """
    if format_of(z) == "fp64":
        result = p.xp.empty_like(z)
        result[...] = p.run.backend.from_host(_math_erf(p.run.backend.to_host(z)))
        return result
    t = 1 / (1 + 0.3275911 * abs(z))
    r = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        r = r * t + coefficient
    return p.xp.copysign(1 - r * t * p.xp.exp(-z * z), z)


def gelu_erf_forward(x: Array, p: OpPrecision) -> tuple[Array, Any]:
    """Return y = x Phi(x) = x/2 (1 + erf(x / sqrt 2)).

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415. PyTorch: torch.nn.functional.gelu.
    """
    xc = p.cast(x, "x")
    z = p.widen(xc)
    return p.round(0.5 * z * (1 + erf(z * math.sqrt(0.5), p)), "y", x), (xc, format_of(x))


def gelu_erf_backward(dy: Array, saved: Any, p: OpPrecision) -> tuple[Array]:
    """Return dx = dy (Phi(x) + x phi(x)),  phi(x) = exp(-x^2/2) / sqrt(2 pi)."""
    x, x_format = saved
    z = p.widen(x)
    cdf = 0.5 * (1 + erf(z * math.sqrt(0.5), p))
    pdf = p.xp.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return (p.round_grad(p.widen(dy) * (cdf + z * pdf), "x", x_format),)
