"""Rules C on uses of a weight: which of them are a matter of the loop, and which of the weight's own format."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import Tensor, nn

from refimpl.parity.audit import Audit
from refimpl.parity.audit.finding import Finding


class Tied(nn.Module):
    """A weight that is used several times in one pass."""

    def __init__(self, uses: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(16, 16, generator=torch.Generator().manual_seed(2)) / 4).to(dtype))
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.uses):
            x = x + torch.tanh(x @ self.weight)
        return x


def shared(uses: int, dtype: torch.dtype, autocast: bool, micro_batches: int = 1) -> Finding | None:
    """Return what is found of the weight's uses."""
    model = Tied(uses, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    with Audit(model, optimizer, steps=1) as audit:
        for _ in range(micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(x).float().square().mean() / micro_batches
            loss.backward()
        optimizer.step()
        audit.step()
    assert audit.failures == {}
    return audit.findings.get("C4")


def test_uses_of_a_weight_under_autocast_are_counted_in_each_pass() -> None:
    assert shared(1, torch.float32, True) is None
    two, again = shared(2, torch.float32, True), shared(2, torch.float32, True, micro_batches=3)
    assert two is not None and again is not None
    for found in (two, again):
        assert found.level == "note" and found.number.startswith("2 uses of weight are added in bfloat16")
    three = shared(3, torch.float32, True)
    assert three is not None and three.level == "worse than it need be" and three.number.startswith("3 uses of weight")


def test_uses_of_a_weight_in_16_bits_are_a_note() -> None:
    found = shared(5, torch.bfloat16, False)
    assert found is not None and found.level == "note" and found.number.startswith("5 uses of weight")
    assert shared(5, torch.float32, False) is None
