"""AdamW and SGD equal to PyTorch's CPU kernels to the last bit.

`optim/optimizer.py`, which trains, computes its formulas in plain FP32 and rounds each operation. PyTorch's CPU kernels fuse
some products with the sum that follows (FMA), and so round once where plain FP32 rounds twice. This module has the same
formulas with those fusions, for NumPy arrays. `ExactAdamW` and `ExactSGD` replace AdamW and SGD; `adamw_step` and `sgd_step`
have all of PyTorch's options. Equality is tested for up to 1000 steps against torch 2.13 on x86-64 with FMA, AVX2 or AVX512,
with one thread.

The tail rule: a fused kernel takes 8 elements at a time and the last numel % 8 elements of a *tensor* one by one, in code
where the compiler fused another pair of the same formula. The flat buffers here have no tensor boundaries, so the number of
such elements is an argument, `tail`. The blocks of `Optimizer` (`optim.layout.BLOCK` elements) are a multiple of 8, so only the
last can have a tail, and `ExactAdamW` applies the rule to the last size % 8 elements of its block. That is PyTorch's result for
one flat parameter, and for several if each but the last has a multiple of 8 elements. Elsewhere up to 7 elements per tensor
differ, in the last bits of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import format_of
from refimpl.optim.adamw import AdamW
from refimpl.optim.gradients import clip_coefficient
from refimpl.optim.sgd import SGD

Number = Any  # an fp32 array, or a Python float, which stands for the nearest fp32 number, as in PyTorch

LANES = 8  # fp32 numbers that PyTorch's kernels for norms and fused optimizers handle at once


def fma32(a: Number, b: Number, c: Number) -> Array:
    """Return a b + c rounded once to fp32, as a fused multiply-add instruction does, also for infinities, NaNs and subnormals.

        p = a b             exact: 24 + 24 bits of significand fit the 53 of fp64, and the exponents fit too
        s = p + c           rounded to fp64
        result = fp32(s)    a second rounding; it goes wrong only where s is a tie, halfway between two fp32 numbers,
                            and p + c is not: there s is moved off the tie, to the side that p + c lies on

    A tie has at most 25 significant bits. Where s has no more and the error of the sum is not 0, s moves to its neighbor
    on the error's side: rounding to odd, since the last bit of such an s is 0. All other s are left as they are.
    Errors: TypeError for a format other than fp32.
    Source: Boldo and Melquiond 2008, 'Emulation of FMA and correctly rounded sums', rounding to odd; Knuth, TwoSum, for
      the error; Veltkamp's splitting (Dekker 1971) for the 25 bits.
    """
    a, b, c = _double(a), _double(b), _double(c)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # Inf and NaN are results here
        p = a * b
        s = np.asarray(p + c)
        scaled = s * _SPLIT
        may_be_tie = scaled - (scaled - s) == s  # the left side is s rounded to 25 bits; Inf and NaN compare unequal
        if may_be_tie.any():
            error = _error_of_sum(s, p, c)
            move = may_be_tie & (error != 0)
            np.nextafter(s, np.copysign(np.inf, error), out=s, where=move)
    return cast(s, "fp32")


_SPLIT = 2.0**28 + 1  # 28 = 53 - 25


def _error_of_sum(s: Array, p: Array, c: Array) -> Array:
    """Return p + c - s exactly, for s = p + c rounded: Knuth's TwoSum."""
    t = s - p
    return (p - (s - t)) + (c - t)


def _double(x: Number) -> Array:
    """Widen an fp32 number to fp64. Errors: TypeError for another format."""
    if isinstance(x, float):
        x = _fp32(x)
    if format_of(x) != "fp32":
        raise TypeError(f"fma32 takes fp32, not {format_of(x)}")
    return widen(x, "fp64")


def _fp32(x: float) -> Array:
    """Return the fp32 number nearest to a Python float."""
    return cast(np.float64(x), "fp32")


def lerp32(x: Array, y: Array, weight: float) -> Array:
    """Return x + weight (y - x) with one FMA, starting from the nearer end. PyTorch: torch.lerp."""
    w = _fp32(weight)
    return fma32(w, y - x, x) if abs(w) < 0.5 else fma32(w - 1, y - x, y)


def adamw_step(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    lr: float,
    t: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decoupled: bool = True,
    vmax: Array | None = None,
    maximize: bool = False,
    tail: int = 0,
    sqrt: Callable[[Array], Array] = np.sqrt,
) -> None:
    """Make update number t (from 1) of the parameters p and the moments, in place; flat fp32 arrays of one length.

    decoupled: AdamW's decay, p (1 - lr wd); otherwise Adam's, g + wd p. vmax: the largest v so far, for amsgrad.
    tail: how many of the last elements follow the tail rule: numel % 8 for a whole tensor under `fused=True`, else 0.
    sqrt: correctly rounded in the fused kernel. The others call torch.sqrt, which on a CPU may be 1 ulp off; pass that
      function for their bits.
    PyTorch: torch.optim.AdamW and torch.optim.Adam (`fused=True`; foreach and single-tensor with their own sqrt).
    """
    rule = AdamW(betas, eps, weight_decay)
    decay, step_size, root_correction = map(_fp32, rule.scalars(lr, t))
    if maximize:
        g = -g
    if weight_decay and decoupled:
        p *= decay
    coupled = 0.0 if decoupled else weight_decay
    for pieces, rest in _pieces(tail, p, g, m, v, vmax):
        _adam_update(rule, pieces, rest, step_size, root_correction, coupled, sqrt)


