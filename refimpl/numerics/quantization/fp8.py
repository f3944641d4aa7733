"""FP8 with FP32 scales: per tensor (current or delayed), per row, and DeepSeek-V3's tiles and blocks.

The scale that is kept is the one that decodes, value = element * scale. What a source calls its scale, amax -> max, is
the factor that encodes; here `factor`. Both are FP32, scale = 1 / factor, each rounded.

    factor = max / amax      max = 448 (e4m3) or 57344 (e5m2)

NaN and infinities: a block that holds one has the factor 1; its NaN stays NaN, its infinity becomes what `overflow` says:

    saturate   the largest value: Transformer Engine, and PyTorch's cast to e4m3 since 2.13
    inf        an infinity in e5m2, NaN in e4m3: ml_dtypes, and PyTorch's cast to e5m2

Finite values overflow only under delayed scaling: the rounding of a current factor is less than the cast rounds off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bits_of, from_bits
from refimpl.numerics.casts import widen
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization.quantized_tensor import QuantizedTensor, along, block_amax, constant, encode


def scale_from_amax(amax: Array, fmt: str, power_of_two: bool = False, floor: float = 0.0) -> Array:
    """The factor that takes the largest magnitude of a block to the largest value of `fmt`: fp32 -> fp32, of one shape.

        factor = max / max(amax, floor);   1 where amax is 0, infinite or NaN;   fp32's largest where it would be infinite

    power_of_two: the next power of two at or below it, so that scaling rounds nothing.
    floor: below it amax is taken for it, so that noise is not blown up to full range; DeepSeek-V3's kernels have 1e-4.
    Source: NVIDIA Transformer Engine, recipe_common.cuh, compute_scale_from_amax.
    """
    amax = np.where(amax < floor, constant(floor), amax)
    usable = np.isfinite(amax) & (amax > 0)
    with np.errstate(over="ignore"):
        factor = constant(FORMATS[fmt].max) / np.where(usable, amax, constant(1.0))
    factor = np.where(usable, np.minimum(factor, constant(FORMATS["fp32"].max)), constant(1.0))
    return _clear_fraction(factor) if power_of_two else factor


def quantize_tensor(
    x: Array, fmt: str, *, power_of_two: bool = False, overflow: str = "saturate", bits: Array | None = None
) -> QuantizedTensor:
    """One scale for the whole tensor, from its own largest magnitude: current scaling.

    Source: Micikevicius et al. 2022, arXiv 2209.05433; Transformer Engine, Float8CurrentScaling.
    """
    return _quantize(x, fmt, tuple(max(1, n) for n in x.shape), power_of_two, 0.0, overflow, bits)


def quantize_rows(
    x: Array, fmt: str, axis: int = -1, *, power_of_two: bool = True, overflow: str = "saturate", bits: Array | None = None
) -> QuantizedTensor:
    """One scale for each vector along `axis`, the axis that the product sums over: a token of x, a row of w.

    Source: torchao, float8 'rowwise' (power-of-two scales, rounded down).
    """
    return _quantize(x, fmt, along(axis, x.shape[axis], x.shape), power_of_two, 0.0, overflow, bits)


def quantize_tiles(
    x: Array, fmt: str, axis: int = -1, size: int = 128, *, power_of_two: bool = False, floor: float = 0.0,
    overflow: str = "saturate", bits: Array | None = None,
) -> QuantizedTensor:  # fmt: skip
    """One scale for each 128 elements along `axis`, the axis that the product sums over: activations and their gradients.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (1x128). Transformer Engine's Float8BlockScaling has powers of two.
    """
    return _quantize(x, fmt, along(axis, size, x.shape), power_of_two, floor, overflow, bits)


def quantize_blocks(
    x: Array, fmt: str, size: int = 128, *, power_of_two: bool = False, floor: float = 0.0,
    overflow: str = "saturate", bits: Array | None = None,
) -> QuantizedTensor:  # fmt: skip
    """One scale for each square block: weights. The same codes serve the products that sum over either axis.

    x (M, K). Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (128x128).
    """
    return _quantize(x, fmt, tuple(max(1, min(size, n)) for n in x.shape), power_of_two, floor, overflow, bits)


def _quantize(
    x: Array, fmt: str, block: tuple[int, ...], power_of_two: bool, floor: float, overflow: str, bits: Array | None
) -> QuantizedTensor:
    x = widen(x, "fp32")
    _check_is_fp8(fmt)
    factors = scale_from_amax(block_amax(x, block), fmt, power_of_two, floor)
    return QuantizedTensor(encode(x, factors, block, fmt, overflow, bits), fmt, 1 / factors, "fp32", block)


@dataclass
class DelayedScaling:
    """The state of delayed scaling for one tensor (x, w or dy of one layer): largest magnitudes of past steps, and the factor.

    A step quantizes with the factor that it finds, and writes down the largest magnitude that it sees; `update`, once a
    step, makes the factor of the next. So no pass over the tensor is needed before it is quantized.

    history_length, margin, amax_compute_algo: Transformer Engine's, with its defaults.
    amax_history: fp32 (history_length,); place 0 is that of the step at hand. factor: fp32, 0-d: 'scale' there.
    Source: Transformer Engine, recipe/delayed_scaling.cu.
    """

    fmt: str
    history_length: int = 1024
    margin: float = 0.0
    amax_compute_algo: str = "max"
    amax_history: Array = field(default=None)
    factor: Array = field(default=None)

    def __post_init__(self) -> None:
        _check_is_fp8(self.fmt)
        if self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo is {self.amax_compute_algo!r}; it is 'max' or 'most_recent'")
        if self.amax_history is None:
            self.amax_history = np.zeros(self.history_length, np.float32)
        if self.factor is None:
            self.factor = np.ones((), np.float32)

    def arrays(self) -> dict[str, Array]:
        """What a checkpoint keeps; a new object with these arrays goes on as this one would."""
        return {"amax_history": self.amax_history, "factor": self.factor}

    def quantize(self, x: Array, overflow: str = "saturate", bits: Array | None = None) -> QuantizedTensor:
        """Quantize with the factor of past steps, and write down x's largest magnitude; where it is larger than they
        were, values saturate.

        A tensor that is quantized several times a step leaves the largest of all. NaN leaves nothing: it would hide the others.
        """
        x = widen(x, "fp32")
        block = tuple(max(1, n) for n in x.shape)
        largest = np.fmax.reduce(abs(x), axis=None, initial=0)
        self.amax_history[0] = np.fmax(self.amax_history[0], largest)
        factors = self.factor.reshape((1,) * x.ndim)
        return QuantizedTensor(encode(x, factors, block, self.fmt, overflow, bits), self.fmt, 1 / factors, "fp32", block)

    def update(self) -> None:
        """Once a step: the next factor from the whole history, this step included; then a new place 0, and the oldest drops.

            factor = (max / 2^margin) / amax,    kept as it is where amax is 0 or infinite
            amax   = the largest of the history, or this step's

        Differs from the source: a factor that would be infinite becomes fp32's largest value, as in `scale_from_amax`.
        """
        history = self.amax_history
        amax = np.fmax.reduce(history) if self.amax_compute_algo == "max" else history[0]
        if np.isfinite(amax) and amax > 0:
            with np.errstate(over="ignore"):
                factor = constant(FORMATS[self.fmt].max * 2.0**-self.margin) / amax
            self.factor = np.minimum(factor, constant(FORMATS["fp32"].max)).reshape(())
        self.amax_history = np.roll(history, -1)
        self.amax_history[0] = 0


def _check_is_fp8(fmt: str) -> None:
    if fmt not in ("e4m3", "e5m2"):
        raise ValueError(
            f"{fmt} with an FP32 scale: it is e4m3 or e5m2; narrower formats need small blocks, see mx.py and nvfp4.py"
        )


def _clear_fraction(x: Array) -> Array:
    """The power of two at or below each positive value; 448 / amax is never subnormal."""
    return from_bits(bits_of(x) & np.uint32(0xFF800000), "fp32")
