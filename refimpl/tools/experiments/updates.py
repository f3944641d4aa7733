"""Experiments on updates: the effect of small updates on 16-bit weights, with and without masters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.numerics.casts import cast, widen
from refimpl.numerics.compensated import kahan_update
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.philox import random_bits
from refimpl.numerics.stochastic_rounding import stochastic_round
from refimpl.tools.experiments.experiment import Experiment, Result
from refimpl.training.palette import BLACK, FORMAT_COLORS, format_in
from refimpl.training.pictures import legend_beside

_SOURCE = "Micikevicius et al. 2018, section 3.1"

# -- a hundred updates -------------------------------------------------------------------------------------------------

UPDATES, SIZE, MEAN_OF = 100, 6e-4, 4096


def run_hundred_updates(seed: int) -> Result:
    """Subtract 6e-4 from 1.0 a hundred times: w = R(w - 6e-4), or with an FP32 master of which w is the rounded copy.

    Without a master also with stochastic rounding R (the mean of 4096 weights), and with Kahan summation.
    """
    step = cast(np.array(SIZE), "fp32")
    curves: dict[str, list[float]] = {}
    for fmt, masters in (("fp32", False), ("fp16", False), ("bf16", False), ("fp16", True), ("bf16", True)):
        kept = cast(np.array(1.0), "fp32" if masters else fmt)  # the array that is updated
        curve = [1.0]
        for _ in range(UPDATES):
            kept = cast(widen(kept, "fp32") - step, "fp32" if masters else fmt)
            curve.append(float(cast(kept, fmt)))
        curves[f"{fmt} with masters" if masters else fmt] = curve
    curves["bf16, stochastic rounding"], curves["bf16, Kahan"] = _stochastic(step, seed), _kahan(step)
    exact = 1 - UPDATES * SIZE
    rows = [[name, f"{curve[-1]:.7g}", f"{curve[-1] - exact:+.2g}"] for name, curve in curves.items()]
    conclusion = (
        f"after {UPDATES} updates of -{SIZE:g} the weight should be {exact:.2f}: it is {curves['fp32'][-1]:.7f} in FP32, still "
        f"{curves['bf16'][-1]:g} in BF16, and {curves['bf16 with masters'][-1]:g} in BF16 with an FP32 master; without a "
        f"master, stochastic rounding gives {curves['bf16, stochastic rounding'][-1]:.4f} on average, and Kahan summation "
        f"{curves['bf16, Kahan'][-1]:.5f}"
    )
    return Result(["weights", "after 100 updates", "error"], rows, conclusion, {"exact": exact, "curves": curves})


def _stochastic(step: np.ndarray, seed: int) -> list[float]:
    w, curve = cast(np.ones(MEAN_OF), "bf16"), [1.0]
    for t in range(UPDATES):
        w = stochastic_round(widen(w, "fp32") - step, "bf16", random_bits(seed, t, 0, MEAN_OF))
        curve.append(float(widen(w, "fp64").mean()))
    return curve


def _kahan(step: np.ndarray) -> list[float]:
    """Return the weight plus its compensation, w + c, after each update."""
    w, c, curve = cast(np.ones(1), "bf16"), cast(np.zeros(1), "bf16"), [1.0]
    for _ in range(UPDATES):
        w, c = kahan_update(w, c, -step)
        curve.append(float(widen(w, "fp64")[0] + widen(c, "fp64")[0]))
    return curve


STYLES = {"master": "--", "stochastic": ":", "kahan": "-."}
"""What keeps small updates: the style of its line, whose color is that of the format."""


def draw_hundred_updates(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the weight after each update."""
    for name, curve in data["curves"].items():
        style = next((style for word, style in STYLES.items() if word in name.lower()), "-")
        color = FORMAT_COLORS[format_in(name) or "fp32"]
        axes.plot(curve, color=color, label=name, lw=3 if name == "fp32" else 1.3, ls=style)
    axes.set_xlabel("updates")
    axes.set_ylabel("weight")
    legend_beside(axes)


# -- weights moved -----------------------------------------------------------------------------------------------------

STD, WEIGHTS = 0.02, 1 << 18
RATES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


def predicted_share(fmt: str, lr: float) -> float:
    """Return the share of weights N(0, 0.02^2) that a step of lr moves: those whose half ulp is less than lr.

        half an ulp of [2^e, 2^(e+1)) is 2^(e - fraction_bits - 1)  =>  P(|w| < 2^(floor(log2 lr) + fraction_bits + 2))

    The few weights just above a power of two, whose lower neighbor is half as far, are not counted.
    """
    row = FORMATS[fmt]
    below = math.ldexp(1.0, math.floor(math.log2(lr)) + row.fraction_bits + 2)
    return math.erf(below / STD / math.sqrt(2)) if lr > row.smallest_subnormal / 2 else 0.0


def run_moved_weights(seed: int) -> Result:
    """Add lr or -lr, at random, to 16-bit weights sampled from N(0, 0.02^2), and count those that change."""
    rng = np.random.default_rng(seed)
    w = cast(rng.standard_normal(WEIGHTS) * STD, "fp32")
    sign = cast(rng.choice([-1.0, 1.0], WEIGHTS), "fp32")
    data: dict[str, Any] = {"rates": RATES}
    for fmt in ("fp16", "bf16"):
        low = widen(cast(w, fmt), "fp32")
        moved = [float(np.mean(widen(cast(low + sign * cast(np.array(lr), "fp32"), fmt), "fp32") != low)) for lr in RATES]
        data[fmt] = {"moved": moved, "predicted": [predicted_share(fmt, lr) for lr in RATES]}
    rows = [
        [f"{lr:g}", *(f"{data[fmt][what][i]:.3f}" for fmt in ("fp16", "bf16") for what in ("moved", "predicted"))]
        for i, lr in enumerate(RATES)
    ]
    at = dict(zip(RATES, data["bf16"]["moved"], strict=True))
    conclusion = (
        f"of BF16 weights N(0, {STD}^2) a step of 1e-4 moves {at[1e-4]:.0%}, one of 3e-5 {at[3e-5]:.0%}, one of 1e-5 "
        f"{at[1e-5]:.0%} and one of 1e-6 {at[1e-6]:.1%}; without masters, the others never move"
    )
    return Result(["step", "fp16 moved", "predicted", "bf16 moved", "predicted"], rows, conclusion, data)


def draw_moved_weights(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the share of weights moved against the size of the step; crosses are predicted from the ulps."""
    for i, fmt in enumerate(("fp16", "bf16")):
        axes.plot(data["rates"], data[fmt]["moved"], "o-", color=FORMAT_COLORS[fmt], label=fmt)
        axes.plot(data["rates"], data[fmt]["predicted"], "x", color=BLACK, ms=7, label="predicted" if i == 0 else None)
    axes.set_xscale("log")
    axes.set_xlabel("size of the step")
    axes.set_ylabel("share of the weights that it moves")
    legend_beside(axes)


HUNDRED_UPDATES = Experiment(
    "hundred-updates", "What is a weight after 100 updates of 6e-4?", _SOURCE, run_hundred_updates, draw_hundred_updates,
)  # fmt: skip
MOVED_WEIGHTS = Experiment(
    "moved-weights", "What share of 16-bit weights does one step move?", _SOURCE, run_moved_weights, draw_moved_weights,
)  # fmt: skip
