"""Each mistake of the catalogue, injected into a Hugging Face model's loop: its code is found, and no other above a note."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
pytest.importorskip("transformers", reason="the loops train Hugging Face models: transformers==5.24.0")
import torch
from audit_mistakes import MISTAKES
from hf_loop import HFLoop, gpt2, llama, serious

from refimpl.parity.audit.finding import is_serious


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# One of each group is tried every time, the others are slow.
SAMPLE = {min(name for name in MISTAKES if name[0] == group) for group in {name[0] for name in MISTAKES}}
NAMES = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in MISTAKES]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_found_by_its_code_and_no_other_is(name: str) -> None:
    audit = MISTAKES[name].faulty().train()
    code = MISTAKES[name].code
    assert code in audit.findings, {c: f.number for c, f in audit.findings.items()}
    finding = audit.findings[code]
    assert finding.number and finding.effect and finding.fix
    cause = {MISTAKES[name].also} - {""}
    expected = {code} | cause if is_serious(finding.level) else cause
    assert serious(audit) == expected, {c: f.number for c, f in audit.findings.items()}


@pytest.mark.parametrize("name", NAMES)
def test_without_the_mistake_nothing_above_a_note_is_found(name: str) -> None:
    audit = MISTAKES[name].clean().train()
    assert serious(audit) == set(), {c: f.number for c, f in audit.findings.items()}
    assert MISTAKES[name].code not in audit.findings


@pytest.mark.parametrize("model", [llama, gpt2])
def test_the_loops_without_a_mistake_learn(model: Callable[..., torch.nn.Module]) -> None:
    loop = HFLoop(model=model, lr=1e-2, max_norm=None)
    batch = loop.batch()
    before = loop.loss(batch).item()
    for _ in range(4):
        loop.backward(loop.loss(batch))
        loop.update()
        loop.zero_grad()
    assert loop.loss(batch).item() < before - 0.5
