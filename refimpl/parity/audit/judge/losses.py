"""Losses over classes: the negative log-likelihood, and binary cross-entropy of probabilities and of logits. u = 2^-24.

    nll      mean of N terms w x:  gamma(N + 2) sum|w x| / W, where W, the sum of the weights, is another sum of N
    its dx   -g w / W in one place of a row, with the stored W:  3 u |dx|, 0 elsewhere
    bce      y log(x) + (1 - y) log(1 - x), logarithms at least -100:  2 ulp of each, and 5 u |term|, with u |1 - y| for 1 - x
    its dx   g w (x - y) / max(x (1 - x), 1e-12) / n:  8 u |dx|. Nothing cancels but x - y, which is rounded once
    logits   (1 - y) x - (1 + (p - 1) y) log(sigmoid(x)), p a weight of positives:  16 u (|1 - y| |x| + (1 + |p - 1| y)
             |log(sigmoid(x))|), two functions and at most eight operations

Sums and means of elements add gamma(n + 1) of the sum of absolute values. In 16 bits each of these operations is rounded to
them, so that u is the format's, and half of the smallest number is lost each time; sums of nll too, which the CPU adds up in
levels of 16, so that at most 16 log16(N) + 24 roundings meet in one term. A note says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import EXACT, U, gamma, in_fp64, is_16_bit
from refimpl.parity.audit.judge.roundings import FLUSHED, FUNCTION, smallest, spread, unit
from refimpl.parity.audit.values import CannotJudge, Twin, Values

NONE, MEAN = 0, 1
"""What `reduction` is."""
SUMS = "the kernel rounds weights, terms and their sums to the tensor's format"
TERMS = "the kernel rounds each operation to the tensor's format"
LEVEL = 16
"""Terms that PyTorch's CPU kernel adds up before it adds the sum to that of the next level."""
LEAST_LOG = -100.0
LEAST_PRODUCT = 1e-12
"""At least so large is what binary_cross_entropy takes for log(x), and for x (1 - x) where it divides by it."""


def likelihood(values: Values) -> Iterator[Twin]:
    """Judge `nll_loss_forward` and `nll_loss2d_forward`: the loss, and the sum of the weights of the targets that count."""
    given, (loss, total) = values.inputs, values.output
    weight, n = given["weight"], given["target"].numel()
    if weight is not None and bool((weight < 0).any()):
        raise CannotJudge("a negative weight: their sum may cancel")
    exact, size = in_fp64(values), in_fp64(values, Tensor.abs)["out.0"].abs()
    weights, mean, rounds = exact["out.1"], given["reduction"] == MEAN, is_16_bit(loss)
    u, least, note = (unit(loss.dtype), smallest(loss.dtype), SUMS) if rounds else (U, FLUSHED, "")
    if given["reduction"] == NONE:
        yield Twin("out.0", loss, exact["out.0"], 0.0 if weight is None else u * size + least, note=note)
        yield Twin("out.1", total, weights, 0.0)
        return
    if not rounds:
        bound, typical = gamma((2 if mean else 1) * n + 3) * size, (spread(n) + 3 * U) * size
        yield Twin("out.0", loss, exact["out.0"], bound, typical)
        yield Twin("out.1", total, weights, 0.0 if weight is None and n < EXACT else gamma(n) * weights)
        return
    limit = torch.finfo(loss.dtype).max
    roundings = min(n, LEVEL * math.ceil(math.log(max(n, 2), LEVEL))) + 24
    off = min(roundings * u, 0.9)
    relative = (1 + off) / (1 - off) - 1 + 2 * u if mean else off + u
    largest = size * weights if mean else size
    bound = torch.where((1 + off) * torch.maximum(largest, weights) >= limit, math.inf, relative * size + 2 * least)
    yield Twin("out.0", loss, exact["out.0"], bound, note=note)
    yield Twin("out.1", total, weights, off * weights, note=note)


def likelihood_gradient(values: Values) -> Iterator[Twin]:
    """Judge `nll_loss_backward` and `nll_loss2d_backward`."""
    actual, exact = values.output, in_fp64(values)["out"]
    size, rounds = exact.abs(), is_16_bit(actual)
    bound = 3 * U * size + FLUSHED * (exact != 0)
    if rounds:
        weight = values.inputs["weight"]
        largest = 1.0 if weight is None else float(weight.abs().max())
        bound = 3 * unit(actual.dtype) * size + (1 + largest) * smallest(actual.dtype) * (exact != 0)
    yield Twin("out", actual, exact, bound, note=SUMS if rounds else "")


