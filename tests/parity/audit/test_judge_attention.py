"""Fused attention before the judge: PyTorch's CPU kernel, and other kernels that are not attention, or not as accurate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from judged import FORMATS, forged, observed, the, unjudged, verdicts
from torch import Tensor

from refimpl.nn.attention import merge_heads
from refimpl.nn.fused_attention import fused_attention_backward, fused_attention_forward
from refimpl.parity.audit.judge import attention
from refimpl.parity.audit.judge.definitions import define
from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import LEVELS

FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu"
BACKWARD = FORWARD + "_backward"
BAD = ("wrong", "worse than it need be")
Shape = tuple[int, int, int, int, int, int]


def attend(
    shape: Shape, dtype: torch.dtype, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False, grad: float = 1.0
) -> None:
    """Run attention forward and backward. shape: batch, heads, heads of keys, queries, keys, numbers."""
    (B, H, shared, T, n, D), generator = shape, torch.Generator().manual_seed(7)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype).requires_grad_()

    q, k, v = draw(B, H, T, D, scale=scale), draw(B, shared, n, D, scale=scale), draw(B, shared, n, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared != H)
    y.backward(draw(B, H, T, D, scale=grad).detach())


def random_mask(shape: Shape, hidden: float, dtype: torch.dtype) -> Tensor:
    """Hide a third of the keys, never the first, and all keys from the second query."""
    rows = torch.rand(shape[0], 1, shape[3], shape[4], generator=torch.Generator().manual_seed(1)) < 0.3
    rows[..., 0] = False
    rows[:, :, 1] = True
    return torch.zeros_like(rows, dtype=dtype).masked_fill_(rows, hidden)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["plain", "causal", "masked"])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_the_attention_of_pytorch_is_within_its_bounds(dtype: torch.dtype, kind: str, scale: float) -> None:
    shapes: list[Shape] = [(2, 3, 3, 7, 7, 8), (2, 4, 2, 40, 40, 16), (1, 2, 1, 20, 700, 32), (1, 1, 1, 300, 270, 64)]
    found = dict[tuple[str, str], str]()

    def judge(values: Values) -> None:
        name = values.operation.name.rpartition(".")[0]
        for verdict in verdicts(values).values() if name in (FORWARD, BACKWARD) else ():
            found[name, verdict.result] = min(found.get((name, verdict.result), "fine"), verdict.level, key=LEVELS.index)

    for shape in shapes:
        mask = random_mask(shape, -math.inf, dtype) if kind == "masked" else None
        observed(lambda shape=shape, mask=mask: attend(shape, dtype, scale, mask, kind == "causal"), judge)
    assert found == {**dict.fromkeys([(FORWARD, f"out.{i}") for i in (0, 1)], "fine"),
                     **dict.fromkeys([(BACKWARD, f"out.{i}") for i in (0, 1, 2)], "fine")}  # fmt: skip


def test_the_twins_are_refimpls_definition() -> None:
    shape = (2, 3, 3, 9, 9, 8)
    values = the(FORWARD, lambda: attend(shape, torch.float32, causal=True))
    gradient = the(BACKWARD, lambda: attend(shape, torch.float32, causal=True))

    def together(*heads: Tensor) -> Tensor:
        """(B, H, T, D) each -> (B, T, 3 H D)"""
        return torch.cat([torch.as_tensor(merge_heads(x.detach().double().numpy())) for x in heads], -1)

    given, back = values.inputs, gradient.inputs
    qkv = together(given["query"], given["key"], given["value"])
    out, (_, _, lse) = define(fused_attention_forward, "attention", qkv, n_head=3)
    ours = {twin.result: twin.exact for twin in attention.forward(values)}
    torch.testing.assert_close(together(ours["out.0"]), out, rtol=0, atol=1e-6)  # sqrt(8) in FP32
    torch.testing.assert_close(ours["out.1"], lse[..., 0], rtol=0, atol=1e-6)
    saved = qkv, together(back["out"]), back["logsumexp"].double()[..., None]
    (dqkv,) = define(fused_attention_backward, "attention", together(back["grad_out"]), saved, n_head=3)
    grads = {twin.result: twin.exact for twin in attention.backward(gradient)}
    torch.testing.assert_close(together(*(grads[f"out.{i}"] for i in range(3))), dqkv, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- other kernels


def scores(given: dict[str, Any], **fault: float) -> Tensor:
    q, k = given["query"].double(), given["key"].double()
    s = fault.get("scale", 1 / math.sqrt(q.shape[-1])) * (q @ k.mT)
    here = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(int(fault.get("ahead", 0)))
    s = s.masked_fill(~here, -math.inf)
    low = given["query"].dtype if given["query"].dtype != torch.float32 else torch.bfloat16
    return s.to(low).double() if "low" in fault else s


def forward(given: dict[str, Any], **fault: float) -> Tensor:
    P = scores(given, **fault).softmax(-1)
    if "forget" in fault:
        P[..., : int(fault["forget"])] = 0  # the sum is over all keys
    y: Tensor = (P @ given["value"].double()).to(given["value"].dtype)
    return y


def backward(given: dict[str, Any], **fault: float) -> tuple[Tensor, Tensor, Tensor]:
    g, o, v = (given[name].double() for name in ("grad_out", "out", "value"))
    P = (scores(given, **fault) - given["logsumexp"].double()[..., None]).exp()
    d = (g * o).sum(-1, keepdim=True) * (0.0 if "constant" in fault else 1.0)
    dS, dtype = P * (g @ v.mT - d), given["value"].dtype
    root = 1 / math.sqrt(g.shape[-1])
    found = root * dS @ given["key"].double(), root * dS.mT @ given["query"].double(), P.mT @ g
    if "few" in fault:  # added up in 16 bits
        low = torch.bfloat16 if dtype == torch.float32 else dtype
        terms = P.mT[..., None] * g[..., None, :, :]
        found = (*found[:2], terms.to(low).cumsum(-2)[..., -1, :].double())
    dq, dk, dv = (x.to(dtype) for x in found)
    return dq, dk, dv


def level(values: Values, result: str, change: Callable[[Tensor], Tensor]) -> str:
    return verdicts(forged(values, result, change))[result].level


@pytest.mark.parametrize("dtype", FORMATS)
def test_another_attention_is_found(dtype: torch.dtype) -> None:
    values = the(FORWARD, lambda: attend((1, 2, 2, 60, 60, 32), dtype, 3.0, causal=True))
    given = values.inputs
    assert level(values, "out.0", lambda y: forward(given)) == "fine"
    for fault in ({"scale": 1 / 32}, {"ahead": 1}, {"ahead": -1}, {"forget": 8}, {"low": 1}):
        assert level(values, "out.0", lambda y, fault=fault: forward(given, **fault)) == "wrong", fault
    assert level(values, "out.1", lambda lse: scores(given).logsumexp(-1).float()) == "fine"
    assert level(values, "out.1", lambda lse: scores(given, low=1).logsumexp(-1).float()) == "wrong"
    assert level(values, "out.1", lambda lse: lse - math.log(2)) == "wrong"
    assert level(values, "out.1", lambda lse: lse * (1 + (1e-3 if dtype != torch.float32 else 1e-5))) == "wrong"
    if dtype == torch.float32:
        assert level(values, "out.0", lambda y: y.bfloat16().float()) in BAD


@pytest.mark.parametrize("dtype", FORMATS)
def test_another_gradient_of_attention_is_found(dtype: torch.dtype) -> None:
    values = the(BACKWARD, lambda: attend((1, 2, 2, 60, 60, 32), dtype, 3.0, causal=True))
    given = values.inputs

    def levels(**fault: float) -> list[str]:
        found = backward(given, **fault)
        return [level(values, f"out.{i}", lambda x, i=i: found[i]) for i in range(3)]

    assert levels() == ["fine"] * 3
    assert levels(ahead=1) == levels(low=1) == ["wrong"] * 3
    assert levels(constant=1) == ["wrong", "wrong", "fine"]
    if dtype == torch.float32:
        assert levels(few=1) == ["fine", "fine", "wrong"]
        assert [level(values, f"out.{i}", lambda x: x.bfloat16().float()) for i in range(3)] == ["wrong"] * 3


def test_gradients_that_exceed_fp16_inside_are_no_error() -> None:
    """With a loss scale that is too large, dS or a sum of dV is Inf in FP16 although the exact result may be finite."""
    results = set()
    for shape in ((2, 4, 2, 17, 300, 64), (1, 1, 1, 800, 1, 8)):
        values = the(BACKWARD, lambda shape=shape: attend(shape, torch.float16, 4.0, grad=10000.0))
        assert {verdict.level for verdict in verdicts(values).values()} == {"fine"}
        results |= {i for i in range(3) if not values.output[i].isfinite().all()}
    assert results == {0, 1, 2}


def test_what_has_no_bound_is_not_judged() -> None:
    dropped = the(FORWARD, lambda: attend((1, 2, 2, 8, 8, 8), torch.float32))
    assert "dropout" in unjudged(replace(dropped, args=(*dropped.args[:3], 0.1)))
    nothing = the(FORWARD, lambda: attend((1, 2, 2, 8, 8, 8), torch.float16, 1000.0))
    broken = replace(nothing, args=(nothing.args[0] * math.inf, *nothing.args[1:]))
    assert "Inf" in unjudged(broken)
    # all scores of a row are the same number when the mask has absorbed them: P is 1 in backward, not 1 / n
    shape = (1, 2, 2, 8, 8, 8)
    mask = random_mask(shape, torch.finfo(torch.float32).min, torch.float32)
    absorbed = the(BACKWARD, lambda: attend(shape, torch.float32, mask=mask))
    with pytest.raises(AssertionError, match="absorbed"):
        verdicts(absorbed)
    mean = the(FORWARD, lambda: attend(shape, torch.float32, mask=mask))
    assert {verdict.level for verdict in verdicts(mean).values()} == {"fine"}
    assert level(mean, "out.0", lambda y: y + 10) == "wrong"
