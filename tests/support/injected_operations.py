"""Mistakes D, of single operations, in a Hugging Face model's loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from hf_loop import LENGTH, SEQUENCES, VOCAB, HFLoop, injected
from torch import Tensor, nn

from refimpl.parity.audit.session import Audit

LOW, HALF = torch.bfloat16, torch.float16

# ------------------------------------------------------------------------------------------------- attention by hand


class ByHand(HFLoop):
    """A model whose attention is written out: scores, mask, softmax, values."""

    def edit(self) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("by_hand", self.attend)
        self.model.config._attn_implementation = "by_hand"

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **other: Any
    ) -> tuple[Tensor, None]:
        scores = q @ k.transpose(2, 3) * scaling
        return (self.softmax(self.masked(scores)) @ v).transpose(1, 2).contiguous(), None

    def masked(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        return scores.masked_fill(torch.ones(n, n).triu(1).bool(), torch.finfo(scores.dtype).min)

    def softmax(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, -1).to(scores.dtype)


@injected("D1", autocast=LOW)
class SoftmaxIn16Bits(ByHand):
    def softmax(self, scores: Tensor) -> Tensor:
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)


@injected("D7")
class MasksAddUp(ByHand):
    """A causal mask, one for padded keys and one for padded queries, all of the least number, are added."""

    def masked(self, scores: Tensor) -> Tensor:
        n, least = scores.shape[-1], torch.finfo(scores.dtype).min
        padded = (torch.arange(n) < 2) * least
        return scores + (torch.full((n, n), least).triu(1) + padded + padded[:, None])


@injected("D8")
class RowsMaskedOut(ByHand):
    """The first position is padding, and sees nothing."""

    def masked(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        return scores.masked_fill(torch.ones(n, n).triu(1).bool() | (torch.arange(n) < 1), -math.inf)


# ------------------------------------------------------------------------------------------------- losses


class Distills(HFLoop):
    """A loop that learns the distribution of a teacher that is close."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            logits = self.model(input_ids=batch["input_ids"]).logits
        teacher = logits.detach().float() + 0.05 * torch.randn(logits.shape, generator=self.generator)
        return self.divergence(logits, F.log_softmax(teacher, -1))

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits.float(), -1), teacher, log_target=True, reduction="batchmean")


@injected("D2", autocast=LOW)
class LossIn16Bits(Distills):
    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, -1), teacher.to(logits.dtype), log_target=True, reduction="batchmean")


class Imitates(Distills):
    """A loop that learns the teacher's logits."""

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return (logits.log_softmax(-1, torch.float32) - teacher).square().mean()


@injected("D24", autocast=LOW)
class Cancels(Imitates):
    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        return (logits.log_softmax(-1, torch.float32).to(LOW) - teacher.to(LOW)).float().square().mean()


class Penalizes(HFLoop):
    """A loop with a penalty on the logits beside the loss."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            out = self.model(**batch)
        loss: Tensor = out.loss + self.penalty(out.logits)
        return loss

    def penalty(self, logits: Tensor) -> Tensor:
        return 1e-5 * (300 * logits.float()).abs().sum()


@injected("D10", autocast=HALF, scale=2.0**10)
class SumOverflows(Penalizes):
    def penalty(self, logits: Tensor) -> Tensor:
        return 1e-5 * (300 * logits).abs().sum(dtype=HALF).float()


class Distances(HFLoop):
    """A loop with a penalty on the distance of each embedding to itself a step ago, which is 0."""

    eps = 1e-12

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        distance = ((weight - weight.detach()).square().sum(-1) + self.eps).sqrt().mean()
        return super().loss(batch) + distance


@injected("D11")
class RootOfZero(Distances):
    eps = 0.0


@injected("D21")
class RunningLossIn16Bits(HFLoop):
    def prepare(self) -> None:
        self.total = torch.tensor(30.0, dtype=LOW)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self.total = self.total + loss.detach().to(LOW)


# ------------------------------------------------------------------------------------------------- norms, positions, experts


@injected("D3", autocast=LOW)
class NormIn16Bits(HFLoop):
    def edit(self) -> None:
        norm = self.model.model.norm

        def forward(x: Tensor) -> Tensor:
            low = x.to(LOW)
            return norm.weight * (low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))

        norm.forward = forward


class FarPositions(HFLoop):
    """A loop over parts of long documents: positions begin at 4000."""

    def batch(self) -> dict[str, Tensor]:
        return {**super().batch(), "position_ids": torch.arange(4000, 4000 + LENGTH).expand(SEQUENCES, LENGTH)}


@injected("D4")
class PositionsIn16Bits(FarPositions):
    def edit(self) -> None:
        rotary = self.model.model.rotary_emb
        forward = rotary.forward
        rotary.forward = lambda x, position_ids: forward(x, position_ids.to(LOW).float())


@injected("D5")
class FrequenciesIn16Bits(FarPositions):
    def edit(self) -> None:
        rotary = self.model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq.to(LOW)


def mixtral(**options: Any) -> nn.Module:
    """A Mixtral with random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False}
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **heads, **options}))


