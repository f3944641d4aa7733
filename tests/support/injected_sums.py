"""Mistakes C, of sums of gradients, in a Hugging Face model's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hf_loop import HFLoop, gpt2, injected
from torch import Tensor, nn


@injected("C1", micro_batches=3)
class AddsMeanLosses(HFLoop):
    def average(self, loss: Tensor) -> Tensor:
        return loss


class Padded(HFLoop):
    """Batches of different lengths, whose losses are summed and divided by the targets of the step."""

    def batch(self) -> dict[str, Tensor]:
        batch = super().batch()
        self.turn = (getattr(self, "turn", 0) + 1) % 2
        batch["labels"][:, 4 + 6 * self.turn :] = -100
        return batch

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = self.model(**batch, num_items_in_batch=torch.tensor(48)).loss
        assert isinstance(loss, Tensor)
        return loss


@injected("C2", micro_batches=2)
class AveragesMeans(Padded):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.average(self.model(**batch).loss)


class WithSGD(HFLoop):
    """With an optimizer without states, whose format would be another mistake.

    So would 16-bit weights that move (A1): where the weights of a faulty loop are in 16 bits, its learning rate is 0.
    """

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr)


@injected("C3", micro_batches=4, lr=0.0)
class AccumulatesIn16Bits(WithSGD):
    def edit(self) -> None:
        for p in self.model.parameters():  # .to() would round the rotary frequencies too
            p.data = p.data.bfloat16()


class Rounds(HFLoop):
    """The same layer three times, in autocast without its cache."""

    cache = False

    def edit(self) -> None:
        layers = self.model.model.layers
        layers[1] = layers[0]
        layers.append(layers[0])
        self.model.config.num_hidden_layers = 3

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=self.cache):
            loss = self.model(**batch).loss
        assert isinstance(loss, Tensor)
        return loss


@injected("C4")
class AddsUsesIn16Bits(Rounds):
    cache = True


class Counts(HFLoop):
    """A buffer that counts tokens."""

    dtype = torch.float32

    def prepare(self) -> None:
        self.counts: Any = torch.full((4,), 1000.0, dtype=self.dtype)

    def after(self) -> None:
        self.counts += 1


@injected("C11")
class CountsIn16Bits(Counts):
    dtype = torch.bfloat16


class Buckets(HFLoop):
    """Gradients in FP16 buckets, divided by a number of ranks."""

    small = 1.0

    def clip(self) -> None:
        for p in self.model.parameters():
            bucket = (p.grad / p.grad.abs().max() * self.small).half()
            bucket.div_(64)


@injected("C10")
class DividesSmallFP16(Buckets):
    small = 2.0**-20


class Scatters(HFLoop):
    """A sum per token."""

    dtype = torch.float32

    def after(self) -> None:
        tokens = torch.arange(1800) % 3
        torch.zeros(3, dtype=self.dtype).index_put_((tokens,), torch.ones(1800, dtype=self.dtype), accumulate=True)


@injected("C7")
class ScattersIn16Bits(Scatters):
    dtype = torch.bfloat16


class Tied(HFLoop):
    """An output layer that has the embedding's weight."""

    def edit(self) -> None:
        weight = self.model.get_input_embeddings().weight
        self.model.lm_head = Output(weight, self.read)

    @staticmethod
    def read(weight: Tensor) -> Tensor:
        return weight


class Output(nn.Module):
    def __init__(self, weight: nn.Parameter, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.read = weight, read

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.read(self.weight))


@injected("C5")
class DropsTheOutputsGradient(Tied):
    @staticmethod
    def read(weight: Tensor) -> Tensor:
        return weight.detach()


@injected("C5", autocast=torch.bfloat16)
class DropsTheOutputsGradientInAutocast(Tied):
    @staticmethod
    def read(weight: Tensor) -> Tensor:
        return weight.data


class LowEmbedding(WithSGD):
    """The embedding's weight is used in FP32, whatever its format."""

    dtype = torch.float32

    def edit(self) -> None:
        embedding = self.model.get_input_embeddings()
        embedding.weight.data = embedding.weight.data.to(self.dtype)
        embedding.register_forward_hook(lambda module, args, y: y.float())

    def batch(self) -> dict[str, Tensor]:
        batch = super().batch()
        return {name: tokens % 3 for name, tokens in batch.items()}


@injected("C6", lr=0.0)
class SumsEmbeddingsIn16Bits(LowEmbedding):
    dtype = torch.bfloat16


class LowNorms(WithSGD):
    """GPT-2, whose layer norms are in the format of its weights."""

    dtype = torch.float32

    def edit(self) -> None:
        self.model.to(self.dtype)


@injected("C8", lr=0.0, model=gpt2)
class SumsNormGradientsIn16Bits(LowNorms):
    dtype = torch.bfloat16
