"""nn.attention: written-out causal self-attention, forward and backward. test_fused_attention.py has the other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from arrays import DTYPE, LOW, Array, array, same_bits, wide
from bounds import D, H, T, agreement, fast_versions, ours
from derivatives import (
    TOLERANCE,
    Call,
    assert_close,
    check_derivative,
    draw,
    forward,
    gradient_error,
    normal_numbers,
    softmax_of,
)
from op_calls import INF, NAN, SHAPES, UNIFORM, bound, run, same
from torch_cases import (
    CASES,
    RECIPES,
    B,
    Case,
    attention_in,
    check,
    draw_qkv,
    outside,
    policy_of,
    product_format,
    reference,
    results,
    same_kind,
    theirs,
)

from refimpl.backends.numpy.backend import NUMPY
from refimpl.backends.numpy.table import OPS as FAST
from refimpl.nn.ops import OPS
from refimpl.precision.context import Run
from refimpl.precision.policy import EVERY_OTHER, Policy, Precision

# ---------------------------------------------------------------------------------------------------------------- formula

r = normal_numbers()

CALLS = [
    Call("attention", "T=1, 1 head", (r(2, 1, 12),), static={"n_head": 1}),
    Call("attention", "T=1, 2 heads", (r(2, 1, 12),), static={"n_head": 2}),
    Call("attention", "T=5, 1 head", (r(2, 5, 12),), static={"n_head": 1}),
    Call("attention", "T=5, 2 heads", (r(2, 5, 12),), static={"n_head": 2}),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward_by_blocks_of_queries(
    call: Call, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries_at_a_time(monkeypatch, queries)
    assert gradient_error(FAST[call.op], call) <= TOLERANCE


def test_the_check_notices_a_gradient_laid_out_in_the_wrong_order() -> None:
    call = next(call for call in CALLS if call.label == "T=5, 2 heads")

    def backward(*args: Any, **kwargs: Any) -> tuple[Array]:
        dq, dk, dv = np.split(OPS["attention"].backward(*args, **kwargs)[0], 3, axis=-1)
        return (np.concatenate([dk, dq, dv], axis=-1),)

    assert gradient_error(replace(OPS["attention"], backward=backward), call) > 0.01


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
    p = bound("fp64", "attention")
    _, saved = OPS["attention"].forward(qkv, p=p, n_head=2)
    (dqkv,) = OPS["attention"].backward(dO, saved, p=p, n_head=2)
    assert not dqkv[:, 3:].any() and dqkv[:, :3].any()


@pytest.mark.parametrize("fmt", UNIFORM)
def test_one_position_and_one_channel(fmt: str) -> None:
    y, (dqkv,) = run(fmt, "attention", [array([[[1.0, 2.0, 7.0]]], fmt)], [], n_head=1)
    assert same(y, [[[7.0]]]) and same(dqkv, [[[0, 0, 1.0]]])


# -------------------------------------------------------------------------------------------------------------- roundings


def roundings_of_attention(recipe: str) -> dict[str, str]:
    """Site -> the dtype it rounded to, in the order of the first visit."""
    seen: dict[str, str] = {}
    qkv = SHAPES["attention"].draw("fp32")[0][0]
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


# --------------------------------------------------------------------------------------------------------- special values


def attend(fmt: str, qkv: Array) -> Array:
    return OPS["attention"].forward(qkv, p=bound(fmt, "attention"), n_head=2)[0]


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("recipe", [*UNIFORM, "amp-fp16", "amp-fp16-cpu"])
def test_a_future_inf_or_nan_in_q_or_k_does_not_change_a_bit_of_the_past(recipe: str, part: str, bad: float) -> None:
    # The mask replaces the scores, whatever they are. Adding a large negative number would leave Inf and NaN standing.
    qkv = SHAPES["attention"].draw(recipe if recipe in DTYPE else "fp32")[0][0]
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
    # kernel. Causality holds for all finite values (above) and, for these, is a matter of the kernel.
    qkv = SHAPES["attention"].draw(fmt)[0][0]
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


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", [case for case in CASES if case.op == "attention"], ids=str)
def test_attention_written_out(case: Case) -> None:
    check(case)


def queries_at_a_time(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Of the fast version; the definition knows no blocks."""
    monkeypatch.setattr("refimpl.backends.numpy.attention.QUERIES", n)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("queries", [1, 2, 3])  # of T = 4
