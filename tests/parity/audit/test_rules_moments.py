"""Rules A4, A5 and A12: eps, g^2 and states in 16 bits, and updates in which they are small and are kept."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import Tensor, nn

from refimpl.parity.audit.session import Audit

LOW, HALF, WHOLE = torch.bfloat16, torch.float16, torch.float32
IMPLEMENTATIONS = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}}


class Weights(nn.Module):
    """A weight whose gradient is the batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


class ByHand(torch.optim.Optimizer):
    """RMSprop. square, denominator: how they are computed."""

    def __init__(self, parameters: Any, square: Any, denominator: Any, dtype: torch.dtype = WHOLE) -> None:
        super().__init__(parameters, {"lr": 1e-4})
        self.square, self.denominator, self.dtype = square, denominator, dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["v"] = torch.zeros_like(p, dtype=self.dtype)
            state["v"].mul_(0.9).add_(self.square(p.grad), alpha=0.1)
            p.sub_((1e-4 * p.grad / self.denominator(state["v"])).to(p.dtype))


def found(optimizer: Any, model: nn.Module, batch: Tensor, steps: int = 1) -> dict[str, str]:
    """Train and return the numbers of what is found of these rules."""
    with Audit(model, optimizer) as audit:
        for _ in range(steps):
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
            audit.step()
    assert audit.failures == {}, audit.failures
    return {code: finding.number for code, finding in audit.findings.items() if code in ("A4", "A5", "A12")}


def by_hand(square: Any, denominator: Any, size: float, dtype: torch.dtype = WHOLE, zeros: int = 5) -> dict[str, str]:
    model = Weights(HALF)
    batch = torch.full((8, 8), size, dtype=HALF)
    batch.view(-1)[:zeros] = 0
    return found(ByHand(model.parameters(), square, denominator, dtype), model, batch)


def in_fp32(g: Tensor) -> Tensor:
    return g.float().square()


# ------------------------------------------------------------------------------------------------- A4

IN_16_BITS = {
    "after the root": lambda v: v.sqrt().half() + 1e-8,
    "in place": lambda v: v.sqrt().half().add_(1e-8),
    "under the root": lambda v: (v.half() + 1e-8).sqrt(),
    "as a tensor": lambda v: v.sqrt().half() + torch.tensor(1e-8),
}
KEPT = {
    "in FP32": lambda v: v.sqrt() + 1e-8,
    "in bfloat16": lambda v: v.sqrt().bfloat16() + 1e-8,
    "a larger one": lambda v: v.sqrt().half() + 1e-4,
    "a second one": lambda v: (v.half() + 1e-8).sqrt() + 1e-4,
}


@pytest.mark.parametrize("denominator", IN_16_BITS.values(), ids=list(IN_16_BITS))
def test_eps_that_float16_does_not_have(denominator: Any) -> None:
    numbers = by_hand(in_fp32, denominator, 1e-2)
    assert numbers == {"A4": "eps = 1e-08 is 0 in float16: 5 of 64 denominators are 0"}


@pytest.mark.parametrize("denominator", KEPT.values(), ids=list(KEPT))
def test_eps_that_the_format_has(denominator: Any) -> None:
    assert by_hand(in_fp32, denominator, 1e-2) == {}


def test_eps_that_is_lost_where_no_denominator_is_zero() -> None:
    assert by_hand(in_fp32, IN_16_BITS["after the root"], 1e-2, zeros=0) == {}


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))
@pytest.mark.parametrize(("eps", "lost"), [(1e-8, True), (1e-4, False)])
def test_adam_on_float16_weights(options: dict[str, Any], eps: float, lost: bool) -> None:
    model, batch = Weights(HALF), torch.full((8, 8), 1e-2, dtype=HALF)
    batch[0] = 0
    numbers = found(torch.optim.Adam(model.parameters(), 1e-4, eps=eps, **options), model, batch)
    assert numbers == ({"A4": "eps = 1e-08 is 0 in float16: 8 of 64 denominators are 0"} if lost else {})


# ------------------------------------------------------------------------------------------------- A5

SQUARES = {
    "a product": lambda g: g * g,
    "square": lambda g: g.square(),
    "a power": lambda g: g**2,
    "a product with a number": lambda g: (g * g) * 0.5,
    "a product that is cast": lambda g: (g * g).float(),
}


