"""A byte language model after Bengio et al. 2003: embed the last k bytes, concatenate them, apply an MLP."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape, Value
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.nn.models.model import Model, Parameter, check_sizes
from refimpl.nn.ops import cross_entropy, embedding, linear, relu, reshape
from refimpl.numerics.arrays import Array


@dataclass(frozen=True)
class MLPConfig:
    """The sizes: block_size bytes of context, n_embd features per byte, n_layer hidden layers of 4 n_embd features."""

    n_layer: int = 2
    n_embd: int = 64
    block_size: int = 16
    vocab_size: int = 256

    def __post_init__(self) -> None:
        check_sizes(asdict(self))


def _logits(t: Tape, tokens: Array, config: MLPConfig) -> Value:
    B, k = tokens.shape
    if k != config.block_size:
        raise UsageError(f"{k} tokens per sequence: the mlp reads exactly {config.block_size}, its block_size")
    x = t(embedding, "wte", tokens)                             # (B, k, C)
    x = t(reshape, "join", x, shape=(B, k * config.n_embd))     # (B, kC)
    for i in range(config.n_layer):
        with t.scope(f"h.{i}"):
            x = t(linear, "fc", x)                              # (B, 4C)
            x = t(relu, "relu", x)                              # (B, 4C)
    return t(linear, "lm_head", x)                              # (B, V)


def _parameters(config: MLPConfig) -> dict[str, Parameter]:
    """Return the table: hidden weights N(0, 2/n_in), which keeps the variance through ReLU, and a small output layer."""
    C, width = config.n_embd, 4 * config.n_embd
    table = {"wte.weight": Parameter((config.vocab_size, C), std=0.5)}
    n_in = config.block_size * C
    for i in range(config.n_layer):
        table[f"h.{i}.fc.weight"] = Parameter((width, n_in), std=math.sqrt(2 / n_in))
        table[f"h.{i}.fc.bias"] = Parameter((width,))
        n_in = width
    table["lm_head.weight"] = Parameter((config.vocab_size, n_in), std=0.02)
    table["lm_head.bias"] = Parameter((config.vocab_size,))
    return table


def mlp_model(config: MLPConfig, ignore_index: int = IGNORE_INDEX, loss_mean: str = "tokens") -> Model:
    """Return a model that predicts one byte from a whole block: tokens (B, k) with k = block_size -> logits (B, V).

    Of `targets` (B, k), the bytes after each position, only the last column counts. Targets equal to ignore_index do not.
    Source: Bengio et al. 2003, 'A neural probabilistic language model', with ReLU for tanh (He et al. 2015).
    """

    def logits(t: Tape, tokens: Array, start: int = 0) -> Value:
        return _logits(t, tokens, config)

    def predicted(targets: Array) -> Array:
        return targets[:, -1]

    def loss(t: Tape, tokens: Array, targets: Array) -> Value:
        return t(cross_entropy, "loss", logits(t, tokens), predicted(targets), ignore_index=ignore_index)

    return Model("mlp", asdict(config), _parameters(config), {}, logits, loss, predicted, ignore_index, loss_mean)
