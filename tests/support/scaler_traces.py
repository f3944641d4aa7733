"""What each project's loss scaler does from 1024 with an interval of 3, step by step; 1 is an overflow."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from refimpl.optim.loss_scalers import SCALER_RULES, GradualLossScale, ProjectLossScale, ScalerRule

PATIENT = [name for name, scaler in SCALER_RULES.items() if scaler.hysteresis > 1]
FP32_MAX = float(np.finfo(np.float32).max)
TOP, TINY = 2.0**127, 2.0**-126


def follow(scale: Any, pattern: str) -> list[float]:
    """The scale after each step, as the project keeps it."""
    scales = []
    for c in pattern:
        scale.update(scale.xp.asarray(c == "1"))
        scales.append(stored(scale))
    return scales


def stored(scale: Any) -> float:
    """S as the project keeps it: some do so in double precision."""
    return float(scale.state_dict()["scale"])


def exhausted(scale: Any) -> bool:
    """Whether the run should end, by a rule that ends runs."""
    return bool(scale.state_dict().get("exhausted"))


def with_row(rule: ScalerRule, start: float, interval: int, xp: Any = np, hysteresis: int | None = None) -> ProjectLossScale:
    """A loss scale that computes a row of the table, PyTorch's included, with the usual factors."""
    kind = GradualLossScale if rule.gradual else ProjectLossScale
    return kind(rule, start, 2.0, 0.5, interval, rule.hysteresis if hysteresis is None else hysteresis, xp)


def fp32(x: float) -> float:
    """A double rounded once to fp32, by the C library and not by NumPy; inf where it does not fit."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.inf


def a_case(rng: np.random.Generator, floor: float) -> tuple[float, int, int, list[bool]]:
    """A start (often near one of the ends, some with fractions), an interval, a hysteresis, and 60 steps."""
    low, high = math.log2(floor) if floor else -149, 127
    exponent = rng.choice([rng.uniform(low, high), low + 3 * rng.random(), high - 3 * rng.random()])
    start = fp32(2.0 ** (round(exponent) if rng.random() < 0.5 else exponent))
    pattern = rng.random(60) < rng.choice([0.0, 0.05, 0.15, 0.4, 0.9])
    interval = int(rng.integers(1, 8) if rng.random() < 0.7 else rng.integers(20, 45))
    return max(start, floor), interval, int(rng.integers(1, 5)), pattern.tolist()


A, B, C = "00000000", "1010100000", "1110000101"
TORCH = {
    A: "1024 1024 2048 2048 2048 4096 4096 4096",
    B: "512 512 256 256 128 128 128 256 256 256",
    C: "512 256 128 128 128 256 256 128 128 64",
}
LATE = "1024 1024 1024 2048 2048 2048 4096 4096"
GOLDEN: dict[tuple[str, int | None], dict[str, str]] = {
    **{(name, None): TORCH for name in ("torch", "jmp", "apex-amp", "apex-fp16")},
    ("flax", None): {
        A: "1024 1024 1024 2048 2048 2048 2048 4096",
        B: "512 512 256 256 128 128 128 128 256 256",
        C: "512 256 128 128 128 128 256 128 128 64",
    },
    ("megatron", 2): {
        A: TORCH[A],
        B: "1024 1024 512 512 256 256 256 512 512 512",
        C: "1024 512 256 256 256 512 512 512 512 256",
    },
    ("apex-kernel", 2): {
        A: TORCH[A],
        B: "1024 1024 1024 1024 1024 1024 1024 2048 2048 2048",
        C: "1024 512 256 256 256 512 512 512 512 512",
    },
    ("deepspeed", 1): {
        A: LATE,
        B: "512 512 256 256 128 128 128 128 256 256",
        C: "512 256 128 128 128 128 256 128 128 64",
    },
    ("deepspeed", 2): {
        A: LATE,
        B: "1024 1024 512 512 256 256 256 256 512 512",
        C: "1024 512 256 256 256 256 512 512 512 256",
    },
    ("deepspeed-consecutive", 2): {
        A: LATE,
        B: "1024 1024 1024 1024 1024 1024 1024 1024 2048 2048",
        C: "1024 512 256 256 256 256 512 512 512 512",
    },
    **{(name, None): TORCH for name in ("fairseq", "fairseq-tolerance")},
    ("chainer", None): {
        A: "2048 4096 8192 16384 32768 65504 65504 65504",
        B: "512 645.0796 322.5398 406.3747 203.1873 256 322.5398 406.3747 512 645.0796",
        C: "512 256 128 161.2699 203.1873 256 322.5398 161.2699 203.1873 101.5937",
    },
}
"""From 1024, interval 3, by scaler and hysteresis. Chainer's to four places."""
