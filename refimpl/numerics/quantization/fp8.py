"""FP8 with FP32 scales: per tensor (current or delayed), per row, and DeepSeek-V3's tiles and blocks.

A QuantizedTensor holds the scale that decodes, value = element * scale. What most sources call the scale encodes, that is, maps
amax to the format's largest value; here it is called `factor`. Both are FP32, scale = 1 / factor, and each is rounded.

    factor = max / amax      max = 448 (e4m3) or 57344 (e5m2)

A block that holds a NaN or an infinity has the factor 1; NaN stays NaN, and an infinity becomes what `overflow` says:

    saturate   the largest value: Transformer Engine, and PyTorch's cast to e4m3 since 2.13
    inf        an infinity in e5m2, NaN in e4m3: ml_dtypes, and PyTorch's cast to e5m2

Finite values overflow only under delayed scaling: the error of a current factor is too small for that.
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
    """Return the factor that maps the largest magnitude of a block to the largest value of `fmt`: fp32 -> fp32, of one shape.

        factor = max / max(amax, floor);   1 where amax is 0, infinite or NaN;   fp32's largest where it would be infinite

    power_of_two: round the factor down to a power of two, so that scaling is exact.
    floor: the smallest amax that counts, so that noise is not scaled up to the full range; 1e-4 in DeepSeek-V3's kernels.
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
    """Quantize with one scale for the tensor, from its own largest magnitude: current scaling.

    Source: Micikevicius et al. 2022, arXiv 2209.05433; Transformer Engine, Float8CurrentScaling.
    """
    return _quantize(x, fmt, tuple(max(1, n) for n in x.shape), power_of_two, 0.0, overflow, bits)


def quantize_rows(
    x: Array, fmt: str, axis: int = -1, *, power_of_two: bool = True, overflow: str = "saturate", bits: Array | None = None
) -> QuantizedTensor:
    """Quantize with one scale for each vector along `axis`, the axis that the product sums over: a token of x, a row of w.

    Source: torchao, float8 'rowwise' (power-of-two scales, rounded down).
    """
    return _quantize(x, fmt, along(axis, x.shape[axis], x.shape), power_of_two, 0.0, overflow, bits)


def quantize_tiles(
    x: Array, fmt: str, axis: int = -1, size: int = 128, *, power_of_two: bool = False, floor: float = 0.0,
    overflow: str = "saturate", bits: Array | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Quantize with one scale per 128 elements along `axis`, the axis that the product sums over: activations, gradients.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (1x128). Transformer Engine's Float8BlockScaling takes powers of two.
    """
    return _quantize(x, fmt, along(axis, size, x.shape), power_of_two, floor, overflow, bits)


def quantize_blocks(
    x: Array, fmt: str, size: int = 128, *, power_of_two: bool = False, floor: float = 0.0,
    overflow: str = "saturate", bits: Array | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Quantize with one scale per square block: weights. The same codes serve products that sum over either axis.

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

    A step quantizes with the factor of the past and records the largest magnitude that it sees; `update`, once per step, makes
    the factor of the next step. So a tensor need not be read before it is quantized.

    history_length, margin, amax_compute_algo: as in Transformer Engine, with its defaults.
    amax_history: fp32 (history_length,); element 0 belongs to the current step. factor: fp32, 0-d; 'scale' in the source.
    Errors: ValueError for another format or algorithm.
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
        """Return the arrays that a checkpoint keeps; a new object made with them continues as this one would."""
        return {"amax_history": self.amax_history, "factor": self.factor}

    def quantize(self, x: Array, overflow: str = "saturate", bits: Array | None = None) -> QuantizedTensor:
        """Quantize with the factor of past steps, and record x's largest magnitude. Values beyond those of the past saturate.

        Of a tensor that is quantized several times per step the largest magnitude is recorded. NaN is ignored: it would hide
        the others.
        """
        x = widen(x, "fp32")
        block = tuple(max(1, n) for n in x.shape)
        largest = np.fmax.reduce(abs(x), axis=None, initial=0)
        self.amax_history[0] = np.fmax(self.amax_history[0], largest)
        factors = self.factor.reshape((1,) * x.ndim)
        return QuantizedTensor(encode(x, factors, block, self.fmt, overflow, bits), self.fmt, 1 / factors, "fp32", block)

    def update(self) -> None:
        """Compute the next factor from the history, this step included; then drop the oldest element and begin a new one.

            factor = (max / 2^margin) / amax,    unchanged where amax is 0 or infinite
            amax   = the largest of the history, or that of this step

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
    """Round each positive normal value down to a power of two; 448 / amax is never subnormal."""
    return from_bits(bits_of(x) & np.uint32(0xFF800000), "fp32")