def _adam_update(
    rule: AdamW,
    arrays: Sequence[Array],
    tail: slice,
    step_size: Array,
    root_correction: Array,
    coupled: float = 0.0,
    sqrt: Callable[[Array], Array] = np.sqrt,
) -> None:
    """Make Adam's update after a decoupled decay. arrays: p, g, m, v and vmax or None. The update of p itself has no FMA."""
    (p, g, m, v, vmax), (beta1, beta2) = arrays, rule.betas
    if coupled:
        g = fma32(coupled, p, g)
    m[...] = lerp32(m, g, 1 - beta1)
    scaled = g * _fp32(1 - beta2)
    last = fma32(v[tail], beta2, scaled[tail] * g[tail])
    v[...] = fma32(scaled, g, v * _fp32(beta2))
    v[tail] = last
    if vmax is not None:
        v = np.maximum(vmax, v, out=vmax)
    p -= (m * step_size) / (sqrt(v) / root_correction + _fp32(rule.eps))


def sgd_step(
    p: Array,
    g: Array,
    buf: Array | None = None,
    *,
    lr: float,
    first: bool,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    tail: int = 0,
) -> None:
    """Update the parameters p and the momentum buffer once, in place; flat fp32 arrays of one length.

        g = g + wd p;   buf = g at the first update, then momentum buf + (1 - dampening) g
        g = g + momentum buf with Nesterov's momentum, else buf;   p = p - lr g

    weight_decay: coupled, as in PyTorch. buf: None where momentum is 0.
    tail: as for `adamw_step`. Only `fused=True` has one; foreach and single-tensor kernels treat all elements alike.
    PyTorch: torch.optim.SGD.
    """
    for (w, d, moment), rest in _pieces(tail, p, g, buf):
        d = -d if maximize else d
        if weight_decay:
            d = fma32(weight_decay, w, d)
        if moment is not None and first:
            moment[...] = d
        elif moment is not None:
            last = fma32(moment[rest], momentum, d[rest] * _fp32(1 - dampening))
            moment[...] = fma32(1 - dampening, d, moment * _fp32(momentum))
            moment[rest] = last
        if moment is not None:
            d = fma32(momentum, moment, d) if nesterov else moment
        w[...] = fma32(-lr, d, w)


PIECE = 8192  # elements; the fp64 temporaries of fma32 then stay in the cache: four times as fast as 100,000, measured


def _pieces(tail: int, *arrays: Array) -> Iterator[tuple[list[Array], slice]]:
    """Yield PIECE elements of each array (views; None stays None), and which of them belong to the last `tail` elements."""
    size = arrays[0].size
    if any(x is not None and x.shape != (size,) for x in arrays):
        raise ValueError(f"expected flat arrays of one length, not {[np.shape(x) for x in arrays if x is not None]}")
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        rest = slice(min(max(size - tail - start, 0), stop - start), stop - start)
        yield [x if x is None else x[start:stop] for x in arrays], rest


@dataclass(frozen=True)
class ExactAdamW(AdamW):
    """AdamW with the bits of torch.optim.AdamW(fused=True), in fp32; for tails see the docstring of this module."""

    def update_block(self, w: Array, g: Array, moments: Sequence[Array], scalars: Array, xp: Any) -> None:
        for pieces, rest in _pieces(w.size % LANES, w, g, *moments, None):
            _adam_update(self, pieces, rest, scalars[1], scalars[2])


@dataclass(frozen=True)
class ExactSGD(SGD):
    """SGD with the bits of torch.optim.SGD (foreach or not, but not fused) with weight_decay=0, in fp32.

    Its own weight decay is decoupled, as in `SGD`; that of `sgd_step` is coupled.
    """

    dampening: float = 0.0
    nesterov: bool = False

    def scalars(self, lr: float, t: int) -> tuple[float, ...]:
        return *super().scalars(lr, t), float(t == 1)

    def update_block(self, w: Array, g: Array, moments: Sequence[Array], scalars: Array, xp: Any) -> None:
        buf = moments[0] if moments else None
        lr, first = float(scalars[1]), bool(scalars[2])
        sgd_step(w, g, buf, lr=lr, first=first, momentum=self.momentum, dampening=self.dampening, nesterov=self.nesterov)


def norm_like_torch(x: Array) -> Array:
    """Return the L2 norm of an fp32 array in PyTorch's order, 0-d: 8 running sums, added up, then the elements left over.

    Each lane is a running sum of n/8 squares, so the relative error can reach (n/8 + 10) 2^-25. The norm of
    `optim/gradients.py`, with partial sums over blocks, is more accurate. PyTorch: torch.linalg.vector_norm, one thread.
    """
    x = x.reshape(-1)
    whole, quads = x.size - x.size % LANES, x.size - x.size % 4
    if x.size == 1:  # PyTorch does not square a single number, which may overflow or vanish
        return abs(x[0])
    with np.errstate(over="ignore", under="ignore"):
        squares = x[:quads] * x[:quads]
        total = _fp32(0.0)
        if whole:
            lanes = np.add.accumulate(squares[:whole].reshape(-1, LANES))[-1]  # accumulate adds in order, by definition
            total = np.add.accumulate(lanes)[-1]
        for square in squares[whole:]:
            total = total + square
        for value in x[quads:]:
            total = fma32(value, value, total)
        return np.sqrt(total)


def clip_coefficient_like_torch(norms: Sequence[Array], max_norm: float) -> Array:
    """Return min(1, max_norm / (total + 1e-6)) from the norms of the parameters' gradients, in their order.

    The formula is `gradients.clip_coefficient`; the total is the norm of the tensors' norms.
    PyTorch: torch.nn.utils.clip_grad_norm_.
    """
    return clip_coefficient(norm_like_torch(np.array(norms)), max_norm)
