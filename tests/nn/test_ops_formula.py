"""refimpl.nn.ops under the fp64 recipe: forward against plain definitions, backward against finite differences of forward.

In double precision rounding is out of the way, so what is tested here are the formulas. Every operation of `OPS` has a
case (a test says which has not), and every gradient of every case is broken once to see that the check would notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from refimpl.backends.base import NUMPY
from refimpl.nn.op import Op
from refimpl.nn.ops import OPS, fan_in
from refimpl.precision.context import Bound, Run
from refimpl.precision.recipes import get_recipe

Array = np.ndarray

STEP = 1e-5
"""Of the central difference. Values and third derivatives here are of order 1, so it errs by STEP^2 = 1e-10 in truncation
and by 2^-53 / STEP = 1e-11 in rounding: four decimal places below the tolerance."""

TOLERANCE = 1e-6
"""Relative. A hundred times and more what the difference errs by, a thousandth of the 1e-3 by which a gradient is broken."""

PLAIN = 1e-12
"""Relative, for two ways to evaluate one formula in fp64: some hundred roundings of 2^-53 = 1e-16, and room for a
cancellation of two digits."""


def bound(op: str) -> Bound:
    return Run(get_recipe("fp64").policy, NUMPY).bind(op, "here")


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One call of an operation: floats are differentiated, integers (tokens) are not, None is a parameter left out."""

    op: str
    label: str
    inputs: tuple[Array, ...] = ()
    params: tuple[Array | None, ...] = ()
    static: dict[str, Any] = field(default_factory=dict)

    @property
    def operands(self) -> tuple[Array | None, ...]:
        return (*self.inputs, *self.params)


def away_from_zero(x: Array) -> Array:
    """relu has a kink at 0: no difference quotient may straddle it."""
    return x + 0.1 * np.sign(x)


def make_cases() -> list[Case]:
    rng = np.random.default_rng(0)

    def r(*shape: int) -> Array:
        return rng.standard_normal(shape)

    elementwise = [Case(op, "3-D", (r(2, 3, 4),)) for op in ("silu", "gelu_tanh", "gelu_erf")]
    repeated = np.array([[3, 0, 3], [5, 3, 0]])
    return [
        Case("linear", "2-D with bias", (r(5, 4),), (r(3, 4), r(3))),
        Case("linear", "2-D without bias", (r(5, 4),), (r(3, 4), None)),
        Case("linear", "3-D with bias", (r(2, 5, 4),), (r(3, 4), r(3))),
        Case("linear", "3-D without bias", (r(2, 5, 4),), (r(3, 4), None)),
        Case("linear", "one row, one output", (r(1, 4),), (r(1, 4), r(1))),
        Case("matmul", "2-D", (r(3, 4), r(4, 5))),
        Case("matmul", "4-D batched", (r(2, 3, 4, 5), r(2, 3, 5, 6))),
        Case("attention", "T=1, 1 head", (r(2, 1, 12),), static={"n_head": 1}),
        Case("attention", "T=1, 2 heads", (r(2, 1, 12),), static={"n_head": 2}),
        Case("attention", "T=5, 1 head", (r(2, 5, 12),), static={"n_head": 1}),
        Case("attention", "T=5, 2 heads", (r(2, 5, 12),), static={"n_head": 2}),
        Case("add", "equal shapes", (r(2, 3, 4), r(2, 3, 4))),
        Case("add", "b lacks one axis", (r(2, 3, 4), r(3, 4))),
        Case("add", "b lacks two axes", (r(2, 3, 4), r(4))),
        Case("relu", "3-D", (away_from_zero(r(2, 3, 4)),)),
        *elementwise,
        Case("layernorm", "3-D with bias", (r(2, 3, 8),), (r(8), r(8))),
        Case("layernorm", "3-D without bias", (r(2, 3, 8),), (r(8), None)),
        Case("layernorm", "1-D with bias", (r(8),), (r(8), r(8))),
        Case("rmsnorm", "3-D", (r(2, 3, 8),), (r(8),)),
        Case("softmax", "3-D", (r(2, 3, 8),)),
        Case("embedding", "repeated rows", (repeated,), (r(7, 4),)),
        Case("embedding", "1-D", (np.arange(5),), (r(7, 4),)),
        Case("cross_entropy", "2-D", (r(4, 7), np.array([0, 6, 3, 3]))),
        Case("cross_entropy", "3-D", (r(2, 3, 7), np.array([[0, 6, 3], [3, 1, 2]]))),
        Case("cross_entropy", "some ignored", (r(5, 7), np.array([-100, 6, 3, -100, 3]))),
        Case("cross_entropy", "a class ignored", (r(2, 3, 7), np.array([[0, 6, 3], [3, 1, 2]])), static={"ignore_index": 3}),
        Case("reshape", "join two axes", (r(2, 3, 4),), static={"shape": (2, 12)}),
        Case("transpose", "a cycle of three axes", (r(2, 3, 4),), static={"axes": (1, 2, 0)}),
        Case("split", "the middle", (r(2, 3, 8),), static={"start": 2, "stop": 5}),
        Case("split", "up to the end", (r(2, 3, 8),), static={"start": 5, "stop": 8}),
        Case("cast", "a parameter", (), (r(3, 4),), {"fmt": "fp64"}),
    ]


