"""nn.grouped_attention: heads that share keys and values, operation by operation and as one kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from arrays import DTYPE, LOW, array, same_bits, wide
from bounds import ours
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
from op_calls import INF, NAN, UNIFORM, bound, run, same
from torch_cases import (
    CASES,
    GROUPS,
    RECIPES,
    Case,
    check,
    draw_groups,
    grouped_attention_in,
    outside,
    policy_of,
    product_format,
    same_kind,
    tensor,
    theirs,
)

from refimpl.backends.base import REFERENCE
from refimpl.backends.numpy.table import OPS as FAST
from refimpl.nn.op import Op
from refimpl.nn.ops import OPS, SELECTED
from refimpl.precision.context import Run
from refimpl.precision.policy import EVERY_OTHER, Policy, Precision
from refimpl.precision.policy_variants import with_attention
from refimpl.precision.recipes import get_recipe

r = normal_numbers()
KINDS = {name: {**OPS, **SELECTED}[name] for name in ("grouped_attention", "fused_grouped_attention")}

CALLS = [
    Call("grouped_attention", "two groups", (r(2, 5, 24), r(2, 5, 12), r(2, 5, 12)), static={"n_head": 4, "n_kv_head": 2}),
    Call("grouped_attention", "one group", (r(1, 4, 12), r(1, 4, 3), r(1, 4, 3)), static={"n_head": 4, "n_kv_head": 1}),
    Call("grouped_attention", "no groups", (r(1, 4, 12), r(1, 4, 12), r(1, 4, 12)), static={"n_head": 2, "n_kv_head": 2}),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward(call: Call) -> None:
    check_derivative(call)


@pytest.mark.parametrize("fmt", ["fp64", "fp32"])
def test_without_groups_it_is_attention(fmt: str) -> None:
    q, k, v = (draw(2, 5, 24, seed=seed) for seed in (1, 2, 3))
    if fmt == "fp32":
        q, k, v = (array(x, fmt) for x in (q, k, v))
    p, qkv = bound(fmt, "attention"), np.concatenate([q, k, v], -1)
    plain, saved = OPS["attention"].forward(qkv, p=p, n_head=4)
    ours, kept = OPS["grouped_attention"].forward(q, k, v, p=p, n_head=4, n_kv_head=4)
    assert same_bits(ours, plain)
    (dqkv,) = OPS["attention"].backward(plain, saved, p=p, n_head=4)
    assert same_bits(np.concatenate(OPS["grouped_attention"].backward(plain, kept, p=p, n_head=4, n_kv_head=4), -1), dqkv)


def grouped_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, H: int, K: int) -> np.ndarray:
    """Position by position and head by head, from the definition: query head h reads keys and values of head h // (H / K)."""
    B, T, C = q.shape
    D = C // H
    out = np.zeros_like(q)
    for n, h, i in np.ndindex(B, H, T):
        own, shared = slice(h * D, (h + 1) * D), slice(h // (H // K) * D, (h // (H // K) + 1) * D)
        scores = [float(q[n, i, own] @ k[n, j, shared]) / math.sqrt(D) for j in range(i + 1)]
        out[n, i, own] = sum(weight * v[n, j, shared] for j, weight in enumerate(softmax_of(np.array(scores))))
    return out


@pytest.mark.parametrize(("H", "K"), [(4, 2), (6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("op", KINDS)
def test_grouped_attention_by_definition(op: str, H: int, K: int) -> None:
    q, k, v = draw(2, 5, 2 * H), draw(2, 5, 2 * K, seed=2), draw(2, 5, 2 * K, seed=3)
    y, _ = KINDS[op].forward(q, k, v, p=bound("fp64", "attention"), n_head=H, n_kv_head=K)
    assert_close(y, grouped_of(q, k, v, H, K))


@pytest.mark.parametrize("op", KINDS)
def test_queries_are_the_last_positions_of_the_keys(op: str) -> None:
    """As with a cache of keys: the last rows of all queries at once. Two orders of sums of five terms."""
    q, k, v = draw(2, 5, 8), draw(2, 5, 4, seed=2), draw(2, 5, 4, seed=3)
    p, heads = bound("fp64", "attention"), {"n_head": 4, "n_kv_head": 2}
    whole, _ = KINDS[op].forward(q, k, v, p=p, **heads)
    last, _ = KINDS[op].forward(q[:, 3:], k, v, p=p, **heads)
    assert_close(last, whole[:, 3:])


@pytest.mark.parametrize("queries", [1, 2, 3])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_is_the_derivative_of_forward_by_blocks_of_queries(
    call: Call, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refimpl.backends.numpy.attention.QUERIES", queries)
    assert gradient_error(FAST[call.op], call) <= TOLERANCE


@pytest.mark.parametrize("versions", [KINDS, FAST], ids=["definition", "fast version"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_backward_of_the_fused_kind_is_the_same_derivative(call: Call, versions: Mapping[str, Op]) -> None:
    op = replace(versions["fused_grouped_attention"], name="attention")  # whose row it is
    assert gradient_error(op, replace(call, op="attention")) <= TOLERANCE


def repeated(x: np.ndarray, n_kv_head: int, times: int) -> np.ndarray:
    """Keys or values (B, T, K D) with each head repeated, (B, T, K times D)."""
    B, T, C = x.shape
    return np.repeat(x.reshape(B, T, n_kv_head, C // n_kv_head), times, axis=2).reshape(B, T, C * times)


def test_the_heads_of_a_group_read_the_same_keys_and_values() -> None:
    q, k, v = draw(2, 5, 24, seed=1), draw(2, 5, 12, seed=2), draw(2, 5, 12, seed=3)
    grouped = forward("grouped_attention", q, k, v, n_head=4, n_kv_head=2)
    k, v = repeated(k, 2, 2), repeated(v, 2, 2)
    assert same_bits(grouped, forward("grouped_attention", q, k, v, n_head=4, n_kv_head=4))


@pytest.mark.parametrize("op", KINDS)
@pytest.mark.parametrize("fmt", LOW)
def test_a_group_sums_rounded_gradients_in_32_bits_and_rounds_the_sum_once(op: str, fmt: str) -> None:
    """dk and dv are those of heads of their own, rounded, summed and rounded again."""
    q, k, v = (array(draw(2, 5, width, seed=width), fmt) for width in (24, 6, 6))
    p, dO = bound(fmt, "attention"), array(draw(2, 5, 24, seed=9), fmt)
    attention = KINDS[op]
    _, saved = attention.forward(q, k, v, p=p, n_head=4, n_kv_head=1)
    _, dk, dv = attention.backward(dO, saved, p=p, n_head=4, n_kv_head=1)
    own = [array(repeated(wide(x), 1, 4), fmt) for x in (k, v)]
    _, saved = attention.forward(q, *own, p=p, n_head=4, n_kv_head=4)
    _, *each = attention.backward(dO, saved, p=p, n_head=4, n_kv_head=4)
    for d, heads in zip((dk, dv), each, strict=True):
        total = wide(heads).reshape(2, 5, 4, 6).sum(2)  # in FP64; four values of 16 bits lose nothing in FP32 that shows here
        assert d.dtype == DTYPE[fmt]
        np.testing.assert_array_max_ulp(wide(d).astype(np.float32), total.astype(DTYPE[fmt]).astype(np.float32), maxulp=0)


@pytest.mark.parametrize("fmt", LOW)
def test_softmax_is_in_fp32_and_p_stays_there(fmt: str) -> None:
    q, k, v = (array(draw(2, 5, width, seed=width), fmt) for width in (24, 12, 12))
    _, (*_, P) = OPS["grouped_attention"].forward(q, k, v, p=bound(fmt, "attention"), n_head=4, n_kv_head=2)
    assert P.dtype == np.float32 and (array(wide(P), fmt) != P).any()


def test_the_group_sum_keeps_the_format_of_keys_and_values_under_autocast() -> None:
    q, k = (array(draw(2, 5, width, seed=width), "fp32") for width in (24, 12))  # after RoPE under autocast: FP32
    v = array(draw(2, 5, 12), "bf16")
    y, (dq, dk, dv) = run("amp-bf16", "grouped_attention", [q, k, v], [], n_head=4, n_kv_head=2)
    assert (y.dtype, dq.dtype, dk.dtype, dv.dtype) == (DTYPE["bf16"], np.float32, np.float32, DTYPE["bf16"])


def roundings(op: str, recipe: str, fmt: str = "fp32") -> dict[str, str]:
    """Site -> the dtype it rounded operands of that format to, in the order of the first visit."""
    seen: dict[str, str] = {}
    q, k, v = (array(draw(2, 5, width, seed=width), fmt) for width in (24, 12, 12))
    p = bound(recipe, "attention", lambda site, _, y: seen.setdefault(site.removeprefix("here:attention."), y.dtype.name))
    y, saved = KINDS[op].forward(q, k, v, p=p, n_head=4, n_kv_head=2)
    KINDS[op].backward(y, saved, p=p, n_head=4, n_kv_head=2)
    return seen


def test_it_rounds_where_transformers_does() -> None:
    operands, forward = {"scores.q", "scores.k", "values.v"}, {"scores.S", "scale.S", "values.P", "values.O"}
    # dS of the softmax is in FP32 until it is stored in the format of S.
    backward = {"values.dP", "wide_softmax.dS.stored", "scale.dS", "scores.dq", "scores.dk", "values.dv"}
    for recipe in ("amp-fp16", "amp-fp16-cpu"):
        assert roundings("grouped_attention", recipe) == dict.fromkeys(operands | forward | backward, "float16")
    # Where keys and values have 16 bits the sums over a group are rounded too.
    assert {*roundings("grouped_attention", "fp16", "fp16")} == forward | backward | {"dk", "dv"}
    assert {*roundings("fused_grouped_attention", "fp16", "fp16")} == (
        {"values.P", "values.O", "scores.dS", "scores.dq", "scores.dk", "values.dv", "dk", "dv"}
    )
    assert roundings("grouped_attention", "fp32") == {}


# --------------------------------------------------------------------------------------------------------- special values


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("recipe", [*UNIFORM, "amp-fp16"])
@pytest.mark.parametrize("op", KINDS)
def test_a_future_inf_or_nan_in_q_or_k_does_not_change_a_bit_of_the_past(op: str, recipe: str, part: int, bad: float) -> None:
    operands = [array(draw(2, 5, width, seed=width), recipe if recipe in DTYPE else "fp32") for width in (24, 12, 12)]
    p, heads = bound(recipe, "attention"), {"n_head": 4, "n_kv_head": 2}
    clean, _ = KINDS[op].forward(*operands, p=p, **heads)
    operands[part][:, 3, :3] = bad
    y, _ = KINDS[op].forward(*operands, p=p, **heads)
    assert same_bits(y[:, :3].copy(), clean[:, :3].copy()) and not same(y[:, 3], clean[:, 3])


# ---------------------------------------------------------------------------------------------------------------- PyTorch

CASES_OF_GROUPS = [case for case in CASES if case.op == "grouped_attention"]


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", CASES_OF_GROUPS, ids=str)
def test_as_transformers_computes_it_operation_by_operation(case: Case) -> None:
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("queries", [1, 2, 3])  # of T = 4
@pytest.mark.parametrize("case", CASES_OF_GROUPS, ids=str)
def test_by_blocks_of_queries_too(case: Case, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.backends.numpy.attention.QUERIES", queries)
    check(case)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("recipe", RECIPES)
def test_where_one_score_outweighs_all_others(recipe: str) -> None:
    check(Case("grouped_attention", recipe, (product_format(recipe),) * 3, 6.0))


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("bad", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_mask_hides_stays_hidden_as_in_pytorch(recipe: str, bad: float) -> None:
    """The last position's q, k or v is not finite; then the gradient of the first position's O."""
    fmt = product_format(recipe)
    for part in range(4):
        operands, dO = draw_groups([fmt] * 3, fmt)
        changed = [*operands, dO][part]
        changed[:, 0 if part == 3 else -1, 0] = bad
        with np.errstate(invalid="ignore"):
            y, gradients = ours(policy_of(recipe), "grouped_attention", operands, dO, **GROUPS)
        y_torch, gradients_torch = theirs(grouped_attention_in(recipe), operands, dO)
        for a, b, name in zip((y, *gradients), (y_torch, *gradients_torch), ("O", "dq", "dk", "dv"), strict=True):
            same_kind(a, b, f"{name}, operand {part} not finite")
        assert part >= 2 or np.isfinite(wide(y)[:, :-1]).all()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("fmt", LOW)
@pytest.mark.parametrize("part", ["scores", "scale", "group"])
def test_control_without_one_of_its_roundings_it_is_noticed(part: str, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are taken as they come, or the next row would make up for it. 'group': of dk and dv of each head."""
    parts = {name: Precision("same", "fp32", "fp32" if name == part else fmt) for name in ("scores", "scale", "values")}
    parts["wide_softmax"] = Precision("fp32", "fp32", "fp32")
    rows = {f"attention.{name}": row for name, row in parts.items()}
    if part == "group":
        monkeypatch.setattr("refimpl.nn.grouped_attention.sum_of_group", lambda d, p, site: p.widen(d).sum(2, keepdims=True))
    missed = outside(
        Policy("unrounded", {EVERY_OTHER: Precision(fmt, "fp32", fmt), **rows}), Case("grouped_attention", fmt, (fmt,) * 3)
    )
    assert max(missed[2:] if part == "group" else missed) > 100, missed


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("size", [0.3, 2.0])
def test_pytorchs_flash_kernel_is_near_the_fused_kind(size: float, low: str) -> None:
    """O and dq, which do not depend on how a group is summed: on the CPU PyTorch adds dk and dv in 16 bits, ever so often."""
    torch = pytest.importorskip("torch")
    q, k, v, dO = (array(size * draw(3, 16, width, seed=width), low) for width in (48, 24, 24, 48))
    p = Run(with_attention(get_recipe(f"amp-{low}-cpu").policy, "fused"), REFERENCE).precision("attention", "here")
    O, saved = KINDS["fused_grouped_attention"].forward(q, k, v, p=p, n_head=4, n_kv_head=2)  # noqa: E741
    dq, *_ = KINDS["fused_grouped_attention"].backward(dO, saved, p=p, n_head=4, n_kv_head=2)
    leaves = [tensor(x).requires_grad_(True) for x in (q, k, v)]
    heads = [x.unflatten(-1, (-1, 12)).transpose(1, 2) for x in leaves]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    y = y.transpose(1, 2).flatten(-2)
    y.backward(tensor(dO))
    # One block of keys and queries: only exp differs, which moves few roundings of BF16 and more of FP16.
    for a, b in ((O, y), (dq, leaves[0].grad)):
        assert (wide(a) == wide(b)).mean() > (0.9 if low == "bf16" else 0.6)
