"""refimpl.ops against PyTorch on the CPU: every operation, forward and backward, on identical inputs, in 32 and 16 bits.

Two correct evaluations of one formula differ, since sums have another order and `exp` another last bit. By how much they
may differ is derived, not tuned: `Near` carries each value's rounding error through the formula (running error analysis,
Higham, 'Accuracy and Stability of Numerical Algorithms', 3.3), and both sides must lie within it of the exact value.

In 16 bits there is a second claim. A difference of one place could hide a rounding too many, so most elements must be
*identical*: rounding separates two values at distance d with probability d / ulp, and `allowed_flips` adds these up.
Negative controls at the end drop a rounding, add one, and accumulate in 16 bits: the claims must fail.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.backends import NUMPY
from refimpl.ops import OPS, fan_in
from refimpl.policy import EVERY_OTHER, Policy, Precision, Run
from refimpl.recipes import get_recipe

torch = pytest.importorskip("torch")
F = torch.nn.functional

Array = np.ndarray
DTYPE = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FRACTION_BITS = {"fp16": 10, "bf16": 7}
SMALLEST_EXPONENT = {"fp16": -14, "bf16": -126}

FORMATS = ["fp32", "fp16", "bf16"]
LOW = ["fp16", "bf16"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch's sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------- the errors of fp32

U = 2.0**-24
"""Unit roundoff of fp32: one operation errs by at most U times its result."""

FUNCTION = 4 * 2 * U
"""exp, log, tanh: at most 4 ulp, 2 U each. NumPy's fp32 loops state 2.52 (exp), 3.83 (log), 4 (tanh) ulp, PyTorch's
(SLEEF u10, MKL) 1 ulp."""

ERF = 1.5e-7 + (10 * 4.5 + 15) * U
"""erf, absolute: both sides use Abramowitz and Stegun 7.1.26, whose error is 1.5e-7; then rounding: a Horner scheme of
degree 5 whose terms sum to 4.5 (gamma_10), an exp (8 U) and about 7 single operations on values of at most 1."""

FLUSHED = 2.0**-126
"""Below the smallest normal fp32 number kernels may flush to zero."""


def gamma(n: int) -> float:
    """The relative error of n roundings: n U / (1 - n U)."""
    return n * U / (1 - n * U)


@dataclass(frozen=True)
class Near:
    """A value (in fp64), and a bound of how far an fp32 evaluation, in any order of its sums, lies from it."""

    value: Array
    err: Array | float = 0.0
    __array_ufunc__ = None  # array * Near is Near's business

    def _after(self, value: Array, err: Any) -> Near:
        """One more fp32 operation: the error so far, and U times the computed result."""
        return Near(value, err * (1 + U) + U * np.abs(value) + FLUSHED)

    def __add__(self, other: Any) -> Near:
        other = near(other)
        return self._after(self.value + other.value, self.err + other.err)

    def __neg__(self) -> Near:
        return Near(-self.value, self.err)

    def __sub__(self, other: Any) -> Near:
        return self + -near(other)

    def __rsub__(self, other: Any) -> Near:
        return near(other) - self

    def __mul__(self, other: Any) -> Near:
        other = near(other)
        err = np.abs(self.value) * other.err + np.abs(other.value) * self.err + self.err * other.err
        return self._after(self.value * other.value, err)

    def __truediv__(self, other: Any) -> Near:
        other = near(other)
        value = self.value / other.value
        err = (self.err + np.abs(value) * other.err) / (np.abs(other.value) - other.err)
        return self._after(value, err)

    __radd__, __rmul__ = __add__, __mul__

    def __rtruediv__(self, other: Any) -> Near:
        return near(other) / self

    def sum(self, axis: int | tuple[int, ...], keepdims: bool = False) -> Near:
        """n terms in any order: gamma_(n-1) times the sum of their absolute values."""
        n = np.size(self.value) // max(1, np.size(self.value.sum(axis)))
        err = np.zeros_like(self.value) + self.err
        size = (np.abs(self.value) + err).sum(axis, keepdims=keepdims)
        return Near(self.value.sum(axis, keepdims=keepdims), err.sum(axis, keepdims=keepdims) + gamma(n - 1) * size)

    def mean(self) -> Near:
        return self.sum(-1, keepdims=True) / self.value.shape[-1]

    def __matmul__(self, other: Near) -> Near:
        """K products, K - 1 sums in any order, fused or not: gamma_K |A||B|. oneDNN flushes a bf16 product below 2^-126."""
        a, b = np.abs(self.value), np.abs(other.value)
        ea, eb = np.zeros_like(a) + self.err, np.zeros_like(b) + other.err
        K = a.shape[-1]
        err = ea @ b + (a + ea) @ eb
        return Near(self.value @ other.value, err + gamma(K) * ((a + ea) @ (b + eb)) + K * FLUSHED)

    def exp(self) -> Near:
        value = np.exp(self.value)
        return Near(value, value * (np.expm1(self.err) * (1 + FUNCTION) + FUNCTION) + FLUSHED)

    def log(self) -> Near:
        value = np.log(self.value)
        return Near(value, -np.log1p(-self.err / self.value) * (1 + FUNCTION) + FUNCTION * np.abs(value))

    def tanh(self) -> Near:
        """The slope is at most 1."""
        value = np.tanh(self.value)
        return Near(value, self.err * (1 + FUNCTION) + FUNCTION * np.abs(value))

    def erf(self) -> Near:
        """The slope is at most 2 / sqrt(pi)."""
        return Near(np.vectorize(math.erf)(self.value), self.err * 2 / math.sqrt(math.pi) + ERF)

    def rsqrt(self) -> Near:
        """1 / sqrt: MKL's sqrt errs by 0.75 ulp = 1.5 U (NumPy's 1 U), the division by 1 U."""
        value = 1 / np.sqrt(self.value)
        return Near(value, (1 / np.sqrt(self.value - self.err) - value) * (1 + 3 * U) + 3 * U * value)

    @property
    def T(self) -> Near:
        err = np.zeros_like(self.value) + self.err
        return Near(self.value.swapaxes(-1, -2), err.swapaxes(-1, -2))

    def where(self, mask: Array, other: float) -> Near:
        return Near(np.where(mask, self.value, other), np.where(mask, self.err, 0.0))

    def worse_of(self, other: Near) -> Near:
        """For two ways to write one formula: the larger error covers both."""
        assert np.allclose(self.value, other.value, rtol=1e-9, atol=1e-12)  # fp64: one formula
        return Near(self.value, np.maximum(self.err, other.err))


def near(x: Any) -> Near:
    """Exact, unless it says otherwise."""
    return x if isinstance(x, Near) else Near(np.asarray(x, np.float64))


# ------------------------------------------------------------------------------------------------------------ agreement


def ulp(x: Array, fmt: str) -> Array:
    """The distance between neighbours of a 16-bit format at x."""
    exponent = np.frexp(np.abs(x))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, SMALLEST_EXPONENT[fmt]) - FRACTION_BITS[fmt])


@dataclass(frozen=True)
class Agreement:
    """How two results compare: the share of identical elements, and the largest difference in units of its bound."""

    share_identical: float
    max_error_in_bound_units: float


def agreement(ours: Array, theirs: Array, exact: Near, fmt: str) -> Agreement:
    """Both lie within exact.err of the exact value, so within twice that of one another; then, in 16 bits, each was rounded
    by at most half an ulp, which makes one ulp (of the larger) more. Equal values agree whatever the bound."""
    a, b = wide(ours), wide(theirs)
    assert a.shape == b.shape == exact.value.shape
    limit = 2 * exact.err + np.zeros_like(a)
    if fmt in LOW:
        # Without an error before the rounding there is none after it.
        limit = np.where(limit > 0, limit + ulp(np.maximum(np.abs(a), np.abs(b)), fmt), 0)
    difference = np.abs(a - b)
    units = np.divide(difference, limit, out=np.where(difference > 0, np.inf, 0.0), where=limit > 0)
    return Agreement(float((a == b).mean()), float(units.max()))


def flips(exact: Near, fmt: str) -> Array:
    """The probability, element by element, that rounding tells two values apart that both lie within exact.err: their
    distance 2 err over an ulp, where values fall uniformly between the neighbours of the format."""
    if fmt == "fp32":
        return np.ones_like(exact.value)
    return np.minimum(1.0, 2 * exact.err / ulp(exact.value, fmt)) + np.zeros_like(exact.value)


def allowed_flips(expected: float) -> float:
    """An expected count, and five standard deviations of a sum of independent events (variance at most the mean)."""
    return expected + 5 * math.sqrt(expected)


def assert_agrees(ours: Array, theirs: Array, exact: Near, fmt: str) -> None:
    got = agreement(ours, theirs, exact, fmt)
    assert got.max_error_in_bound_units <= 1, got
    least = 1 - allowed_flips(float(flips(exact, fmt).sum())) / exact.value.size
    assert got.share_identical >= least, (got, least)


# ------------------------------------------------------------------------------------------------- arrays, here and there


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """With oneDNN, gelu in fp32 and bf16 uses another approximation of erf than the published one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the context manager itself reads a deprecated setting
        flags = torch.backends.mkldnn.flags(enabled=enabled)
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