def cross_entropy(values: Values) -> Iterator[Twin]:
    """Judge `binary_cross_entropy`."""
    given = values.inputs
    x, y = given["self"].double(), given["target"].double()
    logs = x.log().clamp(min=LEAST_LOG), torch.log1p(-x).clamp(min=LEAST_LOG)
    terms = (y * logs[0]).abs() + ((1 - y) * logs[1]).abs()
    u = unit(values.output.dtype) if is_16_bit(values.output) else U
    yield _reduced(values, terms, (FUNCTION + 5 * u) * terms + u * (1 - y).abs())


def cross_entropy_of_logits(values: Values) -> Iterator[Twin]:
    """Judge `binary_cross_entropy_with_logits`."""
    given = values.inputs
    x, y, p = given["self"].double(), given["target"].double(), given.get("pos_weight")
    positive = 1.0 if p is None else 1 + (p.double() - 1).abs() * y.abs()
    terms = ((1 - y) * x).abs() + positive * torch.nn.functional.logsigmoid(x).abs()
    u = unit(values.output.dtype) if is_16_bit(values.output) else U
    yield _reduced(values, terms, 16 * u * terms)


def _reduced(values: Values, terms: Tensor, bound: Tensor) -> Twin:
    """Return the twin of a loss from its elements' sizes and bounds, before weights: of their mean, their sum, or each."""
    given, actual, exact = values.inputs, values.output, in_fp64(values)["out"]
    weight, reduction, rounds = given.get("weight"), given.get("reduction", MEAN), is_16_bit(actual)
    if rounds:
        bound = bound + 4 * smallest(actual.dtype)
        if bool((terms >= torch.finfo(actual.dtype).max).any()):
            raise CannotJudge("a term of the loss is too large for the tensor's format")
    if weight is not None:
        w = weight.double().abs()
        terms, bound = terms * w, bound * w + (unit(actual.dtype) if rounds else U) * terms * w
        bound = bound + (smallest(actual.dtype) if rounds else FLUSHED)
    if reduction != NONE:
        n = terms.numel()
        bound = (bound.sum() + gamma(n + 1) * (terms + bound).sum()) / (n if reduction == MEAN else 1)
    return Twin("out", actual, exact, bound + FLUSHED, note=TERMS if rounds else "")


def cross_entropy_gradient(values: Values) -> Iterator[Twin]:
    """Judge `binary_cross_entropy_backward`."""
    given, actual, exact = values.inputs, values.output, in_fp64(values)["out"]
    x, w = given["self"].double(), given.get("weight")
    rounds = is_16_bit(actual)
    u, least = (unit(actual.dtype), smallest(actual.dtype)) if rounds else (U, FLUSHED)
    product = (x * (1 - x)).abs()
    if actual.dtype == torch.float16 and bool((product == 0).any()):
        raise CannotJudge("FP16 has no 1e-12: where x is 0 or 1 the kernel divides by 0")
    divided = product.clamp(min=LEAST_PRODUCT)
    n = actual.numel() if given.get("reduction", MEAN) == MEAN else 1
    before = (given["grad_output"].double() * (x - given["target"].double())).abs() / divided
    lost = ((before + 1) * least / divided * (1.0 if w is None else w.double().abs()) + 2 * least) / n
    bound = 8 * u * exact.abs() + lost + least
    largest = torch.maximum(before, exact.abs() * n)  # before and after the weight
    bound = torch.where(largest >= torch.finfo(actual.dtype).max / 2, math.inf, bound)
    yield Twin("out", actual, exact, bound, note=TERMS if rounds else "")


JUDGES = {
    **dict.fromkeys(("aten.nll_loss_forward", "aten.nll_loss2d_forward"), likelihood),
    **dict.fromkeys(("aten.nll_loss_backward", "aten.nll_loss2d_backward"), likelihood_gradient),
    "aten.binary_cross_entropy": cross_entropy,
    "aten.binary_cross_entropy_backward": cross_entropy_gradient,
    "aten.binary_cross_entropy_with_logits": cross_entropy_of_logits,
}
