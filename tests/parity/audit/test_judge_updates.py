"""Fused optimizers before the judge: PyTorch's own, and updates by another formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from judged import FORMATS, forged, moved, observed, recorded, unjudged, verdicts
from torch import Tensor

from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import Verdict

OPTIONS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"maximize": True, "eps": 1e-6, "betas": (0.8, 0.95)}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "maximize": True}),
    (torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.01}),
]
SHAPES = ((64, 33), (7,), (1,), (40000,))
Change = Callable[[Values], Values]


def steps(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype, size: float = 1.0, scale: float = 0.0,
    found_inf: float = 0.0, change: Change = lambda values: values, count: int = 3,
) -> list[Verdict]:  # fmt: skip
    """Return the verdicts over some steps of a fused optimizer, the last one changed."""
    generator = torch.Generator().manual_seed(3)
    params = [(torch.randn(*shape, generator=generator) * 0.02).to(dtype).requires_grad_() for shape in SHAPES]
    optimizer: Any = kind(params, lr=1e-3, fused=True, **options)  # type: ignore[call-arg]
    found: list[Verdict] = []

    def judge(values: Values) -> None:
        if values.operation.name.startswith("aten._fused_"):
            found.extend(verdicts(change(values) if last else values).values())

    def run() -> None:
        nonlocal last
        for i in range(count):
            last = i == count - 1
            for p in params:
                p.grad = (torch.randn(p.shape, generator=generator) * size).to(dtype)
            if scale and last:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
            optimizer.step()

    last = False
    observed(run, judge)
    return found


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_fused_optimizers_of_pytorch_are_within_their_bounds(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    if dtype != torch.float32 and kind in (torch.optim.SGD, torch.optim.Adagrad):
        pytest.skip("the kernel is wrong, or rounds everything inside: see the next tests")
    for size, scale, found_inf in ((1.0, 0.0, 0.0), (1e-3, 3.0, 0.0), (30.0, 64.0, 1.0), (0.0, 0.0, 0.0)):
        if scale and kind is torch.optim.Adagrad:
            continue
        found = steps(kind, options, dtype, size, scale, found_inf)
        assert [v for v in found if v.level not in ("fine", "note")] == []
        names = {v.result.partition(".")[0] for v in found}
        assert {"self", "grads"} < names or options == {}
        assert len(found) == 3 * len(SHAPES) * len(names)
        if dtype == torch.float32:
            assert {v.level for v in found} == {"fine"}


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_decay_that_cancels_the_gradient_is_within_the_bound(dtype: torch.dtype) -> None:
    """v is the square of rounding errors then, and the update m / (sqrt(v) + eps) is as large as eps lets it be."""
    p = torch.linspace(0.01, 0.02, 64).to(dtype).requires_grad_()
    optimizer = torch.optim.Adam([p], weight_decay=0.1, fused=True)
    found: list[Verdict] = []

    def run() -> None:
        for g in (torch.full_like(p, 1e-5), -0.1 * p.detach()):
            p.grad = g
            optimizer.state[p].update(exp_avg_sq=torch.zeros_like(p)) if optimizer.state else None
            optimizer.step()

    observed(run, lambda v: found.extend(verdicts(v).values()) if v.operation.name.startswith("aten._fused_") else None)
    assert {v.level for v in found} == {"fine"}
    assert len(found) == 8


def test_a_decay_that_cancels_the_gradient_of_adagrad_is_within_the_bound() -> None:
    p = torch.randn(1000, generator=torch.Generator().manual_seed(3)).requires_grad_()
    p.grad = -0.3 * p.detach()
    optimizer = torch.optim.Adagrad([p], lr=0.1, weight_decay=0.3, fused=True)
    (values,) = [v for v in recorded(optimizer.step) if v.operation.name.startswith("aten._fused_")]
    assert {v.level for v in verdicts(values).values()} == {"fine"}
    assert verdicts(forged(values, "self.0", lambda x: x + 0.05))["self.0"].level == "wrong"


@pytest.mark.parametrize("n", [5, 64])
def test_a_gradient_of_nan_is_no_error_of_the_optimizer(n: int) -> None:
    p = torch.ones(n, requires_grad=True)
    p.grad = torch.full_like(p, math.nan)
    optimizer = torch.optim.AdamW([p], amsgrad=True, fused=True)
    (values,) = [v for v in recorded(optimizer.step) if v.operation.name.startswith("aten._fused_")]
    assert {v.level for v in verdicts(values).values()} == {"fine"}
    assert verdicts(forged(values, "self.0", torch.ones_like))["self.0"].level == "wrong"


def test_the_fused_sgd_of_pytorch_is_wrong_in_16_bits() -> None:
    """If this fails, PyTorch has mended its kernel: its line in updates.py can go."""
    p = torch.ones(16, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5, fused=True).step()
    assert not torch.equal(p.detach(), torch.full_like(p, 0.5))
    assert "wrong" in {v.level for v in steps(torch.optim.SGD, {}, torch.bfloat16)}


def test_fused_adagrad_in_16_bits_is_not_judged() -> None:
    p = torch.ones(16, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    seen: list[Values] = []
    optimizer = torch.optim.Adagrad([p], lr=0.5, fused=True)
    observed(optimizer.step, seen.append)
    (values,) = [v for v in seen if v.operation.name.startswith("aten._fused_adagrad_")]
    assert "16 bits" in unjudged(values)


# ---------------------------------------------------------------------------------------------------------- other formulas


def adamw(values: Values, i: int = 0, **other: float) -> Tensor:
    """Another AdamW, in FP64: without its bias correction, its decoupled decay, its eps outside of the root."""
    given = values.inputs
    p, g, m, v = (given[key][i].double() for key in ("self", "grads", "exp_avgs", "exp_avg_sqs"))
    t, lr, wd, eps = int(given["state_steps"][i]), given["lr"], given["weight_decay"], given["eps"]
    beta1, beta2 = given["beta1"], given["beta2"]
    if "coupled" in other:
        g, wd = g + wd * p, 0.0
    m, v = m + (1 - beta1) * (g - m), beta2 * v + (1 - beta2) * g * g
    first, second = (1.0, 1.0) if "uncorrected" in other else (1 - beta1**t, 1 - beta2**t)
    root = (v / second + eps**2).sqrt() if "inside" in other else (v / second).sqrt() + eps
    root = root.bfloat16().double() if "low" in other else root
    return (p * (1 - lr * wd) - lr * (m / first) / root).float()


@pytest.mark.parametrize("name", ["uncorrected", "coupled", "inside", "low"])
def test_another_adamw_is_found(name: str) -> None:
    # eps is as large as the gradients, so that its place matters
    options = {"weight_decay": 0.1, "eps": 1e-3}
    last = [v for v in steps(torch.optim.AdamW, options, torch.float32, 1e-3) if v.result == "self.0"]
    same = steps(torch.optim.AdamW, options, torch.float32, 1e-3, change=lambda v: forged(v, "self.0", lambda p: adamw(v)))
    other = steps(
        torch.optim.AdamW, options, torch.float32, 1e-3, change=lambda v: forged(v, "self.0", lambda p: adamw(v, **{name: 1.0}))
    )
    assert {v.level for v in (*last, *same)} == {"fine"}
    assert [v.result for v in other if v.level == "wrong"] == ["self.0"]


@pytest.mark.parametrize("result", ["self.3", "exp_avgs.0", "exp_avg_sqs.0", "grads.1"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_result_that_is_off_is_found(dtype: torch.dtype, result: str) -> None:
    ulps = 40 if dtype == torch.float32 else 2
    found = steps(torch.optim.AdamW, {}, dtype, change=lambda v: forged(v, result, lambda x: moved(x, ulps)))
    assert [v.result for v in found if v.level == "wrong"] == [result]


def test_what_moves_although_an_infinity_was_found_is_wrong() -> None:
    found = steps(torch.optim.AdamW, {}, torch.float32, 1.0, 64.0, 1.0, lambda v: forged(v, "self.0", lambda p: moved(p, 1)))
    assert [v.result for v in found if v.level == "wrong"] == ["self.0"]


def test_momentum_by_another_rule_is_wrong() -> None:
    def sgd(values: Values, *, damped: bool) -> Tensor:
        given = values.inputs
        buffer = given["momentum_buffer_list"][0] * 0.9 + given["grads"][0] * (0.1 if damped else 1.0)
        return given["self"][0] - 1e-3 * buffer

    for damped in (False, True):
        found = steps(
            torch.optim.SGD, {"momentum": 0.9}, torch.float32,
            change=lambda v, damped=damped: forged(v, "self.0", lambda p: sgd(v, damped=damped)),
        )  # fmt: skip
        assert [v.result for v in found if v.level == "wrong"] == (["self.0"] if damped else [])
