"""Calls of operations under a recipe, with operands of given shapes, and what their results are compared by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from arrays import DTYPE, Array, array, wide

from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.ops import OPS
from refimpl.nn.rope_scaling import RopeScaling, rotation
from refimpl.precision.context import Monitor, OpPrecision, Run
from refimpl.precision.recipes import get_recipe

UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # unit roundoff: half the distance from 1 to the next value

INF, NAN = math.inf, math.nan

UNIFORM = ["fp32", "fp16", "bf16"]

TINY = {"fp16": 2.0**-24, "bf16": 2.0**-133, "fp32": 2.0**-149}  # the smallest subnormal


def bound(recipe: str, op: str, monitor: Monitor | None = None) -> OpPrecision:
    key = OPS[op].key if op in OPS else op
    return Run(get_recipe(recipe).policy, NUMPY, monitor).precision(key, "here")


def rounded_once(x: Any, fmt: str) -> Array:
    """fp64 -> the format, rounded once (numpy's and ml_dtypes' own conversions), back in fp64 for arithmetic."""
    with np.errstate(over="ignore"):
        return wide(np.asarray(x, np.float64).astype(DTYPE[fmt]))


def same(a: Any, b: Any) -> bool:
    """Equal values, NaN equal to NaN."""
    return bool(np.array_equal(wide(a), wide(b), equal_nan=True))


@dataclass(frozen=True)
class Shapes:
    """Shapes of the operands (strings name token arrays) for one call of an operation."""

    op: str
    inputs: tuple[Any, ...]
    params: tuple[tuple[int, ...], ...] = ()
    static: dict[str, Any] = field(default_factory=dict)

    def draw(self, fmt: str) -> tuple[list[Array], list[Array], dict[str, Any]]:
        rng = np.random.default_rng(7)
        inputs = [shape if isinstance(shape, np.ndarray) else array(rng.standard_normal(shape), fmt) for shape in self.inputs]
        params = [array(rng.standard_normal(shape), fmt) for shape in self.params]
        return inputs, params, self.static


COS, SIN = rotation(100.0, 6, RopeScaling("default", {}), 0, 5)
"""Of 5 positions and heads of width 6, in FP32: data, which an operation reads and does not differentiate."""
OF_TRANSFORMERS = {"rope", "llama_rmsnorm", "swiglu", "grouped_attention", "gelu_new"}
"""Operations that transformers writes as several of PyTorch's, so that there are neither OpInfos nor ONNX nodes of them."""
TOKENS = np.array([[3, 0, 3], [6, 3, 0]])
SHAPES = {
    case.op: case
    for case in (
        Shapes("linear", ((2, 3, 8),), ((5, 8), (5,))),
        Shapes("matmul", ((2, 3, 8), (2, 8, 4))),
        Shapes("attention", ((2, 5, 24),), static={"n_head": 2}),
        Shapes("grouped_attention", ((2, 5, 24), (2, 5, 12), (2, 5, 12)), static={"n_head": 4, "n_kv_head": 2}),
        Shapes("rope", ((2, 5, 24), COS, SIN)),
        Shapes("add", ((2, 3, 4), (3, 4))),
        Shapes("relu", ((3, 8),)),
        Shapes("silu", ((3, 8),)),
        Shapes("swiglu", ((3, 8), (3, 8))),
        Shapes("gelu_tanh", ((3, 8),)),
        Shapes("gelu_new", ((3, 8),)),
        Shapes("gelu_erf", ((3, 8),)),
        Shapes("layernorm", ((2, 3, 8),), ((8,), (8,))),
        Shapes("rmsnorm", ((2, 3, 8),), ((8,),)),
        Shapes("llama_rmsnorm", ((2, 3, 8),), ((4,),)),
        Shapes("softmax", ((3, 8),)),
        Shapes("embedding", (TOKENS,), ((7, 4),)),
        Shapes("cross_entropy", ((2, 3, 7), TOKENS)),
        Shapes("reshape", ((2, 3, 4),), static={"shape": (6, 4)}),
        Shapes("transpose", ((2, 3, 4),), static={"axes": (2, 0, 1)}),
        Shapes("split", ((3, 8),), static={"start": 2, "stop": 5}),
        Shapes("cast", (), ((3, 4),), {"fmt": "fp16"}),
    )
}


def is_data(x: Array) -> bool:
    """Whether an operand has no gradient: tokens, cosines and sines."""
    return x.dtype == np.int64 or x is COS or x is SIN


def run(recipe: str, op: str, inputs: list[Array], params: list[Array | None], **static: Any) -> tuple[Array, list[Array]]:
    """Forward, and backward with a gradient of ones in the format of the output: (output, gradients)."""
    p = bound(recipe, op)
    y, saved = OPS[op].forward(*inputs, *params, p=p, **static)
    dy = np.ones(np.shape(y), y.dtype)
    return y, list(OPS[op].backward(dy, saved, *params, p=p, **static))
