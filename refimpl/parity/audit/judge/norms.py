"""Layer norm and RMS norm, and what every norm over rows of n numbers has in common. The arithmetic is FP32, u = 2^-24.

A row is one sample (layer norm), one group of a sample (group norm), or one channel of the batch (batch norm), and refimpl's
layer norm defines all of them. In a row, with h = (x - mean) rstd:

    mean    dmu = gamma(n + 2) mean|x|
    var     dvar = gamma(n + 6) var + 2 dmu sqrt(var) + dmu^2, in one pass (Welford) or in two
            + gamma(n + 4) mean(x^2), where a kernel computes mean(x^2) - mean^2
    rstd    drs = 1 / sqrt(1 - dvar / (var + eps)) - 1 + 6 u, relative: eps and its sum, the root and its inverse, 2 ulp
    y       |w| (rstd dmu + 4 u rstd (|x| + |mean|) + |h| (drs + 4 u)) + 2 u |b|, as (x - mean) rstd w + b
            or as x (rstd w) + (b - mean rstd w)
    dx      gamma(n + 10) (rstd m1 + rstd^3 (|mean| m1 + m2) (|x| + |mean|)) + 4 u rstd |dh|, with dh = dy w, m1 = mean|dh| and
            m2 = mean|dh x|: sums of dh and of dh x or dh (x - mean), in any order, and the three terms
    dw, db  N terms: gamma(N + 2) sum|dy h| + 4 u sum|dy| (|x| + |mean|) rstd, and gamma(N + 2) sum|dy|

Welford's variance errs by n u sqrt(1 + mean^2 / var) var, which 2 dmu sqrt(var) covers. Backward reads the mean and rstd that
forward stored, and so does its twin. Where the input has 16 bits, PyTorch's layer norm on the CPU rounds dw and db to them
after every row, also those of FP32 weights: + N u_o sum|..|, and N halves of the smallest number.
Source: Chan, Golub and LeVeque 1983, 'Algorithms for computing the sample variance'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.nn.norm import layernorm_backward, layernorm_forward, rmsnorm_backward, rmsnorm_forward
from refimpl.parity.audit.judge.again import U, gamma, is_16_bit
from refimpl.parity.audit.judge.definitions import define
from refimpl.parity.audit.judge.roundings import smallest, spread, unit
from refimpl.parity.audit.values import Twin, Values

Sum = Callable[[float], float]
"""The relative error of a sum by its number of terms: gamma, or spread for a typical one."""
ONE_PASS = "the kernel computes the variance as mean(x^2) - mean(x)^2"
ROUNDED = "PyTorch's CPU kernel rounds mean, variance and rstd to 16 bits before it uses them"
LARGEST = 2.0**127
"""Half of what FP32 holds."""
IN_16_BITS = "PyTorch's CPU kernel rounds this sum to the input's 16 bits after every row"


class Rows(NamedTuple):
    """A norm in row form: x (rows, n); w, b: None, or broadcast to x; back: gives rows the user's shape."""

    x: Tensor
    w: Tensor | None
    b: Tensor | None
    back: Callable[[Tensor], Tensor]

    @property
    def n(self) -> int:
        """The length of a row."""
        return self.x.shape[-1]

    @property
    def ones(self) -> Tensor:
        """The weights of a norm without any."""
        return torch.ones(self.n, dtype=self.x.dtype, device=self.x.device)

    def affine(self, h: Tensor) -> Tensor:
        """Return h w + b."""
        y = h if self.w is None else h * self.w
        return y if self.b is None else y + self.b


class Known(NamedTuple):
    """What a kernel is known to add to the error of a sum: relative to its terms, absolute, and why."""

    relative: float = 0.0
    absolute: Tensor | float = 0.0
    note: str = ""


NOTHING = Known()


class Errors(NamedTuple):
    """Errors of each row's mean and variance, absolute, and of its rstd, relative."""

    mean: Tensor
    var: Tensor
    rstd: Tensor


def errors_of(
    error: Sum, rows: Rows, mean: Tensor, var: Tensor, eps: float, one_pass: bool = False, low: torch.dtype | None = None
) -> Errors:
    """Return the errors that FP32 sums make in the statistics of rows.

    one_pass: the variance is mean(x^2) - mean^2. low: a format that each statistic is rounded to before it is used. There is
    no bound where the squares of a row may add up to more than FP32 holds.
    """
    n, (u, least) = rows.n, (unit(low), smallest(low)) if low is not None else (0.0, 0.0)
    off = error(n + 2) * rows.x.abs().mean(-1, keepdim=True) + (u * mean.abs() + least)
    of_var = error(n + 6) * var + 2 * off * var.sqrt() + off.square()
    if one_pass:
        of_var = of_var + error(n + 4) * (var + mean.square())
    of_var = of_var + (u * var + least)
    of_var = of_var.where(rows.x.square().sum(-1, keepdim=True) < LARGEST, torch.inf)
    left = (1 - of_var / (var + eps)).clamp(min=1e-12)
    return Errors(off, of_var, left.rsqrt() - 1 + 6 * U + u)


