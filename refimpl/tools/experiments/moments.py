"""An experiment on 8-bit moments: embedding rows that get a gradient in some steps only."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.models.model import Parameter
from refimpl.optim.adamw import AdamW
from refimpl.optim.optimizer import Optimizer
from refimpl.optim.schedule import Schedule
from refimpl.optim.state import State
from refimpl.precision.recipes import RECIPES
from refimpl.tools.experiments.experiment import Experiment, Result
from refimpl.training.palette import colors_of
from refimpl.training.pictures import legend_beside

ROWS, WIDTH, STEPS, LR = 64, 64, 20, 1e-3
RARE = ("fp32", "bf16-moments", "adam-8bit", "adam-fp8", "adam-8bit-fp32-embeddings")
"""Recipes whose moments are compared; weights and gradients are FP32 here, so that nothing else differs."""


def run_rare_rows(seed: int) -> Result:
    """Update an embedding table whose rows have gradients of different sizes, each in half of the steps.

    Sizes range over five decades, from 1e-6 to 1e-1, so that each block of 256 moments has both small and large ones.
    Adam moves a weight by about lr per step, whatever the size of its gradient. But if v has become 0 and m has not, and the
    next gradient is 0, it moves the weight by lr m / eps.
    """
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-6, -1, (ROWS, 1))
    steps = [rng.standard_normal((ROWS, WIDTH)) * sizes * (rng.random((ROWS, 1)) < 0.5) for _ in range(STEPS)]
    curves, lost = {}, {}
    for recipe in RARE:
        curves[recipe], lost[recipe] = _largest_weights({k: RECIPES[recipe].state[k] for k in ("m", "v")}, steps)
    rows = [[name, f"{curve[-1]:.4g}", f"{lost[name]:.1%}"] for name, curve in curves.items()]
    ends = {name: curve[-1] for name, curve in curves.items()}
    conclusion = (
        f"after {STEPS} updates at a learning rate of {LR:g} the largest weight is {ends['fp32']:.2g} with FP32 moments, "
        f"{ends['adam-8bit']:.2g} with 8-bit codes and {ends['adam-fp8']:.2g} in e4m3, where v becomes 0 while m does not; "
        f"with FP32 moments for embeddings only it is {ends['adam-8bit-fp32-embeddings']:.2g}"
    )
    header = ["moments of", "largest weight", "v is 0 and m is not"]
    return Result(header, rows, conclusion, {"curves": curves, "ends": ends, "lost": lost})


def _largest_weights(moments: Mapping[str, str], steps: list[np.ndarray]) -> tuple[list[float], float]:
    """Return the largest weight after each update, from zeros, and the final share of weights whose v is 0 and m is not."""
    table = SimpleNamespace(parameters={"wte.weight": Parameter((ROWS, WIDTH), std=1.0)})
    state = State(table, {"weights": "fp32", "grads": "fp32", **moments}, NUMPY)
    optimizer = Optimizer(AdamW(weight_decay=0.0), Schedule(LR, LR, 0, len(steps)))
    largest = []
    for gradient in steps:
        state.grads[...] = gradient.reshape(-1)
        optimizer.update(state, np.asarray(1, np.float32), 1.0, np.asarray(False))
        largest.append(float(abs(state.weights).max()))
    return largest, float(np.mean((state.values("v") == 0) & (state.values("m") != 0)))


def draw_rare_rows(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the largest weight against the number of updates."""
    colors = colors_of(list(data["curves"]))
    for i, (name, curve) in enumerate(data["curves"].items()):
        axes.plot(range(1, len(curve) + 1), curve, color=colors[i], label=name, lw=4 - 0.7 * i)
    axes.set_yscale("log")
    axes.set_xlabel("updates")
    axes.set_ylabel("largest weight")
    legend_beside(axes, fontsize=8)


RARE_ROWS = Experiment(
    "rare-rows", "What do 8-bit moments do to embedding rows without a gradient?",
    "Dettmers et al. 2022, arXiv 2110.02861, section 2.3", run_rare_rows, draw_rare_rows,
)  # fmt: skip
