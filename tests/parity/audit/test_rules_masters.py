"""Rules A1 to A3 and A14: updates that leave weights as they were, and the optimizers that must not be taken for such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from clean_optimizers import BitsAdamW, EightBitAdamW, KahanAdamW, Masters, RemainderAdamW, StochasticAdamW
from injected_weights import adds_nothing
from torch import Tensor, nn

from refimpl.parity.audit.session import Audit

LOW, HALF = torch.bfloat16, torch.float16
ROWS, COLUMNS = 24, 32
IMPLEMENTATIONS = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


class Weights(nn.Module):
    """A weight that is multiplied by the batch; its gradient is the batch."""

    def __init__(self, dtype: torch.dtype = LOW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter((torch.randn(ROWS, COLUMNS) * 0.02).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.float() * x).sum()


class Loop:
    """A loop; `update` is called when the gradients are there."""

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype = LOW) -> None:
        self.model = Weights(dtype)
        self.optimizer = make(list(self.model.parameters()))
        self.batches = torch.Generator().manual_seed(1)

    def update(self) -> None:
        self.optimizer.step()

    def train(self, steps: int = 1, size: float = 1.0) -> Audit:
        audit = Audit(self.model, self.optimizer)
        with audit:
            for _ in range(steps):
                self.optimizer.zero_grad()
                (self.model(torch.randn(ROWS, COLUMNS, generator=self.batches) * size)).backward()
                self.update()
                audit.step()
        assert audit.failures == {}, audit.failures
        return audit


def numbers(audit: Audit) -> dict[str, str]:
    """What is found, by code; D18 is a note about the CPU's square root."""
    return {code: finding.number for code, finding in audit.findings.items() if code != "D18"}


# ------------------------------------------------------------------------------------------------- A1


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))
@pytest.mark.parametrize("lr", [1e-4, 1e-5, 1e-6])
def test_bf16_weights_without_masters_do_not_move(lr: float, options: dict[str, Any]) -> None:
    loop = Loop(lambda ps: torch.optim.AdamW(ps, lr, weight_decay=0, **options))
    before = loop.model.weight.detach().clone()
    audit = loop.train()
    assert set(numbers(audit)) == {"A1"}, numbers(audit)
    left = int((loop.model.weight == before).sum())
    assert audit.findings["A1"].number.startswith(f"{100 * left / (ROWS * COLUMNS):.3g} % of 768 bfloat16 weights did not move")
    assert audit.findings["A1"].parameters == ("weight",) and audit.findings["A1"].level == "worse than it need be"
    assert "test_rules_masters.py" in audit.findings["A1"].line


def test_updates_that_move_nearly_all_weights_are_a_note() -> None:
    audit = Loop(lambda ps: torch.optim.SGD(ps, 1.0)).train()
    assert {f.level for f in audit.findings.values()} <= {"note"}


def test_updates_in_fp32_that_are_rounded_back_have_no_masters_either() -> None:
    audit = Loop(lambda ps: BitsAdamW(ps, 1e-5)).train(steps=2)
    assert set(numbers(audit)) == {"A1"}, numbers(audit)


