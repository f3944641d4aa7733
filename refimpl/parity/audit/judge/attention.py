"""Fused attention: O = softmax(scale Q K^T + mask) V as one operation, and its gradients. u = 2^-24.

T queries, n keys and D numbers for each head; s are the scores, m is a row's largest one, E = exp(s - m), P = E / sum(E).

    s     e = gamma(D + 2) scale |Q| |K|^T + 2 u |s|:  the products and their sum, the scale, and the mask
    E     A = exp(s - m + e + 4 u |s - m|) (1 + x) - E, and 2^-126:  the difference, what exp does with it, and the error x of
          exp, also that of each rescaling after a block of keys. Which m a kernel subtracts does not matter
    O     (sum(A (|V| + |O|)) + sum(R |V|)) / (sum(E) - sum(A)) and 2 gamma(n + ..) P |V|:  the sum of E and the product with V.
          R = u_o (E + A) and half the smallest number for 16 bits: E is rounded before the second product, its sum is not.
          O is a mean of rows of V, so the bound is at most 2 max|V|, which says nothing of rows whose scores a mask absorbed
    lse   -log(1 - sum(A) / sum(E)) + gamma(n + ..) + 4 u |log(sum(E))|, or 6 max(e) where A is no small share of E

Backward reads the O and the lse that forward stored, and so does its twin. With P = exp(s - lse) and A, R as above,
dP = dO V^T and d = sum(dO O), in FP32 and dS = P (dP - d):

    dS    W = A |dP - d| + (P + A) (gamma(D + 2) (|dO| |V|^T + sum|dO O|) + 2 u |dP - d|), and rounded for 16 bits
    dQ    scale (W |K| + gamma(n + ..) |dS| |K|),  dK likewise with Q, dV (A + R) |dO| + gamma(T + ..) P |dO|
          for 16 bits also b - 1 roundings of dQ, dK and dV, where b blocks are added up in them

PyTorch's kernel for 16 bits on the CPU has an exp of its own: a polynomial for the fraction of x log2(e) that errs by
1.07e-4, and a conversion to an integer near 2^30 that errs by 2^-18, together less than 2^-13. For FP32 it is within 2 ulp.
It adds up dQ after 512 keys, and dK and dV after 32, 64 or 256 queries and after each head that shares them.
Source: Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4; Malossi et al. 2015, 'Fast exponential computation on SIMD
architectures'.

Large attentions are judged on sampled heads, queries and keys, each in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, fp32, gamma, is_16_bit
from refimpl.parity.audit.judge.products import SAMPLE, sampled
from refimpl.parity.audit.judge.roundings import FLUSHED, FUNCTION, smallest, unit
from refimpl.parity.audit.values import CannotJudge, Twin, Values

FAST_EXP = 2.0**-13
"""The relative error of the exp that PyTorch's CPU kernel has for 16 bits, but for the rounding of its argument."""
KEYS = 512
"""Keys in a block of the CPU's kernel."""
FEWEST = 64
"""Keys in the smallest block of any kernel that is known: how often sums are rescaled."""
ALL = slice(None)
MOST = 256
"""Queries, and keys, of an attention that are judged whole."""
SCORES = 2**20
"""Scores of the heads that are judged, about."""


