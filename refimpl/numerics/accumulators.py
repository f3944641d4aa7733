"""Matrix products with the accumulators that hardware has: not only FP32.

An accumulator is named by how a partial sum is kept, and, after a slash, by how many products it takes before it is added
to an outer sum (in FP32, unless a third part says otherwise):

    fp32             the BLAS's sums, in its order: the reference
    fp16, bf16       every sum is rounded to the format, to nearest even
    e8m13            every sum is cut to 13 fraction bits, 14 bits with the leading one, as an adder of that width does
    e8m13/128        the same, promoted to FP32 every 128 products: DeepSeek-V3
    fp16/64/fp16     sums of 64 products, and the sum of those, in FP16: chunk-based accumulation

A cut goes towards zero and loses half an ulp on average, each time. While the sum is in [2^k, 2^(k+1)), the ulp is 2^(k-f)
for f fraction bits, and with products of one sign and of mean mu there are 2^k / mu additions. All binades together:

    loss / sum = K 2^-f / 6         8.3 % for K = 4096 and f = 13, half of it for 14, a quarter for 15

and with promotion every N, N takes the place of K. (Less in FP8: its products end before the ulp while sums are small.)

Source: DeepSeek-V3 2024, arXiv 2412.19437, sections 3.3.2 and 3.5.2: 'around 14 bits' on the tensor cores of an H800, an error
of 'nearly 2 %' for K = 4096, promotion every 128. By the formula that error is f = 15's: the width is not settled, give any.
Wang et al. 2018, arXiv 1812.08011: FP16 accumulation in chunks of 64.
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
"""Sums that are formed at a time: few enough for a cache, since each is read and written once for every product."""


@dataclass(frozen=True)
class Accumulator:
    """How partial sums are kept (`inner`), for how many products (`every`, 0 for all), and how their sums are (`outer`)."""

    inner: str
    every: int = 0
    outer: str = "fp32"


def accumulator(spec: str) -> Accumulator:
    """'e8m13/128' -> Accumulator('e8m13', 128, 'fp32'). Errors: ValueError for a name that the table above does not have."""
    parts = re.fullmatch(r"(\w+)(?:/([1-9]\d*)(?:/(\w+))?)?", spec, re.ASCII)
    inner, every, outer = parts.groups() if parts else ("", None, None)
    kind = Accumulator(inner, int(every or 0), outer or "fp32")
    if fraction_bits_kept(kind.inner) is None or fraction_bits_kept(kind.outer) is None:
        raise ValueError(f"accumulator {spec!r}: it is fp32, fp16, bf16, tf32 or e8mN, then perhaps /N, then perhaps /outer")
    return kind


def fraction_bits_kept(name: str) -> int | None:
    """Fraction bits of a partial sum: 13 for e8m13, 10 for fp16; None for a name that is not an accumulator's."""
    if name in ("fp32", "fp16", "bf16", "tf32"):
        return FORMATS[name].fraction_bits
    cut = re.fullmatch("e8m([0-9]+)", name)
    return int(cut[1]) if cut and 1 <= int(cut[1]) <= FORMATS["fp32"].fraction_bits else None


def matmul(a: Array, b: Array, acc: str = "fp32", multiply: Callable[[Array, Array], Array] = np.matmul) -> Array:
    """a (..., M, K) @ b (..., K, N) -> fp32 (..., M, N), summed in the accumulator `acc`.

    a, b: formats that fp32 holds, their leading axes equal. Products of two values of 11 significant bits or fewer (fp16,
    bf16, e4m3, ...) are exact in fp32; a sum is formed in fp32 and then rounded, or cut, to the accumulator. In the order of k.
    multiply: what computes the products whose sums are FP32's: the BLAS, or a backend's gemm.

    Errors: ValueError for an unknown accumulator, or shapes that do not match.
    PyTorch: torch.matmul, for 'fp32'; torch.backends.cuda.matmul.allow_fp16_accumulation is something like 'fp16'.
    Differs from the source: how the tensor cores of an H800 add is not published. DeepSeek-V3 3.5.2 says that 32 products are
      shifted to the largest exponent among them, cut to 14 bits and added at once; here they are added one by one, each time
      cut, which differs only where the sum changes its exponent within the 32 or its sign is not theirs.
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
    """a @ b with all partial sums kept in `inner`, in pieces of rows that fit a cache."""
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
    """Round or cut fp32 sums in place to what the accumulator keeps of them; infinities and NaN stay."""
    if name == "fp32":
        return
    if name in FORMATS:
        widen(cast(sums, name), "fp32", out=sums)
        return
    kept = fraction_bits_kept(name)
    assert kept is not None
    dropped = FORMATS["fp32"].fraction_bits - kept
    bits_of(sums)[...] &= np.uint32(0xFFFFFFFF >> dropped << dropped)
