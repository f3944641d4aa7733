"""Experiments with a small GPT: loss scaling, masters, and all recipes side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.numerics.casts import widen
from refimpl.optim.loss_scalers import make_loss_scale
from refimpl.optim.state import State
from refimpl.parity.trace import batches_of
from refimpl.step import Batch, forward_backward
from refimpl.tools.experiments.experiment import Experiment, Result
from refimpl.training.config import Config
from refimpl.training.palette import BLUE, CYCLE, RED, colors_of
from refimpl.training.pictures import legend_beside
from refimpl.training.progress_bar import Tick, no_tick
from refimpl.training.setup import Training, start

SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "batch_size": 8, "warmup": 5}
"""The model of these experiments: 0.1 million parameters, 256 tokens per step."""
Sizes = Mapping[str, Any]


def _new_training(recipe: str, seed: int, **more: Any) -> tuple[Config, Training]:
    config = Config.of({**SMALL, "recipe": recipe, "seed": seed, **more})
    return config, start(config)


def _batches(config: Config, n: int) -> list[Batch]:
    """Return the batches of the first n steps, of one micro-batch each."""
    return [batch for (batch,) in batches_of(replace(config, steps=n), None)]


def _train(training: Training, batches: list[Batch], tick: Tick) -> list[float]:
    """Train, and return the loss of each step."""
    losses = []
    for batch in batches:
        losses.append(float(training.step([batch]).loss))
        tick()
    return losses


def _end(losses: list[float]) -> float:
    """Return the mean of the last tenth of the losses, since a single batch is noisy."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


# -- a tiny loss -------------------------------------------------------------------------------------------------------

TINY = 1e-9
SCALES = range(0, 68, 4)


def run_tiny_loss(seed: int) -> Result:
    """Multiply the loss by 1e-9 and run backward in FP16 with increasing loss scales: which gradients become zero?

    Only elements that are not zero in the same backward pass in FP32 are counted.
    """
    shares = []
    config, exact = _new_training("fp32", seed)
    batch = _batches(config, 1)[0]
    _, low = _new_training("fp16", seed)
    with np.errstate(all="ignore"):
        forward_backward(exact.model, [batch], exact.state, np.asarray(make_loss_scale("1").scale), exact.run)
        there = exact.state.grads != 0
        for exponent in SCALES:
            S = make_loss_scale(str(TINY * 2.0**exponent)).scale
            forward_backward(low.model, [batch], low.state, S, low.run)
            g = widen(low.state.grads, "fp32")
            shares.append((float(np.mean(g[there] == 0)), float(np.mean(~np.isfinite(g)))))
    zero, infinite = ([share[i] for share in shares] for i in (0, 1))
    best = min(range(len(shares)), key=lambda i: zero[i] + infinite[i])
    rows = [[f"2^{k}", f"{100 * z:.3g} %", f"{100 * i:.3g} %"] for k, z, i in zip(SCALES, zero, infinite, strict=True)]
    conclusion = (
        f"a loss multiplied by {TINY:g} leaves {zero[0]:.0%} of its gradients zero in FP16 without a loss scale, and "
        f"{100 * zero[best]:.2g} % with S = 2^{SCALES[best]}"
    )
    data = {"exponents": list(SCALES), "zero": zero, "infinite": infinite, "best": best}
    return Result(["loss scale", "gradients that are zero", "Inf or NaN"], rows, conclusion, data)


