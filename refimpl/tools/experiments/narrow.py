"""Experiments on narrow formats: the scales of MX blocks, and sums in the accumulators of tensor cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.numerics.accumulators import matmul
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization.fp8 import quantize_tensor
from refimpl.numerics.quantization.mx import SCALE_RULES, quantize_mx
from refimpl.tools.experiments.experiment import Experiment, Result
from refimpl.training.palette import FORMAT_COLORS, colors_of
from refimpl.training.pictures import legend_beside

# -- MX scales ---------------------------------------------------------------------------------------------------------

BLOCKS, SIZE = 1 << 14, 32
ELEMENTS = ("e4m3", "e5m2", "e2m1")


def run_mx_scales(seed: int) -> Result:
    """Quantize blocks whose largest values are uniform over a binade, by each rule for the shared power of two.

    Count the blocks whose largest value saturates. With 'floor' these are the values whose significand is above that of the
    format's largest value: 1.75 for e4m3 and e5m2, 1.5 for e2m1.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (BLOCKS, SIZE))
    x[:, 0] = rng.uniform(1, 2, BLOCKS)
    x = cast(x, "fp32")
    data: dict[str, Any] = {}
    rows = []
    for fmt in ELEMENTS:
        for rule in SCALE_RULES:
            q = quantize_mx(x, fmt, rule=rule)
            scaled = x[:, 0] / q.scale_values()[:, 0]
            limit = FORMATS[fmt].max
            lost = np.log2(limit / np.minimum(scaled, limit))
            error = np.sqrt(np.mean((q.dequantize() - x) ** 2) / np.mean(x * x))
            data[f"{fmt} {rule}"] = {
                "saturated": float(np.mean(scaled > limit)), "unused": float(lost.mean()), "error": float(error),
            }  # fmt: skip
            found = data[f"{fmt} {rule}"]
            rows.append([fmt, rule, f"{found['saturated']:.1%}", f"{found['unused']:.2f}", f"{found['error']:.2%}"])
    floor, rceil = data["e4m3 floor"], data["e4m3 rceil"]
    conclusion = (
        f"with the OCP standard's rule, floor, {floor['saturated']:.0%} of the blocks saturate in e4m3 and "
        f"{data['e2m1 floor']['saturated']:.0%} in e2m1; with rceil {rceil['saturated']:.0%}, which leaves "
        f"{rceil['unused']:.1f} bits of the range unused"
    )
    return Result(["element", "rule", "largest value saturates", "bits unused", "error (rms)"], rows, conclusion, data)


def draw_mx_scales(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the share of blocks that saturate, by rule."""
    for i, fmt in enumerate(ELEMENTS):
        shares = [data[f"{fmt} {rule}"]["saturated"] for rule in SCALE_RULES]
        places = np.arange(len(SCALE_RULES)) + 0.25 * (i - 1)
        bars = axes.bar(places, shares, width=0.25, color=FORMAT_COLORS[fmt], label=fmt)
        axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8)
    axes.set_xticks(range(len(SCALE_RULES)), list(SCALE_RULES))
    axes.set_xlabel("rule for the scale")
    axes.set_ylabel("share of blocks whose largest\nvalue saturates")
    legend_beside(axes)


# -- accumulators ------------------------------------------------------------------------------------------------------

LONGEST, ROWS = 4096, 16
ACCUMULATORS = ("fp32", "e8m15", "e8m14", "e8m13", "e8m14/128", "fp16/64/fp16")


MEANING = {"e8m14/128": "e8m14, added to\nfp32 every 128", "fp16/64/fp16": "fp16, added to\nfp16 every 64"}
"""What the pictures call accumulators whose sums are added to another one after some products."""


def run_accumulators(seed: int) -> Result:
    """Sum up to 4096 products of positive FP8 numbers in accumulators of fewer bits than FP32."""
    rng = np.random.default_rng(seed)
    a, b = (quantize_tensor(cast(rng.uniform(0, 1, (ROWS, LONGEST)), "fp32"), "e4m3").dequantize() for _ in range(2))
    lengths = [2**k for k in range(5, 13)]
    data: dict[str, Any] = {"lengths": lengths}
    rows = []
    for acc in ACCUMULATORS:
        errors = []
        for n in lengths:
            exact = widen(a[:, :n], "fp64") @ widen(b[:, :n], "fp64").T
            errors.append(float(np.mean(abs(matmul(a[:, :n], b[:, :n].T, acc) - exact) / exact)))
        data[acc] = errors
        rows.append([acc, *(f"{error:.2e}" for error in errors[1::2])])
    plain, promoted = data["e8m14"][-1], data["e8m14/128"][-1]
    conclusion = (
        f"the relative error of a sum of {LONGEST} products is {plain:.1%} if it is cut to 14 bits after each of them, and "
        f"{promoted:.2%} if it is added to an FP32 sum after every 128"
    )
    header = ["accumulator", *(f"relative error at {n}" for n in lengths[1::2])]
    return Result(header, rows, conclusion, data)


def draw_accumulators(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the mean relative error against the number of products."""
    for acc, color in zip(ACCUMULATORS, colors_of(ACCUMULATORS), strict=True):
        axes.plot(data["lengths"], data[acc], "o-", ms=3, color=color, label=MEANING.get(acc, acc))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("products summed")
    axes.set_ylabel("relative error (mean)")
    legend_beside(axes)


MX_SCALES = Experiment(
    "mx-scales", "How often does each rule for an MX scale saturate?", "OCP MX v1.0; torchao issue 2035; mlx issue 4353",
    run_mx_scales, draw_mx_scales,
)  # fmt: skip
ACCUMULATORS_OF_HARDWARE = Experiment(
    "accumulators", "How accurate are long sums in 14 bits?", "DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2",
    run_accumulators, draw_accumulators,
)  # fmt: skip
