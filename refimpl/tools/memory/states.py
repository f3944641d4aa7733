"""The memory of training by formulas: model states, ZeRO's shards of them, and published formulas for activations.

    bytes of the model states = parameters x (weights + gradients + masters + m + v)       2 + 2 + 4 + 4 + 4 = 16 per parameter

The states of a recipe follow from its table; CONVENTIONS has published alternatives. The activations on our own tape are in
`training/activation_memory/`, and `measure.py` measures both. A GB is 10^9 bytes, a GiB 2^30, which is 7.4 % more.

Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from refimpl.distributed.zero import Bytes, per_rank
from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig
from refimpl.nn.models.llama import LlamaConfig

GB = 10**9

# ---------------------------------------------------------------------------------------------------- sizes of models


FLAGS = ("tied", "qk_norm", "qkv_bias", "o_bias", "mlp_bias")
"""The sizes of llama that are true or false."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder-only transformer. Letters: L layers, C width, H heads, F width of the MLP, V vocabulary.

    gpt: biases, layer norms with bias, learned positions, an MLP of two matrices, and a tied output layer. Else a Llama:
    RMSNorm, rotary positions, and a gated MLP of three matrices, with the flags of `LlamaConfig`. It has K = n_kv_head heads of
    keys and values, 0 for as many as H, and D = head_dim is the width of a head, 0 for C / H.
    """

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    source: str
    n_kv_head: int = 0
    n_ff: int = 0
    gpt: bool = True
    head_dim: int = 0
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of(cls, name: str, sizes: GPTConfig | LlamaConfig, source: str) -> Architecture:
        """Return the architecture of one of our models."""
        c = sizes
        common = (name, c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size, source)
        if isinstance(c, GPTConfig):
            return cls(*common)
        flags: dict[str, Any] = {name: getattr(c, name) for name in FLAGS}
        return cls(*common, n_kv_head=c.n_kv_head, n_ff=c.ffn_dim, gpt=False, head_dim=c.head_dim, **flags)

    @property
    def sizes(self) -> GPTConfig | LlamaConfig | None:
        """Return the sizes of our model of this architecture, as far as they take memory; None where we have none."""
        a = self
        if a.gpt:
            ours = GPTConfig(a.n_layer, a.n_head, a.n_embd, a.block_size, a.vocab_size)
            return ours if a.width_ff == 4 * a.n_embd else None
        flags: dict[str, Any] = {name: getattr(a, name) for name in FLAGS}
        D = a.width_q // a.n_head
        return LlamaConfig(
            a.n_layer, a.n_head, a.width_kv // D, a.n_embd, D, a.width_ff, a.block_size, a.vocab_size, **flags
        )  # fmt: skip

    @property
    def width_ff(self) -> int:
        """Return F, by default 4 C."""
        return self.n_ff or 4 * self.n_embd

    @property
    def width_q(self) -> int:
        """Return H D, the width of queries and of attention's output."""
        return self.n_head * self.head_dim or self.n_embd

    @property
    def width_kv(self) -> int:
        """Return K D, the width of keys, and of values."""
        return self.width_q * (self.n_kv_head or self.n_head) // self.n_head

    @property
    def n_params(self) -> int:
        """Return the number of parameters.

        GPT:    V C + T C + L (4 C^2 + 2 C F + 9 C + F) + 2 C         (F = 4 C: L (12 C^2 + 13 C))
        Llama:  2 V C + L (2 C H D + 2 C K D + 3 C F + 2 C) + C       (tied: V C)
                per layer also 2 D (qk_norm), H D + 2 K D (qkv_bias), C (o_bias), 2 F + C (mlp_bias)
        """
        C, F, L, V = self.n_embd, self.width_ff, self.n_layer, self.vocab_size
        if self.gpt:
            return V * C + self.block_size * C + L * (4 * C * C + 2 * C * F + 9 * C + F) + 2 * C
        HD, KD = self.width_q, self.width_kv
        layer = 2 * C * HD + 2 * C * KD + 3 * C * F + 2 * C + 2 * self.qk_norm * (HD // self.n_head)
        layer += self.qkv_bias * (HD + 2 * KD) + self.o_bias * C + self.mlp_bias * (2 * F + C)
        return (1 if self.tied else 2) * V * C + L * layer + C


def _llama(
    name: str, source: str, layers: int, width: int, heads: tuple[int, int, int], ffn: int, positions: int, vocabulary: int,
    **flags: Any,
) -> Architecture:
    """Return a Llama. heads: H, K and D."""
    H, K, D = heads
    sizes = LlamaConfig(layers, H, K, width, D, ffn, positions, vocabulary, **{"tied": False} | flags)
    return Architecture.of(name, sizes, source)


PRESETS: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("gpt2-xl", 48, 25, 1600, 1024, 50257, "Radford et al. 2019; OpenAI's released weights"),
        _llama("smollm2-135m", "config.json of HuggingFaceTB/SmolLM2-135M", 30, 576, (9, 3, 64), 1536, 8192, 49152, tied=True),
        _llama("qwen3-0.6b", "config.json of Qwen/Qwen3-0.6B", 28, 1024, (16, 8, 128), 3072, 40960, 151936, tied=True,
               qk_norm=True),
        _llama("llama-3.2-1b", "config.json of meta-llama/Llama-3.2-1B", 16, 2048, (32, 8, 64), 8192, 131072, 128256,
               tied=True),
        _llama("llama-7b", "Touvron et al. 2023, arXiv 2302.13971", 32, 4096, (32, 32, 128), 11008, 2048, 32000),
        _llama("mistral-7b", "Jiang et al. 2023, arXiv 2310.06825", 32, 4096, (32, 8, 128), 14336, 8192, 32000),
        _llama("llama-3.1-8b", "Llama Team 2024, arXiv 2407.21783, table 3; config.json of meta-llama/Llama-3.1-8B", 32, 4096,
               (32, 8, 128), 14336, 131072, 128256),
        Architecture("gpt3-175b", 96, 96, 12288, 2048, 50257, "Brown et al. 2020, arXiv 2005.14165, table 2.1"),
    )
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------- model states

