"""`Audit`: which steps it audits, what it notes, and that the user's run has the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from audit_loops import LOOPS, OneRank
from torch import Tensor

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


def test_no_two_probes_have_one_name() -> None:
    assert len(PROBES) == sum(len(group.PROBES) for group in GROUPS)
