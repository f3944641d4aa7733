"""How far correct evaluations of one operation may lie apart: derived, not tuned. Nothing here needs PyTorch.

Two correct evaluations of one formula differ, since sums have another order and `exp` another last bit. `Near` carries each
value's rounding error through the formula (running error analysis, Higham, 'Accuracy and Stability of Numerical Algorithms',
3.3), and both sides must lie within it of the exact value.

In 16 bits that says much more. Rounding is monotone, so an FP32 value between v - e and v + e is rounded to something
between R(v - e) and R(v + e). Where those two are one number, as they mostly are, the result is *decided*: every correct
evaluation gives that number, and both sides must give it, bit for bit. So a rounding that is missing, that is one too many
or that goes the wrong way cannot hide behind 'one place apart'.

torch_cases.py, test_recorded.py and the parity tests compare by these rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from arrays import Array, U, rounded, wide

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.ops import OPS
from refimpl.precision.context import Run
from refimpl.precision.policy import Policy

FRACTION_BITS = {"fp32": 23, "fp16": 10, "bf16": 7}
SMALLEST_EXPONENT = {"fp32": -126, "fp16": -14, "bf16": -126}


# ---------------------------------------------------------------------------------------------------- the errors of fp32

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
        """One more fp32 operation: the error so far, and U times the computed result; none where fp32 holds it exactly."""
        exact = (np.asarray(err) == 0) & (rounded(value, "fp32") == value) & ((value == 0) | (np.abs(value) >= FLUSHED))
        return Near(value, np.where(exact, 0.0, err * (1 + U) + U * np.abs(value) + FLUSHED))

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


# ------------------------------------------------------------------------------------------------------------- agreement


def ulp(x: Array, fmt: str) -> Array:
    """The distance between neighbors of a format at x."""
    exponent = np.frexp(np.abs(x))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, SMALLEST_EXPONENT[fmt]) - FRACTION_BITS[fmt])


def possible(exact: Near, fmt: str) -> tuple[Array, Array]:
    """The least and the greatest result that a correct evaluation can give: rounding is monotone."""
    return rounded(exact.value - exact.err, fmt), rounded(exact.value + exact.err, fmt)


@dataclass(frozen=True)
class Agreement:
    """How two results compare, and each of them with what is possible."""

    share_identical: float
    share_decided: float  # of elements for which only one result is possible
    ulps_of_row: float  # the largest difference, in places of the largest element of its row
    ours_outside: int  # elements that are no possible result
    theirs_outside: int

    def __str__(self) -> str:
        shares = f"identical {100 * self.share_identical:.3f} %, decided {100 * self.share_decided:.3f} %"
        outside = f", outside: ours {self.ours_outside}, PyTorch's {self.theirs_outside}"
        return f"{shares}, {self.ulps_of_row:.3g} ulp of the row" + outside * bool(self.ours_outside + self.theirs_outside)


def agreement(ours: Array, theirs: Array, exact: Near, fmt: str) -> Agreement:
    """`fmt` is the format of the last rounding that changed anything: 16 bits for a gradient that autocast keeps in FP32."""
    a, b = wide(ours), wide(theirs)
    assert a.shape == b.shape == exact.value.shape
    least, greatest = possible(exact, fmt)
    row = np.abs(b).max(-1, keepdims=True) if b.ndim else np.abs(b)

    def outside(x: Array) -> int:
        """Beyond the possible ones, or no number of the format at all."""
        return int(np.size(x) - np.count_nonzero((least <= x) & (x <= greatest) & (rounded(x, fmt) == x)))

    return Agreement(
        share_identical=float((a == b).mean()),
        share_decided=float((least == greatest).mean()),
        ulps_of_row=float((np.abs(a - b) / ulp(row, fmt)).max()),
        ours_outside=outside(a),
        theirs_outside=outside(b),
    )


def assert_agrees(ours: Array, theirs: Array, exact: Near, fmt: str, name: str = "result") -> Agreement:
    """Every element of both is a possible result. Where only one is, they are therefore identical."""
    got = agreement(ours, theirs, exact, fmt)
    assert got.ours_outside == 0 and got.theirs_outside == 0, f"{name}: {got}"
    return got


# -------------------------------------------------------------------------------------------- arrays, and refimpl's side


def ours(policy: Policy, op: str, operands: list[Array], dy: Array, **static: Any) -> tuple[Array, list[Array]]:
    """The definition of an operation, or inside of `fast_versions` what the NumPy backend runs in its place."""
    version, p = backend().ops.get(op, OPS[op]), Run(policy, backend()).precision(OPS[op].key, "here")
    params = operands if op == "cast" else operands[len(operands) - len(version.params) :]
    y, saved = version.forward(*operands, p=p, **static)
    return y, list(version.backward(dy, saved, *params, p=p, **static))


_backend: ContextVar[Backend] = ContextVar("backend", default=REFERENCE)


def backend() -> Backend:
    """The backend that computes our results: REFERENCE, or inside of `fast_versions` NUMPY."""
    return _backend.get()


@contextmanager
def fast_versions() -> Iterator[None]:
    """Compute our results by the NumPy backend, which has fast versions."""
    token = _backend.set(NUMPY)
    try:
        yield
    finally:
        _backend.reset(token)


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


def swiglu_near(gate: Near, up: Near, dy: Near, fmt: str) -> list[Near]:
    """silu(gate) is stored in `fmt` before the product, and so is its gradient."""
    silu = stored(silu_near(gate, dy)[0], fmt)
    ds = stored(dy * up, fmt)
    return [silu * up, silu_near(gate, ds)[1], dy * silu]


def rope_near(x: Near, cos: Near, sin: Near, dy: Near, fmt: str, grad_fmt: str) -> list[Near]:
    """Both products are stored in `fmt` before they are added, backward in the format of x, `grad_fmt`."""
    c, s = (near(np.tile(rounded(t.value, fmt), 2)[:, None]) for t in (cos, sin))

    def rotated(z: Near, sign: int, fmt: str) -> Near:
        heads = z.value.reshape(*z.value.shape[:-1], -1, c.value.shape[-1])
        a, b = np.split(heads, 2, -1)
        turned = np.concatenate([-sign * b, sign * a], -1)
        y = stored(near(heads) * c, fmt) + stored(near(turned) * s, fmt)
        return Near(y.value.reshape(z.value.shape), y.err.reshape(z.value.shape))

    return [rotated(x, 1, fmt), rotated(dy, -1, grad_fmt)]


def gelu_tanh_near(x: Near, dy: Near) -> list[Near]:
    # Constants are rounded to fp32 before they are used: one more U, which the multiplication by 1 adds.
    beta, kappa = Near(np.float64(math.sqrt(2 / math.pi))) * 1, Near(np.float64(0.044715)) * 1
    t = (beta * (x + kappa * (x * x * x))).tanh()
    slope = 0.5 * x * (1 - t * t) * (beta * (1 + 3 * kappa * (x * x)))
    return [0.5 * x * (1 + t), dy * (0.5 * (1 + t) + slope)]


def gelu_new_near(x: Near, dy: Near, fmt: str, grad_fmt: str) -> list[Near]:
    """Each step is stored in `fmt`, each gradient of one of the three uses of x in the format of x, `grad_fmt`."""
    beta, kappa = Near(np.float64(math.sqrt(2 / math.pi))) * 1, Near(np.float64(0.044715)) * 1

    def R(z: Near) -> Near:
        return stored(z, fmt)

    def Rx(z: Near) -> Near:
        return stored(z, grad_fmt)

    square = R(x * x) if fmt == "bf16" else x * x
    t = R(R(beta * R(x + R(kappa * R(square * x)))).tanh())
    half, outer = R(0.5 * x), R(1 + t)
    dc = R(beta * R(R(dy * half) * (1 - t * t)))
    dcube = R(kappa * dc) * R(3 * R(x * x))
    return [half * outer, Rx(Rx(dc) + Rx(dcube)) + Rx(0.5 * dy * outer)]


def gelu_erf_near(x: Near, dy: Near) -> list[Near]:
    root, density = Near(np.float64(math.sqrt(0.5))) * 1, Near(np.float64(1 / math.sqrt(2 * math.pi))) * 1
    phi = 0.5 * (1 + (x * root).erf())
    return [x * phi, dy * (phi + x * ((-0.5 * x * x).exp() * density))]


def layernorm_near(x: Near, w: Near, b: Near, dy: Near, eps: float = 1e-5) -> list[Near]:
    N = x.value.shape[-1]
    mean = x.mean()
    centered = x - mean
    var = (centered * centered).mean()
    # PyTorch's variance is Welford's: N U kappa more (Chan, Golub, LeVeque 1983), kappa = sqrt(1 + mean^2 / var).
    kappa = np.sqrt(1 + mean.value**2 / var.value)
    rstd = (Near(var.value, var.err + N * U * kappa * var.value) + eps).rsqrt()
    # PyTorch writes x rstd - rstd mean in 16 bits, and B x + rstd dy w + C backward: the same formula, other cancellations.
    h = (centered * rstd).worse_of(x * rstd - rstd * mean)
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


def llama_rmsnorm_near(x: Near, w: Near, dy: Near, fmt: str, grad_fmt: str, eps: float = 1e-5) -> list[Near]:
    """The normalized values are stored in the format of x, `grad_fmt`, and so is their gradient; dy w and dy n in `fmt`."""
    rrms = ((x * x).mean() + eps).rsqrt()
    h = x * rrms
    n, dn = stored(h, grad_fmt), stored(dy * w, grad_fmt)
    dx = rrms * (dn - h * (dn * h).mean())
    # PyTorch differentiates operation by operation: dn rrms - x rrms^3 mean(dn x).
    other = dn * rrms - x * (rrms * rrms * rrms * (dn * x).sum(-1, keepdims=True) * (1 / x.value.shape[-1]))
    return [n * w, dx.worse_of(other), stored(dy * n, fmt).sum(0)]


def softmax_of(z: Near) -> Near:
    e = (z - z.value.max(-1, keepdims=True)).exp()
    return (e / e.sum(-1, keepdims=True)).worse_of(e * (1 / e.sum(-1, keepdims=True)))


def softmax_slope(dy: Near, y: Near) -> Near:
    return (dy - (dy * y).sum(-1, keepdims=True)) * y


def softmax_near(x: Near, dy: Near, fmt: str) -> list[Near]:
    """Backward reads the y that was stored in `fmt`."""
    return [softmax_of(x), softmax_slope(dy, stored(softmax_of(x), fmt))]


def stored(x: Near, fmt: str) -> Near:
    """What comes after a rounding to a 16-bit format: exact where it is decided, and elsewhere one of a few neighbors."""
    if fmt == "fp32":
        return x
    value, (least, greatest) = rounded(x.value, fmt), possible(x, fmt)
    return Near(value, np.maximum(greatest - value, value - least))


def embedding_near(tokens: Array, w: Near, dy: Near) -> list[Near]:
    # A sum over the places of one token; the longest has n terms.
    total, size = np.zeros_like(w.value), np.zeros_like(w.value)
    np.add.at(total, tokens, dy.value)
    np.add.at(size, tokens, np.abs(dy.value))
    return [Near(w.value[tokens]), Near(total, gamma(int(np.bincount(tokens).max()) - 1) * size)]


def cross_entropy_near(logits: Near, targets: Array, S: Near, ignore_index: int = -100) -> list[Near]:
    """The mean over the rows whose target is not ignored, of which there must be one; the other rows' gradients are 0."""
    counts = targets != ignore_index
    rows, n, targets = np.flatnonzero(counts), counts.sum(), targets[counts]
    shifted = logits - logits.value.max(-1, keepdims=True)
    log_p = shifted - shifted.exp().sum(-1, keepdims=True).log()
    at_target = Near(log_p.value[rows, targets], log_p.err[rows, targets])
    onehot = np.zeros_like(logits.value)
    onehot[rows, targets] = 1
    each = S * counts[:, None] / n
    return [-at_target.sum(0) / n, log_p.exp() * each - onehot * each]


