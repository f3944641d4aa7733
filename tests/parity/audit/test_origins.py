"""Where Inf and NaN begin: the first operation that makes them, its operands, and what a loss scale could have done."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.parity.audit.origins import Origin, origin_of
from refimpl.parity.audit.session import Audit

N = 8


class Net(nn.Module):
    """A linear layer, and what a test does with its output."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(N, N)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.fc(x))


def origin(then: Callable[[Tensor], Tensor], scale: float | None = None, factor: float = 1.0) -> Origin | None:
    """Return where Inf or NaN begins in one step of a net; its gradients are in FP16 if there is a loss scale."""
    torch.manual_seed(0)
    net = Net(then)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with Audit(net, optimizer, scaler=scaler) as audit:
        out = net(torch.randn(N, N))
        out = out.half() if scale is not None else out
        scaler.scale(factor * out.float().square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        audit.step()
    assert audit.recorder.failures == {}
    return origin_of(audit.steps[0])


def triangle(diagonal: int, value: float = -math.inf) -> Tensor:
    return torch.full((N, N), value).triu(diagonal)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return F.softmax(x @ x.T + mask, -1)


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x,
        lambda x: attend(x, triangle(1)),
        lambda x: (x @ x.T).masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf).softmax(-1),
        lambda x: attend(x, torch.ones(N, N).tril().log()),
        lambda x: x + 0 * torch.empty(N).fill_(2.0),
    ],
    ids=["plain", "mask of -inf", "masked_fill", "mask by log 0", "empty"],
)
def test_an_inf_that_is_meant_is_no_origin(then: Callable[[Tensor], Tensor]) -> None:
    assert origin(then) is None


def test_an_overflow_of_the_forward_pass_has_its_operands_and_its_value_in_fp64() -> None:
    at = origin(lambda x: (x.half() * 60000).float())
    torch.manual_seed(0)
    x = nn.Linear(N, N)(torch.randn(N, N)).half()
    largest = x.double().abs().max().item()
    assert at.operation.name == "aten.mul.Tensor" and at.operation.phase == "forward"
    assert at.found.largest == largest * 60000 and at.found.finite_exact == ((x.double() * 60000).abs() > 65519).sum()
    assert at.found.operands == {"self": f"{x.flatten()[x.abs().argmax()].item():.6g}", "other": "60000"}
    assert at.helpful_scale is None and "whatever S" in at.remedy


@pytest.mark.parametrize(
    ("then", "name", "phase", "operand"),
    [
        (lambda x: (x * 0).sqrt(), "aten.div.Tensor", "backward", "self = -0, other = -0"),
        (lambda x: (x.abs() * 0) / (x.abs() * 0), "aten.div.Tensor", "forward", "self = 0, other = 0"),
        (lambda x: (x * 0).abs().log() * 0, "aten.log.default", "forward", "self = 0"),
        (lambda x: torch.where(x > 0, x.sqrt(), 0 * x), "aten.sqrt.default", "forward", "self = -"),
        (lambda x: (1000 * x.abs()).exp(), "aten.exp.default", "forward", "self = "),
    ],
    ids=["sqrt'(0)", "0 / 0", "log 0", "where with a bad branch", "exp above 88"],
)
def test_what_is_not_finite_in_any_format_has_no_remedy_by_a_scale(
    then: Callable[[Tensor], Tensor], name: str, phase: str, operand: str
) -> None:
    at = origin(then)
    assert (at.operation.name, at.operation.phase) == (name, phase) and operand in at.sentence
    assert at.helpful_scale is None and at.remedy.startswith("no loss scale helps")
    assert "test_origins.py" in at.operation.line


def test_an_overflow_of_a_product_has_the_row_and_the_column() -> None:
    at = origin(lambda x: ((300 * x.half()) @ (300 * x.half()).T).float())
    i, j = at.found.position
    torch.manual_seed(0)
    x = 300 * nn.Linear(N, N)(torch.randn(N, N)).half()
    assert at.found.operands["mat2"] == f"({N}) in {x[j].min().item():.4g} ... {x[j].max().item():.4g}"
    assert at.found.exact == (x[i].double() @ x[j].double()).item() and "aten.mm (float16)" in at.sentence


def test_a_row_that_is_masked_out_entirely_begins_at_the_softmax() -> None:
    at = origin(lambda x: attend(x, triangle(0)))
    assert at.operation.name == "aten._softmax.default" and at.found.masked_rows == 1 and math.isnan(at.found.value)


def test_finite_masks_that_overflow_when_added_come_before_the_softmax() -> None:
    least = torch.finfo(torch.float32).min
    at = origin(lambda x: attend(x, torch.full((N, N), least) + torch.full((N, N), least)))
    assert at.operation.name == "aten.add.Tensor" and at.found.overflow and at.found.finite_exact == N * N


def test_an_overflow_comes_before_the_mask_that_it_meets() -> None:
    at = origin(lambda x: attend((x.half() * 60000).float(), torch.ones(N, N).tril().log()))
    assert at.operation.name == "aten.mul.Tensor" and at.found.dtype == "float16"


@pytest.mark.parametrize("scale", [2.0**16, 2.0**15])
def test_a_gradient_that_overflows_says_which_scale_would_do(scale: float) -> None:
    at = origin(lambda x: x, scale, factor=100.0)
    assert at.operation.phase == "backward" and at.found.dtype == "float16"
    k = at.helpful_scale
    assert f"S <= 2^{k} would do" in at.remedy
    assert origin(lambda x: x, 2.0**k, factor=100.0) is None
    assert origin(lambda x: x, 2.0 ** (k + 1), factor=100.0) is not None


def test_nan_that_was_there_before_the_step_is_the_tensors() -> None:
    torch.manual_seed(0)
    net = Net(lambda x: x)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with torch.no_grad():
        net.fc.bias[3] = math.nan
    with Audit(net, optimizer) as audit:
        net(torch.randn(N, N)).sum().backward()
        net(torch.randn(N, N)).square().sum().backward()
        audit.step()
    assert origin_of(audit.steps[0]).sentence == "the parameter fc.bias is not finite before the step begins"
