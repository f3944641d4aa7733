"""Rule A10: Adam with mistakes in its formula, and optimizers that are right, or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from clean_optimizers import BitsAdamW, EightBitAdamW, KahanAdamW, RemainderAdamW, StochasticAdamW
from injected_weights import AdamWByHand
from torch import Tensor, nn

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.session import Audit

LOW, WHOLE = torch.bfloat16, torch.float32
BIAS, EPS, DECAY = "no bias correction", "eps inside the root", "weight decay added to the gradient"


class Weights(nn.Module):
    """Two weights whose gradients are the batch."""

    def __init__(self, dtype: torch.dtype = WHOLE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter((torch.randn(8, 32) * 0.1).to(dtype))
        self.second = nn.Parameter((torch.randn(8, 32) * 0.1).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.first + self.second.tanh()) * x).float().sum()


def found(make: Callable[[Any], Any], dtype: torch.dtype = WHOLE, steps: int = 3, before: int = 0) -> Finding | None:
    """Train, unaudited first, and return what A10 finds."""
    model = Weights(dtype)
    optimizer, batches = make(model.parameters()), torch.Generator().manual_seed(1)

    def step() -> None:
        optimizer.zero_grad()
        model((torch.randn(8, 32, generator=batches) * 1e-3).to(dtype)).backward()
        optimizer.step()

    for _ in range(before):
        step()
    with Audit(model, optimizer) as audit:
        for _ in range(steps):
            step()
            audit.step()
    assert audit.failures == {}, audit.failures
    return audit.findings.get("A10")


WRONG = {
    "uncorrected": BIAS,
    "inside": EPS,
    "coupled": DECAY,
    "uncorrected inside": f"{BIAS} and {EPS}",
    "uncorrected coupled": f"{BIAS} and {DECAY}",
    "inside coupled": f"{EPS} and {DECAY}",
    "uncorrected inside coupled": f"{BIAS} and {EPS} and {DECAY}",
}


@pytest.mark.parametrize("before", [0, 10])
@pytest.mark.parametrize(("wrong", "text"), WRONG.items())
def test_each_mistake_is_named(wrong: str, text: str, before: int) -> None:
    finding = found(lambda ps: AdamWByHand(ps, 1e-3, wrong), before=before)
    assert finding is not None and finding.level == "worse than it need be"
    assert finding.number == f"the updates of 2 parameters are those of Adam with {text}, and not those of Adam"
    assert finding.parameters == ("first", "second") and "injected_weights.py" in finding.line
    assert finding.step == 1 and finding.places == 3


@pytest.mark.parametrize("right", ["", "plain"])
@pytest.mark.parametrize("before", [0, 10])
@pytest.mark.parametrize("options", [{}, {"decay": 0.0}, {"eps": 1e-4}, {"betas": (0.0, 0.99)}, {"betas": (0.5, 0.5)}])
def test_adam_by_hand_without_a_mistake(right: str, before: int, options: dict[str, Any]) -> None:
    assert found(lambda ps: AdamWByHand(ps, 1e-3, right, **options), before=before) is None


class AdamByHand(AdamWByHand):
    """The same under a name that promises no decoupled decay."""


AdamByHand.__name__ = "OldAdam"


def test_a_decay_in_the_gradient_is_right_in_adam() -> None:
    assert found(lambda ps: AdamByHand(ps, 1e-3, "coupled")) is None
    both = found(lambda ps: AdamByHand(ps, 1e-3, "coupled uncorrected"))
    assert both is not None and BIAS in both.number and DECAY not in both.number


def test_a_bias_that_is_not_corrected_on_purpose_is_a_note() -> None:
    finding = found(lambda ps: AdamWByHand(ps, 1e-3, "uncorrected", correct_bias=False))
    assert finding is not None and finding.level == "note"


def test_after_many_updates_the_bias_is_gone() -> None:
    assert found(lambda ps: AdamWByHand(ps, 1e-3, "uncorrected", betas=(0.5, 0.5)), before=40) is None


class NoCounter(AdamWByHand):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for state in self.state.values():
            state["count"] = state.pop("step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for state in self.state.values():
            if "count" in state:
                state["step"] = state.pop("count")


def test_without_a_counter_the_first_update_can_be_judged_and_no_other() -> None:
    first = found(lambda ps: NoCounter(ps, 1e-3, "uncorrected"), steps=1)
    assert first is not None and first.step == 1
    assert found(lambda ps: NoCounter(ps, 1e-3, ""), steps=3) is None
    assert found(lambda ps: NoCounter(ps, 1e-3, "uncorrected"), before=2) is None


class Half(AdamWByHand):
    """Wrong for the second parameter only."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        both = self.param_groups[0]["params"]
        for i, wrong in enumerate(("", "uncorrected")):
            self.wrong, self.param_groups[0]["params"] = wrong, both[i : i + 1]
            super().step()
        self.param_groups[0]["params"] = both


def test_where_one_parameter_is_updated_as_it_should_be_nothing_is_said() -> None:
    assert found(lambda ps: Half(ps, 1e-3)) is None


FOR_LOOP, FOREACH, FUSED = {"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}
OPTIMS = torch.optim
OTHERS: dict[str, Callable[[Any], Any]] = {
    **{f"AdamW {list(o)}": lambda ps, o=o: OPTIMS.AdamW(ps, 1e-3, weight_decay=0.1, **o) for o in (FOR_LOOP, FOREACH, FUSED)},
    **{f"Adam {list(o)}": lambda ps, o=o: OPTIMS.Adam(ps, 1e-3, weight_decay=0.1, **o) for o in (FOR_LOOP, FOREACH, FUSED)},
    "amsgrad": lambda ps: OPTIMS.AdamW(ps, 1e-3, amsgrad=True),
    "maximize": lambda ps: OPTIMS.AdamW(ps, 1e-3, maximize=True),
    "capturable": lambda ps: OPTIMS.AdamW(ps, torch.tensor(1e-3), foreach=False),
    "NAdam": lambda ps: OPTIMS.NAdam(ps, 1e-3),
    "RAdam": lambda ps: OPTIMS.RAdam(ps, 1e-3),
    "Adamax": lambda ps: OPTIMS.Adamax(ps, 1e-3),
    "SGD": lambda ps: OPTIMS.SGD(ps, 1e-3, momentum=0.9),
    "RMSprop": lambda ps: OPTIMS.RMSprop(ps, 1e-3, momentum=0.9),
    "FP32": lambda ps: BitsAdamW(ps, 1e-3),
    "8 bits": lambda ps: EightBitAdamW(ps, 1e-3),
}


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("make", OTHERS.values(), ids=list(OTHERS))
def test_other_optimizers_are_not_taken_for_a_wrong_adam(make: Callable[[Any], Any], before: int) -> None:
    assert found(make, before=before, steps=2) is None


@pytest.mark.parametrize("make", [BitsAdamW, StochasticAdamW, KahanAdamW, RemainderAdamW, OPTIMS.AdamW, OPTIMS.Adam])
def test_weights_in_bfloat16(make: Callable[..., Any]) -> None:
    assert found(lambda ps: make(ps, lr=1e-3), LOW) is None
    assert found(lambda ps: make(ps, lr=1e-3), LOW, before=5) is None
