"""nn.elementwise: add, fan_in (the sum of gradients), relu, silu, swiglu and three kinds of gelu, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from arrays import AMP, DTYPE, FORMATS, LOW, array, same_bits, wide
from bounds import Agreement, agreement
from derivatives import Call, assert_close, away_from_zero, check_derivative, draw, forward, normal_numbers
from op_calls import INF, NAN, TINY, UNIFORM, UNIT, bound, rounded_once, run, same
from torch_cases import RECIPES, Case, cases_of, check, check_special_values, low_of, reference, results, subnormal

from refimpl.nn.ops import OPS, fan_in

# ---------------------------------------------------------------------------------------------------------------- formula

r = normal_numbers()

CALLS = [
    Call("add", "equal shapes", (r(2, 3, 4), r(2, 3, 4))),
    Call("add", "b lacks one axis", (r(2, 3, 4), r(3, 4))),
    Call("add", "b lacks two axes", (r(2, 3, 4), r(4))),
    Call("relu", "3-D", (away_from_zero(r(2, 3, 4)),)),
    Call("silu", "3-D", (r(2, 3, 4),)),
    Call("swiglu", "3-D", (r(2, 3, 4), r(2, 3, 4))),
    Call("gelu_tanh", "3-D", (r(2, 3, 4),)),
    Call("gelu_new", "3-D", (r(2, 3, 4),)),
    Call("gelu_erf", "3-D", (r(2, 3, 4),)),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def test_add_repeats_b_along_the_axes_it_lacks() -> None:
    a, b = draw(2, 3, 4), draw(3, 4, seed=2)
    expected = [[[a[i, j, k] + b[j, k] for k in range(4)] for j in range(3)] for i in range(2)]
    assert np.array_equal(forward("add", a, b), expected)


def test_fan_in_is_a_sum() -> None:
    a, b = draw(3, 4), draw(3, 4, seed=2)
    assert np.array_equal(fan_in.forward(a, b, bound("fp64", "fan_in"))[0], a + b)


POINTWISE: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("op", POINTWISE)
def test_pointwise_operations_do_what_the_formula_says(op: str) -> None:
    x = np.concatenate([np.linspace(-8, 8, 161), [0.0, -0.0, 1e-300, 30.0, -30.0]]).reshape(2, -1)
    assert_close(forward(op, x), np.vectorize(POINTWISE[op], otypes=[np.float64])(x))


def test_swiglu_is_the_silu_of_the_gate_times_the_other() -> None:
    gate, up = draw(2, 3, 4), draw(2, 3, 4, seed=2)
    assert_close(forward("swiglu", gate, up), np.vectorize(POINTWISE["silu"])(gate) * up)


# -------------------------------------------------------------------------------------------------------------- roundings


@pytest.mark.parametrize("fmt", LOW)
def test_add_and_fan_in_are_the_exact_sum_rounded_once(fmt: str) -> None:
    rng = np.random.default_rng(4)
    # Eight binades: sums have at most 8 + 11 bits, exact in fp32.
    a, b = (array(np.ldexp(rng.standard_normal(5000), rng.integers(-4, 5, 5000)), fmt) for _ in range(2))
    expected = rounded_once(wide(a) + wide(b), fmt)
    y, (da, db) = run(fmt, "add", [a, b], [])
    assert same(y, expected) and same(da, np.ones(5000)) and same(db, np.ones(5000))
    assert same(fan_in.forward(a, b, bound(fmt, "fan_in"))[0], expected)


@pytest.mark.parametrize("fmt", LOW)
def test_fan_in_rounds_once_and_in_the_format_of_the_tensor(fmt: str) -> None:
    rounded_at: list[tuple[str, str]] = []
    p = bound(fmt, "fan_in", lambda site, before, after: rounded_at.append((site, after.dtype.name)))
    a, b = array([1.0, 1.0], fmt), array([UNIT[fmt], 1.5 * UNIT[fmt]], fmt)
    total, _ = fan_in.forward(a, b, p)
    assert same(total, [1, 1 + 2 * UNIT[fmt]])  # a tie goes to the even 1, what is above it up
    assert total.dtype == DTYPE[fmt] and rounded_at == [("here:fan_in.sum", DTYPE[fmt].name)]


@pytest.mark.parametrize("recipe", AMP)
def test_fan_in_under_autocast_keeps_the_format_of_the_gradients(recipe: str) -> None:
    low = AMP[recipe]
    p = bound(recipe, "fan_in")
    assert fan_in.forward(array([1.0], low), array([2.0], low), p)[0].dtype == DTYPE[low]
    assert same(fan_in.forward(array([1.0], "fp32"), array([2.0**-20], "fp32"), p)[0], [1 + 2.0**-20])


@pytest.mark.parametrize("recipe", AMP)
def test_autocast_adds_fp32_and_16_bit_in_fp32(recipe: str) -> None:
    low = AMP[recipe]
    a, b = array([1.0, 1.0], "fp32"), array([2.0**-9, 2.0**-12], low)
    y, (da, db) = run(recipe, "add", [a, b], [])
    assert y.dtype == np.float32 and same(y, [1 + 2.0**-9, 1 + 2.0**-12])  # in 16 bits the second would be 1
    assert (da.dtype, db.dtype) == (np.float32, DTYPE[low])


@pytest.mark.parametrize("fmt", LOW)
def test_sums_over_rows_do_not_stop_at_the_precision_of_16_bits(fmt: str) -> None:
    n = 4096  # adding ones in bf16 stops at 256, in fp16 at 2048
    assert same(run(fmt, "add", [array(np.ones((n, 1)), fmt), array([0.0], fmt)], [])[1][1], [n])


@pytest.mark.parametrize("fmt", LOW)
def test_swiglu_rounds_before_the_product_and_after_it(fmt: str) -> None:
    """Forward and backward: the exact values rounded in that order, but where FP32's silu falls on another side of a tie."""
    gate, up = array(draw(2000), fmt), array(draw(2000, seed=2), fmt)
    y, (dgate, dup) = run(fmt, "swiglu", [gate, up], [])
    g, sigmoid = wide(gate), 1 / (1 + np.exp(-wide(gate)))
    silu = rounded_once(g * sigmoid, fmt)
    expected = rounded_once(silu * wide(up), fmt), rounded_once(wide(up) * sigmoid * (1 + g * (1 - sigmoid)), fmt), silu
    once = rounded_once(g * sigmoid * wide(up), fmt)
    # FP32 errs by some 2^-22, half an ulp is 2^-12 at most (FP16): one element in a thousand or fewer may differ.
    for ours, exact in zip((y, dgate, dup), expected, strict=True):
        assert (wide(ours) == exact).mean() > 0.995
    assert (wide(y) == once).mean() < 0.9