def draw_tiny_loss(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the shares of gradients that become zero and that overflow, against the loss scale."""
    scales = [2.0**k for k in data["exponents"]]
    axes.plot(scales, data["zero"], "o-", color=BLUE, label="became zero")
    axes.plot(scales, data["infinite"], "s-", color=RED, label="Inf or NaN")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("loss scale S")
    axes.set_ylabel("share of the gradients")
    legend_beside(axes)


# -- masters, loss scaling ---------------------------------------------------------------------------------------------

WARM_STEPS, FINE_STEPS, FINE_LR, SMALL_LOSS = 150, 150, 5e-6, 1e-6


def run_masters(
    seed: int, tick: Tick = no_tick, warm_steps: int = WARM_STEPS, fine_steps: int = FINE_STEPS, sizes: Sizes = SMALL
) -> Result:
    """Continue training at a small learning rate after a warm start, with and without masters and loss scaling.

    The loss is multiplied by 1e-6, and FP32 gradients are divided by it: in backward they are as small as those of large
    models, while Adam sees gradients of the usual size. Without masters, moments stay in FP32. The progress of a run is its
    loss compared with that of the unchanged weights on the same batches.
    """
    config, first = _new_training("fp16", seed, **{**sizes, "lr": 2e-3, "steps": warm_steps})
    batches = _batches(config, warm_steps + fine_steps)
    _train(first, batches[:warm_steps], tick)
    start = {name: np.array(view) for name, view in first.state.layout.views(first.state.master).items()}
    curves: dict[str, list[float]] = {}
    fine = batches[warm_steps:]
    alone = _fine_tuned(seed, sizes, start, fine, tick, 1e-30)
    for masters in (True, False):
        for scaled in (True, False):
            name = f"{'with' if masters else 'without'} masters, {'with' if scaled else 'without'} loss scaling"
            S = SMALL_LOSS * 2.0**30 if scaled else SMALL_LOSS
            curves[name] = _fine_tuned(seed, sizes, start, fine, tick, FINE_LR, masters, S)
    gain = {name: _end(alone) - _end(curve) for name, curve in curves.items()}
    rows = [[name, f"{_end(curve):.4f}", f"{gain[name]:.4f}"] for name, curve in curves.items()]
    both, no_scaling, no_masters, neither = gain.values()
    conclusion = (
        f"{fine_steps} steps at a learning rate of {FINE_LR:g} lower the loss by {both:.4f} with masters and loss scaling, "
        f"by {no_masters:.4f} without masters, by {no_scaling:.4f} without loss scaling, and by {neither:.4f} without both"
    )
    data = {"alone": alone, "curves": curves, "gain": gain}
    return Result(["fp16", "final loss", "reduction"], rows, conclusion, data)


def _fine_tuned(
    seed: int, sizes: Sizes, start: Mapping[str, np.ndarray], batches: list[Batch], tick: Tick, lr: float,
    masters: bool = True, S: float = 1.0,
) -> list[float]:
    """Return the losses of FP16 training from `start`, with the loss scale S, at a constant learning rate."""
    at_lr = {"lr": lr, "min_lr": lr, "warmup": 0, "steps": len(batches), "weight_decay": 0.0}
    _, training = _new_training("fp16", seed, **{**sizes, **at_lr})
    if not masters:
        formats = {kind: fmt for kind, fmt in training.state.formats.items() if kind != "master"}
        training.state = State(training.model, formats, training.state.backend)
    training.state.load_weights(start)
    training.loss_scale = make_loss_scale(str(S))
    return _train(training, batches, tick)


def draw_masters(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the reduction of the loss against that of the unchanged weights, as running means of ten steps."""
    for i, (name, curve) in enumerate(data["curves"].items()):
        lower = _smooth(list(np.subtract(data["alone"], curve)), 10)
        axes.plot(lower, color=CYCLE[i], label=name, ls="-" if i < 2 else "--", lw=2.5 if i == 0 else 1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("reduction of the loss by training")
    legend_beside(axes, fontsize=8)


def _smooth(losses: list[float], n: int) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    smooth: np.ndarray = (sums[n:] - sums[:-n]) / n
    return smooth


# -- all recipes -------------------------------------------------------------------------------------------------------

STEPS = 100
BASIC = ("fp64", "fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu", "pure-fp16", "pure-bf16")
"""The basic recipes. Each other recipe is a variant of one of these, and all would take minutes."""


def run_recipes(seed: int, tick: Tick = no_tick, steps: int = STEPS, sizes: Sizes = SMALL) -> Result:
    """Train the same model from the same weights on the same batches under each of the basic recipes."""
    curves = {}
    for recipe in BASIC:
        config, training = _new_training(recipe, seed, **{**sizes, "lr": 2e-3, "steps": steps})
        curves[recipe] = _train(training, _batches(config, steps), tick)
    ends = {name: _end(curve) for name, curve in curves.items()}
    apart = {name: float(np.nanmax(np.abs(np.subtract(curve, curves["fp32"])))) for name, curve in curves.items()}
    rows = [[name, _loss(ends[name]), _loss(ends[name] - ends["fp32"]), f"{apart[name]:.2g}"] for name in curves]
    kept = {name: abs(ends[name] - ends["fp32"]) for name in curves if not name.startswith("pure")}
    furthest = max(kept, key=lambda name: kept[name])
    pure = " and ".join(f"{name} at {_loss(ends[name])}" for name in curves if name.startswith("pure"))
    conclusion = (
        f"after {steps} steps FP32 is at {_loss(ends['fp32'])}, each of these recipes with FP32 weights or masters within "
        f"{kept[furthest]:.3f} of it (the largest difference is that of {furthest}), {pure}"
    )
    header = ["recipe", "final loss", "minus fp32", "largest difference in a step"]
    return Result(header, rows, conclusion, {"curves": curves, "ends": ends, "apart": apart})


def _loss(x: float) -> str:
    """Return a loss as text."""
    return "NaN" if np.isnan(x) else f"{x:.3f}"


def draw_recipes(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw all loss curves as running means of ten steps."""
    colors = colors_of(list(data["curves"]))
    for color, (name, curve) in zip(colors, data["curves"].items(), strict=True):
        axes.plot(_smooth(curve, 10), color=color, label=name, ls="--" if name.startswith("pure") else "-", lw=1.2)
    smooth = _smooth(data["curves"]["fp32"], 10)
    axes.set_ylim(smooth.min() - 0.1, smooth.max() + 0.3)  # a diverging run may leave the picture
    axes.set_xlabel("step")
    axes.set_ylabel("loss (mean of the last ten steps)")
    legend_beside(axes, fontsize=8)


TINY_LOSS = Experiment(
    "tiny-loss", "Which gradients of a very small loss does loss scaling save?", "Micikevicius et al. 2018, section 3.2",
    run_tiny_loss, draw_tiny_loss,
)  # fmt: skip
MASTERS = Experiment(
    "masters", "FP16 with and without masters, with and without loss scaling", "Micikevicius et al. 2018, sections 3.1 and 3.2",
    run_masters, draw_masters, WARM_STEPS + 5 * FINE_STEPS,
)  # fmt: skip
ALL_RECIPES = Experiment(
    "recipes", "How far apart are the loss curves of the basic recipes?", "refimpl/precision/recipes.py", run_recipes,
    draw_recipes, len(BASIC) * STEPS,
)  # fmt: skip