@injected("D6", model=mixtral, autocast=LOW)
class RouterIn16Bits(HFLoop):
    def edit(self) -> None:
        router = self.model.model.layers[0].mlp.gate

        def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = F.linear(x.reshape(-1, x.shape[-1]), router.weight)
            scores, chosen = logits.float().softmax(-1).to(LOW).topk(2, -1)
            return logits, scores / scores.sum(-1, keepdim=True), chosen

        router.forward = forward


class Tabular(HFLoop):
    """A model of sequences of four features, one of which is a year, instead of tokens."""

    def edit(self) -> None:
        self.model.project = nn.Linear(4, self.model.config.hidden_size)
        features = torch.randn(64, LENGTH, 4, generator=torch.Generator().manual_seed(5))
        features[..., 3] = 2015 + 2 * features[..., 3]
        self.features = self.prepared(features)

    def prepared(self, features: Tensor) -> Tensor:
        return features - features.mean((0, 1))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        which = torch.randint(64, (SEQUENCES,), generator=self.generator)
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            embedded = self.model.project(self.features[which])
            loss: Tensor = self.model(inputs_embeds=embedded, labels=batch["labels"]).loss
        return loss


@injected("D23", autocast=LOW)
class FeaturesTooLarge(Tabular):
    def prepared(self, features: Tensor) -> Tensor:
        return features


def resnet(**options: Any) -> nn.Module:
    """A ResNet with random weights, whose norms have statistics that move slowly and no trained weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 5, "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**{**shape, **options}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
            module.momentum = 1e-3
            module.running_mean.fill_(1.0)
    return model


class Images(HFLoop):
    """A loop over random images."""

    def batch(self) -> dict[str, Tensor]:
        images = torch.randn(SEQUENCES, 3, 32, 32, generator=self.generator)
        return {"pixel_values": images, "labels": torch.randint(5, (SEQUENCES,), generator=self.generator)}


@injected("D22", model=resnet, autocast=LOW)
class StatisticsIn16Bits(Images):
    def edit(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.to(LOW)


# ------------------------------------------------------------------------------------------------- casts


@injected("D9", autocast=HALF, scale=2.0**16)
class OverflowInForward(HFLoop):
    def edit(self) -> None:
        with torch.no_grad():
            for projection in (self.model.model.layers[0].mlp.up_proj, self.model.model.layers[0].mlp.down_proj):
                projection.weight *= 1e4


@injected("D12", autocast=HALF, scale=2.0**10)
class CastTwice(HFLoop):
    def edit(self) -> None:
        head = self.model.lm_head
        forward = head.forward
        head.forward = lambda x: forward(x.to(LOW).to(HALF))


class Apart(HFLoop):
    """A model whose MLPs run in a context of their own."""

    context: Callable[[], Any] = nullcontext

    def edit(self) -> None:
        for layer in self.model.model.layers:
            layer.mlp.forward = self.within(layer.mlp.forward)

    def within(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def apart(x: Tensor) -> Tensor:
            with self.context():
                return forward(x)

        return apart


@injected("D13", autocast=LOW)
class MissingCast(Apart):
    context = torch._C._DisableAutocast


class OwnCache(HFLoop):
    """A head whose 16-bit weight is cached by hand, and whose outputs are looked at first."""

    looks = nullcontext

    def edit(self) -> None:
        head = self.model.lm_head

        def forward(x: Tensor) -> Tensor:
            with self.looks():
                weight = head.weight.to(LOW)
                F.linear(x.detach().to(LOW), weight).amax()
            return F.linear(x.to(LOW), weight)

        head.forward = forward


@injected("D19", autocast=LOW)
class CastWithoutGradient(OwnCache):
    looks = torch.no_grad  # type: ignore[assignment]


class Linear(torch.autograd.Function):
    """x w^T, whose backward computes in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        flat, rows = grad.float().flatten(0, -2), x.float().flatten(0, -2)
        return (flat @ w.float()).reshape(x.shape), flat.T @ rows


