"""nn.linear: y = x w^T + b and matmul, forward and backward."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arrays import FORMATS, LOW, array, rounded, wide
from bounds import agreement, near
from derivatives import Call, assert_close, check_derivative, draw, forward, normal_numbers
from op_calls import INF, NAN, TINY, UNIFORM, bound, rounded_once, run, same
from torch_cases import Case, F, assert_agrees, cases_of, check, outside, reference, subnormal, tensor, theirs

from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.ops import OPS
from refimpl.precision.context import Run
from refimpl.precision.policy import EVERY_OTHER, Policy, Precision
from refimpl.precision.recipes import get_recipe

# ---------------------------------------------------------------------------------------------------------------- formula

r = normal_numbers()

CALLS = [
    Call("linear", "2-D with bias", (r(5, 4),), (r(3, 4), r(3))),
    Call("linear", "2-D without bias", (r(5, 4),), (r(3, 4), None)),
    Call("linear", "3-D with bias", (r(2, 5, 4),), (r(3, 4), r(3))),
    Call("linear", "3-D without bias", (r(2, 5, 4),), (r(3, 4), None)),
    Call("linear", "one row, one output", (r(1, 4),), (r(1, 4), r(1))),
    Call("matmul", "2-D", (r(3, 4), r(4, 5))),
    Call("matmul", "4-D batched", (r(2, 3, 4, 5), r(2, 3, 5, 6))),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def test_linear_is_a_sum_of_products_and_a_bias() -> None:
    x, w, b = draw(2, 3, 5), draw(4, 5, seed=2), draw(4, seed=3)
    expected = [
        [[math.fsum(x[i, j, k] * w[f, k] for k in range(5)) + b[f] for f in range(4)] for j in range(3)] for i in range(2)
    ]
    assert_close(forward("linear", x, w, b), expected)
    assert_close(forward("linear", x, w, None), np.array(expected) - b)


def test_matmul_multiplies_each_pair_of_matrices() -> None:
    a, b = draw(2, 3, 4, 5), draw(2, 3, 5, 6, seed=2)
    expected = np.zeros((2, 3, 4, 6))
    for i, j, m, n in np.ndindex(expected.shape):
        expected[i, j, m, n] = math.fsum(a[i, j, m, k] * b[i, j, k, n] for k in range(5))
    assert_close(forward("matmul", a, b), expected)


@pytest.mark.parametrize("fmt", UNIFORM)
def test_one_row_one_column_one_output(fmt: str) -> None:
    x, w, b = array([[3.0]], fmt), array([[2.0]], fmt), array([5.0], fmt)
    y, (dx, dw, db) = run(fmt, "linear", [x], [w, b])
    assert same(y, [[11.0]]) and same(dx, [[2.0]]) and same(dw, [[3.0]]) and same(db, [1.0])


# -------------------------------------------------------------------------------------------------------------- roundings


@pytest.mark.parametrize(
    ("fmt", "products", "bias"),
    [
        # fp16 keeps 11 bits: 2049 = 2048 + 1 is halfway and would go to 2048; 2049 + 0.5 is above it and goes to 2050.
        ("fp16", [2048, 1], 0.5),
        # bf16 keeps 8 bits: 257 = 256 + 1 is halfway and would go to 256; 257 + 0.5 goes to 258.
        ("bf16", [256, 1], 0.5),
    ],
)
def test_linear_rounds_once_with_the_bias_inside(fmt: str, products: list[float], bias: float) -> None:
    x, w, b = array([products], fmt), array([[1, 1]], fmt), array([bias], fmt)
    once = rounded_once(sum(products) + bias, fmt)
    twice = rounded_once(rounded_once(sum(products), fmt) + bias, fmt)
    assert once != twice  # or the example would show nothing
    y, _ = run(fmt, "linear", [x], [w, b])
    assert same(y, [[once]])


@pytest.mark.parametrize("fmt", LOW)
def test_linear_on_small_integers_is_the_exact_result_rounded_once(fmt: str) -> None:
    # Products and sums below 2^24 are exact in fp32 in any order, so there is nothing but the one rounding.
    rng = np.random.default_rng(3)
    x, w, b = (rng.integers(-30, 31, shape) for shape in ((40, 64), (30, 64), (30,)))
    dy = rng.integers(-30, 31, (40, 30))
    p = bound(fmt, "linear")
    y, saved = OPS["linear"].forward(array(x, fmt), array(w, fmt), array(b / 4, fmt), p=p)
    assert same(y, rounded_once(x @ w.T + b / 4, fmt))
    dx, dw, db = OPS["linear"].backward(array(dy, fmt), saved, array(w, fmt), array(b / 4, fmt), p=p)
    assert same(dx, rounded_once(dy @ w, fmt)) and same(dw, rounded_once(dy.T @ x, fmt))
    assert same(db, rounded_once(dy.sum(0), fmt))
    assert not same(y, rounded_once(rounded_once(x @ w.T, fmt) + b / 4, fmt))  # rounding twice gives another answer somewhere


@pytest.mark.parametrize("fmt", LOW)
def test_sums_do_not_stop_at_the_precision_of_16_bits(fmt: str) -> None:
    # Adding ones in bf16 stops at 256, in fp16 at 2048.
    n = 4096
    ones = array(np.ones((n, 1)), fmt)
    _, (_, dw, db) = run(fmt, "linear", [ones], [array([[1.0]], fmt), array([0.0], fmt)])
    assert same(dw, [[n]]) and same(db, [n])
    assert same(run(fmt, "linear", [ones.T], [ones.T, None])[0], [[n]])
    assert same(run(fmt, "matmul", [ones.T, ones], [])[0], [[n]])


def test_products_beyond_the_range_of_fp16_may_cancel_before_the_rounding() -> None:
    x, w = array([[300.0, 300.0, 1.0]], "fp16"), array([[300.0, -300.0, 5.0]], "fp16")
    assert same(run("fp16", "linear", [x], [w, None])[0], [[5.0]])


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.usefixtures("ieee")
def test_a_result_beyond_the_largest_fp16_is_an_infinity_and_not_the_largest_value() -> None:
    big, two = array([[60000.0]], "fp16"), array([[2.0]], "fp16")
    y, (dx, dw, _) = run("fp16", "linear", [big], [two, None])
    assert same(y, [[INF]]) and same(dx, two) and same(dw, big)
    _, (_, dw, db) = run("fp16", "linear", [array(np.full((2, 1), 6e4), "fp16")], [two, array([0.0], "fp16")])
    assert same(dw, [[INF]]) and same(db, [2.0])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("recipe", ["amp-fp16", "amp-fp16-cpu"])
def test_an_fp32_gradient_shows_the_overflow_of_the_16_bit_product(recipe: str) -> None:
    x = array(np.full((2, 1), 60000.0), "fp32")
    _, (dx, dw, db) = run(recipe, "linear", [x], [array([[1.0]], "fp32"), array([0.0], "fp32")])
    assert same(dw, [[INF]]) and dw.dtype == np.float32  # 120000 would fit fp32, but not the 16 bits it was computed for
    assert same(dx, [[1], [1]]) and same(db, [2])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan_in_linear(fmt: str) -> None:
    x = array([[1, 1], [INF, 1], [INF, NAN], [INF, -INF], [INF, 0]], fmt)
    w = array([[1, 1], [-1, 1], [0, 1]], fmt)
    y, _ = run(fmt, "linear", [x], [w, array([0, 0, 0], fmt)])
    assert same(y, [[2, 0, 1], [INF, -INF, NAN], [NAN, NAN, NAN], [NAN, -INF, NAN], [INF, -INF, NAN]])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan_in_gradients_of_linear(fmt: str) -> None:
    p = bound(fmt, "linear")
    w, b = array([[1, 2], [3, 4]], fmt), array([0, 0], fmt)
    _, saved = OPS["linear"].forward(array([[1, 1], [1, 0]], fmt), w, b, p=p)
    dx, dw, db = OPS["linear"].backward(array([[1, 1], [INF, 1]], fmt), saved, w, b, p=p)
    assert same(dx, [[4, 6], [INF, INF]]) and same(dw, [[INF, NAN], [2, 1]]) and same(db, [INF, 2])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan_in_matmul(fmt: str) -> None:
    a, b = array([[[1, INF]], [[1, 1]]], fmt), array([[[1], [2]], [[1], [NAN]]], fmt)
    assert same(run(fmt, "matmul", [a, b], [])[0], [[[INF]], [[NAN]]])
    assert same(run(fmt, "matmul", [a, array([[[1], [0]], [[1], [1]]], fmt)], [])[0], [[[NAN]], [[2]]])


@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormals_are_numbers(fmt: str) -> None:
    tiny = TINY[fmt]
    x, one = array([[tiny, -3 * tiny]], fmt), array(np.eye(2), fmt)
    y, (_, dw, _) = run(fmt, "linear", [x], [one, None])
    assert same(y, x) and same(dw, [[tiny, -3 * tiny]] * 2)
    assert same(run(fmt, "matmul", [x, one], [])[0], x)


@pytest.mark.parametrize("fmt", LOW)
def test_underflow_rounds_to_nearest_even(fmt: str) -> None:
    # 0.5 tiny is halfway between 0 and tiny: to even, 0. 1.5 tiny is halfway too: to even, 2 tiny. 0.75 tiny: to tiny.
    # (The smallest bf16 times these is still a number of fp32, so the sum is exact.)
    tiny = TINY[fmt]
    y, _ = run(fmt, "linear", [array([[tiny]], fmt)], [array([[0.5], [0.75], [1.5], [-0.5]], fmt), None])
    assert same(y, [[0, tiny, 2 * tiny, 0]])


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("linear", "matmul")], ids=str)
def test_as_pytorch(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_without_bias_and_in_three_dimensions(fmt: str) -> None:
    rng = np.random.default_rng(14)
    x, w, dy = (array(rng.standard_normal(shape), fmt) for shape in ((4, 16, 96), (80, 96), (4, 16, 80)))
    p = Run(get_recipe(fmt).policy, NUMPY).precision("linear", "here")
    y, saved = OPS["linear"].forward(x, w, None, p=p)
    dx, dw, db = OPS["linear"].backward(dy, saved, w, None, p=p)
    y_torch, (dx_torch, dw_torch) = theirs(F.linear, [x, w], dy)
    assert db is None
    X, W, G = near(wide(x).reshape(64, 96)), near(wide(w)), near(wide(dy).reshape(64, 80))
    assert_agrees(y.reshape(64, 80), wide(y_torch).reshape(64, 80), X @ W.T, fmt, "y")
    assert_agrees(dx.reshape(64, 96), wide(dx_torch).reshape(64, 96), G @ W, fmt, "dx")
    assert_agrees(dw, dw_torch, G.T @ X, fmt, "dw")


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("op", ["matmul"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_subnormal_operands_as_pytorch(op: str, fmt: str) -> None:
    check(subnormal(op, fmt))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", LOW)
def test_control_rounding_before_the_bias_is_noticed(fmt: str) -> None:
    case = Case("linear", fmt, (fmt,) * 3)
    x, w, b = reference(case).operands
    run, wanted = Run(get_recipe(fmt).policy, NUMPY), reference(case).expected[0]
    y, _ = OPS["linear"].forward(x, w, None, p=run.precision("linear", "here"))
    twice, _ = OPS["add"].forward(y, b, p=run.precision("add", "here"))
    assert agreement(twice, wanted.theirs, wanted.exact, fmt).ours_outside > 0.1 * twice.size


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", LOW)
def test_control_a_missing_rounding_of_the_output_is_noticed(fmt: str) -> None:
    unrounded = Policy("unrounded", {EVERY_OTHER: Precision(fmt, "fp32", "fp32")})
    assert outside(unrounded, Case("linear", fmt, (fmt,) * 3))[0] > 0.9 * 64 * 80


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(("fmt", "n"), [("fp16", 4096), ("bf16", 512)])
def test_control_accumulating_in_16_bits_is_beyond_the_bound(fmt: str, n: int) -> None:
    dy = np.abs(array(np.random.default_rng(19).standard_normal((n, 8)), fmt))
    running = np.zeros(8)
    for row in wide(dy):
        running = rounded(running + row, fmt)
    exact = near(wide(dy)).sum(0)
    summed = tensor(dy).sum(0)
    assert agreement(running, summed, exact, fmt).ours_outside == 8
    assert agreement(rounded(exact.value, fmt), summed, exact, fmt).ours_outside == 0


@pytest.mark.usefixtures("torch")
def test_control_an_fp32_product_of_rounded_operands_is_beyond_the_bound() -> None:
    tf32_like = Policy("bf16 inputs", {EVERY_OTHER: Precision("bf16", "fp32", "fp32")})
    assert min(outside(tf32_like, Case("matmul", "fp32", ("fp32", "fp32")))) > 1000