def test_swiglu_under_autocast_keeps_what_came() -> None:
    gate, up = array(draw(50), "bf16"), array(draw(50, seed=2), "bf16")
    y, gradients = run("amp-bf16", "swiglu", [gate, up], [])
    assert [x.dtype for x in (y, *gradients)] == [DTYPE["bf16"]] * 3
    assert same_bits(y, run("bf16", "swiglu", [gate, up], [])[0])


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.usefixtures("ieee")
def test_a_sum_beyond_the_largest_fp16_is_an_infinity_and_not_the_largest_value() -> None:
    big = array([[60000.0]], "fp16")
    assert same(run("fp16", "add", [big, big], [])[0], [[INF]])
    assert same(fan_in.forward(-big, -big, bound("fp16", "fan_in"))[0], [[-INF]])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_activations_of_large_values_are_the_value_or_zero(fmt: str) -> None:
    x = array([1e4, -1e4, 88.0, -104.0], fmt)
    positive = wide(x).clip(0)
    for op in ("relu", "silu", "gelu_tanh", "gelu_erf", *(["gelu_new"] if fmt != "fp16" else [])):
        y, (dx,) = run(fmt, op, [x], [])
        # silu(-104) = -104 exp(-104) = -7e-44: subnormal in fp32, 0 in 16 bits.
        assert np.abs(wide(y) - positive).max() <= 1e-43 and np.abs(wide(dx) - (positive > 0)).max() <= 1e-36


