"""Softmax, log-softmax and their gradients. The arithmetic is FP32, u = 2^-24; n terms in a row; r is the exact result.

The largest element of a row is found exactly. With d = x - max, an exp errs by u |d| of its argument and 2 ulp of its own, and
so does its share p in the sum s of the row: together by sum(p |d|) u <= log(n) u, since sum(p |d|) + log(s) is an entropy.

    softmax      r (gamma(n + 11) + u (|d| + log n)):  two exp, a sum of n terms, a quotient
    log-softmax  gamma(n + 5) + u (2 |r| + 4 log n), absolute:  the error of s, that of log(s) <= log n within 2 ulp, two
                 differences, d and d - log s, neither of them larger than |r|

Source: Blanchard, Higham and Higham 2021, 'Accurately computing the log-sum-exp and softmax functions'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from refimpl.nn.softmax import softmax_backward, softmax_forward
from refimpl.parity.audit.judge.again import U, gamma, is_16_bit
from refimpl.parity.audit.judge.definitions import define
from refimpl.parity.audit.judge.roundings import FLUSHED, FUNCTION, smallest, spread, unit
from refimpl.parity.audit.values import Twin, Values


def softmax(values: Values) -> Iterator[Twin]:
    """Judge `_softmax`: twin and bound above; below 2^-126 an exp may be flushed.

    PyTorch on the CPU rounds exp to a 16-bit format of the result, where the axis is not the last: + 2 u_o r, and half of
    its smallest number.
    """
    x = _rows(values, "self")
    yield _of_softmax(values, x, define(softmax_forward, "softmax", x)[0])


def safe_softmax(values: Values) -> Iterator[Twin]:
    """Judge `_safe_softmax`: softmax, and 0 where a whole row is -inf."""
    x = _rows(values, "self")
    exact = define(softmax_forward, "softmax", x)[0]
    yield _of_softmax(values, x, exact.masked_fill_((x == -math.inf).all(-1, keepdim=True), 0.0))


def _of_softmax(values: Values, x: Tensor, exact: Tensor) -> Twin:
    n = x.shape[-1]
    away = (x - x.amax(-1, keepdim=True)).abs_().nan_to_num_(0.0, 0.0, 0.0)
    own = 2 * FUNCTION + U * (math.log(n) + 3)
    typical = away.mul_(U).add_(own + spread(n)).mul_(exact).add_(FLUSHED)
    more, least, note = max(gamma(n) - spread(n), 0.0), 0.0, ""
    if _by_cpu_in_16_bits(values) and values.inputs["dim"] % values.output.dim() != values.output.dim() - 1:
        more, note = more + 2 * unit(values.output.dtype), "PyTorch rounds exp to 16 bits where the axis is not the last"
        least = smallest(values.output.dtype) / 2
    return _twin(values, exact, torch.add(typical + least, exact, alpha=more), typical, by="refimpl", note=note)


def softmax_gradient(values: Values) -> Iterator[Twin]:
    """Judge `_softmax_backward_data`: dx = y (dy - sum(dy y)), with the stored y.

    Bound: y (gamma(n + 2) sum|dy y| + 3 u |dy|): the products and their sum, the difference, the product with y; also where it
    is y dy - y sum(dy y). PyTorch on CUDA rounds dy y to the format of y first, which counts for 16 bits.
    """
    dy, y, stored = _rows(values, "grad_output"), _rows(values, "output"), values.inputs["output"]
    n = y.shape[-1]
    dx = define(softmax_backward, "softmax", dy, (y, "fp64"))[0]
    each = (dy * y).abs_()
    all_of_row = y.abs() * each.sum(-1, keepdim=True)
    typical = each * (3 * U) + all_of_row * (spread(n) + 2 * U)
    bound, note = typical + all_of_row * max(gamma(n) - spread(n), 0.0), ""
    if is_16_bit(stored) and stored.is_cuda:
        bound, note = bound + (each + all_of_row) * unit(stored.dtype), "PyTorch rounds grad * output to 16 bits before the sum"
    yield _twin(values, dx, bound, typical, by="refimpl", note=note)


def log_softmax(values: Values) -> Iterator[Twin]:
    """Judge `_log_softmax`: twin is d - log(sum(exp(d))), bound above.

    PyTorch on the CPU keeps s and log(s) in the format of the result: for 16 bits + u_o (1 + log n).
    """
    x = _rows(values, "self")
    n = x.shape[-1]
    exact = torch.log_softmax(x, -1)
    few = exact.abs().nan_to_num_(0.0, 0.0, 0.0).mul_(2 * U)
    own, more, note = FUNCTION * (1 + math.log(n)) + U, 0.0, ""
    if _by_cpu_in_16_bits(values):
        more, note = unit(values.output.dtype) * (1 + math.log(n)), "PyTorch's CPU kernel rounds s and log(s) to 16 bits"
    yield _twin(values, exact, few + (gamma(n) + own + more), few + (spread(n) + own), note=note)


def _by_cpu_in_16_bits(values: Values) -> bool:
    return is_16_bit(values.output) and not values.output.is_cuda


def log_softmax_gradient(values: Values) -> Iterator[Twin]:
    """Judge `_log_softmax_backward_data`: dx = dy - exp(y) sum(dy), with the stored y.

    Bound: exp(y) sum|dy| (gamma(n + 1) + 2 ulp of exp + 2 u) + 2 u |dy|: the sum, exp, their product, the difference. An exp
    below 2^-126 may be flushed: + 2^-126 sum|dy|.
    """
    dy, y = _rows(values, "grad_output"), _rows(values, "output")
    n = y.shape[-1]
    p = y.exp()
    exact = dy - p * dy.sum(-1, keepdim=True)
    size = dy.abs().sum(-1, keepdim=True)
    p *= size
    typical = dy.abs().mul_(2 * U).add_(p, alpha=FUNCTION + 3 * U + spread(n)).add_(size, alpha=FLUSHED)
    yield _twin(values, exact, typical.add(p, alpha=max(gamma(n) - spread(n), 0.0)), typical)


def logsumexp(values: Values) -> Iterator[Twin]:
    """Judge `logsumexp`: max + log(s). Bound: that of log(s), gamma(n + 5) + 5 u log n, and the sum, u (|r| + log n).

    For 16 bits PyTorch computes it operation by operation: d, exp(d), s, log(s) are each rounded to 16 bits. That adds, for a
    unit u_o, u_o (sum(p |d|) + 3 + log n) <= u_o (3 + 2 log n).
    """
    x, keepdim = values.inputs["self"].double(), values.inputs.get("keepdim", False)
    dims = values.inputs["dim"]
    exact = torch.logsumexp(x, dims, keepdim)
    n = max(x.numel() // max(exact.numel(), 1), 1)
    few = exact.abs().nan_to_num_(0.0, 0.0, 0.0).mul_(U) + FUNCTION * (1 + math.log(n)) + U * math.log(n)
    bound, note = few + gamma(n), ""
    if is_16_bit(values.output):
        bound, note = bound + unit(values.output.dtype) * (3 + 2 * math.log(n)), "PyTorch rounds exp, sum and log to 16 bits"
    yield Twin("out", values.output, exact, bound, few + spread(n), by="PyTorch", note=note)


def _rows(values: Values, name: str) -> Tensor:
    """Return an argument in FP64 with the axis of the softmax last."""
    return torch.atleast_1d(values.inputs[name].double()).movedim(values.inputs["dim"], -1)


def _twin(values: Values, exact: Tensor, bound: Tensor, typical: Tensor, by: str = "PyTorch", note: str = "") -> Twin:
    """Return the twin of the result, with the axes where they were."""
    shape, dim = values.output.shape, values.inputs["dim"]
    back = [x.movedim(-1, dim).reshape(shape) for x in (exact, bound, typical)]
    return Twin("out", values.output, back[0], back[1], back[2], by=by, note=note)


JUDGES = {
    "aten._softmax": softmax,
    "aten._safe_softmax": safe_softmax,
    "aten._softmax_backward_data": softmax_gradient,
    "aten._log_softmax": log_softmax,
    "aten._log_softmax_backward_data": log_softmax_gradient,
    "aten.logsumexp": logsumexp,
}  # fmt: skip
