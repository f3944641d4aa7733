"""The Llama family with Hugging Face's parameter names: Llama 1 to 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from refimpl.errors import UsageError
from refimpl.nn.autograd import Tape, Value
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.nn.models.model import Model, Parameter, check_sizes
from refimpl.nn.ops import add, cross_entropy, embedding, grouped_attention, linear, llama_rmsnorm, rope, swiglu
from refimpl.nn.rope_scaling import RopeScaling, rotation
from refimpl.numerics.arrays import Array


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes: nanoGPT's names where it has one, else Hugging Face's or Meta's.

    n_kv_head: heads of keys and values. head_dim: width of a head, which times n_head need not be n_embd. ffn_dim: width of the
    gated MLP. rope_theta, rope_scaling: frequencies of the position embedding (`rope_scaling.py`). norm_eps: eps of all norms.
    qk_norm: whether queries and keys are normalized per head (Qwen3). qkv_bias (Qwen2), o_bias, mlp_bias: which linear layers
    have a bias. tied: whether the output layer is the token embedding.
    """

    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 128
    head_dim: int = 32
    ffn_dim: int = 384
    block_size: int = 64
    vocab_size: int = 256
    rope_theta: float = 10000.0
    rope_scaling: str = "default"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            kind = type(getattr(LlamaConfig, name))
            if kind is bool and not isinstance(value, bool):
                raise UsageError(f"{name} is {value!r}: it must be True or False")
            if kind is float and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value!r}: it must be positive and finite")
        check_sizes({name: value for name, value in asdict(self).items() if type(getattr(LlamaConfig, name)) is int})
        if self.n_head % self.n_kv_head:
            raise UsageError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}: groups must be equal")
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}: it must be even, since RoPE rotates pairs")
        RopeScaling.parse(self.rope_scaling)


def _block(t: Tape, x: Value, cos: Array, sin: Array, config: LlamaConfig) -> Value:
    h = t(llama_rmsnorm, "input_layernorm", x, eps=config.norm_eps)           # (B, T, C)
    q = t(linear, "self_attn.q_proj", h)                                      # (B, T, H D)
    k = t(linear, "self_attn.k_proj", h)                                      # (B, T, K D)
    v = t(linear, "self_attn.v_proj", h)                                      # (B, T, K D)
    if config.qk_norm:
        q = t(llama_rmsnorm, "self_attn.q_norm", q, eps=config.norm_eps)      # (B, T, H D)
        k = t(llama_rmsnorm, "self_attn.k_norm", k, eps=config.norm_eps)      # (B, T, K D)
    q = t(rope, "self_attn.q_rope", q, cos, sin)                              # (B, T, H D)
    k = t(rope, "self_attn.k_rope", k, cos, sin)                              # (B, T, K D)
    heads = {"n_head": config.n_head, "n_kv_head": config.n_kv_head}
    h = t(grouped_attention, "self_attn", q, k, v, **heads)                   # (B, T, H D)
    h = t(linear, "self_attn.o_proj", h)                                      # (B, T, C)
    x = t(add, "residual_1", x, h)                                            # (B, T, C)
    h = t(llama_rmsnorm, "post_attention_layernorm", x, eps=config.norm_eps)  # (B, T, C)
    gate = t(linear, "mlp.gate_proj", h)                                      # (B, T, F)
    up = t(linear, "mlp.up_proj", h)                                          # (B, T, F)
    h = t(swiglu, "mlp.act", gate, up)                                        # (B, T, F)
    h = t(linear, "mlp.down_proj", h)                                         # (B, T, C)
    return t(add, "residual_2", x, h)                                         # (B, T, C)


Rotation = Callable[[float, int, RopeScaling, int, int], tuple[Array, Array]]
"""A function with the arguments and the results of `rope_scaling.rotation`."""


class Angles:
    """The cos and sin of a model's positions on a backend. The last ones are kept: a step computes and copies none."""

    def __init__(self, config: LlamaConfig, rotation: Rotation) -> None:
        self.config, self.rotation = config, rotation
        self.scaling = RopeScaling.parse(config.rope_scaling)
        self.last: tuple[Any, tuple[Array, ...]] = (None, ())

    def at(self, start: int, stop: int, backend: Any) -> tuple[Array, ...]:
        """Return cos and sin (T, D/2) at positions start to stop - 1."""
        asked, tables = self.last
        if asked != (start, stop, backend):
            found = self.rotation(self.config.rope_theta, self.config.head_dim, self.scaling, start, stop)
            tables = tuple(map(backend.from_host, found))
            self.last = (start, stop, backend), tables
        return tables