# ------------------------------------------------------------------------------------------------------------- attention

T, H, D = 4, 2, 6
"""Short rows: one undecided P makes its row of O undecided, and backward the whole head. D is no power of 4, so that the
scale rounds."""

CAUSAL = np.tril(np.ones((T, T), bool))


def heads(x: Array) -> Array:
    return x.reshape(len(x), -1, H, D).transpose(0, 2, 1, 3)


def merge(x: Near) -> Near:
    """(B, H, T, D) -> (B, T, C)."""

    def merged(a: Array) -> Array:
        return a.transpose(0, 2, 1, 3).reshape(len(a), a.shape[2], H * D)

    return Near(merged(x.value), merged(x.err))


def attention_near(qkv: Array, dO: Array, fmt: str, softmax: str | None = None, unfused: bool = False) -> list[Near]:
    """O and dqkv, formula by formula, each result stored in `fmt`. `softmax`, `unfused`: as in `heads_near`."""
    q, k, v = (near(heads(x)) for x in np.split(wide(qkv), 3, axis=-1))
    O, *dqkv = (merge(x) for x in heads_near(q, k, v, near(heads(wide(dO))), fmt, softmax or "", unfused))  # noqa: E741
    return [O, Near(*(np.concatenate([getattr(x, part) for x in dqkv], -1) for part in ("value", "err")))]