@pytest.mark.parametrize("square", SQUARES.values(), ids=list(SQUARES))
def test_squares_that_float16_does_not_have(square: Any) -> None:
    assert by_hand(square, KEPT["in FP32"], 1e-4) == {"A5": "100 % of 59 squares are 0 in float16 and not in FP64"}


@pytest.mark.parametrize("square", SQUARES.values(), ids=list(SQUARES))
def test_squares_that_float16_has(square: Any) -> None:
    assert by_hand(square, KEPT["in FP32"], 1e-2) == {}


def test_squares_in_fp32_of_small_gradients() -> None:
    assert by_hand(in_fp32, KEPT["in FP32"], 1e-4) == {}


def test_squares_for_a_norm_are_no_moment() -> None:
    def square(g: Tensor) -> Tensor:
        assert float((g * g).sum()) == 0
        return in_fp32(g)

    assert by_hand(square, KEPT["in FP32"], 1e-4) == {}


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))
@pytest.mark.parametrize(("dtype", "lost"), [(HALF, True), (LOW, False), (WHOLE, False)])
def test_the_second_moment_of_adam(options: dict[str, Any], dtype: torch.dtype, lost: bool) -> None:
    model, batch = Weights(dtype), torch.full((8, 8), 1e-4, dtype=dtype)
    numbers = found(torch.optim.Adam(model.parameters(), 1e-4, eps=1e-4, **options), model, batch)
    assert numbers == ({"A5": "100 % of 64 squares are 0 in float16 and not in FP64"} if lost else {})


# ------------------------------------------------------------------------------------------------- A12


def resumed(make: Any, cast: Any, before: int = 3) -> dict[str, str]:
    """Train some steps, cast the states, and return what is found in the next ones. The gradients are bfloat16 values."""
    torch.manual_seed(2)
    model, batch = Weights(WHOLE), torch.randn(8, 8).bfloat16().float()
    optimizer = make(model.parameters())
    for _ in range(before):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    for state in optimizer.state.values():
        state |= {key: cast(x) for key, x in state.items() if isinstance(x, Tensor) and x.dim()}
    return found(optimizer, model, batch, steps=2)


def through(dtype: torch.dtype) -> Any:
    return lambda x: x.to(dtype).float()


ADAM = {**IMPLEMENTATIONS, "fused": {"fused": True}}


@pytest.mark.parametrize("options", ADAM.values(), ids=list(ADAM))
@pytest.mark.parametrize(("dtype", "name"), [(LOW, "bfloat16"), (WHOLE, "")])
def test_states_that_were_saved_in_16_bits(options: dict[str, Any], dtype: torch.dtype, name: str) -> None:
    numbers = resumed(lambda ps: torch.optim.AdamW(ps, 1e-3, **options), through(dtype))
    number = "all 128 sampled elements of 'exp_avg', 'exp_avg_sq' are bfloat16 values in FP32 before step 1"
    assert numbers == ({"A12": number} if name else {})


def test_states_that_were_saved_in_float16() -> None:
    numbers = resumed(lambda ps: torch.optim.AdamW(ps, 1e-3), lambda x: (x * 2.0**12).half().float() / 2.0**12)
    assert numbers == {}, "values that float16 does not have, though they have its bits"
    assert "float16 values" in resumed(lambda ps: torch.optim.Adam(ps, 1e-3, betas=(0.9, 0.9)), through(HALF))["A12"]


OTHERS = {
    "momentum": lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9),
    "rprop": lambda ps: torch.optim.Rprop(ps, 1e-3),
    "adamax": lambda ps: torch.optim.Adamax(ps, 1e-3),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 1e-3),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 1e-3),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, 1e-3),
}


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("make", OTHERS.values(), ids=list(OTHERS))
def test_states_of_gradients_in_16_bits_that_are_as_they_should_be(make: Any, before: int) -> None:
    assert resumed(make, lambda x: x, before) == {}


class StatesOfWeights(ByHand):
    """Keeps positive weights that are bfloat16 values among its states."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if "first" not in self.state[p]:
                self.state[p] |= {"first": p.detach().clone(), "v": torch.zeros_like(p)}
            p.data.add_(p.data - self.state[p]["first"], alpha=1e-3)
        super().step()


def test_weights_that_an_optimizer_keeps_from_its_first_step_are_no_moments() -> None:
    model = Weights(WHOLE)
    model.weight.data = torch.rand(8, 8).bfloat16().float()
    optimizer = StatesOfWeights(model.parameters(), in_fp32, KEPT["in FP32"])
    assert found(optimizer, model, torch.randn(8, 8), steps=2) == {}
