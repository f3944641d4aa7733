"""Matrix products with the accumulators of real hardware, not only FP32.

An accumulator is named by the format of its partial sums. After a slash may come the number of products that it sums before
they are added to an outer sum, and after another slash the format of the outer sum (FP32 if not given):

    fp32             the sums of the BLAS, in its order
    fp16, bf16       every sum is rounded to the format, to nearest even
    e8m13            every sum is truncated to 13 fraction bits, as in an adder of 14 bits
    e8m13/128        the same, promoted to FP32 every 128 products: DeepSeek-V3
    fp16/64/fp16     sums of 64 products, and the sum of those sums, in FP16: chunk-based accumulation

Truncation goes towards zero and loses half an ulp on average. While the sum is in [2^k, 2^(k+1)) the ulp is 2^(k-f) for f
fraction bits, and products of one sign with mean mu need 2^k / mu additions to leave that range. Over all ranges:

    loss / sum = K 2^-f / 6         8.3 % for K = 4096 and f = 13, half of that for 14, a quarter for 15

With promotion every N products, N takes the place of K. (FP8 loses less: while sums are small, its products have no bits below
the ulp.)

Source: DeepSeek-V3 2024, arXiv 2412.19437, sections 3.3.2 and 3.5.2: 'around 14 bits' on the tensor cores of an H800, an error
of 'nearly 2 %' for K = 4096, promotion every 128. By the formula that error means f = 15: the width is not settled, and can be
chosen here. Wang et al. 2018, arXiv 1812.08011: FP16 accumulation in chunks of 64.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS

_SUMS = 1 << 17
"""Sums formed at a time: few enough to fit a cache, since each is read and written once per product."""


@dataclass(frozen=True)
class Accumulator:
    """The format of partial sums (`inner`), how many products each takes (`every`, 0 for all), the format of the outer sum."""

    inner: str
    every: int = 0
    outer: str = "fp32"


def accumulator(spec: str) -> Accumulator:
    """Parse a name: 'e8m13/128' -> Accumulator('e8m13', 128, 'fp32'). Errors: ValueError for another name."""
    parts = re.fullmatch(r"(\w+)(?:/([1-9]\d*)(?:/(\w+))?)?", spec, re.ASCII)
    inner, every, outer = parts.groups() if parts else ("", None, None)
    kind = Accumulator(inner, int(every or 0), outer or "fp32")
    if fraction_bits_kept(kind.inner) is None or fraction_bits_kept(kind.outer) is None:
        raise ValueError(f"accumulator {spec!r}: it must be fp32, fp16, bf16, tf32 or e8mN, with an optional /N and /outer")
    return kind


def fraction_bits_kept(name: str) -> int | None:
    """Return the fraction bits of a partial sum: 13 for e8m13, 10 for fp16; None for a name that is not an accumulator's."""
    if name in ("fp32", "fp16", "bf16", "tf32"):
        return FORMATS[name].fraction_bits
    cut = re.fullmatch("e8m([0-9]+)", name)
    return int(cut[1]) if cut and 1 <= int(cut[1]) <= FORMATS["fp32"].fraction_bits else None


def matmul(a: Array, b: Array, acc: str = "fp32", multiply: Callable[[Array, Array], Array] = np.matmul) -> Array:
    """Multiply a (..., M, K) and b (..., K, N) -> fp32 (..., M, N), summed in the accumulator `acc`, in the order of k.

    a, b: formats that fp32 holds, with equal leading axes. A product of two values of at most 11 significant bits (fp16, bf16,
    e4m3, ...) is exact in fp32; each sum is formed in fp32 and then rounded, or truncated, to the accumulator.
    multiply: what computes the products for 'fp32': the BLAS, or a backend's matmul, in its own order.

    Errors: ValueError for an unknown accumulator, or shapes that do not match.
    PyTorch: torch.matmul, for 'fp32'; torch.backends.cuda.matmul.allow_fp16_accumulation is similar to 'fp16'.
    Differs from the source: how the tensor cores of an H800 add is not published. DeepSeek-V3 3.5.2 says that 32 products are
      aligned to the largest exponent among them, truncated to 14 bits and added at once. Here they are added one by one, and
      truncated each time, which differs where the sum changes its exponent within the 32 or they have different signs.
    """
    kind = accumulator(acc)
    a, b = widen(a, "fp32"), widen(b, "fp32")
    K = a.shape[-1]
    if a.shape[:-2] != b.shape[:-2] or b.shape[-2] != K:
        raise ValueError(f"matmul: the shapes {a.shape} and {b.shape} do not match")
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is a result here, not a warning
        if not kind.every:
            return _sum_products(a, b, kind.inner, multiply)
        total = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
        for start in range(0, K, kind.every):
            part = slice(start, start + kind.every)
            total += _sum_products(a[..., part], b[..., part, :], kind.inner, multiply)
            _keep(total, kind.outer)
    return total


def _sum_products(a: Array, b: Array, inner: str, multiply: Callable[[Array, Array], Array]) -> Array:
    """Return a @ b with all partial sums kept in `inner`, computed in pieces of rows that fit a cache."""
    if inner == "fp32":
        return multiply(a, b)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    product = np.empty_like(total)
    if not total.size:
        return total
    rows = max(1, _SUMS * total.shape[-2] // total.size)
    for start in range(0, total.shape[-2], rows):
        piece = np.s_[..., start : start + rows, :]
        sums, term = total[piece], product[piece]
        for k in range(a.shape[-1]):
            np.multiply(a[piece][..., k, None], b[..., k, None, :], out=term)
            sums += term
            _keep(sums, inner)
    return total


def _keep(sums: Array, name: str) -> None:
    """Round or truncate fp32 sums in place to the format `name`; infinities and NaN do not change."""
    if name == "fp32":
        return
    if name in FORMATS:
        widen(cast(sums, name), "fp32", out=sums)
        return
    kept = fraction_bits_kept(name)
    assert kept is not None
    dropped = FORMATS["fp32"].fraction_bits - kept
    bits_of(sums)[...] &= np.uint32(0xFFFFFFFF >> dropped << dropped)
