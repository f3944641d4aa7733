"""`Audit`: which steps it audits, what it notes, and that the user's run has the same bits."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from audit_loops import LOOPS, OneRank
from torch import Tensor, nn

from refimpl.parity.audit.rules.table import GROUPS, PROBES
from refimpl.parity.audit.session import Audit


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with OneRank():
        yield


def audited(name: str, **options: int) -> tuple[dict[str, Tensor], Audit]:
    """Run a loop under the audit."""
    loop = LOOPS[name]()
    audit = Audit(loop.model, loop.optimizers, scaler=loop.scaler, ema=loop.ema, **options)

    @contextmanager
    def around(step: int) -> Iterator[None]:
        yield
        audit.step()

    with audit:
        loop.run(around)
    return loop.bits(), audit


@pytest.mark.parametrize("name", LOOPS)
def test_an_audited_run_has_the_bits_of_an_unaudited_one(name: str, group: None) -> None:
    plain = LOOPS[name]().run().bits()
    bits, audit = audited(name)
    assert [key for key in {**plain, **bits} if not torch.equal(plain[key], bits[key])] == []
    assert audit.recorder.failures == {}
    assert [step.number for step in audit.steps] == [1, 2, 3, 4]  # the fourth has begun


def test_the_first_steps_are_audited_and_then_one_in_every() -> None:
    backward = torch.autograd.backward
    _, audit = audited("sgd foreach", steps=1, every=3)
    assert [step.number for step in audit.steps] == [1, 3]
    assert torch.autograd.backward is backward


def test_a_step_has_its_calls_and_the_states_around_it() -> None:
    _, audit = audited("fp16 scaler fused")
    first, second, third, _ = audit.steps
    assert [call.name for call in first.calls] == ["autocast", "autocast", "backward", "optimizer.step"]
    assert [call.autocast for call in first.calls] == ["float16", "", "", ""]
    scales = [step.before.scale for step in (first, second, third)]
    assert scales == [2.0**18, 2.0**17, 2.0**16]
    assert {call.line.rpartition(":")[0].rpartition("/")[2] for call in third.calls} == {"audit_loops.py"}
    assert set(third.after.optimizers[0].updates.values()) == {1.0}


def test_what_happens_in_a_skipped_step_is_at_the_line_of_the_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)  # not fused: GradScaler does not call it
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t + 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer._opt_called = True  # else PyTorch warns once, which the tests make an error
    with Audit(model, optimizer, scaler=scaler, scheduler=scheduler) as audit:
        for _ in range(2):
            with torch.autocast("cpu", torch.float16):
                loss = model(torch.randn(16, 8)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0**60)
            scheduler.step()
            optimizer.zero_grad()
            audit.step()
    for code in ("B5", "B7"):
        file, _, line = audit.findings[code].line.rpartition(":")
        assert linecache.getline(file, int(line)).strip() == "scaler.step(optimizer)"


def test_no_two_probes_have_one_name() -> None:
    assert len(PROBES) == sum(len(group.PROBES) for group in GROUPS)
