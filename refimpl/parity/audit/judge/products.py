"""Matrix products and convolutions: products of K terms summed in FP32, in any order. u = 2^-24.

Bound: gamma(K + 2) (|A| |B| + |bias|): one rounding for each of K products and K sums, which may start from the bias, and one
to spare; and K 2^-126, since kernels for 16 bits may flush subnormal products to 0.
Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.5.

In practice the roundings are independent. A partial sum is about as large as the root of the sum of squared terms, or as the
result where terms have one sign, and there are K roundings: sqrt(K) u of both together is the typical error.

A tensor core adds its chunks with truncation, which gamma(2 K) covers: 2 K instead of K on CUDA (not yet run on a GPU).

Large products are judged on sampled rows and columns. Which ones depends on the operation's place in the step, not on random
numbers, so another step sees others; each element that is judged is judged in full, over all K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, gamma, is_16_bit
from refimpl.parity.audit.judge.roundings import smallest, unit
from refimpl.parity.audit.values import CannotJudge, Twin, Values

SCATTERED = "the CPU kernel adds the contributions of a kernel's elements in the tensor's format"
PER_IMAGE = "the CPU kernel adds the images' contributions in the tensor's format"
FACTORS = "the CPU kernel rounds alpha, beta and their products to the tensor's format"
SAMPLE = 48
"""Rows, and columns, of a large product that are judged."""
SMALL = 2**18
"""A product of at most this many multiplications is judged whole."""


def sampled(n: int, offset: int, count: int = SAMPLE) -> slice:
    """Return every k-th of n indices, about `count` of them, from an offset below k."""
    stride = max(1, n // count)
    return slice(offset % stride, None, stride)


def product(
    values: Values, a: Tensor, b: Tensor, bias: Tensor | None = None, alpha: float = 1, beta: float = 1,
    more: float = 0.0, note: str = "",
) -> Iterator[Twin]:
    """Yield the twin of beta bias + alpha a b, for matrices (m, K) (K, n) or batches of them in front.

    more, note: what a kernel is known to add to the relative error of every term, and why. Where K = 0 the CPU multiplies by
    beta in the tensor's format, to which it rounds beta first: two more roundings.
    """
    name, actual = next(iter(values.results()))
    if actual.dtype == torch.float64:
        raise CannotJudge("in FP64 already")
    m, K, n = a.shape[-2], a.shape[-1], b.shape[-1]
    bias = None if bias is None or beta == 0 else bias.expand(actual.shape)
    if actual.numel() * K > SMALL:
        at = values.operation.index
        batches = sampled(a.shape[0], at, max(1, 2 * SMALL // (SAMPLE * SAMPLE * K))) if a.dim() == 3 else slice(None)
        rows, columns = sampled(m, at), sampled(n, at)
        whole = a.dim() == 3
        pick = (batches, rows, columns) if whole else (rows, columns)
        a = a[batches, rows] if whole else a[rows]
        b = b[batches, :, columns] if whole else b[:, columns]
        actual = actual[pick]
        bias = bias[pick] if bias is not None else None
    if K == 0 and is_16_bit(actual) and not actual.is_cuda:
        more, note = 2 * unit(actual.dtype), FACTORS
    wide_a, wide_b = a.double(), b.double()
    exact = wide_a @ wide_b
    size = wide_a.abs() @ wide_b.abs()
    root = (wide_a.square_() @ wide_b.square_()).sqrt_()
    # Terms of one sign make a result larger than the root of K terms; its own roundings count then.
    terms = torch.maximum(abs(alpha) * size / math.sqrt(max(K, 1)), exact.abs())
    error = gamma((2 * K if actual.is_cuda else K) + 2)
    bound = size.mul_(abs(alpha) * (error + more)).add_(K * 2.0**-126 + (K + 1) * (smallest(actual.dtype) if more else 0.0))
    if alpha != 1:
        exact.mul_(alpha)
    root.mul_(abs(alpha)).add_(exact.abs())
    if bias is not None:
        added = bias.double() * beta
        exact.add_(added)
        bound.add_(added.abs_(), alpha=error + more)
        root.add_(added)
        terms = terms + added
    typical = root.mul_(U * math.sqrt(max(K, 1))).add_(K * 2.0**-126)
    yield Twin(name, actual, exact, bound, typical, products=terms, note=note)


def matrix(values: Values) -> Iterator[Twin]:
    """Judge mm and bmm."""
    given = values.inputs
    yield from product(values, given["self"], given["mat2"])


def matrix_and_bias(values: Values) -> Iterator[Twin]:
    """Judge addmm and baddbmm: beta self + alpha A B."""
    given = values.inputs
    a, b = (given["mat1"], given["mat2"]) if "mat1" in given else (given["batch1"], given["batch2"])
    yield from product(values, a, b, given["self"], given.get("alpha", 1), given.get("beta", 1))


def vector(values: Values) -> Iterator[Twin]:
    """Judge mv, dot and addmv, as products of one row or column.

    In 16 bits the CPU's addmv rounds alpha, beta, their products and the sum to the tensor's format, and where the matrix's
    columns are contiguous the sum after each of the K terms too: 4 roundings of all terms, or K + 3.
    """
    given = values.inputs
    name, actual = next(iter(values.results()))
    a = given["self"] if "mat" not in given else given["mat"]
    b = next(given[key] for key in ("vec", "tensor", "other") if key in given)
    bias = given["self"][..., None] if "mat" in given else None
    one = Values(values.operation, values.names, values.args, values.kwargs, actual.reshape(-1, 1), {})
    a = a if a.dim() == 2 else a[None]
    more, note = 0.0, ""
    if bias is not None and is_16_bit(actual) and not actual.is_cuda:
        more, note = (a.shape[1] + 3 if a.stride(0) == 1 else 4) * unit(actual.dtype), FACTORS
    for twin in product(one, a, b[:, None], bias, given.get("alpha", 1), given.get("beta", 1), more, note):
        shape = actual.shape if twin.actual.numel() == actual.numel() else twin.actual.shape
        exact, bound, typical = (torch.as_tensor(x).reshape(shape) for x in (twin.exact, twin.bound, twin.typical))
        yield twin._replace(result=name, actual=twin.actual.reshape(shape), exact=exact, bound=bound, typical=typical)


# ------------------------------------------------------------------------------------------------- convolution


def convolution(values: Values) -> Iterator[Twin]:
    """Judge convolution and its forms: K = channels of a group times the elements of the kernel."""
    given = values.inputs
    x, w, bias = given["input"], given["weight"], given.get("bias")
    rest = _geometry(given)
    transposed, groups = rest[3], rest[5]
    K = math.prod(w.shape[2:]) * (w.shape[1] if not transposed else w.shape[0] // groups)
    name, actual = next(iter(values.results()))
    images = slice(None)
    if actual.numel() * K > SMALL and x.dim() == w.dim():
        images = sampled(x.shape[0], values.operation.index, max(1, 8 * SMALL // max(1, actual[0].numel() * K)))
    x, actual = x[images].double(), actual[images]
    wide = w.double()
    added = bias.double() if bias is not None else None
    exact = torch.ops.aten.convolution(x, wide, added, *rest)
    size = torch.ops.aten.convolution(x.abs(), wide.abs(), None, *rest)
    root = torch.ops.aten.convolution(x.square(), wide.square(), None, *rest).clamp_(min=0).sqrt_()
    if added is not None:
        size += added.abs().reshape(-1, *(1,) * (w.dim() - 2))
    bound = gamma((2 * K if actual.is_cuda else K) + 2) * size + K * 2.0**-126
    if transposed and is_16_bit(actual) and not actual.is_cuda:
        bound += math.prod(w.shape[2:]) * torch.finfo(actual.dtype).eps / 2 * size
        yield Twin(name, actual, exact, bound, note=SCATTERED)
        return
    typical = U * math.sqrt(K) * (root + exact.abs())
    yield Twin(name, actual, exact, bound, typical, products=torch.maximum(size / math.sqrt(K), exact.abs()))


def convolution_gradients(values: Values) -> Iterator[Twin]:
    """Judge convolution_backward: sums over the outputs that an input reached, and over images and places.

    In 16 bits the CPU adds parts of them in the tensor's format, those of the bias where the convolution is dilated.
    """
    given = values.inputs
    gradient, x, w = given["grad_output"], given["input"], given["weight"]
    rest, groups, mask = _geometry(given), _geometry(given)[5], given["output_mask"]
    sizes = given["bias_sizes"]
    places, dilated = gradient.numel() // gradient.shape[1], any(step != 1 for step in given["dilation"])
    kernel = math.prod(w.shape[2:])
    terms = (kernel * gradient.shape[1] // groups, places, places)

    def in_fp64(change: Any) -> Any:
        wide = (change(t.double()) for t in (gradient, x, w))
        return torch.ops.aten.convolution_backward(*wide, sizes, *rest, mask)

    exact, size, squares = in_fp64(lambda t: t), in_fp64(Tensor.abs), in_fp64(Tensor.square)
    for i, (actual, K) in enumerate(zip(values.output, terms, strict=True)):
        if mask[i]:
            factor = 2 * K if actual.is_cuda else K
            bound = gamma(factor + 2) * size[i] + K * 2.0**-126
            if is_16_bit(actual) and not actual.is_cuda and (i < 2 or dilated):
                adds = kernel if i == 0 else x.shape[0]
                bound += (adds + 1) * (unit(actual.dtype) * size[i] + smallest(actual.dtype) / 2)
                yield Twin(f"out.{i}", actual, exact[i], bound, note=SCATTERED if i == 0 else PER_IMAGE)
                continue
            root = squares[i].clamp(min=0).sqrt() if i < 2 else size[i]
            typical = U * math.sqrt(K) * (root + exact[i].abs())
            products = torch.maximum(size[i] / math.sqrt(K), exact[i].abs()) if i < 2 else None
            yield Twin(f"out.{i}", actual, exact[i], bound, typical, products=products)


def _geometry(given: dict[str, Any]) -> tuple[Any, ...]:
    return (
        given["stride"], given["padding"], given["dilation"], given.get("transposed", False),
        given.get("output_padding", [0] * (given["weight"].dim() - 2)), given["groups"],
    )  # fmt: skip


JUDGES = {
    **dict.fromkeys(("aten.mm", "aten.bmm"), matrix),
    **dict.fromkeys(("aten.addmm", "aten.baddbmm", "aten.addmm_", "aten.baddbmm_"), matrix_and_bias),
    **dict.fromkeys(("aten.mv", "aten.dot", "aten.vdot", "aten.addmv", "aten.addmv_"), vector),
    **dict.fromkeys(("aten.convolution", "aten._convolution"), convolution),
    "aten.convolution_backward": convolution_gradients,
}
