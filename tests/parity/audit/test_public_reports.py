"""Public reports, rebuilt as small loops: the audit names what solved each, and says nothing of the mended loop.

Each is a class with the thread it is after; what was mended is in the class that it derives from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.parity.audit.finding import Finding, is_serious
from refimpl.parity.audit.session import Audit

LOW, HALF = torch.bfloat16, torch.float16
N, ROWS = 64, 32


class Loop:
    """A loop with two linear layers and what a report is about between them.

    autocast, scale: as they are given to autocast and GradScaler, None for none. steps: how many are run and audited.
    """

    autocast: torch.dtype | None = None
    scale: float | None = None
    steps = 2

    def __init__(self) -> None:
        torch.manual_seed(11)
        self.model: Any = self.make()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale or 1.0, enabled=self.scale is not None)

    def make(self) -> nn.Module:
        loop = self

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(loop.between(self.first(x)))

        return Net()

    def between(self, x: Tensor) -> Tensor:
        return x

    def loss(self, y: Tensor) -> Tensor:
        return y.float().square().mean()

    def batch(self) -> Tensor:
        return torch.randn(ROWS, N)

    def train(self) -> Audit:
        audit = Audit(self.model, self.optimizer, scaler=self.scaler)
        with audit:
            for _ in range(self.steps):
                with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                    y = self.model(self.batch())
                self.scaler.scale(self.loss(y)).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                audit.step()
        assert audit.failures == {}
        return audit


class Report(NamedTuple):
    """A report: its thread, the code of the rule that names it, and words of the sentence that does."""

    thread: str
    code: str
    said: tuple[str, ...]
    faulty: type[Loop]


REPORTS: list[Report] = []
Kind = TypeVar("Kind", bound=type[Loop])


def report(thread: str, code: str, *said: str) -> Callable[[Kind], Kind]:
    """Return a decorator that adds a loop to the reports."""

    def add(kind: Kind) -> Kind:
        REPORTS.append(Report(thread, code, said, kind))
        return kind

    return add


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def serious(audit: Audit) -> dict[str, Finding]:
    return {code: finding for code, finding in audit.findings.items() if is_serious(finding.level)}


# ------------------------------------------------------------------------------------------------- positions


class Rotary(Loop):
    """Angles of rotary embeddings, in FP32."""

    length = 512
    positions = frequencies = torch.float32

    def between(self, x: Tensor) -> Tensor:
        inverse = (10000 ** (-torch.arange(0, N, 2) / N)).to(self.frequencies)
        angle = torch.arange(self.length).to(self.positions)[:, None] * inverse
        table = torch.cat([angle.cos(), angle.sin()], -1)
        return x + table[-len(x) :].to(x.dtype)


@report("huggingface/transformers#29285", "D4", "512 different integers become 385 in bfloat16")
class RotaryIn16Bits(Rotary):
    """The angles of Llama and Gemma were computed in the model's bfloat16, so that it differed from FP32 from step 1 on."""

    positions = frequencies = LOW


@report("EleutherAI/gpt-neox#1003", "D4", "different integers become", "in float16")
class RotaryBeyond2048(Rotary):
    """Positions above 2048 are no numbers of float16: cos was off by 0.78."""

    length = 4096
    positions = HALF


@report("huggingface/transformers#25681", "D4", "bfloat16 angles of up to 255, where phases are off by up to 0.5 radians")
class AnglesIn16Bits(Rotary):
    """Positions below 256 are exact; their angles were not."""

    length = 256
    positions = frequencies = LOW


