"""The product of two quantized matrices, as tensor cores compute it: codes are multiplied, sums are scaled.

    y_mn = sum over blocks B of K:  a's scale * b's scale * (sum of the products of codes, k in B)

The inner sum runs in the accumulator that is asked for, the outer in FP32, so a block is where an FP32 scale promotes: with
DeepSeek-V3's 1x128 tiles every 128 products.

MX and NVFP4 differ: the tensor core itself multiplies by the block scales, whose products with the codes are exact (a power
of two, or 4 significant bits times 2), and the accumulator runs on over the blocks. So here such a scale goes into the
operand. NVFP4's tensor scales multiply the result.

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
    """a (M, K) @ b (K, N) -> fp32 (M, N), both quantized along K.

    acc: an accumulator of accumulate.py. With FP32 scales it is emptied at each block's end. multiply: as there.
    y = x w^T, w (F, C) quantized along C:  product(x, w.T).
    Errors: ValueError for operands that are no matrices or do not match, that have one scale for each k (quantized along the
      other axis), or blocks of which the smaller does not divide the larger.
    PyTorch: torch._scaled_mm.
    Differs from the source: each block sum is multiplied by one scale, then by the other; DeepGEMM multiplies the scales first,
      and adds with one rounding (an FMA) where here are two.
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
    """What is multiplied, (M, K) or (K, N) in fp32; the scales of its sums, one for each row (or column) and block; its block.

    axis: that of K.
    """
    if q.scale_fmt != "fp32":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scaled = q.elements() * spread(q.scale_values(), q.block, q.shape)
        return scaled, np.ones((1, 1), np.float32), max(1, K)
    other = list(q.block)
    other[axis] = 1  # spread over the rows, not over K
    blocks = [-(-n // size) for n, size in zip(q.shape, q.block, strict=True)]
    blocks[1 - axis] = q.shape[1 - axis]
    return q.elements(), spread(q.scales, tuple(other), tuple(blocks)), q.block[axis]