def wide(x: Any) -> Array:
    return (x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)).astype(np.float64)


def rounded(x: Any, fmt: str) -> Array:
    """To the format and back to fp64; numpy's own conversion, by way of fp32."""
    return wide(np.asarray(x, np.float64).astype(np.float32).astype(DTYPE[fmt]))


def array(x: Array, fmt: str) -> Array:
    return np.asarray(x).astype(np.float32).astype(DTYPE[fmt])


def tensor(x: Array, fmt: str | None = None) -> Any:
    """The same values in PyTorch: by way of fp32, which holds all of them."""
    if x.dtype == np.int64:
        return torch.tensor(x)
    name = fmt or next(name for name, dtype in DTYPE.items() if dtype == x.dtype)
    return torch.tensor(x.astype(np.float32)).to(TORCH[name])


def theirs(f: Callable[..., Any], operands: list[Array], dy: Array, fmt: str | None = None) -> tuple[Any, list[Any]]:
    """f on PyTorch tensors, and the gradients of the operands; fmt: on operands widened to it."""
    leaves = [tensor(x, fmt).requires_grad_(x.dtype != np.int64) for x in operands]
    y = f(*leaves)
    y.backward(tensor(np.asarray(dy), fmt))
    return y, [leaf.grad for leaf in leaves]


