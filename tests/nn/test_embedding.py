"""nn.embedding: a lookup, and the sum of the gradients of each row."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import FORMATS, LOW, array, rounded, wide
from bounds import agreement, embedding_near, near, ours
from derivatives import Call, check_derivative, draw, forward, normal_numbers
from op_calls import INF, NAN, TINY, UNIFORM, bound, run, same
from torch_cases import Case, F, assert_agrees, cases_of, check, subnormal, theirs

from refimpl.nn.ops import OPS
from refimpl.precision.recipes import get_recipe

# ---------------------------------------------------------------------------------------------------------------- formula

r, REPEATED = normal_numbers(), np.array([[3, 0, 3], [5, 3, 0]])

CALLS = [
    Call("embedding", "repeated rows", (REPEATED,), (r(7, 4),)),
    Call("embedding", "1-D", (np.arange(5),), (r(7, 4),)),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def test_embedding_is_a_lookup() -> None:
    w, tokens = draw(7, 4), np.array([[3, 0, 3], [6, 3, 0]])
    assert np.array_equal(forward("embedding", tokens, w), [[w[t] for t in row] for row in tokens])


@pytest.mark.parametrize("fmt", UNIFORM)
def test_one_token_and_one_column(fmt: str) -> None:
    y, (_, dw) = run(fmt, "embedding", [np.array(1)], [array([[1.0], [4.0]], fmt)])
    assert same(y, [4.0]) and same(dw, [[0.0], [1.0]])


# -------------------------------------------------------------------------------------------------------------- roundings


@pytest.mark.parametrize("fmt", LOW)
def test_gradients_of_a_row_do_not_stop_at_the_precision_of_16_bits(fmt: str) -> None:
    n = 4096  # adding ones in bf16 stops at 256, in fp16 at 2048
    assert same(run(fmt, "embedding", [np.zeros(n, np.int64)], [array([[0.0], [0.0]], fmt)])[1][1], [[n], [0]])


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan(fmt: str) -> None:
    w = array([[1, 2], [INF, NAN], [3, 4]], fmt)
    p = bound(fmt, "embedding")
    y, saved = OPS["embedding"].forward(np.array([0, 1, 0]), w, p=p)
    assert same(y, [[1, 2], [INF, NAN], [1, 2]])
    _, dw = OPS["embedding"].backward(array([[INF, 1], [1, 1], [-INF, 1]], fmt), saved, w, p=p)
    assert same(dw, [[NAN, 2], [1, 1], [0, 0]])


@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormals_are_numbers(fmt: str) -> None:
    x = array([[TINY[fmt], -3 * TINY[fmt]]], fmt)
    assert same(run(fmt, "embedding", [np.array([0])], [x])[0], x)


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("embedding")], ids=str)
def test_as_pytorch(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("op", ["embedding"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_subnormal_operands_as_pytorch(op: str, fmt: str) -> None:
    check(subnormal(op, fmt))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", LOW)
def test_embedding_gradient_of_a_row_that_is_used_thousands_of_times(fmt: str) -> None:
    # Row 3 stands in 5000 places with gradients near 1: the sum is rounded once. PyTorch's CPU kernel rounds after each
    # addition and stops where half an ulp is more than 1; its sum in FP32 is the reference.
    rng = np.random.default_rng(22)
    tokens = np.where(rng.random(6000) < 5 / 6, 3, rng.integers(0, 20, 6000))
    w, dy = array(rng.standard_normal((20, 16)), fmt), array(1 + 0.1 * rng.standard_normal((6000, 16)), fmt)
    _, (_, dw) = ours(get_recipe(fmt).policy, "embedding", [tokens, w], dy)
    _, (_, in_fp32) = theirs(F.embedding, [tokens, w], dy, "fp32")
    _, (_, in_16_bits) = theirs(F.embedding, [tokens, w], dy)
    exact = embedding_near(tokens, near(wide(w)), near(wide(dy)))[1]
    assert_agrees(dw, rounded(wide(in_fp32), fmt), exact, fmt, "dw")
    assert agreement(dw, wide(in_16_bits), exact, fmt).theirs_outside > 16
    assert wide(in_16_bits)[3].max() < 0.9 * wide(dw)[3].min()
