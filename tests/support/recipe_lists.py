"""Which recipes a test runs over, where all of them would say the same thing many times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

BASIC = ("fp64", "fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu", "pure-fp16", "pure-bf16")
"""The recipes that PyTorch can train by. The others, with other states or quantized products, have tests of their own."""

MECHANISMS = {
    "fp64": "sums in FP64",
    "fp32": "no rounding below FP32, weights that are their own masters",
    "fp16": "FP16 copies of FP32 masters, a dynamic loss scale",
    "bf16": "BF16 copies of FP32 masters, no loss scale",
    "amp-fp16": "the lists of CUDA autocast, with a loss scale",
    "amp-bf16-cpu": "the lists of CPU autocast, without one",
    "pure-bf16": "weights and moments in 16 bits",
    "bf16-sr": "weights rounded stochastically",
    "bf16-kahan": "weights with a compensation",
    "bf16-remainder": "masters in two halves",
    "adam-8bit": "moments in codebooks",
    "adam-8bit-fp32-embeddings": "FP32 moments of embeddings beside codes",
    "adam-fp8": "moments in FP8",
    "apex-o2": "an FP32 copy of the gradients, masters from rounded weights",
    "fp8-delayed": "scales that are remembered",
    "fp8-rows-dw-bf16": "scales per row, products of which some are not quantized",
    "fp8-blocks": "scales per tile, FP32 gradients, masters beside 16-bit moments",
    "mxfp8": "scales per 32 elements",
    "nvfp4": "two levels of scales, random rotation and stochastic rounding of operands",
    "fp8-14bit-128": "scales per tensor, sums of few bits in parts",
    "fp16-sums-64": "sums in FP16",
}
"""One recipe per mechanism, and what it stands for; test_recipes.py holds that every part of every recipe is in one of them."""


def others_slow(cases: Iterable[Any], *, plain: Iterable[Any] = MECHANISMS) -> list[Any]:
    """Return the parameters of a test, names or tuples, where those that are not in `plain` are left to `-m slow`."""
    values = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    plain = {*plain}
    return [pytest.param(*value, marks=() if case in plain else pytest.mark.slow) for case, value in values]
