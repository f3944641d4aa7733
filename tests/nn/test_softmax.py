"""nn.softmax: forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import FORMATS, LOW, array, wide
from bounds import SMALLEST_EXPONENT
from derivatives import Call, assert_close, check_derivative, draw, forward, normal_numbers, softmax_of
from op_calls import INF, NAN, TINY, UNIFORM, rounded_once, run, same
from torch_cases import Case, cases_of, check, check_special_values, results, subnormal

# ---------------------------------------------------------------------------------------------------------------- formula

r = normal_numbers()

CALLS = [
    Call("softmax", "3-D", (r(2, 3, 8),)),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def test_softmax_by_definition() -> None:
    x = draw(2, 3, 8)
    assert_close(forward("softmax", x), [[softmax_of(row) for row in plane] for plane in x])
    assert_close(forward("softmax", x + 1000), forward("softmax", x + 1000 - 1000))  # a shift changes nothing, nor overflows


@pytest.mark.parametrize("fmt", UNIFORM)
def test_one_element_has_all_of_the_probability(fmt: str) -> None:
    y, (dx,) = run(fmt, "softmax", [array([[3.0]], fmt)], [])
    assert same(y, [[1.0]]) and same(dx, [[0.0]])


# -------------------------------------------------------------------------------------------------------------- roundings


@pytest.mark.parametrize("fmt", LOW)
def test_ten_thousand_values_are_summed_in_32_bits(fmt: str) -> None:
    y, _ = run(fmt, "softmax", [array(np.zeros(10_000), fmt)], [])
    assert same(y, np.full(10_000, rounded_once(1e-4, fmt)))


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("fmt", UNIFORM)
def test_softmax_of_large_values(fmt: str) -> None:
    y, (dx,) = run(fmt, "softmax", [array([[1e4, 1e4, -1e4], [-1e4, -1e4, -1e4 - 512]], fmt)], [])
    assert same(y, [[0.5, 0.5, 0], [0.5, 0.5, 0]]) and same(dx, np.zeros((2, 3)))


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan(fmt: str) -> None:
    y, _ = run(fmt, "softmax", [array([[0, 0, -INF], [0, INF, 0], [0, NAN, 0], [-INF, -INF, -INF], [0, 0, 0]], fmt)], [])
    assert same(y[0], [0.5, 0.5, 0]) and np.isnan(wide(y[1:4])[:, 1]).all()
    assert same(y[2], [NAN] * 3) and same(y[3], [NAN] * 3) and same(y[4], [rounded_once(1 / 3, fmt)] * 3)


@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormals_are_numbers(fmt: str) -> None:
    assert same(run(fmt, "softmax", [array([[TINY[fmt], -3 * TINY[fmt]]], fmt)], [])[0], [[0.5, 0.5]])


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("softmax")], ids=str)
def test_as_pytorch(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", FORMATS)
def test_special_values_as_pytorch(fmt: str) -> None:
    check_special_values("softmax", fmt)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("op", ["softmax"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_subnormal_operands_as_pytorch(op: str, fmt: str) -> None:
    check(subnormal(op, fmt))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", LOW)
def test_subnormal_results(fmt: str) -> None:
    # Values so far apart that many probabilities are subnormal, and their gradients too.
    case = Case("softmax", fmt, (fmt,), {"fp16": 6.0, "bf16": 45.0}[fmt])
    check(case)
    y = wide(results(case)[0])
    assert np.count_nonzero((y > 0) & (y < 2.0 ** SMALLEST_EXPONENT[fmt])) > 100
