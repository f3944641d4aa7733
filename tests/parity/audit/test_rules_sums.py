"""Rules C on uses of a weight, and on ranks: which are a matter of the loop, and which of the weight's own format."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def undivided(finish: Callable[[nn.Module, list[Tensor], float], None]) -> Finding | None:
    """Return what is found of 4 mean losses that are summed. finish: changes the model's gradients, given their norm."""
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(1))
    with Audit(model, optimizer, steps=1) as audit:
        for batch in x:
            model(batch).square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        finish(model, grads, math.sqrt(sum(float(g.square().sum()) for g in grads)))
        optimizer.step()
        audit.step()
    assert audit.failures == {}
    return audit.findings.get("C1")


def clip_by_hand(model: nn.Module, grads: list[Tensor], norm: float) -> None:
    """Multiply by max_norm / norm, which is 1.00002 / 4."""
    total = torch.stack([g.norm() for g in grads]).norm()
    for g in grads:
        g.mul_(norm / 4 * 1.00002 / total)


def divide_and_clip(model: nn.Module, grads: list[Tensor], norm: float) -> None:
    """Multiply by 1/4 and a clip coefficient in one, which is 1."""
    total = torch.stack([g.norm() for g in grads]).norm()
    coefficient = (2 * norm / total).clamp(max=1.0) / 4
    for g in grads:
        g.mul_(coefficient)


def test_a_clip_coefficient_near_one_nth_is_no_division_by_n() -> None:
    def clip(model: nn.Module, grads: list[Tensor], norm: float) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), norm / 4)

    def divide(model: nn.Module, grads: list[Tensor], norm: float) -> None:
        for g in grads:
            g.div_(4)

    assert undivided(lambda model, grads, norm: None) is not None
    assert undivided(clip) is not None and undivided(clip_by_hand) is not None
    assert undivided(divide) is None and undivided(divide_and_clip) is None


RANK = """
import sys
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from refimpl.parity.audit import Audit

rank, ranks, path, low = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "low"
torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
if low:
    model.register_comm_hook(None, fp16_compress_hook)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with Audit(model, optimizer, steps=1) as audit:
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    audit.step()
assert not audit.failures, audit.failures
for code, finding in audit.findings.items():
    print(code, finding.level, finding.number)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("low", [True, False])
def test_gradients_that_ranks_sum_in_16_bits_are_found(tmp_path: Path, low: bool) -> None:
    words = ["2", str(tmp_path / "meeting"), "low" if low else "fp32"]
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    other = subprocess.Popen([*command, "1", *words], stdout=subprocess.DEVNULL)
    done = subprocess.run([*command, "0", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == other.wait(300) == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("C9 ")]
    # one sum of two numbers, rounded to nearest: 2^-11
    expected = "C9 note float16 numbers are summed over 2 ranks: an error of up to 0.00049 of their sizes"
    assert found == ([expected] if low else [])
