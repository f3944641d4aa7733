"""Rules D12, D13 and D19 to D22: casts too many, missing, or without a gradient, and sums over steps in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from audit_nets import HALF, LOW, ROWS, N, Net, audited, hidden, serious, squares, the_one
from torch import Tensor, nn

from refimpl.parity.audit.session import Audit

FP32 = torch.float32

# ------------------------------------------------------------------------------------------------- D12 cast twice


def test_a_cast_from_fp32_by_way_of_the_other_format_counts_what_is_lost() -> None:
    def then(x: Tensor) -> Tensor:
        return (x * 1e-6).to(LOW).to(HALF).float() * 1e6

    finding = the_one(audited(then, FP32), "D12")
    first = (hidden(FP32) * 1e-6).to(LOW)
    second = first.to(HALF)
    flushed = int(((second == 0) & (first != 0)).sum())
    rounded = int((second.double() != first.double()).sum()) - flushed
    assert f"of {ROWS * N:,} elements {flushed:,} become 0, 0 Inf, and {rounded:,} are rounded again" in finding.number
    assert flushed > 0 and "from float32 to bfloat16 to float16" in finding.number


def test_bf16_activations_that_fp16_makes_infinite_are_found() -> None:
    then = lambda x: (x * 1e5).to(HALF).clamp(-1e4, 1e4).to(LOW)  # noqa: E731
    assert "Inf" in the_one(audited(then), "D12").number


@pytest.mark.parametrize(
    "then",
    [lambda x: x.to(HALF).to(LOW), lambda x: x.float().to(LOW), lambda x: x.float().to(HALF).to(FP32).to(LOW)],
    ids=["a note", "exact", "by way of FP32"],
)
def test_casts_that_keep_what_there_is_are_not_found(then: Callable[[Tensor], Tensor]) -> None:
    assert serious(audited(then)) == set()


# ------------------------------------------------------------------------------------------------- D13 missing cast


def outside_autocast(how: Callable[[], AbstractContextManager]) -> Callable[[Net], None]:
    """Return what makes the second layer run in another context; gives its input in FP32."""

    def prepare(net: Net) -> None:
        second = net.second

        class Apart(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with how():
                    return F.linear(x.float(), second.weight, second.bias)

        net.second = Apart()
        net.weights = second

    return prepare


def test_products_that_autocast_misses_have_their_share() -> None:
    audit = audited(lambda x: x, FP32, autocast=LOW, prepare=outside_autocast(torch._C._DisableAutocast))
    assert "50% of the multiplications" in the_one(audit, "D13").number


@pytest.mark.parametrize("how", [lambda: torch.autocast("cpu", enabled=False), nullcontext], ids=["on purpose", "cast"])
def test_products_outside_autocast_on_purpose_are_not_found(how: Callable[[], AbstractContextManager]) -> None:
    assert audited(lambda x: x, FP32, autocast=LOW, prepare=outside_autocast(how)).findings == {}


def test_attention_that_is_computed_from_its_parts_is_not_found() -> None:
    def then(x: Tensor) -> Tensor:
        heads = x.reshape(1, ROWS, 2, N // 2).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1).transpose(1, 2).reshape(ROWS, N)

    audit = audited(then, FP32, autocast=LOW)
    assert any(o.name == "aten.bmm.default" and o.outputs.dtype == "float32" for o in audit.steps[0].operations)
    assert audit.findings == {}


def test_what_the_lists_of_autocast_keep_in_fp32_is_not_found() -> None:
    then = lambda x: torch.cdist(x.float(), x.float() + 1) @ x.float()  # noqa: E731
    audit = audited(then, FP32, autocast=LOW, batch=torch.randn(64, N))
    distances = [o for o in audit.steps[0].operations if "_euclidean_dist" in o.name]
    assert {o.arguments["x1"].dtype for o in distances} == {"float32"} and audit.findings == {}
    assert serious(audited(lambda x: x, FP32)) == set()


# ------------------------------------------------------------------------------------------------- D19 no gradient


class Shares(nn.Module):
    """A linear layer with a cache of its own for its 16-bit weight, as autocast's was before PyTorch mended it."""

    def __init__(self, first: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N) / 8)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        with self.first():
            cached = self.weight.to(LOW)
            target = F.linear(x.detach().to(LOW), cached)
        y = F.linear(x.to(LOW), cached)
        return (y - target.detach()).to(x.dtype) + x


def test_a_weight_whose_cast_was_made_without_gradients_gets_none() -> None:
    finding = the_one(audited(Shares(torch.no_grad), FP32), "D19")
    assert finding.number.startswith("1 parameters get no gradient, then.weight first") and finding.level == "wrong"


