"""The product of two quantized matrices, as tensor cores compute it: codes are multiplied, sums are scaled.

    y_mn = sum over blocks B of K:  a's scale * b's scale * (sum of the products of codes, k in B)

The inner sum is formed in the chosen accumulator, the outer in FP32. So FP32 scales promote at the end of each block: with
DeepSeek-V3's 1x128 tiles, every 128 products.

MX and NVFP4 differ: there the tensor core multiplies by the block scales, exactly (a scale is a power of two, or has 4
significant bits), and the accumulator runs on over the blocks. So here their scales are multiplied into the operand. NVFP4's
tensor scales multiply the result.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2; OCP MX v1.0, section 6.2 (the dot product of two blocks).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.numerics.accumulators import matmul
from refimpl.numerics.arrays import Array
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, spread


def product(
    a: QuantizedTensor, b: QuantizedTensor, acc: str = "fp32", multiply: Callable[[Array, Array], Array] = np.matmul
) -> Array:
    """Multiply a (M, K) and b (K, N) -> fp32 (M, N), both quantized along K.

    acc: an accumulator of accumulators.py; with FP32 scales it is emptied at the end of each block. multiply: as there.
    y = x w^T with w (F, C) quantized along C is product(x, w.T).
    Errors: ValueError for operands that are not matrices or do not match; that are quantized along the other axis, with one
      scale for each k; or whose blocks do not divide each other.
    PyTorch: torch._scaled_mm.
    Differs from the source: each block's sum is multiplied by one scale, then by the other, and added. DeepGEMM multiplies the
      scales first, and adds with an FMA, which rounds once less.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"product: the shapes {a.shape} and {b.shape} do not match")
    K = a.shape[1]
    for name, length in (("a", a.block[1]), ("b", b.block[0])):
        if length == 1 < K:
            raise ValueError(f"product: {name} was quantized along the axis that is not summed over: quantize it along K")
    (x, x_scales, x_step), (w, w_scales, w_step) = _operand(a, K, 1), _operand(b, K, 0)
    small, large = sorted((x_step, w_step))
    if large < K and large % small:
        raise ValueError(f"product: blocks of {x_step} and of {w_step} along K do not fit each other")
    result = np.zeros((a.shape[0], b.shape[1]), np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, K, small):
            part = slice(start, start + small)
            sums = matmul(x[:, part], w[part], acc, multiply)
            sums *= x_scales[:, start // x_step, None]
            sums *= w_scales[start // w_step]
            result += sums
        for q in (a, b):
            if q.tensor_scale is not None:
                result *= q.tensor_scale
    return result


def _operand(q: QuantizedTensor, K: int, axis: int) -> tuple[Array, Array, int]:
    """Return the factor, (M, K) or (K, N) in fp32; its scales, one per row (column) and block of K; and the length of a block.

    axis: the axis of K.
    """
    if q.scale_fmt != "fp32":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scaled = q.elements() * spread(q.scale_values(), q.block, q.shape)
        return scaled, np.ones((1, 1), np.float32), max(1, K)
    other = list(q.block)
    other[axis] = 1  # one scale per row, but still per block of K
    blocks = [-(-n // size) for n, size in zip(q.shape, q.block, strict=True)]
    blocks[1 - axis] = q.shape[1 - axis]
    return q.elements(), spread(q.scales, tuple(other), tuple(blocks)), q.block[axis]
