"""Experiments on roundings: numbers flushed to zero, updates that are lost, and sums in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.tools.experiments.experiment import Experiment, Result
from refimpl.training.palette import FORMAT_COLORS, GRAY, RED
from refimpl.training.pictures import legend_beside

_MICIKEVICIUS = "Micikevicius et al. 2018, section"


def _round(x: np.ndarray, fmt: str) -> np.ndarray:
    """Return x rounded to `fmt`, as fp32 (as fp64 if x is fp64); 8-bit formats saturate."""
    wide = "fp64" if x.dtype == np.float64 else "fp32"
    y: np.ndarray = widen(cast(x, fmt, overflow="saturate" if FORMATS[fmt].bits <= 8 else None), wide)
    return y


# -- flush -------------------------------------------------------------------------------------------------------------


def run_flush(seed: int) -> Result:
    """Round numbers from 0 to three times the smallest subnormal in each format, and half of it and the number just above."""
    data, rows = {}, []
    for fmt in ("fp16", "bf16", "e5m2", "e4m3"):
        s = FORMATS[fmt].smallest_subnormal
        x = cast(np.linspace(0, 3, 769) * s, "fp32")
        half = cast(np.array([s / 2]), "fp32")
        above = np.nextafter(half, cast(np.array([math.inf]), "fp32"))
        at_half, just_above = float(_round(half, fmt)[0]), float(_round(above, fmt)[0])
        data[fmt] = {"x": widen(x, "fp64") / s, "y": widen(_round(x, fmt), "fp64") / s, "at_half": at_half, "above": just_above}
        power = math.log2(s)
        rows.append([fmt, f"2^{power:.0f}", f"2^{power - 1:.0f}", f"{at_half:g}", f"2^{math.log2(just_above):.0f}"])
    fp16 = data["fp16"]
    half = FORMATS["fp16"].smallest_subnormal / 2
    conclusion = (
        f"in FP16 numbers up to 2^{math.log2(half):.0f} = {half:.3g} become {fp16['at_half']:g}, and those just above "
        f"become 2^{math.log2(fp16['above']):.0f}; BF16's smallest number is "
        f"2^{math.log2(FORMATS['bf16'].smallest_subnormal):.0f}"
    )
    header = ["format", "smallest value", "half of it", "half becomes", "just above becomes"]
    return Result(header, rows, conclusion, data)


def draw_flush(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw stored against given numbers, in units of each format's smallest value."""
    for fmt, line in data.items():
        if fmt in ("fp16", "e4m3"):
            axes.plot(line["x"], line["y"], color=FORMAT_COLORS[fmt], label=fmt, lw=3 if fmt == "fp16" else 1.2)
    axes.plot([0, 3], [0, 3], ":", color=GRAY, label="exact")
    axes.axvline(0.5, color=RED, lw=0.8, ls="--", label="half the smallest value")
    axes.set_xlabel("given, in units of the format's smallest value (FP16: 2^-24)")
    axes.set_ylabel("stored, in the same units")
    legend_beside(axes)


# -- lost updates ------------------------------------------------------------------------------------------------------


def run_lost_update(seed: int) -> Result:
    """Add w / ratio to all weights w of a binade: for which ratios does the sum round back to w?"""
    data, rows = {}, []
    ratios = 2.0 ** np.arange(5, 15, 1 / 8)
    for fmt in ("fp16", "bf16"):
        weights = 1 + np.arange(0, 1, FORMATS[fmt].eps)  # every value of [1, 2)
        lost = np.array([np.mean(_round(weights * (1 + 1 / ratio), fmt) == weights) for ratio in ratios])
        first, all_lost = float(ratios[lost > 0][0]), float(ratios[lost == 1][0])
        data[fmt] = {"ratio": ratios, "lost": lost, "first": first, "all": all_lost}
        rows.append([fmt, f"{first:.0f}", f"{all_lost:.0f}"])
    tie, above = (float(_round(np.array([1 + c * 2.0**-11]), "fp16")[0]) for c in (1.0, 1.01))
    data["tie"] = {"1 + 2^-11": tie, "1 + 1.01 * 2^-11": above}
    conclusion = (
        f"some updates are lost if weight / update is at least {data['fp16']['first']:.0f} in FP16 or "
        f"{data['bf16']['first']:.0f} in BF16, and all are at twice that ratio: 1 + 2^-11 is stored as {tie:g}, "
        f"1 + 1.01 * 2^-11 as 1 + 2^{math.log2(above - 1):.0f}"
    )
    return Result(["format", "some are lost from ratio", "all are lost from ratio"], rows, conclusion, data)