CASES = make_cases()


def name(case: Case) -> str:
    return f"{case.op}: {case.label}"


def test_every_operation_has_a_case() -> None:
    assert {case.op for case in CASES} == set(OPS)


# ---------------------------------------------------------------------------------------------------------- the checker


def differentiable(case: Case) -> list[int]:
    """Positions of the operands that have a gradient."""
    return [i for i, x in enumerate(case.operands) if x is not None and x.dtype == np.float64]


def gradient_error(op: Op, case: Case) -> float:
    """How far <backward(dy), direction> is from the central difference of <dy, forward>, relative to the larger.

    dy and the direction, over all differentiable inputs and parameters at once, are random (seeded by the case).
    """
    rng = np.random.default_rng(len(case.label) + 100 * len(case.op))
    p = bound(op.name)
    which = differentiable(case)
    direction = {i: rng.standard_normal(case.operands[i].shape) for i in which}

    y, saved = op.forward(*case.operands, p=p, **case.static)
    dy = rng.standard_normal(np.shape(y))[()]
    gradients = op.backward(dy, saved, *case.params, p=p, **case.static)
    assert len(gradients) == len(case.operands)
    for i, x in enumerate(case.operands):
        assert (gradients[i] is not None) == (i in which)
        assert gradients[i] is None or gradients[i].shape == x.shape
    analytic = sum(float((gradients[i] * direction[i]).sum()) for i in which)

    def along(step: float) -> float:
        moved = [x + step * direction[i] if i in direction else x for i, x in enumerate(case.operands)]
        return float((op.forward(*moved, p=p, **case.static)[0] * dy).sum())

    numeric = (along(STEP) - along(-STEP)) / (2 * STEP)
    return abs(analytic - numeric) / max(abs(analytic), abs(numeric))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_backward_is_the_derivative_of_forward(case: Case) -> None:
    assert gradient_error(OPS[case.op], case) <= TOLERANCE


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case.op == "attention"], ids=str)
def test_backward_is_the_derivative_of_forward_by_blocks_of_queries(
    case: Case, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPS["attention"].forward.__globals__, "QUERIES", queries)
    assert gradient_error(OPS[case.op], case) <= TOLERANCE


BROKEN = [(case, i) for case in CASES for i in differentiable(case)]


@pytest.mark.parametrize(("case", "which"), BROKEN, ids=[f"{name(case)}, gradient {i}" for case, i in BROKEN])
def test_the_check_notices_one_gradient_that_is_a_thousandth_too_large(case: Case, which: int) -> None:
    right = OPS[case.op]

    def backward(*args: Any, **kwargs: Any) -> tuple[Array | None, ...]:
        gradients = list(right.backward(*args, **kwargs))
        gradients[which] = gradients[which] * 1.001
        return tuple(gradients)

    # One of several gradients carries at least a hundredth of the derivative (seeded): 1e-5, ten tolerances.
    assert gradient_error(replace(right, backward=backward), case) > 10 * TOLERANCE


def test_the_check_notices_a_gradient_laid_out_in_the_wrong_order() -> None:
    case = next(case for case in CASES if case.label == "T=5, 2 heads")

    def backward(*args: Any, **kwargs: Any) -> tuple[Array]:
        dq, dk, dv = np.split(OPS["attention"].backward(*args, **kwargs)[0], 3, axis=-1)
        return (np.concatenate([dk, dq, dv], axis=-1),)

    assert gradient_error(replace(OPS["attention"], backward=backward), case) > 0.01


# --------------------------------------------------------------------------------------------- forward: the definitions


def forward(op: str, *operands: Array | None, **static: Any) -> Array:
    return OPS[op].forward(*operands, p=bound(op), **static)[0]


def assert_close(got: Array, expected: Any) -> None:
    expected = np.asarray(expected)
    assert np.shape(got) == expected.shape
    assert np.abs(got - expected).max() <= PLAIN * max(1.0, np.abs(expected).max())


def draw(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


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


def test_add_repeats_b_along_the_axes_it_lacks() -> None:
    a, b = draw(2, 3, 4), draw(3, 4, seed=2)
    expected = [[[a[i, j, k] + b[j, k] for k in range(4)] for j in range(3)] for i in range(2)]
    assert np.array_equal(forward("add", a, b), expected)


POINTWISE: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
}


