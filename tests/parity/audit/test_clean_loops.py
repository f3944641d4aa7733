"""Correct loops as people write them, under the audit: their bits stay, nothing is found, and nearly all of them is judged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
pytest.importorskip("transformers", reason="the loops train Hugging Face models: transformers==5.24.0")
pytest.importorskip("peft", reason="some loops train LoRA's parts: peft>=0.17")
import torch
from audit_loops import OneRank
from clean_loops import LOOPS, MORE_LOOPS, Run
from script_loader import load_script

from refimpl.parity.audit import Audit

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_group() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with OneRank():
        yield
    torch.set_num_threads(threads)


def audited(name: str) -> tuple[Run, Audit]:
    """Run a loop for three steps, all audited."""
    run = MORE_LOOPS[name].make() if name not in LOOPS else LOOPS[name].make()
    audit = Audit(run.model, run.optimizer, scaler=run.scaler, scheduler=run.scheduler, ema=run.ema)

    @contextmanager
    def step() -> Iterator[None]:
        yield
        audit.step()

    with audit:
        run.train(step)
    return run, audit


once = cache(audited)
COVERAGE = load_script("audit_coverage")


EAGER = [name for name in LOOPS if "compile" not in name]
SOME = EAGER[::8]
CASES = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in EAGER]


@pytest.mark.parametrize("name", CASES)
def test_the_audit_changes_no_bit_of_a_clean_loop(name: str) -> None:
    plain = LOOPS[name].make().train().bits()
    run, audit = once(name)
    bits = run.bits()
    assert [key for key in {**plain, **bits} if not torch.equal(plain[key], bits[key])] == []
    assert audit.failures == {} and audit.audited == [1, 2, 3]


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in dict.fromkeys([*LOOPS, *MORE_LOOPS]) if name not in SOME]


@pytest.mark.parametrize("name", [*SOME, *MORE])
def test_nothing_above_a_note_is_found_in_a_clean_loop_and_nearly_all_of_it_is_judged(name: str) -> None:
    _, audit = once(name)
    assert COVERAGE.serious(audit) == []
    assert COVERAGE.share(audit) >= COVERAGE.LEAST, audit.judge.unjudged