def draw_lost_update(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the share of weights in a binade that the update does not move, against the ratio."""
    for fmt in ("fp16", "bf16"):
        axes.plot(data[fmt]["ratio"], data[fmt]["lost"], "o-", ms=3, color=FORMAT_COLORS[fmt], label=fmt)
        axes.axvline(data[fmt]["first"], color=FORMAT_COLORS[fmt], lw=0.8, ls="--", label=f"{fmt}: the first is lost")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("weight / update")
    axes.set_ylabel("share of the weights in [1, 2)\nthat do not move")
    legend_beside(axes)


# -- accumulation ------------------------------------------------------------------------------------------------------

PRODUCTS, TRIALS, UNIFORMS = 4096, 256, 10_000


def _running_sum(terms: np.ndarray, fmt: str) -> np.ndarray:
    """Return all partial sums of fp32 terms along the last axis, rounded to `fmt` after each addition."""
    sums, total = np.empty_like(terms), np.zeros_like(terms[..., 0])
    for i in range(terms.shape[-1]):
        total = _round(total + terms[..., i], fmt)
        sums[..., i] = total
    return sums


def run_accumulate(seed: int) -> Result:
    """Sum 4096 products of FP16 numbers, and 10,000 uniform numbers, one after another in FP32, FP16 or BF16."""
    rng = np.random.default_rng(seed)
    a, b = (_round(cast(rng.standard_normal((TRIALS, PRODUCTS)), "fp32"), "fp16") for _ in range(2))
    products = a * b  # 11 bits times 11 bits: exact in FP32
    exact = widen(products, "fp64").cumsum(-1)
    scale = np.sqrt((exact**2).mean(0))
    uniforms = _round(cast(rng.random((1, UNIFORMS)), "fp32"), "bf16")
    data: dict[str, Any] = {"n": np.arange(1, PRODUCTS + 1), "uniforms": float(widen(uniforms, "fp64").sum())}
    rows = []
    for fmt in ("fp32", "fp16", "bf16"):
        error = np.sqrt(((widen(_running_sum(products, fmt), "fp64") - exact) ** 2).mean(0)) / scale
        total = float(_running_sum(uniforms, fmt)[0, -1])
        data[fmt] = {"error": error, "last": float(error[-1]), "uniforms": total}
        rows.append([fmt, f"{error[-1]:.2e}", f"{total:g}"])
    conclusion = (
        f"the relative error of a sum of {PRODUCTS} products is {data['fp32']['last']:.1e} in FP32, "
        f"{data['fp16']['last']:.1%} in FP16 and {data['bf16']['last']:.0%} in BF16; the sum of {UNIFORMS:,} uniform numbers, "
        f"{data['uniforms']:.0f}, is {data['bf16']['uniforms']:g} in BF16"
    )
    header = ["sum in", "relative error (rms)", f"sum of {UNIFORMS:,} uniform numbers"]
    return Result(header, rows, conclusion, data)


def draw_accumulate(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the relative error of the partial sums against their length."""
    for fmt in ("bf16", "fp16", "fp32"):
        axes.plot(data["n"][7:], data[fmt]["error"][7:], color=FORMAT_COLORS[fmt], label=f"sum in {fmt}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("products summed")
    axes.set_ylabel("error of the sum, relative to its size (rms)")
    legend_beside(axes)


FLUSH = Experiment(
    "flush", "What do numbers near a format's smallest value round to?", f"{_MICIKEVICIUS} 3.1", run_flush, draw_flush
)
LOST_UPDATE = Experiment(
    "lost-update", "How small may an update be, relative to its weight?", f"{_MICIKEVICIUS} 3.1",
    run_lost_update, draw_lost_update,
)  # fmt: skip
ACCUMULATE = Experiment(
    "accumulate", "How accurate are long sums in 16 bits?", f"{_MICIKEVICIUS} 3.3", run_accumulate, draw_accumulate
)