@pytest.mark.parametrize("op", POINTWISE)
def test_pointwise_operations_do_what_the_formula_says(op: str) -> None:
    x = np.concatenate([np.linspace(-8, 8, 161), [0.0, -0.0, 1e-300, 30.0, -30.0]]).reshape(2, -1)
    assert_close(forward(op, x), np.vectorize(POINTWISE[op], otypes=[np.float64])(x))


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


def softmax_of(row: Array) -> list[float]:
    e = [math.exp(v) for v in row]
    return [v / math.fsum(e) for v in e]


def test_softmax_by_definition() -> None:
    x = draw(2, 3, 8)
    assert_close(forward("softmax", x), [[softmax_of(row) for row in plane] for plane in x])
    assert_close(forward("softmax", x + 1000), forward("softmax", x + 1000 - 1000))  # a shift changes nothing, nor overflows


def test_embedding_is_a_lookup() -> None:
    w, tokens = draw(7, 4), np.array([[3, 0, 3], [6, 3, 0]])
    assert np.array_equal(forward("embedding", tokens, w), [[w[t] for t in row] for row in tokens])


def test_cross_entropy_is_the_mean_of_minus_the_log_of_the_target_probability() -> None:
    logits, targets = draw(2, 3, 7), np.array([[0, 6, 3], [3, 1, 2]])
    each = [-math.log(softmax_of(logits[i, j])[targets[i, j]]) for i, j in np.ndindex(2, 3)]
    assert_close(forward("cross_entropy", logits, targets), math.fsum(each) / 6)
    assert_close(forward("cross_entropy", np.zeros((5, 11)), np.arange(5)), math.log(11))


def test_operations_that_move_values() -> None:
    x = draw(2, 3, 4)
    assert np.array_equal(
        forward("reshape", x, shape=(2, 12)), [[*x[0, 0], *x[0, 1], *x[0, 2]], [*x[1, 0], *x[1, 1], *x[1, 2]]]
    )
    turned = forward("transpose", x, axes=(1, 2, 0))
    assert turned.shape == (3, 4, 2) and all(turned[j, k, i] == x[i, j, k] for i, j, k in np.ndindex(2, 3, 4))
    assert np.array_equal(forward("split", x, start=1, stop=3), [[row[1:3] for row in plane] for plane in x])
    assert np.array_equal(forward("cast", x, fmt="fp64"), x)


def test_cast_under_fp64_still_rounds_when_told_to() -> None:
    w = np.array([1 + 2**-12, 1 + 2**-10])
    assert np.array_equal(OPS["cast"].forward(w, p=bound("cast"), fmt="fp16")[0].astype(np.float64), [1, 1 + 2**-10])


def test_fan_in_is_a_sum() -> None:
    a, b = draw(3, 4), draw(3, 4, seed=2)
    assert np.array_equal(fan_in.forward(a, b, bound("fan_in"))[0], a + b)


# ------------------------------------------------------------------------------------------------------------ attention


def attention_of(qkv: Array, n_head: int) -> Array:
    """Position by position and head by head, from the definition."""
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // n_head
    out = np.zeros((B, T, C))
    for n, h, i in np.ndindex(B, n_head, T):
        part = slice(h * D, (h + 1) * D)
        q, k, v = (qkv[n, :, j * C : (j + 1) * C][:, part] for j in range(3))
        weights = softmax_of(np.array([float(q[i] @ k[j]) / math.sqrt(D) for j in range(i + 1)]))
        out[n, i, part] = sum(weight * v[j] for j, weight in enumerate(weights))
    return out


@pytest.mark.parametrize("n_head", [1, 2, 3])
@pytest.mark.parametrize("T", [1, 5])
def test_attention_by_definition(T: int, n_head: int) -> None:
    qkv = draw(2, T, 36)
    assert_close(forward("attention", qkv, n_head=n_head), attention_of(qkv, n_head))


@pytest.mark.parametrize("n_head", [1, 2])
def test_attention_over_one_position_returns_v(n_head: int) -> None:
    qkv = draw(3, 1, 12)
    assert np.array_equal(forward("attention", qkv, n_head=n_head), qkv[..., 8:])


@pytest.mark.parametrize("later", [1, 2, 4])
def test_attention_does_not_look_ahead(later: int) -> None:
    qkv = draw(2, 5, 12)
    changed = qkv.copy()
    changed[:, later] += 1
    before, after = forward("attention", qkv, n_head=2), forward("attention", changed, n_head=2)
    assert np.array_equal(before[:, :later], after[:, :later])
    assert (before[:, later:] != after[:, later:]).all()  # and every later position does see the change


def test_gradients_of_attention_do_not_flow_from_the_past_to_the_future() -> None:
    qkv, dO = draw(1, 5, 12), draw(1, 5, 4, seed=2)
    dO[:, 3:] = 0
    p = bound("attention")
    _, saved = OPS["attention"].forward(qkv, p=p, n_head=2)
    (dqkv,) = OPS["attention"].backward(dO, saved, p=p, n_head=2)
    assert not dqkv[:, 3:].any() and dqkv[:, :3].any()