@dataclass(frozen=True)
class Convention:
    """A published way to count or store model states: bytes per parameter by kind, and the source."""

    name: str
    states: Bytes
    source: str
    remark: str = ""

    @property
    def total(self) -> Fraction:
        """Return the bytes per parameter of all states."""
        return sum(self.states.values(), Fraction(0))


def _states(**kinds: int | Fraction) -> Bytes:
    return {kind: Fraction(size) for kind, size in kinds.items()}


_BLOCK_8BIT = 256
_SCALE = Fraction(4, _BLOCK_8BIT)
CONVENTIONS: dict[str, Convention] = {
    row.name: row
    for row in (
        Convention("zero", _states(weights=2, grads=2, master=4, m=4, v=4),
                   "Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1; llm.c's default", ""),
        Convention("llm.c-no-master", _states(weights=2, grads=2, m=4, v=4), "llm.c, train_gpt2.cu -w 0",
                   "BF16 weights rounded stochastically"),
        Convention("torch-amp", _states(weights=4, grads=4, m=4, v=4), "PyTorch, torch.amp",
                   "FP32 weights; 16-bit copies of them during a step come on top"),
        Convention("fp32", _states(weights=4, grads=4, m=4, v=4), "plain FP32 with Adam", "as many as mixed precision"),
        Convention("megatron-bf16", _states(weights=2, grads=4, master=4, m=4, v=4),
                   "Megatron-LM, docs of the distributed optimizer", "gradients summed in FP32; distributed: 6 + 12/N"),
        Convention("megatron-fp16", _states(weights=2, grads=2, main_grads=4, master=4, m=4, v=4),
                   "Megatron-LM, docs of the distributed optimizer", "an FP32 copy of the gradients; distributed: 4 + 16/N"),
        Convention("apex-o2", _states(weights=2, grads=2, main_grads=4, master=4, m=4, v=4), "NVIDIA Apex, amp O2",
                   "an FP32 copy of the gradients"),
        Convention("pure-bf16", _states(weights=2, grads=2, m=2, v=2), "everything in BF16, no masters", "loses small updates"),
        Convention("bf16-kahan", _states(weights=2, grads=2, weights_compensation=2, m=2, v=2),
                   "Zamirai et al. 2020, arXiv 2010.06192", "the rounding error of each update is stored in BF16"),
        Convention("bf16-fp32-moments", _states(weights=2, grads=2, m=4, v=4), "BF16 weights, FP32 moments, no masters", ""),
        Convention("adam-8bit", _states(weights=2, grads=2, m=1, m_scales=_SCALE, v=1, v_scales=_SCALE),
                   "Dettmers et al. 2022, arXiv 2110.02861; torchao", f"an FP32 scale per {_BLOCK_8BIT} values of m, and of v"),
        Convention("ms-amp-o2", _states(weights=2, grads=1, m=1, v=2), "Peng et al. 2023, arXiv 2310.18313 (MS-AMP)",
                   "FP8 gradients and m, FP16 v; the FP16 weight is the master"),
    )
}  # fmt: skip
"""Published conventions by name. Further kinds: main_grads (FP32 gradients beside 16-bit ones), compensation, scales."""