class Diffusion(Loop):
    """A sinusoidal embedding of the time steps of a batch."""

    time = torch.float32

    def between(self, x: Tensor) -> Tensor:
        steps = torch.tensor([751, 113, 8, 402]).to(self.time).float()
        angle = steps[:, None] * torch.exp(-math.log(10000) * torch.arange(N // 2) / (N // 2))
        return x + torch.cat([angle.cos(), angle.sin()], -1).mean(0).to(x.dtype)


@report("huggingface/diffusers#9405", "D4", "integers change in bfloat16: 751 becomes 752")
class TimeStepsIn16Bits(Diffusion):
    time = LOW


class Buffer(Loop):
    """Frequencies in a buffer of a module, 4096 positions."""

    kept = torch.float32

    def make(self) -> nn.Module:
        model = super().make()
        model.register_buffer("inv_freq", (10000 ** (-torch.arange(0, N, 2) / N)).to(self.kept), persistent=False)
        return model

    def between(self, x: Tensor) -> Tensor:
        angle = torch.arange(4096)[-len(x) :, None].float() * self.model.inv_freq.float()
        return x + torch.cat([angle.cos(), angle.sin()], -1).to(x.dtype)


@report("meta-llama/llama-recipes#6, NVIDIA/Megatron-LM#744", "D5", "frequencies are in bfloat16 (the buffer inv_freq)")
class BufferIn16Bits(Buffer):
    kept = LOW


# ------------------------------------------------------------------------------------------------- Inf and NaN


class FeedForward(Loop):
    """T5's wo, with hidden states as large as a trained model's, under autocast with FP16 and a loss scale."""

    autocast, scale = HALF, 2.0**16
    size = 10.0

    def between(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.size * x.float() + 300 * (self.size > 10))
        normed = hidden @ torch.ones(N, N)
        return F.layer_norm(normed.float(), (N,)) + x


@report("huggingface/transformers#5651, #9295", "D9", "times the largest float16", "in the forward pass")
class FeedForwardOverflows(FeedForward):
    """NaN after some iterations: one product of T5's last feed-forward layer was 66246, above 65504."""

    size = 4000.0


class Norm(Loop):
    """An RMS norm of activations, some rows of which nobody has written."""

    def loss(self, y: Tensor) -> Tensor:
        return 10 * y.square().sum()

    def between(self, x: Tensor) -> Tensor:
        rows = torch.cat([x[:-4], self.unwritten().expand(4, N)])
        y: Tensor = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)
        return y

    def unwritten(self) -> Tensor:
        return torch.zeros(1, N, requires_grad=True)


@report("TensorAuto/OpenTau#300", "D11", "Inf first appears in the backward pass: aten.mul", "other = 3e+38", "largest float32")
class NormOfGarbage(Norm):
    """The loss and the gradient into the norm's backward are finite, and the one that leaves it is not.

    The rows are 0 after the norm, since their squares are Inf; on the way back a product with them is Inf, and 0 times Inf NaN.
    """

    def unwritten(self) -> Tensor:
        return torch.full((1, N), 3e38, requires_grad=True)


class Padded(Loop):
    """Attention over padded sequences: masks are combined as booleans."""

    def between(self, x: Tensor) -> Tensor:
        scores = x @ x.T
        return F.softmax(self.masked(scores, torch.arange(len(x)) < 3), -1) @ x

    def masked(self, scores: Tensor, padding: Tensor) -> Tensor:
        n = len(scores)
        seen = torch.ones(n, n).tril().bool() & ~padding & ~padding[:, None] | torch.eye(n).bool()
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


@report("NVIDIA-NeMo/Automodel#2658", "D7", "-3.40282e+38, other = -3.40282e+38")
class MasksOfLeastNumbers(Padded):
    """NaN in the first step, with padded batches only: the least number was added to the least number."""

    def masked(self, scores: Tensor, padding: Tensor) -> Tensor:
        n, least = len(scores), torch.finfo(scores.dtype).min
        causal = torch.full((n, n), least).triu(1) + padding * least
        return scores + (causal + (padding * least)[:, None])


@report("pytorch/pytorch#131060, #41508, #103749", "D8", "3 of 32 rows of the softmax are fully masked")
class MasksOfMinusInf(Padded):
    def masked(self, scores: Tensor, padding: Tensor) -> Tensor:
        causal = torch.ones(len(scores), len(scores)).tril().bool()
        return scores.masked_fill(~(causal & ~padding), -math.inf)


class Mean(Loop):
    """A mean over many elements under FP16: a sum, and a division by their number."""

    autocast, scale = HALF, 1.0

    def loss(self, y: Tensor) -> Tensor:
        total = (y.float() * 200).abs()
        return self.total(total) / 1e4

    def total(self, x: Tensor) -> Tensor:
        return x.sum()


@report("coreylowman/dfdx#748", "D10", "aten.sum (float16)", "times the largest float16")
class SumOfMean(Mean):
    def total(self, x: Tensor) -> Tensor:
        return x.half().sum(dtype=HALF).float()


# ------------------------------------------------------------------------------------------------- several roundings


class Draft(Loop):
    """A draft model's divergence from the logits of a target model that it nearly equals."""

    autocast = LOW

    def loss(self, y: Tensor) -> Tensor:
        target = y.detach().float() + 0.03 * torch.randn(y.shape)
        return self.divergence(y, target)

    def divergence(self, y: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(y.float(), -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean")


@report("vllm-project/speculators#788", "D2", "put an error of", "on the gradient of the logits")
class DraftIn16Bits(Draft):
    """Late in training the gradient of the divergence was noise: found beside FP64 on the same logits."""

    def divergence(self, y: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(y, -1), F.log_softmax(target.to(LOW), -1), log_target=True, reduction="batchmean")


class Normalized(Loop):
    """An RMS norm that is written out under autocast."""

    autocast = HALF
    statistics = torch.float32

    def between(self, x: Tensor) -> Tensor:
        z = x.to(self.statistics)
        return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@report("nntrainer/nntrainer#3935", "D3", "the statistics are in float16")
class NormalizedIn16Bits(Normalized):
    statistics = HALF


class Experts(Loop):
    """A router over 16 experts."""

    scores = torch.float32

    def between(self, x: Tensor) -> Tensor:
        probabilities = x[:, :16].float().softmax(-1).to(self.scores)
        weights, chosen = probabilities.topk(2, -1)
        return x * weights.sum(-1, keepdim=True).float() + F.one_hot(chosen, N).sum(1)


@report("databricks/megablocks#91, NVIDIA/Megatron-LM#2741", "D6", "tie at the choice (2 of 16)")
class ExpertsIn16Bits(Experts):
    scores = LOW


# ------------------------------------------------------------------------------------------------- kernels and casts

library = torch.library.Library("audit_reports", "DEF")
library.define("add(Tensor x, Tensor residual) -> Tensor")
library.define("truncating_add(Tensor x, Tensor residual) -> Tensor")


def add(x: Tensor, residual: Tensor) -> Tensor:
    return (x.float() + residual.float()).to(x.dtype)


def truncating_add(x: Tensor, residual: Tensor) -> Tensor:
    """Add in FP32, and keep the upper 16 bits."""
    return ((x.float() + residual.float()).view(torch.int32) >> 16).to(torch.int16).view(LOW)


library.impl("add", add, "CPU")
library.impl("truncating_add", truncating_add, "CPU")


class Residual(Loop):
    """A residual stream in bfloat16, which a kernel of an extension adds to."""

    autocast = LOW
    kernel = staticmethod(torch.ops.audit_reports.add)

    def between(self, x: Tensor) -> Tensor:
        kernel = self.kernel

        class Add(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
                return kernel(x, residual)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
                return grad, grad

        for _ in range(3):
            x = Add.apply(F.silu(x), x)
        return x


@report("ROCm/aiter#5151", "D14", "audit_reports.truncating_add: 100.0%", "on average -0.")
class ResidualTruncated(Residual):
    """After 36 layers the residual stream had shrunk by 9 %; every test of the kernel had passed."""

    kernel = staticmethod(torch.ops.audit_reports.truncating_add)


class Compiled(Loop):
    """A function that a compiler has rewritten, and that autocast applies to."""

    autocast = LOW

    def between(self, x: Tensor) -> Tensor:
        return x @ self.model.second.weight


@report("Lightning-AI/lightning-thunder#725", "D13", "of the multiplications in autocast's regions are of float32 numbers")
class CompiledWithoutAutocast(Compiled):
    def between(self, x: Tensor) -> Tensor:
        with torch._C._DisableAutocast():
            return x.float() @ self.model.second.weight


class Cached(Loop):
    """Two passes over the same weight in 16 bits, the first to look at its result."""

    autocast = LOW

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            F.linear(x, self.low()).amax()
        return F.linear(x, self.low())

    def make(self) -> nn.Module:
        model = super().make()
        model.third = nn.Linear(N, N, bias=False)
        return model

    def low(self) -> Tensor:
        weight: Tensor = self.model.third.weight.to(LOW)
        return weight


@report("pytorch/pytorch#65766, #105211, #112583", "D19", "1 parameters get no gradient, third.weight first")
class CachedWithoutGradient(Cached):
    """The cache of autocast kept the copy that was made without gradients, here by hand: PyTorch has mended it."""

    def between(self, x: Tensor) -> Tensor:
        self.kept: Tensor | None = None
        return super().between(x)

    def low(self) -> Tensor:
        if self.kept is None:
            self.kept = super().low()
        return self.kept


# ------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("case", REPORTS, ids=[case.thread for case in REPORTS])
def test_a_reported_mistake_is_named_with_its_number(case: Report) -> None:
    findings = serious(case.faulty().train())
    assert set(findings) == {case.code}, {c: f.number for c, f in findings.items()}
    finding = findings[case.code]
    assert finding.step == 1 and [words for words in case.said if words not in finding.number] == [], finding.number


@pytest.mark.parametrize("kind", dict.fromkeys(case.faulty.__bases__[0] for case in REPORTS))
def test_the_mended_loop_has_nothing_above_a_note(kind: type[Loop]) -> None:
    assert serious(kind().train()) == {}