def bound_of_y(rows: Rows, h: Tensor, mean: Tensor, rstd: Tensor, errors: Errors) -> Tensor:
    """Return the bound of y. h = (x - mean) rstd; mean, rstd (rows, 1)."""
    shift = rstd * (errors.mean + 4 * U * mean.abs())
    bound = h.abs().mul_(errors.rstd + 4 * U).add_(shift).add_(rows.x.abs().mul_(4 * U * rstd))
    if rows.w is not None:
        bound *= rows.w.abs()
    return bound if rows.b is None else bound + 2 * U * rows.b.abs()


def bounds_of_dx(dh: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, more: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the bound of dx and its typical error. dh = dy w, x (rows, n); mean, rstd (rows, 1) as stored.

    more: what a kernel is known to add to the relative error of every term. No bound as in `errors_of`, and for large dh x.
    """
    n, size = x.shape[-1], dh.abs()
    first, second = size.mean(-1, keepdim=True), (size * x).abs_().mean(-1, keepdim=True)
    fits = torch.maximum(x.square().sum(-1, keepdim=True), n * second) < LARGEST
    slope = rstd.abs().pow(3) * (mean.abs() * first + second)
    sums = x.abs().mul_(slope).add_(slope * mean.abs() + rstd.abs() * first).where(fits, torch.inf)
    few = size.mul_(4 * U * rstd.abs())
    return (few * (1 + more / (4 * U))).add_(sums, alpha=gamma(n + 10) + more), few.add_(sums, alpha=spread(n) + 10 * U)


def summed(
    result: str, out: Tensor, terms: Tensor, sizes: Tensor, axes: tuple[int, ...], known: Known = NOTHING
) -> Twin:
    """Return the twin of a sum over axes: dw or db. sizes: |terms|, or what they cancelled from."""
    exact, size = terms.sum(axes), sizes.sum(axes)
    n = terms.numel() // max(exact.numel(), 1)
    bound = size * (gamma(n + 2) + known.relative) + known.absolute
    return twin(result, out, (t.reshape(out.shape) for t in (exact, bound, size * (spread(n) + 4 * U))), known.note)


def forward(
    rows: Rows, eps: float, outputs: tuple[Tensor, ...], one_pass: bool = False, low: torch.dtype | None = None
) -> tuple[list[Twin], Tensor, Tensor, Errors, Errors]:
    """Return the twins of y, mean and rstd; and mean, variance, their errors and their typical errors.

    one_pass, low: what the kernel is known to do, as in `errors_of`. The mean of a row with an Inf is Inf, or NaN where a
    kernel updates it by differences.
    """
    h, (_, mean, rstd, _) = define(layernorm_forward, "layernorm", rows.x, rows.ones, None, eps=eps)
    if outputs[1].numel():
        mean = mean.masked_fill(mean.isinf() & outputs[1].reshape(mean.shape).isnan(), math.nan)
    var = (rstd.pow(-2) - eps).clamp_(min=0)
    errors, usual = errors_of(gamma, rows, mean, var, eps, one_pass, low), errors_of(spread, rows, mean, var, eps, one_pass)
    note = ONE_PASS if one_pass else ROUNDED if low is not None else ""
    bounds = (bound_of_y(rows, h, mean, rstd, each) for each in (errors, usual))
    twins = [twin("out.0", outputs[0], map(rows.back, (rows.affine(h), *bounds)), note)]
    for i, triple in ((1, (mean, errors.mean, usual.mean)), (2, (rstd, rstd * errors.rstd, rstd * usual.rstd))):
        if outputs[i].numel():
            twins.append(twin(f"out.{i}", outputs[i], (t.reshape(outputs[i].shape) for t in triple), note))
    return twins, mean, var, errors, usual


def backward(
    rows: Rows, dy: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor, known: Known = NOTHING
) -> Twin:
    """Return the twin of dx. dy (rows, n); mean, rstd (rows, 1) as stored."""
    dh = dy if rows.w is None else dy * rows.w
    exact = define(layernorm_backward, "layernorm", dh, (rows.x, mean, rstd, "fp64"), rows.ones, None)[0]
    return twin("out.0", dx, map(rows.back, (exact, *bounds_of_dx(dh, rows.x, mean, rstd, known.relative))), known.note)


def twin(result: str, actual: Tensor, parts: Iterable[Tensor], note: str = "") -> Twin:
    """Return a twin by refimpl's definition. parts: exact, bound, typical."""
    exact, bound, typical = parts
    return Twin(result, actual, exact, bound, typical, by="refimpl", note=note)


def by_cpu_in_16_bits(x: Tensor) -> bool:
    """Return whether a kernel of the CPU reads a 16-bit tensor."""
    return is_16_bit(x) and not x.is_cuda


def wanted(x: Tensor | None) -> bool:
    """Return whether a gradient was asked for."""
    return x is not None and x.numel() > 0


# ----------------------------------------------------------------------------------------------------- layer norm, RMS norm


def layer_norm(values: Values) -> Iterator[Twin]:
    """Judge `native_layer_norm`: y, mean, rstd."""
    yield from forward(_samples(values.inputs), values.inputs["eps"], values.output)[0]


def layer_norm_gradient(values: Values) -> Iterator[Twin]:
    """Judge `native_layer_norm_backward`: dx, dw, db."""
    inputs, (dx, dw, db) = values.inputs, values.output
    rows = _samples(inputs)
    dy = inputs["grad_out"].double().reshape(rows.x.shape)
    mean, rstd = (inputs[key].double().reshape(-1, 1) for key in ("mean", "rstd"))
    low = inputs["input"].dtype if by_cpu_in_16_bits(inputs["input"]) else None
    known = NOTHING if low is None else Known(len(dy) * unit(low), len(dy) * smallest(low) / 2, IN_16_BITS)
    if wanted(dx):
        yield backward(rows, dy, mean, rstd, dx)
    if wanted(dw):
        terms = (rows.x - mean).mul_(rstd).mul_(dy)
        yield summed("out.1", dw, terms, sizes_of(terms, dy, rows.x, mean, rstd, len(dy)), (0,), known)
    if wanted(db):
        yield summed("out.2", db, dy, dy.abs(), (0,), known)


def rms_norm(values: Values) -> Iterator[Twin]:
    """Judge `_fused_rms_norm`: y and rstd.

    Without an eps it is that of FP32, in which the kernel computes. Bound: mean(x^2) is a sum of positive terms, so that rstd
    errs by gamma(n + 2) / 2 + 6 u, and y by 2 u more, relative.
    """
    rows, (y, rstd) = _samples(values.inputs), values.output
    given = values.inputs.get("eps")
    eps = torch.finfo(torch.float32).eps if given is None else given
    weight = rows.ones if rows.w is None else rows.w.flatten()
    exact, (_, rrms, _) = define(rmsnorm_forward, "rmsnorm", rows.x, weight, eps=eps)
    relative, usual = gamma(rows.n + 2) / 2 + 6 * U, spread(rows.n) / 2 + 7 * U
    size = rows.back(exact.abs())
    yield Twin("out.0", y, rows.back(exact), size * (relative + 2 * U), size * (usual + 2 * U), by="refimpl")
    rrms = rrms.reshape(rstd.shape)
    yield Twin("out.1", rstd, rrms, rrms * relative, rrms * usual, by="refimpl")


def rms_norm_gradient(values: Values) -> Iterator[Twin]:
    """Judge `_fused_rms_norm_backward`: dx and dw, with the stored rstd; bounds as for layer norm, with a mean of 0."""
    inputs, (dx, dw) = values.inputs, values.output
    rows = _samples(inputs)
    dy, rstd = inputs["grad_out"].double().reshape(rows.x.shape), inputs["rstd"].double().reshape(-1, 1)
    weight = rows.ones if rows.w is None else rows.w.flatten()
    if wanted(dx):
        exact = define(rmsnorm_backward, "rmsnorm", dy, (rows.x, rstd, "fp64"), weight)[0]
        bounds = bounds_of_dx(dy if rows.w is None else dy * rows.w, rows.x, torch.zeros_like(rstd), rstd)
        yield twin("out.0", dx, map(rows.back, (exact, *bounds)))
    if wanted(dw):
        terms = dy * (rows.x * rstd)
        yield summed("out.1", dw, terms, terms.abs(), (0,))


def _samples(inputs: dict[str, Any]) -> Rows:
    """Return the rows of layer and RMS norm."""
    x, shape = inputs["input"], inputs["input"].shape
    w, b = (None if inputs.get(key) is None else inputs[key].double().reshape(1, -1) for key in ("weight", "bias"))
    return Rows(x.double().reshape(-1, math.prod(inputs["normalized_shape"])), w, b, lambda t: t.reshape(shape))


def sizes_of(terms: Tensor, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, N: int) -> Tensor:
    """Return |dy h| of N terms, and what x - mean may have cancelled from, |dy| (|x| + |mean|) rstd, as far as 4 u allow."""
    away = x.abs().add_(mean.abs()).mul_(rstd.abs()).mul_(dy.abs())
    return terms.abs().add_(away, alpha=4 / (N + 2))


JUDGES = {
    "aten.native_layer_norm": layer_norm,
    "aten.native_layer_norm_backward": layer_norm_gradient,
    "aten._fused_rms_norm": rms_norm,
    "aten._fused_rms_norm_backward": rms_norm_gradient,
}  # fmt: skip
