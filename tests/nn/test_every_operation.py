"""What holds for every operation alike: formats of results, no rows, layouts in memory, operands left alone.

The files of the operations have their formulas, roundings, special values and comparisons with PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import AMP, DTYPE, LOW, Array, array, same_bits, wide
from autocast_lists import FP32_INSIDE_ON_CUDA, FP32_ON_CPU, FP32_ON_CUDA, LOW_PRECISION
from bounds import possible
from op_calls import SHAPES, UNIFORM, Shapes, bound, is_data, rounded_once, run, same
from torch_cases import CASES, COUNTERPARTS, RECIPES, REPORT, reference

from refimpl.nn.ops import OPS
from refimpl.precision.recipes import RECIPES as ALL_RECIPES
from refimpl.precision.recipes import get_recipe

# ---------------------------------------------------------------------------------------------------------------- formats


def test_every_operation_has_a_case() -> None:
    assert set(SHAPES) == set(OPS)


@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize("op", SHAPES)
def test_uniform_recipes_keep_every_tensor_in_their_format(op: str, fmt: str) -> None:
    inputs, params, static = SHAPES[op].draw(fmt)
    if op == "cast":
        static = {"fmt": fmt}
    y, gradients = run(fmt, op, inputs, params, **static)
    assert y.dtype == (np.float32 if op == "cross_entropy" else DTYPE[fmt])  # the loss is FP32 in every recipe
    for x, dx in zip(inputs + params, gradients, strict=True):
        if is_data(x):
            assert dx is None
        else:
            assert dx.dtype == DTYPE[fmt] and dx.shape == x.shape


# Of torch.autocast on FP32 inputs. Products are low in both lists; normalization, softmax and losses come out FP32 in
# both: on CUDA since they are in the FP32 list, on CPU since they keep the format of the input. (RoPE's angles and
# the weight of Llama's norm are FP32, and so is what they are multiplied by.)
LOW_FROM_FP32 = {*LOW_PRECISION, "attention", "grouped_attention", "cast"}

# Of 16-bit inputs (with FP32 parameters): what the CUDA list takes to FP32 and the CPU list leaves as it is.
CUDA_FP32_FROM_LOW = FP32_ON_CUDA - FP32_ON_CPU | FP32_INSIDE_ON_CUDA


@pytest.mark.parametrize("recipe", AMP)
@pytest.mark.parametrize("op", SHAPES)
def test_autocast_on_fp32_tensors(op: str, recipe: str) -> None:
    low = AMP[recipe]
    inputs, params, static = SHAPES[op].draw("fp32")
    if op == "cast":
        static = {"fmt": low}
    y, gradients = run(recipe, op, inputs, params, **static)
    assert y.dtype == (DTYPE[low] if op in LOW_FROM_FP32 else np.float32)
    for x, dx in zip(inputs + params, gradients, strict=True):
        if is_data(x):
            assert dx is None
            continue
        assert dx.dtype == np.float32 and dx.shape == x.shape
        summed = op == "grouped_attention" and x is not inputs[0]  # FP32 sums of a group's gradients, which are rounded
        if op in LOW_FROM_FP32 and not summed:  # the gradient of an operand has no more precision than its 16-bit copy had
            assert same(dx, rounded_once(dx, low))


@pytest.mark.parametrize("recipe", AMP)
@pytest.mark.parametrize("op", [op for op in SHAPES if op not in ("embedding", "cast")])
def test_autocast_on_16_bit_activations(op: str, recipe: str) -> None:
    low = AMP[recipe]
    inputs, _, static = SHAPES[op].draw(low)
    _, params, _ = SHAPES[op].draw("fp32")
    y, gradients = run(recipe, op, inputs, params, **static)
    takes_up = op in ("cross_entropy", "rope", "llama_rmsnorm") or (op in CUDA_FP32_FROM_LOW and not recipe.endswith("cpu"))
    assert y.dtype == (np.float32 if takes_up else DTYPE[low])
    for x, dx in zip(inputs + params, gradients, strict=True):
        assert dx is None if is_data(x) else (dx.dtype == x.dtype and dx.shape == x.shape)


# ---------------------------------------------------------------------------------------------------------------- no rows

EMPTY = {
    "linear": ([(0, 8)], [(5, 8), (5,)], {}, (0, 5)),
    "matmul": ([(2, 0, 8), (2, 8, 4)], [], {}, (2, 0, 4)),
    "add": ([(0, 4), (4,)], [], {}, (0, 4)),
    "relu": ([(0, 4)], [], {}, (0, 4)),
    "silu": ([(0, 4)], [], {}, (0, 4)),
    "gelu_tanh": ([(0, 4)], [], {}, (0, 4)),
    "gelu_new": ([(0, 4)], [], {}, (0, 4)),
    "gelu_erf": ([(0, 4)], [], {}, (0, 4)),
    "layernorm": ([(0, 4)], [(4,), (4,)], {}, (0, 4)),
    "rmsnorm": ([(0, 4)], [(4,)], {}, (0, 4)),
    "softmax": ([(0, 4)], [], {}, (0, 4)),
    "embedding": ([np.zeros((0,), np.int64)], [(7, 4)], {}, (0, 4)),
    "reshape": ([(0, 3, 4)], [], {"shape": (0, 12)}, (0, 12)),
    "transpose": ([(0, 4)], [], {"axes": (1, 0)}, (4, 0)),
    "split": ([(0, 4)], [], {"start": 1, "stop": 3}, (0, 2)),
}
"""op -> inputs, params, static, shape of the output. The mean over no rows (cross_entropy) and no sample (attention) have
no use."""


@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize("op", EMPTY)
def test_no_rows_give_no_rows_and_gradients_of_zero(op: str, fmt: str) -> None:
    inputs, shapes, static, expected = EMPTY[op]
    xs = [x if isinstance(x, np.ndarray) else array(np.ones(x), fmt) for x in inputs]
    params = [array(np.ones(shape), fmt) for shape in shapes]
    y, gradients = run(fmt, op, xs, params, **static)
    assert y.shape == expected and y.dtype == DTYPE[fmt]
    for x, dx in zip(xs + params, gradients, strict=True):
        assert (dx is None and x.dtype == np.int64) or (dx.shape == x.shape and not wide(dx).any())


# ----------------------------------------------------------------------------------------------------------------- memory


def strided(x: Array) -> Array:
    """The same values, every other one of a larger array along the last axis."""
    if x.ndim == 0:
        return x
    holder = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    holder[..., ::2] = x
    return holder[..., ::2]


def fortran(x: Array) -> Array:
    """The same values, the first axis running fastest: a transposed view."""
    return np.ascontiguousarray(x.T).T


BIGGER = SHAPES | {
    # Enough elements for the order of a sum to matter, and more than a vector of each.
    "linear": Shapes("linear", ((40, 100),), ((70, 100), (70,))),
    "matmul": Shapes("matmul", ((3, 40, 100), (3, 100, 24))),
    "attention": Shapes("attention", ((2, 33, 96),), static={"n_head": 2}),
    "layernorm": Shapes("layernorm", ((40, 100),), ((100,), (100,))),
    "rmsnorm": Shapes("rmsnorm", ((40, 100),), ((100,),)),
    "softmax": Shapes("softmax", ((40, 100),)),
    "cross_entropy": Shapes("cross_entropy", ((40, 100), np.arange(40))),
    "add": Shapes("add", ((40, 100), (100,))),
    **{op: Shapes(op, ((41, 101),)) for op in ("relu", "silu", "gelu_tanh", "gelu_new", "gelu_erf")},
}

# NumPy sums in the order of memory, so where the first axis runs fastest these sum in another order than in C order, and
# the last bits differ. No model makes such an operand for them.
SUMS_IN_MEMORY_ORDER = {"linear", "matmul", "attention", "add", "layernorm", "rmsnorm", "softmax", "cross_entropy"}

LAYOUTS = [(op, strided) for op in BIGGER] + [(op, fortran) for op in BIGGER if op not in SUMS_IN_MEMORY_ORDER]


def forward_and_backward(fmt: str, op: str, change: Any) -> list[Array]:
    """All results of one call on operands (and a gradient) that went through `change`."""
    inputs, params, static = BIGGER[op].draw(fmt)
    p, ws = bound(fmt, op), [change(w) for w in params]
    static = {"fmt": fmt} if op == "cast" else static
    y, saved = OPS[op].forward(*(change(x) for x in inputs), *ws, p=p, **static)
    dy = array(np.random.default_rng(8).standard_normal(np.shape(y)), "fp32" if op == "cross_entropy" else fmt)
    return [y, *OPS[op].backward(change(dy), saved, *ws, p=p, **static)]


@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize(("op", "layout"), LAYOUTS)
def test_bits_do_not_depend_on_gaps_or_axis_order_in_memory(op: str, layout: Any, fmt: str) -> None:
    for a, b in zip(forward_and_backward(fmt, op, lambda x: x), forward_and_backward(fmt, op, layout), strict=True):
        assert (a is None and b is None) or same_bits(a, b)


@pytest.mark.parametrize("recipe", [*UNIFORM, *AMP])
@pytest.mark.parametrize("op", SHAPES)
def test_operations_do_not_write_to_their_operands(op: str, recipe: str) -> None:
    inputs, params, static = SHAPES[op].draw(recipe if recipe in DTYPE else "fp32")
    for x in (*inputs, *params):
        x.flags.writeable = False  # a write now raises
    p = bound(recipe, op)
    y, saved = OPS[op].forward(*inputs, *params, p=p, **static)
    dy = np.ones(np.shape(y), y.dtype)
    dy.flags.writeable = False
    first = OPS[op].backward(dy, saved, *params, p=p, **static)
    again = OPS[op].backward(dy, saved, *params, p=p, **static)  # what is saved is not used up either
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or same_bits(a, b)


# ---------------------------------------------------------------------------------------------------------------- PyTorch


def test_every_operation_has_a_counterpart_in_pytorch() -> None:
    assert {*COUNTERPARTS, "attention", "grouped_attention", "cast"} == set(OPS)


def test_every_recipe_is_covered() -> None:
    # pure-fp16 differs from fp16 in what the optimizer keeps, not in its operations; fp64 has no rounding to compare, and
    # what is quantized or summed otherwise for test_quantized_linear.py.
    covered = [get_recipe(name).policy for name in RECIPES]
    assert all(recipe.policy in covered for name, recipe in ALL_RECIPES.items() if name != "fp64" and recipe.policy.in_formats)


@pytest.mark.usefixtures("torch")
def test_most_results_are_decided() -> None:
    """Otherwise the claims would be empty. It depends on the data and the formulas alone, not on what computes them. The least
    share, some 50 %, is that of the layer norm's dw in FP16: a hundred sums of fifty products that cancel in part."""
    shares = {}
    for case in CASES:
        for wanted in reference(case).expected:
            least, greatest = possible(wanted.exact, wanted.rounded)
            if wanted.rounded in LOW:
                shares[f"{case}: {wanted.name}"] = float((least == greatest).mean())
    average = float(np.mean([*shares.values()]))
    REPORT.append(("decided, on average", f"{100 * average:.1f} %"))
    assert average > 0.9
    assert min(shares.values()) > 1 / 3, {name: share for name, share in shares.items() if share <= 1 / 3}
