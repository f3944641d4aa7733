"""nn.ops in 16 and 32 bits: formats of every result, where it rounds and where it must not, Inf, NaN, subnormals, empty.

Everything here is exact: bits, formats and NaN-ness are compared, nothing has a tolerance but where one is derived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from arrays import AMP, DTYPE, LOW, Array, U, array, same_bits, wide

from refimpl.backends.base import NUMPY
from refimpl.nn.ops import OPS, fan_in
from refimpl.precision.context import MAP_BLOCK, Bound, Monitor, Run
from refimpl.precision.recipes import get_recipe

UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # unit roundoff: half the distance from 1 to the next value
INF, NAN = math.inf, math.nan

UNIFORM = ["fp32", "fp16", "bf16"]


def bound(recipe: str, op: str, monitor: Monitor | None = None) -> Bound:
    return Run(get_recipe(recipe).policy, NUMPY, monitor).bind(op, "here")


def rounded_once(x: Any, fmt: str) -> Array:
    """fp64 -> the format, rounded once (numpy's and ml_dtypes' own conversions), back in fp64 for arithmetic."""
    with np.errstate(over="ignore"):
        return wide(np.asarray(x, np.float64).astype(DTYPE[fmt]))


def same(a: Any, b: Any) -> bool:
    """Equal values, NaN equal to NaN."""
    return bool(np.array_equal(wide(a), wide(b), equal_nan=True))


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
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


TOKENS = np.array([[3, 0, 3], [6, 3, 0]])
CASES = {
    case.op: case
    for case in (
        Case("linear", ((2, 3, 8),), ((5, 8), (5,))),
        Case("matmul", ((2, 3, 8), (2, 8, 4))),
        Case("attention", ((2, 5, 24),), static={"n_head": 2}),
        Case("add", ((2, 3, 4), (3, 4))),
        Case("relu", ((3, 8),)),
        Case("silu", ((3, 8),)),
        Case("gelu_tanh", ((3, 8),)),
        Case("gelu_erf", ((3, 8),)),
        Case("layernorm", ((2, 3, 8),), ((8,), (8,))),
        Case("rmsnorm", ((2, 3, 8),), ((8,),)),
        Case("softmax", ((3, 8),)),
        Case("embedding", (TOKENS,), ((7, 4),)),
        Case("cross_entropy", ((2, 3, 7), TOKENS)),
        Case("reshape", ((2, 3, 4),), static={"shape": (6, 4)}),
        Case("transpose", ((2, 3, 4),), static={"axes": (2, 0, 1)}),
        Case("split", ((3, 8),), static={"start": 2, "stop": 5}),
        Case("cast", (), ((3, 4),), {"fmt": "fp16"}),
    )
}


def run(recipe: str, op: str, inputs: list[Array], params: list[Array | None], **static: Any) -> tuple[Array, list[Array]]:
    """Forward, and backward with a gradient of ones in the format of the output: (output, gradients)."""
    p = bound(recipe, op)
    y, saved = OPS[op].forward(*inputs, *params, p=p, **static)
    dy = np.ones(np.shape(y), y.dtype)
    return y, list(OPS[op].backward(dy, saved, *params, p=p, **static))


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(OPS)


# -------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize("op", CASES)
def test_uniform_recipes_keep_every_tensor_in_their_format(op: str, fmt: str) -> None:
    inputs, params, static = CASES[op].draw(fmt)
    if op == "cast":
        static = {"fmt": fmt}
    y, gradients = run(fmt, op, inputs, params, **static)
    assert y.dtype == (np.float32 if op == "cross_entropy" else DTYPE[fmt])  # the loss is FP32 in every recipe
    for x, dx in zip(inputs + params, gradients, strict=True):
        if x.dtype == np.int64:
            assert dx is None
        else:
            assert dx.dtype == DTYPE[fmt] and dx.shape == x.shape


# Of torch.autocast on FP32 inputs. Products are low in both lists; normalization, softmax and losses come out FP32 in
# both: on CUDA since they are in the FP32 list, on CPU since they keep the format of the input.
LOW_FROM_FP32 = {"linear", "matmul", "attention", "cast"}
# Of 16-bit inputs (with FP32 parameters): what the CUDA list takes to FP32 and the CPU list leaves as it is.
CUDA_FP32_FROM_LOW = {"layernorm", "rmsnorm", "softmax"}


@pytest.mark.parametrize("recipe", AMP)
@pytest.mark.parametrize("op", CASES)
def test_autocast_on_fp32_tensors(op: str, recipe: str) -> None:
    low = AMP[recipe]
    inputs, params, static = CASES[op].draw("fp32")
    if op == "cast":
        static = {"fmt": low}
    y, gradients = run(recipe, op, inputs, params, **static)
    assert y.dtype == (DTYPE[low] if op in LOW_FROM_FP32 else np.float32)
    for x, dx in zip(inputs + params, gradients, strict=True):
        if x.dtype == np.int64:
            assert dx is None
            continue
        assert dx.dtype == np.float32 and dx.shape == x.shape
        if op in LOW_FROM_FP32:  # the gradient of an operand has no more precision than its 16-bit copy had
            assert same(dx, rounded_once(dx, low))


@pytest.mark.parametrize("recipe", AMP)
@pytest.mark.parametrize("op", [op for op in CASES if op not in ("embedding", "cast")])
def test_autocast_on_16_bit_activations(op: str, recipe: str) -> None:
    low = AMP[recipe]
    inputs, _, static = CASES[op].draw(low)
    _, params, _ = CASES[op].draw("fp32")
    y, gradients = run(recipe, op, inputs, params, **static)
    takes_up = op == "cross_entropy" or (op in CUDA_FP32_FROM_LOW and not recipe.endswith("cpu"))
    assert y.dtype == (np.float32 if takes_up else DTYPE[low])
    for x, dx in zip(inputs + params, gradients, strict=True):
        assert dx is None if x.dtype == np.int64 else (dx.dtype == x.dtype and dx.shape == x.shape)


@pytest.mark.parametrize("recipe", AMP)
def test_autocast_adds_fp32_and_16_bit_in_fp32(recipe: str) -> None:
    low = AMP[recipe]
    a, b = array([1.0, 1.0], "fp32"), array([2.0**-9, 2.0**-12], low)
    y, (da, db) = run(recipe, "add", [a, b], [])
    assert y.dtype == np.float32 and same(y, [1 + 2.0**-9, 1 + 2.0**-12])  # in 16 bits the second would be 1
    assert (da.dtype, db.dtype) == (np.float32, DTYPE[low])


def roundings_of_attention(recipe: str) -> dict[str, str]:
    """Site -> the dtype it rounded to, in the order of the first visit."""
    seen: dict[str, str] = {}
    qkv = CASES["attention"].draw("fp32")[0][0]
    p = bound(recipe, "attention", lambda site, before, after: seen.setdefault(site.removeprefix("here:"), after.dtype.name))
    OPS["attention"].forward(qkv, p=p, n_head=2)
    return seen


def test_attention_rounds_where_each_list_of_autocast_does() -> None:
    cast_in = {"attention.scores.q": "float16", "attention.scores.k": "float16"}
    values = {"attention.values.v": "float16", "attention.values.O": "float16"}
    # CUDA: softmax reads S in FP32 (exact, so no rounding); P is FP32 and is rounded when the second product reads it.
    assert roundings_of_attention("amp-fp16") == cast_in | values | {
        "attention.scores.S": "float16", "attention.scale.S": "float16", "attention.values.P": "float16",
    }  # fmt: skip
    # CPU: softmax stays in 16 bits, P is rounded as it leaves it.
    assert roundings_of_attention("amp-fp16-cpu") == cast_in | values | {
        "attention.scores.S": "float16", "attention.scale.S": "float16", "attention.softmax.P": "float16",
    }  # fmt: skip
    assert roundings_of_attention("fp32") == {}


# --------------------------------------------------------------------------------------------------------- one rounding


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


# ---------------------------------------------------------------------------------------------- accumulation in 32 bits


@pytest.mark.parametrize("fmt", LOW)
def test_sums_over_rows_do_not_stop_at_the_precision_of_16_bits(fmt: str) -> None:
    # Adding ones in bf16 stops at 256, in fp16 at 2048.
    n = 4096
    ones = array(np.ones((n, 1)), fmt)
    _, (_, dw, db) = run(fmt, "linear", [ones], [array([[1.0]], fmt), array([0.0], fmt)])
    assert same(dw, [[n]]) and same(db, [n])
    assert same(run(fmt, "linear", [ones.T], [ones.T, None])[0], [[n]])
    assert same(run(fmt, "matmul", [ones.T, ones], [])[0], [[n]])
    assert same(run(fmt, "embedding", [np.zeros(n, np.int64)], [array([[0.0], [0.0]], fmt)])[1][1], [[n], [0]])
    assert same(run(fmt, "add", [ones, array([0.0], fmt)], [])[1][1], [n])
    x = array(np.tile([1.0, -1.0], (n, 1)), fmt)  # normalized: 1/sqrt(1 + 1e-5) = 1 - 5e-6
    _, (_, dw, db) = run(fmt, "layernorm", [x], [array([1.0, 1.0], fmt), array([0.0, 0.0], fmt)])
    assert same(db, [n, n]) and same(dw, [n, -n])
    assert same(run(fmt, "rmsnorm", [x], [array([1.0, 1.0], fmt)])[1][1], [n, -n])


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
    ):
        error = np.abs(wide(y) - expected)
        assert (error <= UNIT[fmt] * np.abs(expected) + 10_000 * 2.0**-24).all()
    y, _ = run(fmt, "softmax", [array(np.zeros(10_000), fmt)], [])
    assert same(y, np.full(10_000, rounded_once(1e-4, fmt)))
    loss, _ = run(fmt, "cross_entropy", [array(np.zeros((4096, 2)), fmt), np.zeros(4096, np.int64)], [])
    assert float(loss) == pytest.approx(math.log(2), rel=4096 * 2.0**-24)  # gamma_n of a sum of equal terms


@pytest.mark.parametrize("op", ["layernorm", "rmsnorm"])
def test_squares_beyond_the_range_of_fp16_do_not_overflow(op: str) -> None:
    x = array([[60000.0, -60000.0, 60000.0, -60000.0]], "fp16")
    one = array(np.ones(4), "fp16")
    y, _ = run("fp16", op, [x], [one, None] if op == "layernorm" else [one])
    assert same(y, [[1, -1, 1, -1]])


def test_products_beyond_the_range_of_fp16_may_cancel_before_the_rounding() -> None:
    x, w = array([[300.0, 300.0, 1.0]], "fp16"), array([[300.0, -300.0, 5.0]], "fp16")
    assert same(run("fp16", "linear", [x], [w, None])[0], [[5.0]])


# ------------------------------------------------------------------------------------------------------------ large values


@pytest.mark.parametrize("fmt", UNIFORM)
def test_cross_entropy_of_large_logits(fmt: str) -> None:
    logits = array([[1e4, 0.0, -1e4], [-1e4, 1e4, 1e4]], fmt)
    largest = float(logits[0, 0])  # bf16 has no 1e4
    loss, (dz, _) = run(fmt, "cross_entropy", [logits, np.array([0, 1])], [])
    # Row 0 is certain: loss 0. Row 1 is one of two: log 2. Mean log(2)/2, in fp32: a log, an addition and a mean, 3 u.
    assert float(loss) == pytest.approx(math.log(2) / 2, rel=4 * U)
    assert same(dz, [[0, 0, 0], [0, -0.25, 0.25]])
    loss, (dz, _) = run(fmt, "cross_entropy", [logits, np.array([2, 2])], [])
    assert float(loss) == pytest.approx((2 * largest + math.log(2)) / 2, rel=4 * U)
    assert same(dz, [[0.5, 0, -0.5], [0, 0.25, -0.25]])


@pytest.mark.parametrize("fmt", UNIFORM)
def test_softmax_of_large_values(fmt: str) -> None:
    y, (dx,) = run(fmt, "softmax", [array([[1e4, 1e4, -1e4], [-1e4, -1e4, -1e4 - 512]], fmt)], [])
    assert same(y, [[0.5, 0.5, 0], [0.5, 0.5, 0]]) and same(dx, np.zeros((2, 3)))


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
def test_activations_of_large_values_are_the_value_or_zero(fmt: str) -> None:
    x = array([1e4, -1e4, 88.0, -104.0], fmt)
    positive = wide(x).clip(0)
    for op in ("relu", "silu", "gelu_tanh", "gelu_erf"):
        y, (dx,) = run(fmt, op, [x], [])
        # silu(-104) = -104 exp(-104) = -7e-44: subnormal in fp32, 0 in 16 bits.
        assert np.abs(wide(y) - positive).max() <= 1e-43 and np.abs(wide(dx) - (positive > 0)).max() <= 1e-36


@pytest.mark.usefixtures("ieee")
def test_a_result_beyond_the_largest_fp16_is_an_infinity_and_not_the_largest_value() -> None:
    big = array([[60000.0]], "fp16")
    two = array([[2.0]], "fp16")
    assert same(run("fp16", "add", [big, big], [])[0], [[INF]])
    assert same(fan_in.forward(-big, -big, bound("fp16", "fan_in"))[0], [[-INF]])
    y, (dx, dw, _) = run("fp16", "linear", [big], [two, None])
    assert same(y, [[INF]]) and same(dx, two) and same(dw, big)
    _, (_, dw, db) = run("fp16", "linear", [array(np.full((2, 1), 6e4), "fp16")], [two, array([0.0], "fp16")])
    assert same(dw, [[INF]]) and same(db, [2.0])
    assert same(run("fp16", "cast", [], [array([65519.0, 65520.0], "fp32")], fmt="fp16")[0], [65504.0, INF])
    assert same(run("bf16", "cast", [], [array([65520.0], "fp32")], fmt="bf16")[0], [65536.0])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("recipe", ["amp-fp16", "amp-fp16-cpu"])
def test_an_fp32_gradient_shows_the_overflow_of_the_16_bit_product(recipe: str) -> None:
    x = array(np.full((2, 1), 60000.0), "fp32")
    _, (dx, dw, db) = run(recipe, "linear", [x], [array([[1.0]], "fp32"), array([0.0], "fp32")])
    assert same(dw, [[INF]]) and dw.dtype == np.float32  # 120000 would fit fp32, but not the 16 bits it was computed for
    assert same(dx, [[1], [1]]) and same(db, [2])


# ------------------------------------------------------------------------------------------------------------ Inf and NaN


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", UNIFORM)
class TestSpecialValues:
    """Inf and NaN go where IEEE 754 sends them, into what depends on them, and nowhere else."""

    def test_add(self, fmt: str) -> None:
        y, _ = run(fmt, "add", [array([INF, INF, NAN, -INF], fmt), array([1, -INF, 1, -INF], fmt)], [])
        assert same(y, [INF, NAN, NAN, -INF])

    def test_relu(self, fmt: str) -> None:
        y, (dx,) = run(fmt, "relu", [array([INF, -INF, NAN, 0, -0.0, -1], fmt)], [])
        assert same(y, [INF, 0, NAN, 0, 0, 0])
        assert same(dx[[0, 1, 3, 4, 5]], [1, 0, 0, 0, 0])

    def test_relu_stops_an_infinite_gradient_where_it_is_off(self, fmt: str) -> None:
        p = bound(fmt, "relu")
        _, saved = OPS["relu"].forward(array([-1, 1], fmt), p=p)
        assert same(OPS["relu"].backward(array([INF, INF], fmt), saved, p=p)[0], [0, INF])

    @pytest.mark.parametrize("op", ["silu", "gelu_tanh", "gelu_erf"])
    def test_smooth_activations(self, op: str, fmt: str) -> None:
        # x times a factor in [0, 1]: at -Inf the formula is Inf * 0, so NaN although the limit is 0 (as in PyTorch).
        y, _ = run(fmt, op, [array([INF, NAN, 0, -INF], fmt)], [])
        assert same(y, [INF, NAN, 0, NAN])

    def test_linear(self, fmt: str) -> None:
        x = array([[1, 1], [INF, 1], [INF, NAN], [INF, -INF], [INF, 0]], fmt)
        w = array([[1, 1], [-1, 1], [0, 1]], fmt)
        y, _ = run(fmt, "linear", [x], [w, array([0, 0, 0], fmt)])
        assert same(y, [[2, 0, 1], [INF, -INF, NAN], [NAN, NAN, NAN], [NAN, -INF, NAN], [INF, -INF, NAN]])

    def test_gradients_of_linear(self, fmt: str) -> None:
        p = bound(fmt, "linear")
        w, b = array([[1, 2], [3, 4]], fmt), array([0, 0], fmt)
        _, saved = OPS["linear"].forward(array([[1, 1], [1, 0]], fmt), w, b, p=p)
        dx, dw, db = OPS["linear"].backward(array([[1, 1], [INF, 1]], fmt), saved, w, b, p=p)
        assert same(dx, [[4, 6], [INF, INF]]) and same(dw, [[INF, NAN], [2, 1]]) and same(db, [INF, 2])

    def test_matmul(self, fmt: str) -> None:
        a, b = array([[[1, INF]], [[1, 1]]], fmt), array([[[1], [2]], [[1], [NAN]]], fmt)
        assert same(run(fmt, "matmul", [a, b], [])[0], [[[INF]], [[NAN]]])
        assert same(run(fmt, "matmul", [a, array([[[1], [0]], [[1], [1]]], fmt)], [])[0], [[[NAN]], [[2]]])

    @pytest.mark.parametrize("bad", [INF, -INF, NAN])
    @pytest.mark.parametrize("op", ["layernorm", "rmsnorm"])
    def test_norms_lose_the_row_and_no_other(self, op: str, bad: float, fmt: str) -> None:
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

    def test_softmax(self, fmt: str) -> None:
        y, _ = run(fmt, "softmax", [array([[0, 0, -INF], [0, INF, 0], [0, NAN, 0], [-INF, -INF, -INF], [0, 0, 0]], fmt)], [])
        assert same(y[0], [0.5, 0.5, 0]) and np.isnan(wide(y[1:4])[:, 1]).all()
        assert same(y[2], [NAN] * 3) and same(y[3], [NAN] * 3) and same(y[4], [rounded_once(1 / 3, fmt)] * 3)

    def test_cross_entropy(self, fmt: str) -> None:
        for bad in (INF, NAN):
            loss, (dz, _) = run(fmt, "cross_entropy", [array([[0, bad], [0, 0]], fmt), np.array([0, 0])], [])
            assert np.isnan(loss) and np.isnan(wide(dz[0, 1])) and same(dz[1], [-0.25, 0.25])
        loss, (dz, _) = run(fmt, "cross_entropy", [array([[0, -INF]], fmt), np.array([0])], [])
        assert loss == 0 and same(dz, [[0, 0]])
        loss, (dz, _) = run(fmt, "cross_entropy", [array([[0, -INF]], fmt), np.array([1])], [])
        assert loss == INF and same(dz, [[1, -1]])

    def test_an_infinite_loss_scale_reaches_the_gradients(self, fmt: str) -> None:
        p = bound(fmt, "cross_entropy")
        _, saved = OPS["cross_entropy"].forward(array([[0, 1]], fmt), np.array([0]), p=p)
        dz, _ = OPS["cross_entropy"].backward(np.float32(INF), saved, p=p)
        assert not np.isfinite(wide(dz)).any()

    def test_embedding(self, fmt: str) -> None:
        w = array([[1, 2], [INF, NAN], [3, 4]], fmt)
        p = bound(fmt, "embedding")
        y, saved = OPS["embedding"].forward(np.array([0, 1, 0]), w, p=p)
        assert same(y, [[1, 2], [INF, NAN], [1, 2]])
        _, dw = OPS["embedding"].backward(array([[INF, 1], [1, 1], [-INF, 1]], fmt), saved, w, p=p)
        assert same(dw, [[NAN, 2], [1, 1], [0, 0]])

    def test_operations_that_move_values(self, fmt: str) -> None:
        x = array([[NAN, INF], [-INF, -0.0]], fmt)
        assert same(run(fmt, "reshape", [x], [], shape=(4,))[0], [NAN, INF, -INF, 0])
        assert same(run(fmt, "transpose", [x], [], axes=(1, 0))[0], [[NAN, -INF], [INF, 0]])
        assert same(run(fmt, "split", [x], [], start=1, stop=2)[0], [[INF], [0]])
        assert same(run(fmt, "cast", [], [x], fmt=fmt)[0], x)

    def test_split_keeps_an_infinite_gradient_inside_the_slice(self, fmt: str) -> None:
        p = bound(fmt, "split")
        _, saved = OPS["split"].forward(array([[1, 2, 3]], fmt), p=p, start=1, stop=2)
        assert same(OPS["split"].backward(array([[INF]], fmt), saved, p=p, start=1, stop=2)[0], [[0, INF, 0]])


# ------------------------------------------------------------------------------------------- attention: Inf in the future


def attend(fmt: str, qkv: Array) -> Array:
    return OPS["attention"].forward(qkv, p=bound(fmt, "attention"), n_head=2)[0]


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("recipe", [*UNIFORM, "amp-fp16", "amp-fp16-cpu"])
def test_a_future_inf_or_nan_in_q_or_k_does_not_change_a_bit_of_the_past(recipe: str, part: str, bad: float) -> None:
    # The mask replaces the scores, whatever they are. Adding a large negative number would leave Inf and NaN standing.
    qkv = CASES["attention"].draw(recipe if recipe in DTYPE else "fp32")[0][0]
    clean = attend(recipe, qkv)
    start = 0 if part == "q" else 8
    qkv[:, 3, start : start + 8] = bad
    y = attend(recipe, qkv)
    assert same_bits(y[:, :3].copy(), clean[:, :3].copy())
    assert not same(y[:, 3], clean[:, 3])


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("fmt", UNIFORM)
def test_a_future_inf_in_v_makes_nan_of_the_past(fmt: str, bad: float) -> None:
    # Written-out attention multiplies v by P = 0 where masked, and 0 * Inf is NaN, here as in PyTorch without a fused
    # kernel. Causality holds for all finite values (test_ops_formula) and, for these, is a matter of the kernel.
    qkv = CASES["attention"].draw(fmt)[0][0]
    qkv[0, 3, 16] = bad  # sample 0, head 0, the first of its D values
    y = attend(fmt, qkv)
    assert np.isnan(wide(y[0, :3, 0])).all()
    assert np.isfinite(wide(y[1])).all() and np.isfinite(wide(y[0, :, 1:])).all()


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("fmt", LOW)
def test_scores_that_overflow_16_bits_are_infinite_and_seen(fmt: str) -> None:
    # q k = 4 * 200^2 = 160,000: beyond fp16, so S rounds to Inf before the scale and the row is lost; bf16 holds it.
    qkv = array(np.full((1, 2, 24), 200.0), fmt)
    y = attend(fmt, qkv)
    assert np.isnan(wide(y)).all() if fmt == "fp16" else same(y, np.full((1, 2, 8), 200.0))


# ------------------------------------------------------------------------------------------------------------ subnormals

TINY = {"fp16": 2.0**-24, "bf16": 2.0**-133, "fp32": 2.0**-149}  # the smallest subnormal


@pytest.mark.parametrize("fmt", UNIFORM)
def test_subnormals_are_numbers(fmt: str) -> None:
    tiny = TINY[fmt]
    x = array([[tiny, -3 * tiny]], fmt)
    assert same(wide(x), [[tiny, -3 * tiny]])
    assert same(run(fmt, "add", [x, x], [])[0], [[2 * tiny, -6 * tiny]])
    assert same(run(fmt, "relu", [x], [])[0], [[tiny, 0]])
    y, (_, dw, _) = run(fmt, "linear", [x], [array(np.eye(2), fmt), None])
    assert same(y, x) and same(dw, [[tiny, -3 * tiny]] * 2)
    assert same(run(fmt, "matmul", [x, array(np.eye(2), fmt)], [])[0], x)
    assert same(run(fmt, "embedding", [np.array([0])], [x])[0], x)
    assert same(fan_in.forward(x, x, bound(fmt, "fan_in"))[0], 2 * wide(x))
    assert same(run(fmt, "softmax", [x], [])[0], [[0.5, 0.5]])
    b = array([2.0, 3.0], fmt)
    assert same(run(fmt, "layernorm", [x], [array([1.0, 1.0], fmt), b])[0], [[2, 3]])  # eps, not a division by zero


@pytest.mark.parametrize("fmt", LOW)
def test_underflow_rounds_to_nearest_even(fmt: str) -> None:
    # 0.5 tiny is halfway between 0 and tiny: to even, 0. 1.5 tiny is halfway too: to even, 2 tiny. 0.75 tiny: to tiny.
    # (The smallest bf16 times these is still a number of fp32, so the sum is exact.)
    tiny = TINY[fmt]
    y, _ = run(fmt, "linear", [array([[tiny]], fmt)], [array([[0.5], [0.75], [1.5], [-0.5]], fmt), None])
    assert same(y, [[0, tiny, 2 * tiny, 0]])


# ------------------------------------------------------------------------------------------------- empty and single axes

EMPTY = {
    "linear": ([(0, 8)], [(5, 8), (5,)], {}, (0, 5)),
    "matmul": ([(2, 0, 8), (2, 8, 4)], [], {}, (2, 0, 4)),
    "add": ([(0, 4), (4,)], [], {}, (0, 4)),
    "relu": ([(0, 4)], [], {}, (0, 4)),
    "silu": ([(0, 4)], [], {}, (0, 4)),
    "gelu_tanh": ([(0, 4)], [], {}, (0, 4)),
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


@pytest.mark.parametrize("fmt", UNIFORM)
def test_axes_of_one_element(fmt: str) -> None:
    x, w, b = array([[3.0]], fmt), array([2.0], fmt), array([5.0], fmt)
    y, (dx, dw, db) = run(fmt, "layernorm", [x], [w, b])
    assert same(y, [[5.0]]) and same(dx, [[0.0]]) and same(dw, [0.0]) and same(db, [1.0])  # x is its own mean
    y, (dx,) = run(fmt, "softmax", [x], [])
    assert same(y, [[1.0]]) and same(dx, [[0.0]])
    loss, (dz, _) = run(fmt, "cross_entropy", [x, np.array([0])], [])
    assert loss == 0 and same(dz, [[0.0]])
    y, (dx, dw, db) = run(fmt, "linear", [x], [array([[2.0]], fmt), b])
    assert same(y, [[11.0]]) and same(dx, [[2.0]]) and same(dw, [[3.0]]) and same(db, [1.0])
    qkv = array([[[1.0, 2.0, 7.0]]], fmt)
    y, (dqkv,) = run(fmt, "attention", [qkv], [], n_head=1)
    assert same(y, [[[7.0]]]) and same(dqkv, [[[0, 0, 1.0]]])
    y, (_, dw) = run(fmt, "embedding", [np.array(1)], [array([[1.0], [4.0]], fmt)])
    assert same(y, [4.0]) and same(dw, [[0.0], [1.0]])


# ----------------------------------------------------------------------------------------------------- memory layout, purity


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


BIGGER = CASES | {
    # Enough elements for the order of a sum to matter, and more than a vector of each.
    "linear": Case("linear", ((40, 100),), ((70, 100), (70,))),
    "matmul": Case("matmul", ((3, 40, 100), (3, 100, 24))),
    "attention": Case("attention", ((2, 33, 96),), static={"n_head": 2}),
    "layernorm": Case("layernorm", ((40, 100),), ((100,), (100,))),
    "rmsnorm": Case("rmsnorm", ((40, 100),), ((100,),)),
    "softmax": Case("softmax", ((40, 100),)),
    "cross_entropy": Case("cross_entropy", ((40, 100), np.arange(40))),
    "add": Case("add", ((40, 100), (100,))),
    **{op: Case(op, ((41, 101),)) for op in ("relu", "silu", "gelu_tanh", "gelu_erf")},
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


@pytest.mark.parametrize("fmt", UNIFORM)
@pytest.mark.parametrize("op", ["relu", "silu", "gelu_tanh", "gelu_erf"])
def test_bits_do_not_depend_on_the_blocks_of_a_long_array(op: str, fmt: str) -> None:
    # Two blocks of `Bound.map` and a bit, against pieces that no block boundary falls into, and against a monitored run.
    n, piece = 2 * MAP_BLOCK + 37, 1001
    x = array(np.random.default_rng(9).standard_normal(n) * 3, fmt)
    y, (dx,) = run(fmt, op, [x], [])
    parts = [run(fmt, op, [x[i : i + piece]], []) for i in range(0, n, piece)]
    assert same_bits(y, np.concatenate([part for part, _ in parts]))
    assert same_bits(dx, np.concatenate([gradient for _, (gradient,) in parts]))
    watched = bound(fmt, op, lambda site, before, after: None)
    assert same_bits(y, OPS[op].forward(x, p=watched)[0])


@pytest.mark.parametrize("recipe", [*UNIFORM, *AMP])
@pytest.mark.parametrize("op", CASES)
def test_operations_do_not_write_to_their_operands(op: str, recipe: str) -> None:
    inputs, params, static = CASES[op].draw(recipe if recipe in DTYPE else "fp32")
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