def ours(policy: Policy, op: str, operands: list[Array], dy: Array, **static: Any) -> tuple[Array, list[Array]]:
    p = Run(policy, NUMPY).bind(op, "here")
    params = operands if op == "cast" else operands[len(operands) - len(OPS[op].params) :]
    y, saved = OPS[op].forward(*operands, p=p, **static)
    return y, list(OPS[op].backward(dy, saved, *params, p=p, **static))


# ---------------------------------------------------------------------------------------------------------- the formulas


def linear_near(x: Near, w: Near, b: Near, dy: Near) -> list[Near]:
    return [x @ w.T + b, dy @ w, dy.T @ x, dy.sum(0)]


def matmul_near(a: Near, b: Near, dy: Near) -> list[Near]:
    return [a @ b, dy @ b.T, a.T @ dy]


def add_near(a: Near, b: Near, dy: Near) -> list[Near]:
    # One addition, correctly rounded on both sides: exact. The gradient of b is a sum over the repeated axis.
    return [Near(a.value + b.value), dy, dy.sum(0)]


def relu_near(x: Near, dy: Near) -> list[Near]:
    return [Near(np.maximum(x.value, 0)), Near(np.where(x.value > 0, dy.value, 0))]


def silu_near(x: Near, dy: Near) -> list[Near]:
    s = 1 / (1 + (-x).exp())
    return [x / (1 + (-x).exp()), dy * s * (1 + x * (1 - s))]


def gelu_tanh_near(x: Near, dy: Near) -> list[Near]:
    # Constants are rounded to fp32 before they are used: one more U, which the multiplication by 1 adds.
    beta, kappa = Near(np.float64(math.sqrt(2 / math.pi))) * 1, Near(np.float64(0.044715)) * 1
    t = (beta * (x + kappa * (x * x * x))).tanh()
    slope = 0.5 * x * (1 - t * t) * (beta * (1 + 3 * kappa * (x * x)))
    return [0.5 * x * (1 + t), dy * (0.5 * (1 + t) + slope)]


def gelu_erf_near(x: Near, dy: Near) -> list[Near]:
    root, density = Near(np.float64(math.sqrt(0.5))) * 1, Near(np.float64(1 / math.sqrt(2 * math.pi))) * 1
    phi = 0.5 * (1 + (x * root).erf())
    return [x * phi, dy * (phi + x * ((-0.5 * x * x).exp() * density))]


def layernorm_near(x: Near, w: Near, b: Near, dy: Near) -> list[Near]:
    N = x.value.shape[-1]
    mean = x.mean()
    centred = x - mean
    var = (centred * centred).mean()
    # PyTorch's variance is Welford's: N U kappa more (Chan, Golub, LeVeque 1983), kappa = sqrt(1 + mean^2 / var).
    kappa = np.sqrt(1 + mean.value**2 / var.value)
    rstd = (Near(var.value, var.err + N * U * kappa * var.value) + 1e-5).rsqrt()
    # PyTorch writes x rstd - rstd mean in 16 bits, and B x + rstd dy w + C backward: the same formula, other cancellations.
    h = (centred * rstd).worse_of(x * rstd - rstd * mean)
    dh = dy * w
    dx = rstd * (dh - dh.mean() - h * (dh * h).mean())
    ds, db = (dy * x * w).sum(-1, keepdims=True), (dy * w).sum(-1, keepdims=True)
    B = (db * mean - ds) * rstd * rstd * rstd * (1 / N)
    C = -B * mean - db * rstd * (1 / N)
    other = B * x + rstd * dy * w + C
    assert np.allclose(dx.value, other.value, rtol=1e-9, atol=1e-9)
    return [h * w + b, dx.worse_of(other), (dy * h).sum(0), dy.sum(0)]


def rmsnorm_near(x: Near, w: Near, dy: Near) -> list[Near]:
    rrms = ((x * x).mean() + 1e-5).rsqrt()
    h = x * rrms
    dh = dy * w
    dx = rrms * (dh - h * (dh * h).mean())
    # PyTorch differentiates operation by operation: dh rrms - x rrms^3 mean(dh x).
    other = dh * rrms - x * (rrms * rrms * rrms * (dh * x).sum(-1, keepdims=True) * (1 / x.value.shape[-1]))
    return [h * w, dx.worse_of(other), (dy * h).sum(0)]


def softmax_of(z: Near) -> Near:
    e = (z - z.value.max(-1, keepdims=True)).exp()
    return (e / e.sum(-1, keepdims=True)).worse_of(e * (1 / e.sum(-1, keepdims=True)))


def softmax_slope(dy: Near, y: Near) -> Near:
    return (dy - (dy * y).sum(-1, keepdims=True)) * y


def embedding_near(tokens: Array, w: Near, dy: Near) -> list[Near]:
    # A sum over the places of one token; the longest has n terms.
    total, size = np.zeros_like(w.value), np.zeros_like(w.value)
    np.add.at(total, tokens, dy.value)
    np.add.at(size, tokens, np.abs(dy.value))
    return [Near(w.value[tokens]), Near(total, gamma(int(np.bincount(tokens).max()) - 1) * size)]