ZERO_SIZES = (7_500_000_000, 128_000_000_000, 1_000_000_000_000)
ZERO_RANKS = (1, 4, 16, 64, 256, 1024)


def zero_table() -> dict[int, dict[int, tuple[float, float, float]]]:
    """Return ZeRO's table 1: parameters -> ranks -> GB per rank at stages 1, 2 and 3, for 16 bytes per parameter.

    Source: arXiv 1910.02054, table 1.
    """
    states = CONVENTIONS["zero"].states

    def row(n: int, ranks: int) -> tuple[float, float, float]:
        one, two, three = (sum(per_rank(n, states, stage, ranks).values()) / GB for stage in (1, 2, 3))
        return one, two, three

    return {n: {ranks: row(n, ranks) for ranks in ZERO_RANKS} for n in ZERO_SIZES}


# ---------------------------------------------------------------------------------------------------- published activations

CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class ActivationTerm:
    """A line of a published formula: the number of copies (one per layer, or one), and the bytes of each."""

    name: str
    count: int
    nbytes: int


def published_activations(a: Architecture, b: int, s: int, checkpointing: str = "none") -> list[ActivationTerm]:
    """Return the bytes of activations in 16-bit training of a GPT, by the formulas of Korthikanti et al.

        per layer, nothing recomputed       s b h (34 + 5 a s / h)       attention 11 s b h + 5 a s^2 b, MLP 19, norms 4
        selective (attention's core is)     34 s b h
        full (only the input is stored)     2 s b h
        outside the layers                  s b h (embedding's mask) + 4 s b h (1 + V / h) (last norm, output layer, loss)

    s tokens, b sequences, h width, a heads. An MLP of another width F than 4 h has s b (3 h + 4 F) instead of 19 s b h: the
    inputs of its linear layers and of GELU, and its mask. Heads of another width, or k heads of keys and values, have
    s b (3 h + 4 a d + 4 k d) instead of 11 s b h, where d is the width of a head: the input of the three layers and the mask;
    queries and the input of the output layer; keys and values.
    Differs from the source: that MLP term is Megatron-LM's (theoretical_memory_usage.py); a gated MLP stores one more F. Heads
    in groups are counted by the same rule, 2 bytes per value.
    Source: Korthikanti et al. 2022, arXiv 2205.05198, sections 4 and 5.
    """
    if checkpointing not in CHECKPOINTING:
        raise UsageError(f"--checkpointing is {checkpointing!r}: choose {', '.join(CHECKPOINTING)}")
    h, sbh, L = a.n_embd, s * b * a.n_embd, a.n_layer
    core = 5 * a.n_head * s * s * b
    mlp = s * b * (3 * h + 4 * a.width_ff) if a.gpt else s * b * (3 * h + 6 * a.width_ff)
    attention = 3 * sbh + 4 * s * b * (a.width_q + a.width_kv)
    layer = {
        "none": [("attention, inputs and outputs", attention), ("attention, (s, s) matrices", core), ("MLP", mlp),
                 ("two norms", 4 * sbh)],
        "selective": [("attention, inputs and outputs", attention), ("MLP", mlp), ("two norms", 4 * sbh)],
        "full": [("input of the layer", 2 * sbh)],
    }[checkpointing]  # fmt: skip
    return [
        *(ActivationTerm(name, L, size) for name, size in layer),
        ActivationTerm("embedding's dropout mask", 1, sbh),
        ActivationTerm("inputs of the last norm and the output layer", 1, 4 * sbh),
        ActivationTerm("logits, in FP32", 1, 4 * s * b * a.vocab_size),
    ]
