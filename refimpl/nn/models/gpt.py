"""GPT-2 with nanoGPT's parameter names, shapes and initialization, so that weights can be compared by name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape, Value
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.nn.models.model import Model, Parameter, check_sizes
from refimpl.nn.ops import GELUS, add, attention, cross_entropy, embedding, layernorm, linear
from refimpl.numerics.arrays import Array

OPTIONAL = {"bias": True, "activation": "gelu_tanh"}  # in `Model.config` where they are others


@dataclass(frozen=True)
class GPTConfig:
    """The sizes, named as in nanoGPT. bias: of layer norms and all linear layers but the last. activation: one of GELUS."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 64
    vocab_size: int = 256
    bias: bool = True
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        check_sizes({name: size for name, size in asdict(self).items() if name not in OPTIONAL})
        if self.activation not in GELUS:
            raise UsageError(f"activation is {self.activation!r}: it must be {' or '.join(GELUS)}")
        if not isinstance(self.bias, bool):
            raise UsageError(f"bias is {self.bias!r}: it must be True or False")
        if self.n_embd % self.n_head:
            raise UsageError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: heads must be equally wide")


def _block(t: Tape, x: Value, config: GPTConfig) -> Value:
    h = t(layernorm, "ln_1", x)                       # (B, T, C)
    h = t(linear, "attn.c_attn", h)                   # (B, T, 3C)
    h = t(attention, "attn", h, n_head=config.n_head) # (B, T, C)
    h = t(linear, "attn.c_proj", h)                   # (B, T, C)
    x = t(add, "residual_1", x, h)                    # (B, T, C)
    h = t(layernorm, "ln_2", x)                       # (B, T, C)
    h = t(linear, "mlp.c_fc", h)                      # (B, T, 4C)
    h = t(GELUS[config.activation], "mlp.gelu", h)    # (B, T, 4C)
    h = t(linear, "mlp.c_proj", h)                    # (B, T, C)
    return t(add, "residual_2", x, h)                 # (B, T, C)


def _logits(t: Tape, tokens: Array, config: GPTConfig, start: int) -> Value:
    stop = start + tokens.shape[1]
    if stop > config.block_size:  # on a device the lookup below would not fail
        raise UsageError(f"{stop} tokens per sequence are too many: the model has {config.block_size} positions")
    positions = t.run.backend.xp.arange(start, stop)
    x = t(embedding, "transformer.wte", tokens)       # (B, T, C)
    e = t(embedding, "transformer.wpe", positions)    # (T, C)
    x = t(add, "transformer.embedding", x, e)         # (B, T, C)
    for i in range(config.n_layer):
        with t.block(f"transformer.h.{i}"):
            x = _block(t, x, config)                  # (B, T, C)
    x = t(layernorm, "transformer.ln_f", x)           # (B, T, C)
    return t(linear, "lm_head", x)                    # (B, T, V)


def _linear(name: str, n_in: int, n_out: int, std: float) -> dict[str, Parameter]:
    return {f"{name}.weight": Parameter((n_out, n_in), std=std), f"{name}.bias": Parameter((n_out,))}


def _layernorm(name: str, width: int) -> dict[str, Parameter]:
    return {f"{name}.weight": Parameter((width,), fill=1.0), f"{name}.bias": Parameter((width,))}


def _parameters(config: GPTConfig) -> dict[str, Parameter]:
    """Return the table: weights N(0, 0.02^2), the two projections into the residual stream divided by sqrt(2 n_layer)."""
    C, std = config.n_embd, 0.02
    residual_std = std / math.sqrt(2 * config.n_layer)
    table = {
        "transformer.wte.weight": Parameter((config.vocab_size, C), std=std),
        "transformer.wpe.weight": Parameter((config.block_size, C), std=std),
    }
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        table |= _layernorm(f"{block}.ln_1", C)
        table |= _linear(f"{block}.attn.c_attn", C, 3 * C, std)
        table |= _linear(f"{block}.attn.c_proj", C, C, residual_std)
        table |= _layernorm(f"{block}.ln_2", C)
        table |= _linear(f"{block}.mlp.c_fc", C, 4 * C, std)
        table |= _linear(f"{block}.mlp.c_proj", 4 * C, C, residual_std)
    table |= _layernorm("transformer.ln_f", C)
    return {name: spec for name, spec in table.items() if config.bias or not name.endswith(".bias")}


def gpt_model(config: GPTConfig, ignore_index: int = IGNORE_INDEX, loss_mean: str = "tokens") -> Model:
    """Return GPT-2 with GELU (tanh), without dropout; the last linear layer has no bias and is tied to the token embedding.

    tokens (B, T) with T <= block_size -> logits (B, T, V). Targets equal to ignore_index do not count in the loss.
    Source: Radford et al. 2019; initialization and names as in nanoGPT.
    """

    def logits(t: Tape, tokens: Array, start: int = 0) -> Value:
        return _logits(t, tokens, config, start)

    def loss(t: Tape, tokens: Array, targets: Array) -> Value:
        return t(cross_entropy, "loss", logits(t, tokens), targets, ignore_index=ignore_index)

    tied = {"lm_head.weight": "transformer.wte.weight"}
    sizes = {name: size for name, size in asdict(config).items() if size != OPTIONAL.get(name)}
    return Model("gpt", sizes, _parameters(config), tied, logits, loss, ignore_index=ignore_index, loss_mean=loss_mean)
