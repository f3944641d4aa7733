"""FP8, MX and NVFP4: tensors as codes with scales, and the products of such tensors.

    quantized_tensor.py   QuantizedTensor: codes, and one scale for each block of them
    fp8.py                FP32 scales: per tensor (current, delayed), per row, DeepSeek-V3's 1x128 and 128x128
    mx.py                 blocks of 32 with a power of two as scale
    nvfp4.py              blocks of 16 with an FP8 scale, and an FP32 scale for the tensor
    rotation.py           the Hadamard rotation that spreads outliers before NVFP4
    products.py           the product of two quantized matrices
    registry.py           all schemes by the names that policies use
    scaling_state.py      what schemes remember during a run

A matrix product needs both operands quantized along the axis that it sums over, each from its unquantized source: y = x w^T
takes x and w along C, dx = dy w takes dy and w along F, dw = dy^T x takes dy and x along the tokens. So each tensor is
quantized twice, and a quantized tensor is never transposed to be summed over its other axis.
"""

from refimpl.numerics.quantization.fp8 import (
    DelayedScaling,
    quantize_blocks,
    quantize_rows,
    quantize_tensor,
    quantize_tiles,
    scale_from_amax,
)
from refimpl.numerics.quantization.mx import SCALE_RULES, quantize_mx
from refimpl.numerics.quantization.nvfp4 import quantize_nvfp4
from refimpl.numerics.quantization.products import product
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, block_amax, encode, spread
from refimpl.numerics.quantization.registry import SCHEMES
from refimpl.numerics.quantization.rotation import hadamard, random_signs, rotate, rotate_back
from refimpl.numerics.quantization.scaling_state import ScalingState

__all__ = [
    "SCALE_RULES",
    "SCHEMES",
    "DelayedScaling",
    "QuantizedTensor",
    "ScalingState",
    "block_amax",
    "encode",
    "hadamard",
    "product",
    "quantize_blocks",
    "quantize_mx",
    "quantize_nvfp4",
    "quantize_rows",
    "quantize_tensor",
    "quantize_tiles",
    "random_signs",
    "rotate",
    "rotate_back",
    "scale_from_amax",
    "spread",
]