class Heads(NamedTuple):
    """The heads that are judged, in FP64: N heads of keys, G heads of queries that share each of them.

    q, g, o (N, G, T, D); k, v (N, 1, n, D); lse (N, G, T, 1): g, o and lse in backward only. at: batch and heads, to index a
    tensor with. mask: as given, for all heads. low: the 16-bit format in which E and dS are rounded.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Any
    o: Any
    lse: Any
    at: tuple[Tensor, Tensor]
    mask: Tensor | None
    causal: bool
    scale: float
    low: torch.dtype | None

    def rounding(self, x: Tensor) -> Tensor:
        """Return what rounding numbers of a size x >= 0 to the 16-bit format costs; 0 has no error."""
        return torch.zeros_like(x) if self.low is None else (unit(self.low) * x).add_((x > 0) * (smallest(self.low) / 2))

    def scores(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the scores (N, G, rows, columns), -inf where they are hidden, and their errors, 0 there."""
        q, k = self.q[..., rows, :], self.k[..., columns, :].mT
        T, n, D = self.q.shape[-2], self.k.shape[-2], q.shape[-1]
        s, error = self.scale * (q @ k), gamma(D + 2) * self.scale * (q.abs() @ k.abs()) + D * FLUSHED
        if self.mask is not None:
            mask = self.mask[..., rows, columns][self.at]
            s = s + (torch.where(mask, 0.0, -math.inf) if mask.dtype is torch.bool else mask.double())
        if self.causal:
            here = torch.ones(T, n, dtype=torch.bool, device=s.device).tril()[rows, columns]
            s = s.masked_fill(~here, -math.inf)
        hidden = s == -math.inf
        return s, (error + 2 * U * s.abs()).masked_fill_(hidden, 0.0)

    def exp(self, x: Tensor, error: Tensor, more: float) -> tuple[Tensor, Tensor]:
        """Return exp(x) and its error A, both 0 for -inf. error: of x; more: what is added to the error of exp itself."""
        exact, size = x.exp(), x.abs().masked_fill_(x == -math.inf, 0.0)
        own = more + (FUNCTION if self.low is None else FAST_EXP)
        found = (x + error + 4 * U * size).exp_().mul_(1 + own).sub_(exact).add_(FLUSHED)
        return exact, found.masked_fill_(x == -math.inf, 0.0)


def forward(values: Values) -> Iterator[Twin]:
    """Judge `_scaled_dot_product_flash_attention_for_cpu`: the output and the stored log-sum-exp."""
    out, lse = values.output
    T, n = out.shape[-2], values.inputs["key"].shape[-2]
    rows, blocks = _some(T, values), _blocks(n, FEWEST)
    heads = _heads(values, _length(rows, T) * n)
    s, error = heads.scores(rows, ALL)
    largest = s.amax(-1, keepdim=True)
    largest = largest.masked_fill_(largest == -math.inf, 0.0)  # rows that see nothing: the kernel stores 0
    E, A = heads.exp(s - largest, error, blocks * (FUNCTION + 2 * U))
    total, off, size = E.sum(-1, keepdim=True), A.sum(-1, keepdim=True), heads.v.abs()
    total = total.masked_fill_(total == 0, 1.0)
    sure = off < total / 2
    exact = (E @ heads.v) / total
    bound = A @ size + off * exact.abs() + heads.rounding(E + A) @ size + 2 * gamma(n + 2 * blocks + 8) * ((E + A) @ size)
    bound = torch.where(sure, bound / (total - off), 2 * size.amax(-2, keepdim=True))
    yield _twin("out.0", out, out[..., rows, :][heads.at], exact, bound)
    log = total.log()
    bound = -torch.log1p(-off / total) + gamma(n + 2 * blocks + 4) + FUNCTION * log.abs()
    bound = torch.where(sure, bound, 6 * error.amax(-1, keepdim=True))
    yield _twin("out.1", lse, lse[..., rows][heads.at], largest + log, bound)


def backward(values: Values) -> Iterator[Twin]:
    """Judge the backward of the same."""
    dq, dk, dv = values.output
    T, n, G = dq.shape[-2], dk.shape[-2], dq.shape[1] // dk.shape[1]
    rows, columns = _some(T, values), _some(n, values)
    heads = _heads(values, max(_length(rows, T) * n, T * _length(columns, n)))
    at = heads.at[0][:, 0], heads.at[1][:, 0] // G
    (dS, W), (P, R) = _inside(heads, rows, ALL)
    yield _twin("out.0", dq, dq[..., rows, :][heads.at], *_summed(heads, dS, W, heads.k, _blocks(n, KEYS), heads.scale))
    if not rows == columns == ALL:
        (dS, W), (P, R) = _inside(heads, ALL, columns)
    if not bool(R.isfinite().all()):
        raise CannotJudge("attention with a row whose scores are all absorbed by a mask")
    dS, W, P, R = (x.flatten(1, 2).mT for x in (dS, W, P, R))
    blocks = G * _blocks(T, 256 if T >= 768 else 64 if T >= 192 else 32)
    q, g = heads.q.flatten(1, 2), heads.g.flatten(1, 2)
    yield _twin("out.1", dk, dk[..., columns, :][at], *_summed(heads, dS, W, q, blocks, heads.scale))
    yield _twin("out.2", dv, dv[..., columns, :][at], *_summed(heads, P, R, g, blocks, 1.0))


