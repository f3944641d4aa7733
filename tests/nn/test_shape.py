"""nn.shape: operations that move values (reshape, transpose, split), and the cast of a parameter."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import AMP, array
from derivatives import Call, check_derivative, draw, forward, normal_numbers
from op_calls import INF, NAN, UNIFORM, bound, run, same
from torch_cases import Case, cases_of, check

from refimpl.nn.ops import OPS

# ---------------------------------------------------------------------------------------------------------------- formula

r = normal_numbers()

CALLS = [
    Call("reshape", "join two axes", (r(2, 3, 4),), static={"shape": (2, 12)}),
    Call("transpose", "a cycle of three axes", (r(2, 3, 4),), static={"axes": (1, 2, 0)}),
    Call("split", "the middle", (r(2, 3, 8),), static={"start": 2, "stop": 5}),
    Call("split", "up to the end", (r(2, 3, 8),), static={"start": 5, "stop": 8}),
    Call("cast", "a parameter", (), (r(3, 4),), {"fmt": "fp64"}),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


def test_operations_that_move_values() -> None:
    x = draw(2, 3, 4)
    assert np.array_equal(
        forward("reshape", x, shape=(2, 12)), [[*x[0, 0], *x[0, 1], *x[0, 2]], [*x[1, 0], *x[1, 1], *x[1, 2]]]
    )
    turned = forward("transpose", x, axes=(1, 2, 0))
    assert turned.shape == (3, 4, 2) and all(turned[j, k, i] == x[i, j, k] for i, j, k in np.ndindex(2, 3, 4))
    assert np.array_equal(forward("split", x, start=1, stop=3), [[row[1:3] for row in plane] for plane in x])
    assert np.array_equal(forward("cast", x, fmt="fp64"), x)


# -------------------------------------------------------------------------------------------------------------- roundings


def test_cast_under_fp64_still_rounds_when_told_to() -> None:
    w = np.array([1 + 2**-12, 1 + 2**-10])
    assert np.array_equal(OPS["cast"].forward(w, p=bound("fp64", "cast"), fmt="fp16")[0].astype(np.float64), [1, 1 + 2**-10])


@pytest.mark.usefixtures("ieee")
def test_a_cast_beyond_the_largest_fp16_is_an_infinity_and_not_the_largest_value() -> None:
    assert same(run("fp16", "cast", [], [array([65519.0, 65520.0], "fp32")], fmt="fp16")[0], [65504.0, INF])
    assert same(run("bf16", "cast", [], [array([65520.0], "fp32")], fmt="bf16")[0], [65536.0])


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_inf_and_nan_are_moved(fmt: str) -> None:
    x = array([[NAN, INF], [-INF, -0.0]], fmt)
    assert same(run(fmt, "reshape", [x], [], shape=(4,))[0], [NAN, INF, -INF, 0])
    assert same(run(fmt, "transpose", [x], [], axes=(1, 0))[0], [[NAN, -INF], [INF, 0]])
    assert same(run(fmt, "split", [x], [], start=1, stop=2)[0], [[INF], [0]])
    assert same(run(fmt, "cast", [], [x], fmt=fmt)[0], x)


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_split_keeps_an_infinite_gradient_inside_the_slice(fmt: str) -> None:
    p = bound(fmt, "split")
    _, saved = OPS["split"].forward(array([[1, 2, 3]], fmt), p=p, start=1, stop=2)
    assert same(OPS["split"].backward(array([[INF]], fmt), saved, p=p, start=1, stop=2)[0], [[0, INF, 0]])


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [*cases_of("reshape", "transpose", "split")], ids=str)
def test_as_pytorch(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", AMP)
def test_the_recorded_cast_of_a_parameter_is_autocasts(recipe: str) -> None:
    check(Case("cast", recipe))