@injected("D20", autocast=LOW)
class BackwardInAnotherFormat(HFLoop):
    def edit(self) -> None:
        head = self.model.lm_head
        head.forward = lambda x: Linear.apply(x, head.weight)


# ------------------------------------------------------------------------------------------------- kernels


@contextmanager
def kernel(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """Put another kernel in the place of one of PyTorch's for the CPU."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(name, function, "CPU")
    try:
        yield
    finally:
        library._destroy()


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """Return a b by another of PyTorch's kernels."""
    return torch.bmm(a[None], b[None])[0]


def truncated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x with the bits cut off that a format does not hold."""
    y = x.to(dtype)
    return (y.view(torch.int16) - (y.double().abs() > x.double().abs()).to(torch.int16)).view(dtype)


class OtherKernel(HFLoop):
    """A loop on a machine with another kernel."""

    name = ""

    def kernel(self, *args: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    def train(self) -> Audit:
        with kernel(self.name, self.kernel) if self.name else nullcontext():
            return super().train()


@injected("D14", autocast=LOW)
class Truncates(OtherKernel):
    """SiLU on 16-bit numbers is computed in FP32 and truncated."""

    name = "silu"

    def kernel(self, x: Tensor) -> Tensor:  # type: ignore[override]
        exact = x.double() * x.double().sigmoid()
        return truncated(exact, x.dtype) if x.dtype == LOW else exact.to(x.dtype)


@injected("D17", autocast=LOW)
class TruncatesAttention(OtherKernel):
    """Fused attention truncates the probabilities, and is else computed in FP64."""

    name = "_scaled_dot_product_flash_attention_for_cpu"

    def kernel(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, attn_mask: Any = None, scale: Any = None
    ) -> tuple[Tensor, Tensor]:
        scores = q.double() @ k.double().mT * (scale or q.shape[-1] ** -0.5)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        if attn_mask is not None:
            scores = scores + attn_mask.double()
        p = scores.softmax(-1)
        output = ((truncated(p, LOW).double() if q.dtype == LOW else p) @ v.double()).to(q.dtype)
        # The layout of PyTorch's own kernel, which its users reckon with.
        return output.transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1).float()


@injected("D15")
class Tf32(OtherKernel):
    """Products of FP32 numbers read 10 bits of their fractions."""

    name = "mm"

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        if a.dtype == torch.float32:
            a, b = ((x.view(torch.int32) & -(2**13)).view(torch.float32) for x in (a, b))
        return multiplied(a, b)


@injected("D16", autocast=LOW)
class SplitK(OtherKernel):
    """Products of 16-bit numbers add up four parts in 16 bits."""

    name = "mm"

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        if a.dtype != LOW or a.shape[1] < 8:
            return multiplied(a, b)
        parts = zip(a.chunk(4, 1), b.chunk(4, 0), strict=True)
        total = torch.zeros(a.shape[0], b.shape[1], dtype=LOW)
        for x, y in parts:
            total = total + multiplied(x, y)
        return total


class Descends(OtherKernel):
    """A loop with SGD, none of whose kernels rounds inside: AdamW has FP32 square roots."""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr)


@injected("D18", autocast=LOW)
class RoundsInside(Descends):
    """SiLU on 16-bit numbers rounds its sigmoid to 16 bits."""

    name = "silu"

    def kernel(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * x.sigmoid()