def test_a_weight_whose_cast_was_made_with_gradients_gets_one() -> None:
    assert serious(audited(Shares(nullcontext), FP32)) == set()


def test_frozen_weights_and_those_used_without_gradients_only_are_not_found() -> None:
    assert serious(audited(Shares(torch.no_grad), FP32, prepare=lambda net: net.then.requires_grad_(False))) == set()

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, N))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", LOW):
                F.linear(x, self.weight)
                F.linear(x, self.weight)
            return x

    assert serious(audited(Probe(), FP32)) == set()


def test_autocast_of_this_version_casts_again_for_gradients() -> None:
    def then(x: Tensor) -> Tensor:
        with torch.no_grad():
            F.linear(x, weight)
        return F.linear(x, weight)

    weight = nn.Parameter(torch.randn(N, N) / 8)
    keep = lambda net: net.register_parameter("extra", weight)  # noqa: E731
    assert serious(audited(then, FP32, autocast=LOW, prepare=keep)) == set()


# ------------------------------------------------------------------------------------------------- D20 custom functions


class Product(torch.autograd.Function):
    """x w^T, whose backward computes in FP32 whatever its forward pass was in."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad.float() @ w.float(), grad.float().T @ x.float()


class WithAutocast(torch.autograd.Function):
    """x w^T in the format of autocast in both passes."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N) / 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.weight)


def test_a_custom_function_whose_backward_is_in_another_format_says_both() -> None:
    finding = the_one(audited(Custom(Product), FP32, autocast=LOW), "D20")
    assert "ProductBackward multiplies float32 numbers, and bfloat16 ones in its forward pass" in finding.number


@pytest.mark.parametrize(
    ("function", "autocast"), [(WithAutocast, LOW), (Product, None), (WithAutocast, None)], ids=["custom_bwd", "FP32", "both"]
)
def test_custom_functions_with_one_format_are_not_found(
    function: type[torch.autograd.Function], autocast: torch.dtype | None
) -> None:
    assert serious(audited(Custom(function), FP32, autocast=autocast)) == set()


# ------------------------------------------------------------------------------------------------- D21 running sums


def logged(total: Tensor | float, each_step: bool = False) -> Audit:
    """Train with a running loss."""
    torch.manual_seed(0)
    net = Net(lambda x: x)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    zero = total
    with Audit(net, optimizer) as audit:
        for _ in range(3):
            loss = squares(net(torch.randn(ROWS, N)), torch.zeros(ROWS))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            more = loss.detach().to(total.dtype) if isinstance(total, Tensor) else loss.item()
            total = (zero if each_step else total) + more
            audit.step()
    assert audit.failures == {}
    return audit


def test_a_running_loss_in_16_bits_says_what_an_addition_changes() -> None:
    finding = the_one(logged(torch.tensor(40.0, dtype=LOW)), "D21")
    before, added = (float(word) for word in finding.number.replace(";", "").split()[1:4:2])
    change = float(finding.number.split(" by ")[1].split(";")[0])
    assert finding.step == 2 and abs(change - added) > 0.01 * abs(added) and before != added
    assert "steps of 0.25 there" in finding.number


@pytest.mark.parametrize(
    ("total", "each_step"), [(torch.tensor(40.0), False), (0.0, False), (torch.tensor(0.0, dtype=LOW), True)]
)
def test_running_losses_in_fp32_and_sums_that_begin_anew_are_not_found(total: Tensor | float, each_step: bool) -> None:
    assert logged(total, each_step).findings == {}


# ------------------------------------------------------------------------------------------------- D22 batch norm


def test_running_means_in_16_bits_that_stand_still_are_counted() -> None:
    net: list[Net] = []

    def prepare(made: Net) -> None:
        net.append(made)
        with torch.no_grad():
            made.first.bias += 100.0
        made.then.running_mean.fill_(100.0)

    finding = the_one(audited(nn.BatchNorm1d(N), LOW, prepare=prepare), "D22")
    still = int((net[0].then.running_mean == 100).sum())  # steps are below 0.25, half the spacing of bfloat16 at 100
    said = int(finding.number.split(": ")[1].split()[0])
    assert N / 2 < said <= still and f"of {N} did not move, at momentum 0.1" in finding.number  # some means are 100


def test_batch_norm_in_fp32_and_statistics_that_still_move_are_not_found() -> None:
    assert audited(nn.BatchNorm1d(N), LOW).findings["D22"].level == "note"
    assert serious(audited(nn.BatchNorm1d(N), FP32)) == set()
    mixed = audited(lambda x: norm(x.float()).to(x.dtype), LOW)
    assert mixed.findings == {}


norm = nn.BatchNorm1d(N)
