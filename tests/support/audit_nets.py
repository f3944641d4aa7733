"""A net of two linear layers, whose middle a test chooses, trained under the audit: for the tests of rules D."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.parity.audit.finding import Finding, is_serious
from refimpl.parity.audit.session import Audit

N, ROWS = 64, 32
LOW, HALF = torch.bfloat16, torch.float16
Then = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Two linear layers with what a test puts between them."""

    def __init__(self, then: Then) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.then(self.first(x)))


def squares(y: Tensor, target: Tensor) -> Tensor:
    """Return a loss whose gradients FP16 neither flushes to 0 nor makes infinite."""
    return y.float().square().sum() / N


def audited(
    then: Then, dtype: torch.dtype = LOW, loss: Callable[[Tensor, Tensor], Tensor] = squares, batch: Tensor | None = None,
    steps: int = 1, autocast: torch.dtype | None = None, scale: float | None = None,
    prepare: Callable[[Any], object] | None = None,
) -> Audit:  # fmt: skip
    """Train a net for some steps under the audit. batch: random rows if not given; prepare: is called with the net."""
    torch.manual_seed(0)
    net = Net(then).to(dtype)
    if prepare is not None:
        prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)  # 16-bit weights without masters that move are A1
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with Audit(net, optimizer, scaler=scaler) as audit:
        for _ in range(steps):
            x = batch if batch is not None else torch.randn(ROWS, N)
            target = torch.randint(N, (len(x),))
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                value = loss(net(x.to(dtype) if autocast is None else x), target)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            audit.step()
    assert audit.failures == {}
    return audit


def serious(audit: Audit) -> set[str]:
    return {code for code, finding in audit.findings.items() if is_serious(finding.level)}


def the_one(audit: Audit, code: str) -> Finding:
    """Return the finding of a rule, which is the only one above a note, and says all that a finding says."""
    assert serious(audit) == {code}, {c: f.number for c, f in audit.findings.items()}
    finding = audit.findings[code]
    assert finding.number and finding.effect and finding.fix and ":" in finding.line
    return finding


def hidden(dtype: torch.dtype = LOW, scale: float = 1.0) -> Tensor:
    """Return what the net hands to `then` in the first step."""
    torch.manual_seed(0)
    net = Net(lambda x: x).to(dtype)
    return net.first(torch.randn(ROWS, N).to(dtype)).detach() * scale