def grouped_attention_near(q: Array, k: Array, v: Array, dO: Array, fmt: str) -> list[Near]:
    """O, dq, dk and dv, each result of a head stored in `fmt`, with a softmax in FP32. dk and dv are sums over a group."""
    K = k.shape[-1] // D

    def groups(x: Array) -> Near:
        """(B, T, K G D) -> (B, K, G, T, D)."""
        return near(wide(x).reshape(len(x), x.shape[1], K, -1, D).transpose(0, 2, 3, 1, 4))

    def joined(x: Near) -> Near:
        def join(a: Array) -> Array:
            return a.transpose(0, 3, 1, 2, 4).reshape(len(a), a.shape[3], -1)

        return Near(join(x.value), join(x.err))

    O, dq, dk, dv = heads_near(*(groups(x) for x in (q, k, v, dO)), fmt, "fp32")  # noqa: E741
    dk, dv = (stored(d, fmt).sum(2, keepdims=True) if d.value.shape[2] > 1 else d for d in (dk, dv))
    return [joined(x) for x in (O, dq, dk, dv)]


def heads_near(q: Near, k: Near, v: Near, dO: Near, fmt: str, softmax: str = "", unfused: bool = False) -> list[Near]:
    """O, dq, dk and dv of heads (..., T, D), of which keys and values may serve several of queries. `softmax`: the format that
    the softmax works and stores in, if another. unfused: all in FP32, and the root of the scale multiplied to q and k each, as
    SDPBackend.MATH does."""
    scale = near(np.float64(1 / math.sqrt(D))) * 1  # times 1: rounded to FP32
    inside = "fp32" if unfused else fmt
    softmax = softmax or inside

    S = stored(stored(q @ k.T, inside) * scale, inside)
    if unfused:
        root = near(np.float64(D**-0.25)) * 1
        S = S.worse_of((q * root) @ (k * root).T)
    P32 = stored(masked_softmax(S), softmax)
    P = stored(P32, inside)
    O = P @ v  # noqa: E741

    dP = stored(dO @ v.T, inside)
    dv = P.T @ dO
    dS = stored(softmax_slope(dP, P32).where(CAUSAL, 0.0), inside)
    scaled = stored(dS * scale, inside)
    dq, dk = scaled @ k, scaled.T @ q
    if unfused:
        dq, dk = dq.worse_of((dS @ (k * root)) * root), dk.worse_of((dS.T @ (q * root)) * root)
    return [O, dq, dk, dv]


def masked_softmax(S: Near) -> Near:
    """PyTorch and ours put -Inf where masked; here e is set to 0, which is the same."""
    largest = np.where(CAUSAL, S.value, -np.inf).max(-1, keepdims=True)
    # Both sides subtract their own largest score, which errs as much as the score does.
    err = np.zeros_like(S.value) + S.err
    e = (S.where(CAUSAL, 0.0) - Near(largest, np.where(CAUSAL, err, 0).max(-1, keepdims=True))).exp().where(CAUSAL, 0.0)
    total = e.sum(-1, keepdims=True)
    return (e / total).worse_of(e * (1 / total))
