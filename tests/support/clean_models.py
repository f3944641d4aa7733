"""Small models of the families that people train, with batches that they can learn: for the audit's clean loops.

The Hugging Face models are made from tiny configurations with random weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, LENGTH, CLASSES, SIDE = 61, 24, 5, 16

Batch = dict[str, Tensor]


class Family(NamedTuple):
    """A kind of model.

    make: makes one whose weights have a format. batch: draws n samples. blocks: the names of its layer lists, for FSDP.
    lora: the names of the linear layers that LoRA is added to, () where it is not tried. checkpoints: whether it has
    `activation_checkpointing_enable`. Those with `loss` give logits, of which it makes the loss; the others return their loss.
    """

    make: Callable[[torch.dtype], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]
    blocks: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    checkpoints: bool = False
    loss: Callable[[Tensor, Batch, str], Tensor] | None = None


# ------------------------------------------------------------------------------------------------- what is learned


def sequences(generator: torch.Generator, n: int) -> Tensor:
    """Sequences whose next token follows from the last one, but for one in twenty."""
    tokens = torch.randint(VOCAB, (n, LENGTH), generator=generator)
    surprise = torch.rand((n, LENGTH), generator=generator) < 0.05
    for i in range(1, LENGTH):
        tokens[:, i] = torch.where(surprise[:, i], tokens[:, i], (3 * tokens[:, i - 1] + 7) % VOCAB)
    return tokens


def language(generator: torch.Generator, n: int) -> Batch:
    """A language model's batch."""
    tokens = sequences(generator, n)
    return {"input_ids": tokens, "labels": tokens.clone()}


def padded_language(generator: torch.Generator, n: int) -> Batch:
    """A language model's batch of sequences of unequal lengths, padded."""
    tokens = sequences(generator, n)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (n, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    labels = tokens.where(mask, torch.tensor(-100))
    return {"input_ids": tokens.where(mask, torch.tensor(0)), "attention_mask": mask.long(), "labels": labels}


def masked(generator: torch.Generator, n: int) -> Batch:
    """A masked language model's batch: the labels of hidden tokens."""
    batch = padded_language(generator, n)
    hidden = (torch.rand((n, LENGTH), generator=generator) < 0.2) & batch["attention_mask"].bool()
    hidden[:, 1] = True
    batch["labels"] = batch["labels"].where(hidden, torch.tensor(-100))
    batch["input_ids"] = batch["input_ids"].where(~hidden, torch.tensor(VOCAB - 1))
    return batch


def images(generator: torch.Generator, n: int) -> Batch:
    """Normalized images, whose class is the place of a brighter bar."""
    labels = torch.randint(CLASSES, (n,), generator=generator)
    pixels = torch.randn((n, 3, SIDE, SIDE), generator=generator)
    for i, label in enumerate(labels):
        pixels[i, :, :, 3 * int(label) : 3 * int(label) + 3] += 1.0
    return {"pixel_values": pixels, "labels": labels}


def patterns(generator: torch.Generator, n: int) -> Batch:
    """Sequences to classify: by the token that all of them begin with."""
    tokens = sequences(generator, n)
    return {"tokens": tokens, "labels": tokens[:, 0] % CLASSES}


def following(generator: torch.Generator, n: int) -> Batch:
    """Sequences, each with its next tokens."""
    tokens = sequences(generator, n)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def cross_entropy(logits: Tensor, batch: Batch, reduction: str) -> Tensor:
    """The loss over the last axis, in FP32."""
    return F.cross_entropy(logits.float().flatten(0, -2), batch["labels"].flatten(), reduction=reduction)


# ------------------------------------------------------------------------------------------------- models


def hugging_face(config: str, model: str, **settings: Any) -> Callable[[torch.dtype], nn.Module]:
    """Return a function that makes one of Hugging Face's models, as `from_pretrained(dtype=...)` would."""

    def make(dtype: torch.dtype) -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        result = getattr(transformers, model)._from_config(made, dtype=dtype)
        assert isinstance(result, nn.Module)
        return result.train()

    return make


DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "use_cache": False,
}  # fmt: skip
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Encoder(nn.Module):
    """PyTorch's transformer encoder, as a classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.position = nn.Parameter(torch.randn(LENGTH, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.position
        return self.head(self.encoder(hidden).mean(1))


class Residual(nn.Module):
    """Two convolutions with batch norm, around which the input goes too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.short(x), inplace=True)


class ResNet(nn.Module):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(pixel_values.to(self.stem[0].weight.dtype)))).flatten(1))


class Recurrent(nn.Module):
    """A language model of two LSTM layers, which run without autocast: not every CPU has the kernel in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, _ = self.lstm(hidden)
        return self.head(hidden)


def _resnet(dtype: torch.dtype) -> nn.Module:
    """The residual network; its batch norms stay in FP32, as their running statistics must."""
    model = ResNet().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


FAMILIES = {
    "llama": Family(
        hugging_face("LlamaConfig", "LlamaForCausalLM", **DECODER), language, ("layers",), ("q_proj", "v_proj"), True
    ),
    "qwen2": Family(
        hugging_face("Qwen2Config", "Qwen2ForCausalLM", **DECODER, tie_word_embeddings=True),
        padded_language, ("layers",), ("q_proj", "up_proj"), True,
    ),
    "gpt2": Family(
        hugging_face(
            "GPT2Config", "GPT2LMHeadModel", vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, use_cache=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        language, ("h",), ("c_attn",), True,
    ),
    "bert": Family(
        hugging_face("BertConfig", "BertForMaskedLM", vocab_size=VOCAB, max_position_embeddings=64, **ENCODER),
        masked, ("layer",), ("query", "value"), True,
    ),
    "vit": Family(
        hugging_face("ViTConfig", "ViTForImageClassification", image_size=SIDE, patch_size=4, num_labels=CLASSES, **ENCODER),
        images, ("layer", "layers"), ("query", "q_proj"), True,
    ),
    "encoder": Family(lambda dtype: Encoder().to(dtype), patterns, ("layers",), loss=cross_entropy),
    "resnet": Family(_resnet, images, loss=cross_entropy),
    "lstm": Family(lambda dtype: Recurrent().to(dtype), following, loss=cross_entropy),
}  # fmt: skip