def cross_entropy_near(logits: Near, targets: Array, S: Near) -> list[Near]:
    rows = np.arange(targets.size)
    shifted = logits - logits.value.max(-1, keepdims=True)
    log_p = shifted - shifted.exp().sum(-1, keepdims=True).log()
    at_target = Near(log_p.value[rows, targets], log_p.err[rows, targets])
    onehot = np.zeros_like(logits.value)
    onehot[rows, targets] = 1
    each = S / targets.size
    return [-at_target.sum(0) / targets.size, log_p.exp() * each - onehot * each]


# ----------------------------------------------------------------------------------------------- one format throughout


@dataclass(frozen=True)
class Twin:
    """One operation here and there. operands: shapes, or tokens. `formula` has the errors of forward, then backward."""

    operands: tuple[Any, ...]
    torch: Callable[..., Any]
    formula: Callable[..., list[Near]] | None  # None: no arithmetic at all, so identical
    static: dict[str, Any] | None = None

    # The gradients of PyTorch's 16-bit kernels that are less than one rounding of an FP32 sum: its layernorm rounds the mean
    # and rstd that it saves to 16 bits, and dgamma, dbeta and the embedding's gradient after every row. That is not what is
    # specified here (on CUDA neither happens), so these are compared with PyTorch in FP32 on the same values, rounded once.
    gradients_in_fp32: bool = False

    def draw(self, fmt: str) -> list[Array]:
        rng = np.random.default_rng(11)
        return [x if isinstance(x, np.ndarray) else array(rng.standard_normal(x), fmt) for x in self.operands]


rng = np.random.default_rng(12)
TOKENS, TARGETS = rng.integers(0, 20, 300), rng.integers(0, 50, 60)
TWINS = {
    "linear": Twin(((64, 32), (80, 32), (80,)), F.linear, linear_near),
    "matmul": Twin(((2, 3, 32, 48), (2, 3, 48, 40)), torch.matmul, matmul_near),
    "add": Twin(((50, 60), (60,)), torch.add, add_near),
    "relu": Twin(((50, 60),), torch.relu, relu_near),
    "silu": Twin(((50, 60),), F.silu, silu_near),
    "gelu_tanh": Twin(((50, 60),), lambda x: F.gelu(x, approximate="tanh"), gelu_tanh_near),
    "gelu_erf": Twin(((50, 60),), F.gelu, gelu_erf_near),
    "layernorm": Twin(
        ((50, 100), (100,), (100,)), lambda x, w, b: F.layer_norm(x, (100,), w, b), layernorm_near, gradients_in_fp32=True
    ),
    "rmsnorm": Twin(((50, 100), (100,)), lambda x, w: F.rms_norm(x, (100,), w, eps=1e-5), rmsnorm_near, gradients_in_fp32=True),
    "softmax": Twin(
        ((50, 60),), lambda x: torch.softmax(x, -1), lambda x, dy: [softmax_of(x), softmax_slope(dy, softmax_of(x))]
    ),
    "embedding": Twin((TOKENS, (20, 16)), F.embedding, embedding_near, gradients_in_fp32=True),
    "cross_entropy": Twin(((60, 50), TARGETS), lambda z, t: F.cross_entropy(z.float(), t), cross_entropy_near),
    "reshape": Twin(((4, 6, 8),), lambda x: x.reshape(24, 8), None, {"shape": (24, 8)}),
    "transpose": Twin(((4, 6, 8),), lambda x: x.permute(2, 0, 1), None, {"axes": (2, 0, 1)}),
    "split": Twin(((4, 6, 12),), lambda x: torch.split(x, [4, 5, 3], dim=-1)[1], None, {"start": 4, "stop": 9}),
}
"""Attention and the recorded cast have tests of their own below."""


def test_every_operation_has_a_twin() -> None:
    assert {*TWINS, "attention", "cast"} == set(OPS)


def gradient_of_output(op: str, y: Array) -> Array:
    """Random, in the output's format; the loss scale for the loss."""
    if op == "cross_entropy":
        return np.float32(1024)
    return array(np.random.default_rng(13).standard_normal(np.shape(y)), next(f for f, d in DTYPE.items() if d == y.dtype))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", TWINS)
def test_twin(op: str, fmt: str) -> None:
    twin, policy = TWINS[op], get_recipe(fmt).policy
    operands, static = twin.draw(fmt), twin.static or {}
    y, _ = OPS[op].forward(*operands, p=Run(policy, NUMPY).bind(op, "here"), **static)
    dy = gradient_of_output(op, y)

    y, gradients = ours(policy, op, operands, dy, **static)
    with onednn(op != "gelu_erf"):
        y_torch, gradients_torch = theirs(twin.torch, operands, dy)
        assert TORCH[fmt] == y_torch.dtype or op == "cross_entropy"
        if twin.gradients_in_fp32 and fmt in LOW:
            _, gradients_torch = theirs(twin.torch, operands, dy, "fp32")
            gradients_torch = [None if g is None else rounded(g, fmt) for g in gradients_torch]

    pairs = [(y, y_torch), *((a, b) for a, b in zip(gradients, gradients_torch, strict=True) if a is not None)]
    if twin.formula is None:
        for a, b in pairs:
            assert np.array_equal(wide(a), wide(b))
        return
    exact = twin.formula(*(x if x.dtype == np.int64 else near(wide(x)) for x in operands), near(wide(dy)))
    for (a, b), value in zip(pairs, exact, strict=True):
        out = "fp32" if a.dtype == np.float32 else fmt  # the loss is FP32 in 16-bit recipes too
        if op == "softmax" and fmt in LOW and value is exact[1]:
            # Backward reads the y that was stored in 16 bits: ours, which is PyTorch's but for a flip in the last place.
            assert_softmax_gradient(a, b, y, y_torch, dy, fmt)
        else:
            assert_agrees(a, b, value, out)


