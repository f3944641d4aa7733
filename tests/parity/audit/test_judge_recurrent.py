"""An LSTM layer as one operation: PyTorch's own within its bound, and layers that are another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from judged import forged, recorded, unjudged, verdicts
from torch import Tensor, nn

from refimpl.parity.audit.values import Values

FORWARD, BACKWARD = "aten.mkldnn_rnn_layer", "aten.mkldnn_rnn_layer_backward"

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the operation is oneDNN's")


def layers(steps: int, name: str, scale: float = 1.0, **options: bool) -> list[Values]:
    """Return the operations with this name in a step of an LSTM of 8 to 12 features."""
    generator = torch.Generator().manual_seed(steps)
    lstm = nn.LSTM(8, 12, **options)
    for p in lstm.parameters():
        p.data.copy_((torch.rand(p.shape, generator=generator) - 0.5) * scale)
    x = torch.randn(steps, 3, 8, generator=generator, requires_grad=True)

    def run() -> None:
        y, (h, c) = lstm(x)
        torch.autograd.backward((y, h, c), [torch.randn(t.shape, generator=generator) for t in (y, h, c)])

    return [values for values in recorded(run) if values.operation.name.rpartition(".")[0] == name]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (6, 0.1), (6, 4.0), (12, 1.0)])
def test_an_lstm_is_within_its_bound(steps: int, scale: float, options: dict[str, bool]) -> None:
    found = layers(steps, FORWARD, scale, **options) + layers(steps, BACKWARD, scale, **options)
    assert len(found) == (4 if "bidirectional" in options else 2)
    for values in found:
        assert {(v.level, v.ratio < 0.5) for v in verdicts(values).values()} == {("fine", True)}


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "a unit": lambda y: y + 0.01 * y.abs().max(),
    "two steps exchanged": lambda y: y.flip(0),
    "in 16 bits": lambda y: y.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_layer_is_found(change: str) -> None:
    (forward,), (backward,) = layers(6, FORWARD), layers(6, BACKWARD)
    for values, results in ((forward, ("out.0", "out.1", "out.2")), (backward, [f"out.{i}" for i in range(7)])):
        for result in results:
            spoiled = forged(values, result, CHANGES[change])
            assert verdicts(spoiled)[result].level == "wrong", (values.operation.name, result)


def test_errors_that_steps_multiply_leave_gradients_unjudged() -> None:
    (forward,), (backward,) = layers(200, FORWARD, 4.0), layers(200, BACKWARD, 4.0)
    assert {v.level for v in verdicts(forward).values()} == {"fine"}  # each step from the h before it, as stored
    assert unjudged(backward).startswith("an LSTM's gradients over so many steps")