@pytest.mark.parametrize("case", [case for case in CASES if case.op == "attention"], ids=str)
def test_attention_by_blocks_of_queries(case: Case, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries_at_a_time(monkeypatch, queries)
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_goes_where_pytorchs_goes_and_not_to_a_block_that_does_not_see_it(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 times a NaN of a later position is NaN: in the definition and in PyTorch, but not between blocks of queries."""
    fmt = product_format(recipe)
    qkv, dO = draw_qkv(fmt, fmt)
    queries_at_a_time(monkeypatch, 2)
    with fast_versions():
        y, _ = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
    _, (_, P) = OPS["attention"].forward(qkv, p=Run(policy_of(recipe), NUMPY).precision("attention", "h"), n_head=H)
    assert np.array_equal(wide(P) == 0, np.broadcast_to(np.triu(np.ones((T, T), bool), 1), P.shape))
    qkv[:, 2:] = math.nan
    with fast_versions():
        z, _ = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
    assert z[:, :2].tobytes() == y[:, :2].tobytes() and np.isnan(wide(z)[:, 2:]).all()
    z, _ = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
    assert np.isnan(wide(z)).all() and np.isnan(wide(theirs(attention_in(recipe), [qkv], dO)[0])).all()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("low", LOW)
def test_attention_with_one_rounding_is_the_math_backend(low: str) -> None:
    case = Case("attention", f"math-{low}", (low,))
    check(case)
    # Of O 95 % and of dqkv 79 % are decided, and so identical. The others may fall either way, with a probability of the
    # errors that really occur over an ulp; those are a tenth or less of what they are bounded by, so 99 % is identical.
    for wanted, x in zip(reference(case).expected, results(case), strict=True):
        assert agreement(x, wanted.theirs, wanted.exact, low).share_identical > 0.99


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", RECIPES)
def test_attention_where_one_score_outweighs_all_others(recipe: str) -> None:
    # q and k 6 times as large: scores in the hundreds, a softmax of ones, zeros and subnormals.
    check(Case("attention", recipe, (product_format(recipe),), 6.0))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_mask_hides_stays_hidden_as_in_pytorch(recipe: str, bad: float) -> None:
    # The last position's q, k or v is not finite. Earlier positions do not see its scores; 0 times its v is NaN in both.
    fmt = product_format(recipe)
    for part in range(3):
        qkv, dO = draw_qkv(fmt, fmt)
        qkv[:, -1, part * H * D] = bad
        with np.errstate(invalid="ignore"):
            y, (g,) = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
        y_torch, (g_torch,) = theirs(attention_in(recipe), [qkv], dO)
        same_kind(y, y_torch, f"O, {'qkv'[part]} not finite")
        same_kind(g, g_torch, f"dqkv, {'qkv'[part]} not finite")
        assert part == 2 or np.isfinite(wide(y)[:, :-1]).all()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_infinite_gradient_reaches_no_key_that_is_hidden_from_it(recipe: str) -> None:
    # P is 0 where a key is hidden, but 0 times an infinite dP is NaN.
    qkv, dO = draw_qkv(product_format(recipe), product_format(recipe))
    dO[:, 0, 0] = math.inf
    with np.errstate(invalid="ignore"):
        _, (g,) = ours(policy_of(recipe), "attention", [qkv], dO, n_head=H)
    _, (g_torch,) = theirs(attention_in(recipe), [qkv], dO)
    same_kind(g, g_torch, "dqkv, dO not finite")
    assert np.isfinite(wide(g)[:, 1:, : 2 * H * D]).all()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", LOW)
@pytest.mark.parametrize("part", ["scores", "scale", "softmax", "everything"])
def test_control_attention_without_one_of_its_roundings_is_noticed(part: str, fmt: str) -> None:
    # 'everything' is what SDPBackend.MATH does: all in FP32, one rounding at the end. Operands are taken as they come, or
    # the next row would make up for it.
    missing = ["scores", "scale", "softmax"] if part == "everything" else [part]
    parts = {name: Precision("same", "fp32", "fp32" if name in missing else fmt) for name in ("scores", "scale", "softmax")}
    rows = {f"attention.{name}": row for name, row in {**parts, "values": Precision("same", "fp32", fmt)}.items()}
    missed = outside(Policy("unrounded", {EVERY_OTHER: Precision(fmt, "fp32", fmt), **rows}), Case("attention", fmt, (fmt,)))
    assert min(missed) > 0.01 * B * T * H * D, missed