def assert_softmax_gradient(a: Array, b: Any, y: Array, y_torch: Any, dy: Array, fmt: str) -> None:
    same_y = (wide(y) == wide(y_torch)).all(-1)
    assert same_y.mean() > 0.5  # rows whose y does not differ anywhere: there the formula sees identical inputs
    value = softmax_slope(near(wide(dy)[same_y]), near(wide(y)[same_y]))
    assert_agrees(a[same_y], wide(b)[same_y], value, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_without_bias_and_in_three_dimensions(fmt: str) -> None:
    rng = np.random.default_rng(14)
    x, w, dy = (array(rng.standard_normal(shape), fmt) for shape in ((4, 16, 96), (80, 96), (4, 16, 80)))
    p = Run(get_recipe(fmt).policy, NUMPY).bind("linear", "here")
    y, saved = OPS["linear"].forward(x, w, None, p=p)
    dx, dw, db = OPS["linear"].backward(dy, saved, w, None, p=p)
    y_torch, (dx_torch, dw_torch) = theirs(F.linear, [x, w], dy)
    assert db is None
    X, W, G = near(wide(x).reshape(64, 96)), near(wide(w)), near(wide(dy).reshape(64, 80))
    assert_agrees(y.reshape(64, 80), wide(y_torch).reshape(64, 80), X @ W.T, fmt)
    assert_agrees(dx.reshape(64, 96), wide(dx_torch).reshape(64, 96), G @ W, fmt)
    assert_agrees(dw, dw_torch, G.T @ X, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_fan_in_is_pytorchs_accumulation_bit_for_bit(fmt: str) -> None:
    rng = np.random.default_rng(15)
    a, b, c = (array(rng.standard_normal(4000), fmt) for _ in range(3))
    p = Run(get_recipe(fmt).policy, NUMPY).bind("fan_in", "here")
    leaf = torch.zeros(4000, dtype=TORCH[fmt], requires_grad=True)
    for g in (a, b, c):
        leaf.backward(tensor(g))
    assert np.array_equal(wide(fan_in(fan_in(a, b, p), c, p)), wide(leaf.grad))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", ["relu", "silu", "gelu_tanh", "gelu_erf", "softmax", "add"])
def test_special_values_are_finite_infinite_or_nan_where_pytorchs_are(op: str, fmt: str) -> None:
    values = [math.inf, -math.inf, math.nan, 0, -0.0, 1, -1, 3e38, -3e38, 65504, -65504, 1e-8, -1e-8, 1e-40]
    with np.errstate(all="ignore"):
        x = array(values, fmt)
        # Pairs of values for those that look at more than one.
        pairs = np.array(np.meshgrid(x, x)).reshape(2, -1)
        operands = {"softmax": [pairs.T], "add": [pairs[0], pairs[1]]}.get(op, [x])
        operands = [np.ascontiguousarray(v).astype(DTYPE[fmt]) for v in operands]
        y, _ = OPS[op].forward(*operands, p=Run(get_recipe(fmt).policy, NUMPY).bind(op, "here"))
    with onednn(op != "gelu_erf"):
        y_torch = TWINS[op].torch(*(tensor(v) for v in operands))
    a, b = wide(y), wide(y_torch)
    assert np.array_equal(np.isnan(a), np.isnan(b))
    assert np.array_equal(a[np.isinf(a)], b[np.isinf(a)]) and np.array_equal(np.isinf(a), np.isinf(b))
    if op in ("relu", "add"):
        assert np.array_equal(a, b, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------- autocast


def autocast(f: Callable[..., Any], low: str) -> Callable[..., Any]:
    def run(*operands: Any) -> Any:
        with torch.autocast("cpu", dtype=TORCH[low]):
            return f(*operands)

    return run


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("op", ["linear", "matmul"])
def test_products_under_cpu_autocast(op: str, low: str) -> None:
    operands = TWINS[op].draw("fp32")
    policy = get_recipe(f"amp-{low}-cpu").policy
    y, _ = OPS[op].forward(*operands, p=Run(policy, NUMPY).bind(op, "here"))
    assert y.dtype == DTYPE[low]
    dy = gradient_of_output(op, y)
    y, gradients = ours(policy, op, operands, dy)
    y_torch, gradients_torch = theirs(autocast(TWINS[op].torch, low), operands, dy)
    assert y_torch.dtype == TORCH[low]
    exact = TWINS[op].formula(*(near(rounded(x, low)) for x in operands), near(wide(dy)))
    assert_agrees(y, y_torch, exact[0], low)
    for a, b, value in zip(gradients, gradients_torch, exact[1:], strict=True):
        assert a.dtype == np.float32 and b.dtype == torch.float32
        assert_agrees(a, b, value, low)  # fp32 arrays of 16-bit values


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("x_format", ["fp32", "low"])
def test_layernorm_and_softmax_under_cpu_autocast_keep_the_format_of_their_input(low: str, x_format: str) -> None:
    fmt = low if x_format == "low" else "fp32"
    policy = get_recipe(f"amp-{low}-cpu").policy
    twin = TWINS["layernorm"]
    x, (_, w, b) = twin.draw(fmt)[0], twin.draw("fp32")  # parameters are FP32
    y, _ = OPS["layernorm"].forward(x, w, b, p=Run(policy, NUMPY).bind("layernorm", "here"))
    y_torch = autocast(twin.torch, low)(tensor(x), tensor(w), tensor(b))
    assert y.dtype == DTYPE[fmt] and y_torch.dtype == TORCH[fmt]
    zero = near(np.zeros(x.shape))
    assert_agrees(y, y_torch, layernorm_near(near(wide(x)), near(wide(w)), near(wide(b)), zero)[0], fmt)

    s, _ = OPS["softmax"].forward(x, p=Run(policy, NUMPY).bind("softmax", "here"))
    s_torch = autocast(TWINS["softmax"].torch, low)(tensor(x))
    assert s.dtype == DTYPE[fmt] and s_torch.dtype == TORCH[fmt]
    assert_agrees(s, s_torch, softmax_of(near(wide(x))), fmt)


@pytest.mark.parametrize("low", LOW)
def test_cross_entropy_and_mixed_addition_under_cpu_autocast(low: str) -> None:
    policy = get_recipe(f"amp-{low}-cpu").policy
    logits, targets = TWINS["cross_entropy"].draw(low)
    y, gradients = ours(policy, "cross_entropy", [logits, targets], np.float32(1024))
    y_torch, gradients_torch = theirs(autocast(F.cross_entropy, low), [logits, targets], np.float32(1024))
    assert y_torch.dtype == torch.float32 and gradients_torch[0].dtype == TORCH[low] and gradients[0].dtype == DTYPE[low]
    exact = cross_entropy_near(near(wide(logits)), targets, near(1024.0))
    assert_agrees(y, y_torch, exact[0], "fp32")
    assert_agrees(gradients[0], gradients_torch[0], exact[1], low)

    a, b = TWINS["relu"].draw("fp32")[0], TWINS["relu"].draw(low)[0] * 0 + array(np.float64(0.3), low)
    b = array(wide(b), low)
    dy = gradient_of_output("add", a)
    y, (da, db) = ours(policy, "add", [a, b], dy)
    y_torch, (da_torch, db_torch) = theirs(autocast(torch.add, low), [a, b], dy)
    assert y.dtype == np.float32 and db.dtype == DTYPE[low] and db_torch.dtype == TORCH[low]
    for p, q in ((y, y_torch), (da, da_torch), (db, db_torch)):
        assert np.array_equal(wide(p), wide(q))  # nothing is summed: bit for bit


@pytest.mark.parametrize("low", LOW)
def test_the_recorded_cast_of_a_parameter_is_autocasts(low: str) -> None:
    rng = np.random.default_rng(16)
    w, dy = array(rng.standard_normal((40, 30)) * 1e-3, "fp32"), array(rng.standard_normal((40, 30)), low)
    y, (dw,) = ours(get_recipe(f"amp-{low}-cpu").policy, "cast", [w], dy, fmt=low)
    y_torch, (dw_torch,) = theirs(lambda w: w.to(TORCH[low]), [w], dy)
    assert np.array_equal(wide(y), wide(y_torch)) and np.array_equal(wide(dw), wide(dw_torch))
    assert y.dtype == DTYPE[low] and dw.dtype == np.float32 and dw_torch.dtype == torch.float32


@pytest.mark.parametrize("low", LOW)
def test_a_weight_used_twice_under_autocast_sums_its_gradients_in_16_bits(low: str) -> None:
    # PyTorch caches the cast, so both gradients meet at the 16-bit copy: f32(R(R(d1) + R(d2))). The tape does the same
    # (test_tape); here the twin of the two operations that it is made of. One row each, so that products are exact.
    rng = np.random.default_rng(17)
    w, x1, x2, g1, g2 = (array(rng.standard_normal(s), "fp32") for s in ((40, 30), (1, 30), (1, 30), (1, 40), (1, 40)))
    leaf = tensor(w).requires_grad_(True)
    with torch.autocast("cpu", dtype=TORCH[low]):
        y1, y2 = F.linear(tensor(x1), leaf), F.linear(tensor(x2), leaf)
    torch.autograd.backward([y1, y2], [tensor(g1, low), tensor(g2, low)])

    run = Run(get_recipe(f"amp-{low}-cpu").policy, NUMPY)
    p, cast_p = run.bind("linear", "here"), run.bind("cast", "here")
    copy, saved = OPS["cast"].forward(w, p=cast_p, fmt=low)
    each = []
    for x, g in ((x1, g1), (x2, g2)):
        _, kept = OPS["linear"].forward(x, copy, None, p=p)
        each.append(OPS["linear"].backward(array(g, low), kept, copy, None, p=p)[1])
    (dw,) = OPS["cast"].backward(fan_in(*each, run.bind("fan_in", "here")), saved, w, p=cast_p, fmt=low)
    assert np.array_equal(wide(dw), wide(leaf.grad))
    assert not np.array_equal(wide(each[0]) + wide(each[1]), wide(leaf.grad))  # summing in FP32 is something else


# ------------------------------------------------------------------------------------------------------------ attention

B, T, H, D = 400, 4, 2, 6
"""Short rows: a last place that flips in one P reaches its row forward, the whole head backward. D is no power of 4, so that
the scale rounds; many samples, so that shares are sharp."""


def torch_attention(qkv: Any) -> Any:
    """Written out: PyTorch's own fused kernel rounds elsewhere."""
    q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in qkv.split(H * D, dim=2))
    S = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(D))
    S = S.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    return (torch.softmax(S, -1) @ v).transpose(1, 2).reshape(B, T, H * D)


def heads(x: Array) -> Array:
    return x.reshape(B, T, H, D).transpose(0, 2, 1, 3)


def stage(formula: Callable[..., Near], fmt: str, *operands: Near) -> tuple[Near, float]:
    """One formula and its rounding: the result with all errors so far, and how often its own error flips a last place.

    The value is what the rounding makes of the exact formula on the rounded values before. Another evaluation, off by e
    before the rounding, is off by at most e and one ulp after it.
    """
    alone, value = formula(*(near(x.value) for x in operands)), formula(*operands)
    if fmt == "fp32":
        return value, 1.0
    place = ulp(np.abs(value.value) + value.err, fmt)
    return Near(rounded(value.value, fmt), value.err + place), float(flips(alone, fmt).mean())


def attention_near(qkv: Array, dO: Array, fmt: str) -> tuple[list[Near], list[float]]:
    """O, dq, dk, dv with their errors, and how often each may flip: the odds of all the roundings that an element depends on
    (the union bound). An element of O sees a row of S and P; of dv a column of P; of dq a row, of dk a column of dS."""
    q, k, v = (near(heads(x)) for x in np.split(wide(qkv), 3, axis=-1))
    dO = near(heads(wide(dO)))
    mask = np.tril(np.ones((T, T), bool))

    S, p1 = stage(lambda q, k: q @ k.T, fmt, q, k)
    S, p2 = stage(lambda S: S * (1 / math.sqrt(D)), fmt, S)
    P, p3 = stage(lambda S: masked_softmax(S, mask), fmt, S)
    O, p4 = stage(lambda P, v: P @ v, fmt, P, v)  # noqa: E741

    dP, p5 = stage(lambda dO, v: dO @ v.T, fmt, dO, v)
    dv, p6 = stage(lambda P, dO: P.T @ dO, fmt, P, dO)
    dS, p7 = stage(lambda dP, P: softmax_slope(dP, P).where(mask, 0.0), fmt, dP, P)
    dS, p8 = stage(lambda dS: dS * (1 / math.sqrt(D)), fmt, dS)
    dq, p9 = stage(lambda dS, k: dS @ k, fmt, dS, k)
    dk, p10 = stage(lambda dS, q: dS.T @ q, fmt, dS, q)

    row = T * (p1 + p2 + p3)  # of P
    slope = row + T * p5  # what all of a row of dS sees, but for its own two roundings
    odds = [row + p4, slope + T * (p7 + p8) + p9, T * (slope + p7 + p8) + p10, T * row + p6]
    return [O, dq, dk, dv], odds


def masked_softmax(S: Near, mask: Array) -> Near:
    """PyTorch and ours put -Inf where masked; here e is set to 0, which is the same."""
    largest = np.where(mask, S.value, -np.inf).max(-1, keepdims=True)
    # Both sides subtract their own largest score, which errs as much as the score does.
    err = np.zeros_like(S.value) + S.err
    e = (S.where(mask, 0.0) - Near(largest, np.where(mask, err, 0).max(-1, keepdims=True))).exp().where(mask, 0.0)
    total = e.sum(-1, keepdims=True)
    return (e / total).worse_of(e * (1 / total))


def attention_pairs(policy: Policy, qkv: Array, dO: Array, f: Callable[..., Any]) -> list[tuple[Array, Array]]:
    """(ours, PyTorch's) O, dq, dk, dv, by heads."""
    y, (g,) = ours(policy, "attention", [qkv], dO, n_head=H)
    y_torch, (g_torch,) = theirs(f, [qkv], dO)
    assert g.dtype == qkv.dtype and g_torch.dtype == tensor(qkv).dtype
    parts = zip(np.split(wide(g), 3, axis=-1), np.split(wide(g_torch), 3, axis=-1), strict=True)
    return [(heads(wide(a)), heads(wide(b))) for a, b in [(y, y_torch), *parts]]


def least_share(odds: float, size: int) -> float:
    """As `allowed_flips`, but that one flipped S may take the T D elements of a head along: that many count as one event."""
    expected = min(1.0, odds) * size
    return 1 - (expected + 5 * math.sqrt(T * D * expected)) / size


def draw_qkv(fmt: str, out: str) -> tuple[Array, Array]:
    rng = np.random.default_rng(18)
    return array(rng.standard_normal((B, T, 3 * H * D)), fmt), array(rng.standard_normal((B, T, H * D)), out)


ATTENTION = [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("amp-fp16-cpu", "fp16"), ("amp-bf16-cpu", "bf16")]


@pytest.mark.parametrize(("recipe", "fmt"), ATTENTION)
def test_attention_written_out(recipe: str, fmt: str) -> None:
    amp = recipe.startswith("amp")
    qkv, dO = draw_qkv("fp32" if amp else fmt, fmt)
    f = autocast(torch_attention, fmt) if amp else torch_attention
    exact, odds = attention_near(rounded(qkv, fmt) if amp else qkv, dO, fmt)
    for (a, b), value, p in zip(attention_pairs(get_recipe(recipe).policy, qkv, dO, f), exact, odds, strict=True):
        got = agreement(a, b, value, fmt)
        assert got.max_error_in_bound_units <= 1, got
        assert got.share_identical >= least_share(p, a.size), (got, p)


# ----------------------------------------------------------------------------------------------------- negative controls


def control(policy: Policy, op: str, fmt: str) -> tuple[Agreement, float, Agreement, float]:
    """Of the output and of the last gradient: how they agree with PyTorch, and the least share of identical elements."""
    twin = TWINS[op]
    operands = twin.draw(fmt)
    y, _ = OPS[op].forward(*operands, p=Run(get_recipe(fmt).policy, NUMPY).bind(op, "here"))
    dy = gradient_of_output(op, y)
    y, gradients = ours(policy, op, operands, dy)
    y_torch, gradients_torch = theirs(twin.torch, operands, dy)
    exact = twin.formula(*(near(wide(x)) for x in operands), near(wide(dy)))
    result: list[Any] = []
    for a, b, value in ((y, y_torch, exact[0]), (gradients[-1], gradients_torch[-1], exact[-1])):
        result += [agreement(a, b, value, fmt), 1 - allowed_flips(float(flips(value, fmt).sum())) / value.value.size]
    return tuple(result)


@pytest.mark.parametrize("fmt", LOW)
def test_control_rounding_before_the_bias_is_noticed(fmt: str) -> None:
    right, least, _, _ = control(get_recipe(fmt).policy, "linear", fmt)
    assert right.share_identical >= least

    def twice(x: Array, w: Array, b: Array, p: Any) -> Any:
        y, saved = OPS["linear"].forward(x, w, None, p=p)
        return OPS["add"].forward(y, b, p=p)[0], saved

    operands = TWINS["linear"].draw(fmt)
    y = twice(*operands, p=Run(get_recipe(fmt).policy, NUMPY).bind("linear", "here"))[0]
    exact = linear_near(*(near(wide(x)) for x in operands), near(np.zeros((64, 80))))[0]
    got = agreement(y, F.linear(*(tensor(x) for x in operands)), exact, fmt)
    assert got.share_identical < least


@pytest.mark.parametrize("fmt", LOW)
def test_control_a_missing_rounding_of_the_output_is_noticed(fmt: str) -> None:
    unrounded = Policy("unrounded", {EVERY_OTHER: Precision(fmt, "fp32", "fp32")})
    got, least, _, _ = control(unrounded, "linear", fmt)
    assert got.share_identical < least


@pytest.mark.parametrize(("fmt", "n"), [("fp16", 4096), ("bf16", 512)])
def test_control_accumulating_in_16_bits_is_beyond_the_bound(fmt: str, n: int) -> None:
    dy = np.abs(array(np.random.default_rng(19).standard_normal((n, 8)), fmt))
    running = np.zeros(8)
    for row in wide(dy):
        running = rounded(running + row, fmt)
    exact = near(wide(dy)).sum(0)
    summed = tensor(dy).sum(0)
    assert agreement(running, summed, exact, fmt).max_error_in_bound_units > 1
    assert agreement(rounded(exact.value, fmt), summed, exact, fmt).max_error_in_bound_units <= 1


def test_control_an_fp32_product_of_rounded_operands_is_beyond_the_bound() -> None:
    tf32_like = Policy("bf16 inputs", {EVERY_OTHER: Precision("bf16", "fp32", "fp32")})
    got, _, gradient, _ = control(tf32_like, "matmul", "fp32")
    assert got.max_error_in_bound_units > 1 and gradient.max_error_in_bound_units > 1


@pytest.mark.parametrize("fmt", LOW)
@pytest.mark.parametrize("part", ["scores", "softmax", "everything"])
def test_control_attention_without_one_of_its_roundings_is_noticed(part: str, fmt: str) -> None:
    # 'everything' is what SDPBackend.MATH does: all in FP32, one rounding at the end.
    policy = get_recipe(fmt).policy
    parts = {"scores": ["scores", "scale"], "softmax": ["softmax"], "everything": ["scores", "scale", "softmax"]}[part]
    wider = {f"attention.{name}": Precision("same", "fp32", "fp32") for name in parts}
    wider |= {"attention.values": Precision("same", "fp32", fmt)}
    qkv, dO = draw_qkv(fmt, fmt)
    _, odds = attention_near(qkv, dO, fmt)
    pairs = attention_pairs(replace(policy, rows={**policy.rows, **wider}), qkv, dO, torch_attention)
    noticed = [(a == b).mean() < least_share(p, a.size) for (a, b), p in zip(pairs, odds, strict=True)]
    # O in any case; dv, which reads P, where P is not rounded; dq and dk, which read dS, at least where nothing is.
    assert noticed[0] and (part == "scores" or noticed[3]) and (part != "everything" or all(noticed))
