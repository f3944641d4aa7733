"""One loop of a user with one slip at a time, as public reports of GradScaler, accumulation and schedules have them."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
pytest.importorskip("transformers", reason="the loops train Hugging Face models: transformers==5.24.0")
import torch
from hf_loop import HFLoop, gpt2, serious
from torch import Tensor, nn

from refimpl.parity.audit import Audit

FIRST = 2.0**20
"""A loss scale with which the first steps overflow, so that a loop must tell steps from updates."""


class UsersLoop(HFLoop):
    """A GPT-2 with AdamW in two groups, FP16 autocast, a GradScaler, two micro-batches, clipping, and a warm-up by hand."""

    def __init__(self, slip: str) -> None:
        self.slip, self.updates, self.rate = slip, 0, 1e-3
        super().__init__(model=gpt2, autocast=torch.float16, scale=FIRST, micro_batches=2, steps=4)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        decayed = [p for p in parameters if p.dim() >= 2 or self.slip == "decay-all"]
        rest = [p for p in parameters if p.dim() < 2 and self.slip != "decay-all"]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        betas = (0.9, 0.999) if self.slip in ("betas", "betas-late") else (0.9, 0.95)
        return torch.optim.AdamW(groups, 1e-3, betas=betas, eps=1e-6 if self.slip == "eps" else 1e-8, fused=True)

    def schedule(self, count: int) -> float:
        if self.slip == "const-lr":
            return self.rate
        if self.slip == "lin-lr":
            return self.rate * (1 - count / 10)
        return self.rate * min(1.0, (count + 1) / 4) * (1 + math.cos(math.pi * count / 20)) / 2

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.number if self.slip == "sched-every-step" else self.updates)
        if self.slip != "no-zero-grad":
            self.optimizer.zero_grad()
        for _ in range(self.micro_batches):
            self.backward(self.loss(self.batch()))
        self.update()

    def batch(self) -> dict[str, Tensor]:
        batch = super().batch()
        if self.slip == "ignore":
            batch["labels"][:, -4:] = -100
        return batch

    def average(self, loss: Tensor) -> Tensor:
        return loss if self.slip == "loss-summed" else loss / self.micro_batches

    def update(self) -> None:
        late, scale = self.slip.endswith("late"), self.scaler.get_scale()
        if late:
            self.clip()
        self.scaler.unscale_(self.optimizer)
        if not late:
            self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += self.scaler.get_scale() >= scale


MISTAKES = {
    "late": "B1", "betas-late": "B1", "loss-summed": "C1", "no-zero-grad": "A9", "sched-every-step": "B5",
}  # fmt: skip
SETTINGS = ("ok", "betas", "eps", "const-lr", "lin-lr", "own-count", "decay-all", "ignore")
"""Right loops, with other settings: which are meant, no audit can know."""


def trained(slip: str) -> Audit:
    return UsersLoop(slip).train()


@pytest.mark.parametrize("slip", [pytest.param(s, marks=pytest.mark.slow) if s == "betas-late" else s for s in MISTAKES])
def test_a_slip_is_found_by_its_code_and_no_other_is(slip: str) -> None:
    audit = trained(slip)
    found = {code: f"{finding.level}: {finding.number}" for code, finding in audit.findings.items()}
    assert MISTAKES[slip] in found and serious(audit) <= {MISTAKES[slip]}, found


@pytest.mark.parametrize("slip", [s if s == "ok" else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS])
def test_a_right_loop_with_other_settings_is_not_blamed(slip: str) -> None:
    audit = trained(slip)
    assert serious(audit) == set(), {code: finding.number for code, finding in audit.findings.items()}
    assert not set(MISTAKES.values()) & set(audit.findings)