class ByHand(Loop):
    def update(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 1e-5 * p.grad.sign()


def test_an_update_by_hand_has_no_masters_either() -> None:
    loop = ByHand(lambda ps: torch.optim.SGD(ps, 0.0))
    before = loop.model.weight.detach().clone()
    audit = loop.train()
    assert set(numbers(audit)) == {"A1"}
    left = int((loop.model.weight == before).sum())
    assert audit.findings["A1"].number.startswith(f"{100 * left / (ROWS * COLUMNS):.3g} % of 768 ")


class TwoBlocks(Loop):
    """Masters by hand. stale: whether the weights are never copied from them; late: whether at the next step's beginning."""

    stale = late = False

    def __init__(self, **options: Any) -> None:
        self.model = Weights()
        self.masters = Masters(list(self.model.parameters()), lr=1e-3, **options)
        self.optimizer = self.masters.optimizer
        self.batches = torch.Generator().manual_seed(1)

    def update(self) -> None:
        self.masters.receive()
        if self.late:
            self.masters.send()
        self.optimizer.step()
        if not (self.stale or self.late):
            self.masters.send()


SMALL_STATES = [StochasticAdamW, KahanAdamW, RemainderAdamW]


@pytest.mark.parametrize("kind", SMALL_STATES)
def test_optimizers_that_need_no_masters_are_known_by_what_they_do(kind: Any) -> None:
    audit = Loop(lambda ps: kind(ps, 1e-5)).train(steps=3)
    assert numbers(audit) == {}


class Kahan32(BitsAdamW):
    """Weights in BF16 with their compensation in FP32, from a result in FP32."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        super().begin(p, state)
        state["lost"] = torch.zeros_like(p, dtype=torch.float32)

    def write(self, p: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        whole = new + state["lost"]
        p.copy_(whole)
        state["lost"].copy_(whole - p.float())


class TwoHalves(BitsAdamW):
    """Weights in BF16 and the 16 bits that an FP32 master has beyond; the upper half is rounded by PyTorch."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        super().begin(p, state)
        state["low"] = torch.zeros_like(p, dtype=torch.int16)

    def write(self, p: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        low = state["low"].to(torch.int32)
        whole = (p.float().view(torch.int32) + low).view(torch.float32) + (new - p.float())
        p.copy_(whole)
        state["low"].copy_(whole.view(torch.int32) - p.float().view(torch.int32))


@pytest.mark.parametrize("kind", [Kahan32, TwoHalves])
def test_what_holds_the_lost_part_is_known_by_its_values(kind: Any) -> None:
    audit = Loop(lambda ps: kind(ps, 1e-5)).train(steps=3)
    assert numbers(audit) == {}


class WrongKahan(Kahan32):
    """A compensation that is not what was lost."""

    def write(self, p: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        p.copy_(new)
        state["lost"].copy_(new - p.float()).mul_(0.5)


def test_a_compensation_with_other_values_is_none() -> None:
    assert set(numbers(Loop(lambda ps: WrongKahan(ps, 1e-5)).train(steps=3))) == {"A1"}


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))
def test_copies_of_masters_are_no_updates_in_16_bits(options: dict[str, Any]) -> None:
    audit = TwoBlocks(**options).train(steps=3)
    assert numbers(audit) == {}


class LateMasters(BitsAdamW):
    """Masters in the optimizer's states, made in its first step."""

    def update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if "master" not in state:
            state["master"] = p.detach().float().clone()
        state["master"].sub_(p.grad.float().sign() * group["lr"])
        p.copy_(state["master"])


@pytest.mark.parametrize("dtype", [LOW, HALF])
def test_masters_that_the_first_step_makes_are_masters(dtype: torch.dtype) -> None:
    audit = Loop(lambda ps: LateMasters(ps, 1e-5), dtype).train(steps=3)
    assert numbers(audit) == {}


def test_frozen_weights_in_bf16_are_not_expected_to_move() -> None:
    loop = Loop(lambda ps: torch.optim.SGD(ps, 1e-2))
    loop.model.extra = nn.Parameter(loop.model.weight.detach().float())
    loop.model.weight.requires_grad_(False)
    loop.model.forward = lambda x: (loop.model.weight.float() * loop.model.extra * x).sum()  # type: ignore[method-assign]
    loop.optimizer = torch.optim.SGD([loop.model.extra], 1e-2)
    assert numbers(loop.train(steps=2)) == {}


def test_weights_in_fp32_with_8_bit_states_have_no_finding() -> None:
    assert numbers(Loop(lambda ps: EightBitAdamW(ps, 1e-5), torch.float32).train(steps=3)) == {}


def test_a_learning_rate_of_zero_is_no_lost_update() -> None:
    assert numbers(Loop(lambda ps: torch.optim.SGD(ps, 0.0)).train(steps=2)) == {}
    assert "A1" not in numbers(Loop(lambda ps: torch.optim.AdamW(ps, 0.0)).train(steps=2))


# ------------------------------------------------------------------------------------------------- A2


class Stale(TwoBlocks):
    stale = True


class Late(TwoBlocks):
    late = True


def test_weights_that_are_not_copied_from_their_masters() -> None:
    loop = Stale()
    audit = loop.train(steps=3)
    assert set(numbers(audit)) == {"A2"}, numbers(audit)
    finding = audit.findings["A2"]
    masters, weight = loop.masters.copies[0].detach(), loop.model.weight.detach()
    assert finding.level == "wrong" and finding.parameters == ("weight",) and finding.step == 2
    assert "1 weights did not change in two steps" in finding.number and not torch.equal(masters.to(LOW), weight)


def test_the_distance_of_stale_weights_is_in_units_in_the_last_place() -> None:
    loop = Stale()
    audit = loop.train(steps=2)
    weight, rounded = loop.model.weight.detach().double(), loop.masters.copies[0].detach().to(LOW).double()
    spacing = 2.0 ** (torch.floor(torch.log2(weight.abs())) - 7)
    off = int((weight != rounded).sum())
    number = audit.findings["A2"].number
    assert f"{100 * off / weight.numel():.3g} % of {weight.numel()}" in number
    assert f"by up to {float(((weight - rounded).abs() / spacing).max()):.3g} units" in number


def test_weights_that_are_copied_at_the_next_step_are_not_stale() -> None:
    assert numbers(Late().train(steps=4)) == {}


class LateByHand(TwoBlocks):
    """Two weights, 1 at first, are copied at the next step's beginning from masters that move by `units` of theirs."""

    late = True

    def __init__(self, *units: tuple[float, float]) -> None:
        super().__init__()
        self.moves = iter(units)
        for weight in (self.model.weight, self.masters.copies[0]):
            weight.data.view(-1)[:2] = 1.0
        self.optimizer.param_groups[0].update(lr=1e-12, weight_decay=0.0)

    def update(self) -> None:
        super().update()
        self.masters.copies[0].data.view(-1)[:2] += torch.tensor(next(self.moves)) * 2.0**-7


@pytest.mark.parametrize("units", [
    ((0.2, 0.0), (0.6, 0.0), (0.0, 0.0)),     # rounded to the same weight after one step, to the next after two
    ((1.1, -0.5), (1.1, -0.5), (1.1, -0.5)),  # to the next and, below 1, to the one before: by as many bits
])  # fmt: skip
def test_weights_that_are_copied_at_the_next_step_and_hardly_move_are_not_stale(units: tuple[tuple[float, float], ...]) -> None:
    loop = LateByHand(*units)
    assert numbers(loop.train(steps=3)) == {}


def test_masters_that_have_not_moved_by_half_a_unit_have_no_stale_weights() -> None:
    loop = Stale()
    loop.optimizer.param_groups[0].update(lr=1e-12, weight_decay=0.0)
    assert numbers(loop.train(steps=3)) == {}


# ------------------------------------------------------------------------------------------------- A3


class DecaysFirst(StochasticAdamW):
    """Rounds at random, but decays in an operation of its own, in 16 bits."""

    def update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        super().update(p, {**group, "weight_decay": 0.0}, state)


@pytest.mark.parametrize(("lr", "decay", "lost"), [(1e-3, 0.01, True), (1e-1, 0.1, False)])
def test_a_decay_that_16_bits_cannot_hold(lr: float, decay: float, lost: bool) -> None:
    audit = Loop(lambda ps: DecaysFirst(ps, lr, decay)).train()
    assert set(numbers(audit)) == ({"A3"} if lost else set()), numbers(audit)
    if lost:
        assert audit.findings["A3"].number.startswith("the decay by 1 - 1e-05 left 100 % of 768 bfloat16 weights as they were")


def test_a_decay_inside_a_fused_update_is_no_decay_of_its_own() -> None:
    audit = Loop(lambda ps: torch.optim.AdamW(ps, 1e-5, weight_decay=0.1, fused=True)).train()
    assert set(numbers(audit)) == {"A1"}


@pytest.mark.parametrize("foreach", [False, True])
def test_both_are_found_where_both_are(foreach: bool) -> None:
    audit = Loop(lambda ps: torch.optim.AdamW(ps, 1e-5, weight_decay=0.1, foreach=foreach)).train()
    assert set(numbers(audit)) == {"A1", "A3"}


# ------------------------------------------------------------------------------------------------- A14


class Void(BitsAdamW):
    """An optimizer with one operation."""

    def update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.add_(p.grad, alpha=-group["lr"])


def test_an_update_that_runs_and_changes_nothing() -> None:
    loop = Loop(lambda ps: Void(ps, 1e-2), torch.float32)
    before = loop.model.weight.detach().clone()
    with adds_nothing():
        audit = loop.train()
    assert torch.equal(loop.model.weight, before)
    assert set(numbers(audit)) == {"A14"}, numbers(audit)
    assert audit.findings["A14"].number.startswith("aten.add_.Tensor left all 768 elements of weight as they were; FP64")
    assert numbers(Loop(lambda ps: Void(ps, 1e-2), torch.float32).train()) == {}


def test_a_fused_update_that_found_inf_skips_is_not_void() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with Audit(model, optimizer, scaler=scaler) as audit:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((16, 8), 4.0)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    assert not {"A1", "A14"} & set(numbers(audit)) and audit.failures == {}
