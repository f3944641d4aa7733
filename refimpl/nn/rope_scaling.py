"""The angles of rotary position embeddings: frequencies of every kind that Hugging Face's configs name, cosines and sines.

All of it is FP32, where 16 bits would ruin it: in BF16 an angle of 255 is off by up to half a radian. cos and sin are data of a
model, never parameters: casting a model to 16 bits must not touch the frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from refimpl.errors import UsageError, nearest, unknown
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen

SETTINGS: dict[str, dict[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "dynamic": {"factor": None, "original": None},
    "llama3": {"factor": None, "low": 1.0, "high": 4.0, "original": 8192.0},
    "yarn": {"factor": None, "original": None, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.0, "truncate": 1.0},
}
"""The kinds of frequencies, and the settings of each with their defaults; None if a setting has to be given.

factor: how much longer the context is than the one of pretraining, which has `original` positions. low, high: of llama3, the
numbers of turns over `original` positions below which frequencies are divided by the factor, and above which they stay.
attention_factor: what cos and sin are multiplied by; 0 stands for the paper's, 0.1 ln(factor) + 1. truncate: whether the two
bounds of yarn are rounded to whole dimensions, 1 or 0.
"""


@dataclass(frozen=True)
class RopeScaling:
    """The kind of the frequencies and its settings. Text of it: 'llama3,factor=32.0,low=1.0,high=4.0,original=8192'."""

    kind: str
    settings: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """Parse such a text, and fill in defaults. Errors: UsageError that names an unknown kind or setting."""
        kind, *pairs = text.split(",")
        if kind not in SETTINGS:
            raise UsageError(unknown("rope scaling", kind, SETTINGS))
        known, given = SETTINGS[kind], dict[str, float]()
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name not in known:
                it_has = f"it has {', '.join(known)}{nearest(name, known)}" if known else "it has none"
                raise UsageError(f"rope scaling {kind} has no setting {name!r}: {it_has}")
            try:
                given[name] = float(value)
            except ValueError:
                raise UsageError(f"rope scaling {text}: {name} is {value!r}, and must be a number") from None
            if not (0 < given[name] < math.inf or (name in ("truncate", "attention_factor") and given[name] == 0)):
                raise UsageError(f"rope scaling {text}: {name} must be positive and finite")
        missing = [name for name, default in known.items() if default is None and name not in given]
        if missing:
            form = ",".join(f"{name}=..." for name, default in known.items() if default is None)
            raise UsageError(f"rope scaling {text} lacks {' and '.join(missing)}: write {kind},{form}")
        return cls(kind, {name: given.get(name, default or 0.0) for name, default in known.items()})

    def __str__(self) -> str:
        pairs = [f"{name}={int(value) if value == int(value) else value!r}" for name, value in self.settings.items()]
        return ",".join([self.kind, *pairs])

    @property
    def attention_factor(self) -> float:
        """Return the factor of cos and sin: 1 but for yarn."""
        if self.kind != "yarn":
            return 1.0
        factor = self.settings["factor"]
        return self.settings["attention_factor"] or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)


def inverse_frequencies(theta: float, D: int, scaling: RopeScaling, longest: int) -> Array:
    """Return the angle per position of each pair of a head of width D, (D/2,) in FP32: 1 / theta^(2i/D), scaled.

    longest: the number of positions in use, on which 'dynamic' depends. Each step is in FP32, and in transformers' order.
    Source: Su et al. 2021, arXiv 2104.09864, section 3.3; llama3: Llama Team 2024, arXiv 2407.21783; yarn: Peng et al. 2023,
    arXiv 2309.00071. PyTorch: `ROPE_INIT_FUNCTIONS` of transformers.
    """
    s = scaling.settings
    if scaling.kind == "dynamic" and longest > s["original"] and D > 2:  # the only frequency of two channels is 1 for any theta
        theta *= (s["factor"] * longest / s["original"] - (s["factor"] - 1)) ** (D / (D - 2))
    exponents = cast(np.arange(0, D, 2) / D, "fp32")
    powers = cast(theta ** widen(exponents, "fp64"), "fp32")  # in FP64 and rounded once: PyTorch's bits on the CPU
    inverse: Array = 1 / powers
    if scaling.kind == "linear":
        return inverse / s["factor"]
    if scaling.kind == "llama3":
        return _llama3(inverse, s)
    return _yarn(powers, theta, D, s) if scaling.kind == "yarn" else inverse


def _llama3(inverse: Array, s: dict[str, float]) -> Array:
    """Return frequencies divided by the factor where they turn less than `low` times over the original context.

    Those that turn more than `high` times stay; between the two the share of either is linear in the number of turns.
    """
    wavelength = (1 / inverse) * (2 * math.pi)
    slow, fast = wavelength > s["original"] / s["low"], wavelength < s["original"] / s["high"]
    share = ((1 / wavelength) * s["original"] - s["low"]) / (s["high"] - s["low"])
    between = (1 - share) * inverse / s["factor"] + share * inverse
    return np.where(slow, inverse / s["factor"], np.where(fast, inverse, between))


def _yarn(powers: Array, theta: float, D: int, s: dict[str, float]) -> Array:
    """Return the frequencies: fast ones unchanged, slow ones divided by the factor, with a linear ramp in between."""

    def dimension(turns: float) -> float:
        """Return the pair, as a real number, that turns so many times over the original context."""
        return D * math.log(s["original"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s["beta_fast"]), dimension(s["beta_slow"])
    if s["truncate"]:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, D - 1.0)
    ramp = (cast(np.arange(D // 2) / 1, "fp32") - low) / (high - low or 0.001)
    stays = 1 - np.clip(ramp, 0, 1)
    return (1 / (powers * s["factor"])) * (1 - stays) + (1 / powers) * stays


def angles_at(start: int, stop: int, inverse: Array) -> Array:
    """Return the angles (T, D/2) at positions start to stop - 1: an FP32 product of the position and the frequency."""
    angles: Array = cast(np.arange(start, stop) / 1, "fp32")[:, None] * inverse
    return angles


def cos_and_sin(angles: Array, factor: float) -> tuple[Array, Array]:
    """Return cos and sin of FP32 angles, each rounded once to FP32, times the attention factor."""
    exact = widen(angles, "fp64")
    return cast(np.cos(exact), "fp32") * factor, cast(np.sin(exact), "fp32") * factor


def rotation(theta: float, D: int, scaling: RopeScaling, start: int, stop: int) -> tuple[Array, Array]:
    """Return cos and sin (T, D/2) of the angles at positions start to stop - 1, in FP32, times the attention factor.

    At position 32,767 the rounding of the angle and of the frequency alone moves them by up to 4e-4.
    """
    return cos_and_sin(angles_at(start, stop, inverse_frequencies(theta, D, scaling, stop)), scaling.attention_factor)