def _inside(heads: Heads, rows: slice, columns: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return dS and P, each with its error, rounding included."""
    s, error = heads.scores(rows, columns)
    P, A = heads.exp(s - heads.lse[..., rows, :], error, 0.0)
    g, o, v = heads.g[..., rows, :], heads.o[..., rows, :], heads.v[..., columns, :].mT
    x = g @ v - (g * o).sum(-1, keepdim=True)
    sums = gamma(heads.q.shape[-1] + 2) * (g.abs() @ v.abs() + (g * o).abs().sum(-1, keepdim=True))
    dS, W = P * x, A * x.abs() + (P + A) * (sums + 2 * U * x.abs())
    return (dS, W + heads.rounding(dS.abs() + W)), (P, A + heads.rounding(P + A))


def _summed(heads: Heads, x: Tensor, error: Tensor, y: Tensor, blocks: int, factor: float) -> tuple[Tensor, Tensor]:
    """Return factor x y, whose sum is rounded after each block, and its bound, where x has an error.

    There is no bound where x, or what is added up in 16 bits, may exceed the largest number.
    """
    exact, size, most = factor * (x @ y), y.abs(), x.abs() + error
    total = factor * (most @ size)
    bound = factor * (error @ size) + gamma(x.shape[-1] + blocks + 4) * total
    if heads.low is None:
        return exact, bound + blocks * FLUSHED
    limit = torch.finfo(heads.low).max
    bound = bound + (blocks - 1) * unit(heads.low) * total + blocks * smallest(heads.low) / 2
    return exact, bound.masked_fill_((most >= limit).any(-1, keepdim=True) | (total >= limit), math.inf)


def _heads(values: Values, scores: int) -> Heads:
    """Return the heads that are judged. scores: how many each of them has."""
    given = values.inputs
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("dropout_p"):
        raise CannotJudge("attention with dropout draws random numbers")
    if q.dim() != 4 or k.shape[-2] == 0:
        raise CannotJudge("attention without heads or keys")
    known = [given[name] for name in ("query", "key", "value", "grad_out", "out", "logsumexp") if name in given]
    if not all(bool(x.isfinite().all()) for x in known):
        raise CannotJudge("attention with Inf or NaN in it")
    shared, G = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
    some = torch.arange(shared, device=q.device)[sampled(shared, values.operation.index, max(1, SCORES // (G * scores)))]
    batch, head = some // k.shape[1], some % k.shape[1]
    at = batch[:, None], head[:, None] * G + torch.arange(G, device=q.device)
    names = ("query", "grad_out", "out", "logsumexp")
    queries, grad, out, lse = (given[name][at].double() if name in given else None for name in names)
    assert queries is not None
    scale = given.get("scale")
    return Heads(
        q=queries, k=k[batch, head][:, None].double(), v=v[batch, head][:, None].double(), g=grad, o=out,
        lse=None if lse is None else lse[..., None], at=at,
        mask=None if mask is None else mask.expand(*q.shape[:3], k.shape[-2]), causal=given.get("is_causal", False),
        scale=fp32(1 / math.sqrt(q.shape[-1]) if scale is None else scale), low=q.dtype if is_16_bit(q) else None,
    )  # fmt: skip


def _some(n: int, values: Values) -> slice:
    """Return which of n queries or keys are judged: all of a few."""
    return sampled(n, values.operation.index, SAMPLE) if n > MOST else ALL


def _length(part: slice, n: int) -> int:
    return len(range(n)[part])


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _twin(result: str, whole: Tensor, actual: Tensor, exact: Tensor, bound: Tensor) -> Twin:
    """Return the twin of a result, or of the part of it that is judged."""
    shape = whole.shape if actual.numel() == whole.numel() else actual.shape
    return Twin(result, actual.reshape(shape), exact.reshape(shape), bound.reshape(shape))


JUDGES = {
    "aten._scaled_dot_product_flash_attention_for_cpu": forward,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": backward,
}  # fmt: skip
