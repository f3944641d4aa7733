"""nn.grouped_attention: heads that share keys and values, operation by operation and as one kernel."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPE, LOW, array, same_bits, wide
from derivatives import Call, check_derivative, draw, forward, normal_numbers
from op_calls import bound, run
from torch_cases import CASES, Case, check

from refimpl.nn.ops import OPS, SELECTED

r = normal_numbers()

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


def repeated(x: np.ndarray, n_kv_head: int, times: int) -> np.ndarray:
    """Keys or values (B, T, K D) with each head repeated, (B, T, K times D)."""
    B, T, C = x.shape
    return np.repeat(x.reshape(B, T, n_kv_head, C // n_kv_head), times, axis=2).reshape(B, T, C * times)


def test_the_heads_of_a_group_read_the_same_keys_and_values() -> None:
    q, k, v = draw(2, 5, 24, seed=1), draw(2, 5, 12, seed=2), draw(2, 5, 12, seed=3)
    grouped = forward("grouped_attention", q, k, v, n_head=4, n_kv_head=2)
    k, v = repeated(k, 2, 2), repeated(v, 2, 2)
    assert same_bits(grouped, forward("grouped_attention", q, k, v, n_head=4, n_kv_head=4))


@pytest.mark.parametrize("op", ["grouped_attention", "fused_grouped_attention"])
@pytest.mark.parametrize("fmt", LOW)
def test_a_group_sums_rounded_gradients_in_32_bits_and_rounds_the_sum_once(op: str, fmt: str) -> None:
    """dk and dv are those of heads of their own, rounded, summed and rounded again."""
    q, k, v = (array(draw(2, 5, width, seed=width), fmt) for width in (24, 6, 6))
    p, dO = bound(fmt, "attention"), array(draw(2, 5, 24, seed=9), fmt)
    attention = {**OPS, **SELECTED}[op]
    _, saved = attention.forward(q, k, v, p=p, n_head=4, n_kv_head=1)
    _, dk, dv = attention.backward(dO, saved, p=p, n_head=4, n_kv_head=1)
    own = [array(repeated(wide(x), 1, 4), fmt) for x in (k, v)]
    _, saved = attention.forward(q, *own, p=p, n_head=4, n_kv_head=4)
    _, *each = attention.backward(dO, saved, p=p, n_head=4, n_kv_head=4)
    for ours, heads in zip((dk, dv), each, strict=True):
        total = wide(heads).reshape(2, 5, 4, 6).sum(2)  # in FP64; four values of 16 bits lose nothing in FP32 that shows here
        assert ours.dtype == DTYPE[fmt]
        np.testing.assert_array_max_ulp(wide(ours).astype(np.float32), total.astype(DTYPE[fmt]).astype(np.float32), maxulp=0)


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


# ---------------------------------------------------------------------------------------------------------------- PyTorch

CASES_OF_GROUPS = [case for case in CASES if case.op == "grouped_attention"]


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", CASES_OF_GROUPS, ids=str)
def test_as_transformers_computes_it_operation_by_operation(case: Case) -> None:
    check(case)