@pytest.mark.usefixtures("ieee")
def test_the_gradient_of_gelu_new_is_nan_in_fp16_where_3_x2_overflows() -> None:
    y, (dx,) = run("fp16", "gelu_new", [array([147.0, -147.0, 149.0, -149.0], "fp16")], [])
    assert same(y, [147, 0, 149, 0]) and same(dx, [1, 0, NAN, NAN])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan_in_add(fmt: str) -> None:
    y, _ = run(fmt, "add", [array([INF, INF, NAN, -INF], fmt), array([1, -INF, 1, -INF], fmt)], [])
    assert same(y, [INF, NAN, NAN, -INF])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan_in_relu(fmt: str) -> None:
    y, (dx,) = run(fmt, "relu", [array([INF, -INF, NAN, 0, -0.0, -1], fmt)], [])
    assert same(y, [INF, 0, NAN, 0, 0, 0])
    assert same(dx[[0, 1, 3, 4, 5]], [1, 0, 0, 0, 0])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_relu_stops_an_infinite_gradient_where_it_is_off(fmt: str) -> None:
    p = bound(fmt, "relu")
    _, saved = OPS["relu"].forward(array([-1, 1], fmt), p=p)
    assert same(OPS["relu"].backward(array([INF, INF], fmt), saved, p=p)[0], [0, INF])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize("op", ["silu", "gelu_tanh", "gelu_new", "gelu_erf"])
def test_inf_and_nan_in_smooth_activations(op: str, fmt: str) -> None:
    # x times a factor in [0, 1]: at -Inf the formula is Inf * 0, so NaN although the limit is 0 (as in PyTorch).
    y, _ = run(fmt, op, [array([INF, NAN, 0, -INF], fmt)], [])
    assert same(y, [INF, NAN, 0, NAN])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan_in_swiglu(fmt: str) -> None:
    # As in silu, a gate of -Inf is NaN; an infinite gate or factor meets the other in a product.
    y, (dgate, dup) = run(fmt, "swiglu", [array([INF, INF, 0, -INF, NAN, 1], fmt), array([2, 0, INF, 1, 1, INF], fmt)], [])
    assert same(y, [INF, NAN, NAN, NAN, NAN, INF])
    assert same(dup[:5], [INF, INF, 0, NAN, NAN]) and same(dgate[2], INF)


@pytest.mark.usefixtures("ieee")
def test_a_product_beyond_the_largest_fp16_is_an_infinity() -> None:
    y, _ = run("fp16", "swiglu", [array([300.0, -9.0], "fp16"), array([300.0, 60000.0], "fp16")], [])
    assert same(y, [INF, rounded_once(rounded_once(-9 / (1 + math.exp(9)), "fp16") * 60000, "fp16")])


@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormals_are_numbers(fmt: str) -> None:
    tiny = TINY[fmt]
    x = array([[tiny, -3 * tiny]], fmt)
    assert same(wide(x), [[tiny, -3 * tiny]])
    assert same(run(fmt, "add", [x, x], [])[0], [[2 * tiny, -6 * tiny]])
    assert same(run(fmt, "relu", [x], [])[0], [[tiny, 0]])
    # silu(4) = 3.93 and silu(2) = 1.76, times 2 and -6 of the smallest numbers.
    assert same(run(fmt, "swiglu", [array([[4.0, 2.0]], fmt), array(2 * wide(x), fmt)], [])[0], [[8 * tiny, -11 * tiny]])
    assert same(fan_in.forward(x, x, bound(fmt, "fan_in"))[0], 2 * wide(x))


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("add", "relu", "silu", "swiglu", "gelu_tanh", "gelu_new", "gelu_erf")], ids=str)
def test_as_pytorch(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", RECIPES)
def test_fan_in_is_pytorchs_accumulation_bit_for_bit(recipe: str) -> None:
    for fmt in [recipe] if recipe in FORMATS else ["fp32", low_of(recipe)]:
        case = Case("fan_in", recipe, (fmt,))
        check(case)
        assert agreement(results(case)[0], reference(case).expected[0].theirs, reference(case).expected[0].exact, fmt) == (
            Agreement(1.0, 1.0, 0.0, 0, 0)
        )


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("op", ["relu", "silu", "swiglu", "gelu_tanh", "gelu_new", "gelu_erf", "add"])
def test_special_values_as_pytorch(op: str, fmt: str) -> None:
    check_special_values(op, fmt)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("op", ["add", "relu", "silu", "swiglu", "gelu_tanh", "gelu_new", "gelu_erf", "fan_in"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_subnormal_operands_as_pytorch(op: str, fmt: str) -> None:
    check(subnormal(op, fmt))
