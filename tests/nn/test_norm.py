"""nn.norm: layernorm and both RMS norms, forward and backward."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arrays import LOW, Array, array, same_bits, wide
from derivatives import Call, assert_close, check_derivative, draw, forward, normal_numbers
from op_calls import INF, NAN, TINY, UNIFORM, UNIT, rounded_once, run, same
from torch_cases import Case, cases_of, check

# ---------------------------------------------------------------------------------------------------------------- formula

r = normal_numbers()

CALLS = [
    Call("layernorm", "3-D with bias", (r(2, 3, 8),), (r(8), r(8))),
    Call("layernorm", "3-D without bias", (r(2, 3, 8),), (r(8), None)),
    Call("layernorm", "1-D with bias", (r(8),), (r(8), r(8))),
    Call("rmsnorm", "3-D", (r(2, 3, 8),), (r(8),)),
    Call("llama_rmsnorm", "3-D", (r(2, 3, 8),), (r(8),)),
    Call("llama_rmsnorm", "two heads", (r(2, 3, 8),), (r(4),)),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def normalized(row: Array) -> list[float]:
    mean = math.fsum(row) / len(row)
    variance = math.fsum((x - mean) ** 2 for x in row) / len(row)
    return [(x - mean) / math.sqrt(variance + 1e-5) for x in row]


def test_layernorm_has_mean_0_and_variance_1_before_weight_and_bias() -> None:
    # Small values in row 0, so that a wrong place or size of eps is seen.
    x, w, b = draw(2, 3, 8), draw(8, seed=2), draw(8, seed=3)
    x[0] *= 1e-3
    expected = np.array([[normalized(row) for row in plane] for plane in x])
    assert_close(forward("layernorm", x, w, b), expected * w + b)
    assert_close(forward("layernorm", x, w, None), expected * w)
    assert_close(forward("layernorm", x[1, 1], w, b), expected[1, 1] * w + b)


def test_rmsnorm_divides_by_the_root_of_the_mean_square() -> None:
    x, w = draw(2, 3, 8), draw(8, seed=2)
    x[0] *= 1e-3
    roots = np.array([[math.sqrt(math.fsum(v * v for v in row) / 8 + 1e-5) for row in plane] for plane in x])
    assert_close(forward("rmsnorm", x, w), x / roots[..., None] * w)


def test_llama_rmsnorm_normalizes_each_head_by_itself() -> None:
    x, w = draw(2, 3, 8), draw(4, seed=2)
    heads = forward("rmsnorm", x.reshape(2, 3, 2, 4), w)
    assert_close(forward("llama_rmsnorm", x, w), heads.reshape(2, 3, 8))


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_eps_is_added_to_the_mean_square(eps: float) -> None:
    x, w, b = draw(2, 3, 8), draw(8, seed=2), draw(8, seed=3)
    x[0] *= 1e-3
    root = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    assert_close(forward("rmsnorm", x, w, eps=eps), x / root * w)
    assert_close(forward("llama_rmsnorm", x, w, eps=eps), x / root * w)
    centered = x - x.mean(-1, keepdims=True)
    root = np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
    assert_close(forward("layernorm", x, w, b, eps=eps), centered / root * w + b)


@pytest.mark.parametrize("fmt", UNIFORM)
def test_one_element_is_its_own_mean(fmt: str) -> None:
    y, (dx, dw, db) = run(fmt, "layernorm", [array([[3.0]], fmt)], [array([2.0], fmt), array([5.0], fmt)])
    assert same(y, [[5.0]]) and same(dx, [[0.0]]) and same(dw, [0.0]) and same(db, [1.0])


# -------------------------------------------------------------------------------------------------------------- roundings


@pytest.mark.parametrize("fmt", LOW)
def test_gradients_are_summed_over_rows_in_32_bits(fmt: str) -> None:
    n = 4096  # adding ones in bf16 stops at 256, in fp16 at 2048
    x = array(np.tile([1.0, -1.0], (n, 1)), fmt)  # normalized: 1/sqrt(1 + 1e-5) = 1 - 5e-6
    _, (_, dw, db) = run(fmt, "layernorm", [x], [array([1.0, 1.0], fmt), array([0.0, 0.0], fmt)])
    assert same(db, [n, n]) and same(dw, [n, -n])
    for op in ("rmsnorm", "llama_rmsnorm"):
        assert same(run(fmt, op, [x], [array([1.0, 1.0], fmt)])[1][1], [n, -n])


@pytest.mark.parametrize("fmt", LOW)
def test_llama_rmsnorm_rounds_before_the_weight_and_after_it(fmt: str) -> None:
    """Where rmsnorm rounds once. Both are exact but for the root, so that nearly every element is the one expected."""
    x, w = array(draw(40, 50), fmt), array(draw(50, seed=2), fmt)
    n = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-5)
    twice, once = rounded_once(rounded_once(n, fmt) * wide(w), fmt), rounded_once(n * wide(w), fmt)
    y = wide(run(fmt, "llama_rmsnorm", [x], [w])[0])
    # FP32 errs by some 2^-22 and half an ulp is 2^-12 at least of a value: one element in a hundred at most is near a tie.
    assert (y == twice).mean() > 0.99 and (y == once).mean() < 0.9
    assert (wide(run(fmt, "rmsnorm", [x], [w])[0]) == once).mean() > 0.99


@pytest.mark.parametrize("fmt", LOW)
def test_statistics_of_ten_thousand_values_are_summed_in_32_bits(fmt: str) -> None:
    # 10,000 uniforms summed in bf16 stall at 256: a mean of 0.026 for 0.5.
    x = array(np.random.default_rng(5).random((2, 10_000)), fmt)
    exact = wide(x)
    one = array(np.ones(10_000), fmt)
    centered = exact - exact.mean(-1, keepdims=True)
    layernorm = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    rmsnorm = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    # Before the rounding the fp32 values err by less than 10,000 * 2^-24 = 6e-4 of 1 even if nothing cancels, so the
    # result is within that and half a distance of two 16-bit values (u relative) of the exact one.
    for y, expected in (
        (run(fmt, "layernorm", [x], [one, None])[0], layernorm),
        (run(fmt, "rmsnorm", [x], [one])[0], rmsnorm),
        (run(fmt, "llama_rmsnorm", [x], [one])[0], rmsnorm),
    ):
        error = np.abs(wide(y) - expected)
        assert (error <= UNIT[fmt] * np.abs(expected) + 10_000 * 2.0**-24).all()


@pytest.mark.parametrize("op", ["layernorm", "rmsnorm", "llama_rmsnorm"])
def test_squares_beyond_the_range_of_fp16_do_not_overflow(op: str) -> None:
    x = array([[60000.0, -60000.0, 60000.0, -60000.0]], "fp16")
    one = array(np.ones(4), "fp16")
    y, _ = run("fp16", op, [x], [one, None] if op == "layernorm" else [one])
    assert same(y, [[1, -1, 1, -1]])


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("op", ["layernorm", "rmsnorm", "llama_rmsnorm"])
def test_inf_or_nan_lose_the_row_and_no_other(op: str, bad: float, fmt: str) -> None:
    x = array([[1, 2, 3, 4], [1, 2, 3, 4]], fmt)
    one = array(np.ones(4), fmt)
    params = [one, one] if op == "layernorm" else [one]
    good, _ = run(fmt, op, [x], params)
    x[1, 2] = bad
    y, _ = run(fmt, op, [x], params)
    assert same_bits(y[0], good[0]) and np.isnan(wide(y[1, 2]))
    if op == "layernorm" or math.isnan(bad):
        assert np.isnan(wide(y[1])).all()  # the mean itself is not finite
    else:
        assert same(y[1, [0, 1, 3]], [0, 0, 0])  # x / Inf


@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormals_are_divided_by_eps_and_not_by_zero(fmt: str) -> None:
    x = array([[TINY[fmt], -3 * TINY[fmt]]], fmt)
    assert same(run(fmt, "layernorm", [x], [array([1.0, 1.0], fmt), array([2.0, 3.0], fmt)])[0], [[2, 3]])
    y = run(fmt, "llama_rmsnorm", [x], [array([1.0, 1.0], fmt)])[0]
    assert same(y, rounded_once(wide(x) / math.sqrt(1e-5), fmt))


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("layernorm", "rmsnorm", "llama_rmsnorm")], ids=str)
def test_as_pytorch(case: Case) -> None:
    check(case)