def _logits(t: Tape, tokens: Array, config: LlamaConfig, start: int, angles: Angles) -> Value:
    stop = start + tokens.shape[1]
    if stop > config.block_size:
        raise UsageError(f"{stop} tokens per sequence are too many: the model has {config.block_size} positions")
    cos, sin = angles.at(start, stop, t.run.backend)                          # (T, D/2)
    x = t(embedding, "model.embed_tokens", tokens)                            # (B, T, C)
    for i in range(config.n_layer):
        with t.block(f"model.layers.{i}"):
            x = _block(t, x, cos, sin, config)                                # (B, T, C)
    x = t(llama_rmsnorm, "model.norm", x, eps=config.norm_eps)                # (B, T, C)
    return t(linear, "lm_head", x)                                            # (B, T, V)


def _linear(name: str, n_in: int, n_out: int, bias: bool, std: float) -> dict[str, Parameter]:
    weight = {f"{name}.weight": Parameter((n_out, n_in), std=std)}
    return weight | {f"{name}.bias": Parameter((n_out,))} if bias else weight


def _norm(name: str, width: int) -> dict[str, Parameter]:
    return {f"{name}.weight": Parameter((width,), fill=1.0)}


def _parameters(config: LlamaConfig) -> dict[str, Parameter]:
    """Return the table: weights N(0, 0.02^2), the two projections into the residual stream divided by sqrt(2 n_layer)."""
    c, std = config, 0.02
    residual_std, C, D = std / math.sqrt(2 * c.n_layer), c.n_embd, c.head_dim
    table = {"model.embed_tokens.weight": Parameter((c.vocab_size, C), std=std)}
    for i in range(c.n_layer):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        table |= _linear(f"{attn}.q_proj", C, c.n_head * D, c.qkv_bias, std)
        table |= _linear(f"{attn}.k_proj", C, c.n_kv_head * D, c.qkv_bias, std)
        table |= _linear(f"{attn}.v_proj", C, c.n_kv_head * D, c.qkv_bias, std)
        table |= _linear(f"{attn}.o_proj", c.n_head * D, C, c.o_bias, residual_std)
        if c.qk_norm:
            table |= _norm(f"{attn}.q_norm", D) | _norm(f"{attn}.k_norm", D)
        table |= _linear(f"{mlp}.gate_proj", C, c.ffn_dim, c.mlp_bias, std)
        table |= _linear(f"{mlp}.up_proj", C, c.ffn_dim, c.mlp_bias, std)
        table |= _linear(f"{mlp}.down_proj", c.ffn_dim, C, c.mlp_bias, residual_std)
        table |= _norm(f"model.layers.{i}.input_layernorm", C) | _norm(f"model.layers.{i}.post_attention_layernorm", C)
    table |= _norm("model.norm", C)
    return table if c.tied else table | _linear("lm_head", C, c.vocab_size, False, std)


def llama_model(
    config: LlamaConfig, ignore_index: int = IGNORE_INDEX, loss_mean: str = "tokens", rotation: Rotation = rotation
) -> Model:
    """Return a model of the Llama family: RMSNorm, rotary positions, grouped-query attention, a gated MLP; no dropout.

    tokens (B, T) with T <= block_size -> logits (B, T, V). Targets equal to ignore_index do not count in the loss.
    rotation: the function that computes cos and sin of the positions; a known mistake replaces it.
    Source: Touvron et al. 2023, arXiv 2302.13971. PyTorch: transformers' Llama, Mistral, Qwen2 and Qwen3, with eager attention.
    Differs from the source: the initial weights are nanoGPT's.
    """
    angles = Angles(config, rotation)

    def logits(t: Tape, tokens: Array, start: int = 0) -> Value:
        return _logits(t, tokens, config, start, angles)

    def loss(t: Tape, tokens: Array, targets: Array) -> Value:
        return t(cross_entropy, "loss", logits(t, tokens), targets, ignore_index=ignore_index)

    sizes, tied = asdict(config), {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}
    return Model("llama", sizes, _parameters(config), tied, logits, loss, ignore_index=ignore_index, loss_mean=loss_mean)
