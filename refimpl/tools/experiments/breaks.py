"""Experiments on constants that fail in 16 bits: attention masks that overflow, and Adam's epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS
from refimpl.optim.adamw import AdamW
from refimpl.tools.experiments.experiment import Experiment, Result
from refimpl.training.palette import FORMAT_COLORS, RED, colors_of
from refimpl.training.pictures import legend_beside

# -- masks -------------------------------------------------------------------------------------------------------------

KEYS, HIDDEN, LEAST = 8, 3, -16.0
"""The number of keys in a row of scores, the number of hidden keys, and the lowest score."""


def run_masks(seed: int) -> Result:
    """Mask rows of FP16 scores in several common ways, then compute the softmax.

    Hidden keys must get no weight, and the softmax of a row in which every key is hidden (padding) must not be NaN.
    """
    rng = np.random.default_rng(seed)
    scores = cast(rng.uniform(LEAST, 4, KEYS), "fp16")
    scores[0] = LEAST
    lowest = -FORMATS["fp16"].max

    def added(s: np.ndarray, hide: np.ndarray, value: float = lowest) -> np.ndarray:
        return _fp16(s + np.where(hide, value, 0))

    ways: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "score replaced by -Inf": lambda s, hide: np.where(hide, -math.inf, s),
        "score replaced by -65504": lambda s, hide: np.where(hide, lowest, s),
        "-65504 added": added,
        "-65504 added twice (causal and padding)": lambda s, hide: added(added(s, hide), hide),
        "-10000 added": lambda s, hide: added(s, hide, -10000.0),
    }
    some, every = np.arange(KEYS) >= KEYS - HIDDEN, np.full(KEYS, True)
    data, rows = {}, []
    for way, mask in ways.items():
        masked = [_fp16(mask(widen(scores, "fp64"), hide)) for hide in (some, every)]
        partly, whole = (_softmax(z) for z in masked)
        data[way] = {"infinite": int(np.isinf(masked[1]).sum()), "leaked": float(partly[some].sum()), "whole": whole}
        rows.append([
            way, f"{data[way]['infinite']} of {KEYS}", f"{data[way]['leaked']:g}",
            "NaN" if np.isnan(whole).any() else f"{whole.min():.3g} to {whole.max():.3g}",
        ])  # fmt: skip
    conclusion = (
        f"-65504, the lowest number of FP16, added to a score of {LEAST:g} or below gives -Inf "
        f"({data['-65504 added']['infinite']} of {KEYS} here), added twice always; the softmax of a row of -Inf is NaN; "
        f"replacing the score by -65504 is safe"
    )
    header = ["mask", "become -Inf", "weight of hidden keys", "all keys hidden"]
    return Result(header, rows, conclusion, data)


def _fp16(x: np.ndarray) -> np.ndarray:
    """Return x rounded to FP16, as FP64."""
    with np.errstate(over="ignore"):
        return np.asarray(widen(cast(x, "fp16"), "fp64"))


@np.errstate(invalid="ignore")
def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum())


def draw_masks(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the largest weight of a row in which every key is hidden as a bar, or write that it is NaN."""
    for i, result in enumerate(data.values()):
        whole = result["whole"]
        if np.isnan(whole).any():
            axes.text(0.01, i, "NaN", color=RED, va="center")
        else:
            axes.barh(i, whole.max(), color=FORMAT_COLORS["fp16"], height=0.5)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(data) - 0.4)
    axes.set_yticks(range(len(data)), [way.replace(" (", "\n(") for way in data])
    axes.set_xlabel("largest weight in a row of which every key is hidden")


# -- Adam's epsilon ----------------------------------------------------------------------------------------------------

EXPONENTS = range(-4, -21, -2)
EPS = 1e-8


def run_epsilon(seed: int) -> Result:
    """Compute Adam's first update divided by lr for gradients of one size: 1 as long as they are much larger than epsilon.

    With moments in FP32; with v stored in FP16; with v, epsilon and the division in FP16.
    """
    rule, rows = AdamW(eps=EPS), []
    data: dict[Any, Any] = {"exponents": list(EXPONENTS)}
    beta1, beta2 = rule.betas
    with np.errstate(divide="ignore", invalid="ignore"):
        for exponent in EXPONENTS:
            g = np.float64(2.0**exponent)
            m, v = (1 - beta1) * g, (1 - beta2) * g * g
            step, correction = 1 / (1 - beta1), math.sqrt(1 - beta2)
            kept = _fp16(np.asarray(v))
            denominator = _fp16(_fp16(np.sqrt(kept) / correction) + _fp16(np.asarray(EPS)))
            update = {
                "fp32": step * m / (math.sqrt(v) / correction + EPS),
                "v in fp16": float(step * m / (np.sqrt(kept) / correction + EPS)),
                "all in fp16": float(_fp16(np.asarray(step * m)) / denominator),
            }
            data[exponent] = update
            rows.append([f"2^{exponent}", f"{float(kept):.3g}", *(f"{value:.4g}" for value in update.values())])
    first = next(exponent for exponent in EXPONENTS if data[exponent]["v in fp16"] > 2)
    conclusion = (
        f"epsilon, {EPS:g}, is {float(_fp16(np.asarray(EPS))):g} in FP16, and v of a gradient of 2^{first} is 0: the "
        f"update is then {data[first]['v in fp16']:.0f} times too large, or infinite if epsilon is in FP16 too"
    )
    return Result(["gradient", "v in FP16", "update / lr in FP32", "with v in FP16", "all in FP16"], rows, conclusion, data)


def draw_epsilon(axes: Any, data: Mapping[str, Any]) -> None:
    """Draw the update against the size of the gradient."""
    names = {"fp32": "o-", "v in fp16": "s--", "all in fp16": "x:"}
    gradients = [2.0**e for e in data["exponents"]]
    for color, (name, style) in zip(colors_of(list(names)), names.items(), strict=True):
        updates = [data[e][name] for e in data["exponents"]]
        axes.plot(gradients, updates, style, color=color, label=name)
        finite = [point for point in zip(gradients, updates, strict=True) if math.isfinite(point[1])]
        if len(finite) < len(updates):
            axes.annotate(f"{name}: infinite below", finite[-1], xytext=(6, 8), textcoords="offset points", color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("gradient")
    axes.set_ylabel("Adam's first update / learning rate")
    legend_beside(axes)


MASKS = Experiment(
    "masks", "What does a mask do to FP16 scores?", "apex issue 93; transformers issue 17306; flax issue 982",
    run_masks, draw_masks,
)  # fmt: skip
EPSILON = Experiment(
    "epsilon", "What is Adam's epsilon in FP16?", "optax issue 1754; chainer issue 6299; keras issue 11860",
    run_epsilon, draw_epsilon,
)  # fmt: skip
