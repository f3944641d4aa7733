"""The memory of training by formulas: model states, ZeRO's shards of them, and published formulas for activations.

    bytes of the model states = parameters x (weights + gradients + masters + m + v)       2 + 2 + 4 + 4 + 4 = 16 per parameter

The states of a recipe follow from its table; CONVENTIONS has published alternatives. The activations on our own tape are in
`training/activation_memory/`, and `measure.py` measures both. A GB is 10^9 bytes, a GiB 2^30, which is 7.4 % more.

Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from refimpl.distributed.zero import Bytes, per_rank
from refimpl.errors import UsageError

GB = 10**9

# ---------------------------------------------------------------------------------------------------- sizes of models


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder-only transformer. Letters: L layers, C width, F width of the MLP, V vocabulary.

    n_kv_head: heads of keys and values, fewer than n_head in grouped-query attention. gpt: biases, layer norms with bias,
    learned positions (else rotary ones), an MLP of two matrices (else three, gated), and a tied output layer.
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

    @property
    def width_ff(self) -> int:
        """Return F, by default 4 C."""
        return self.n_ff or 4 * self.n_embd

    @property
    def n_params(self) -> int:
        """Return the number of parameters.

        GPT:    V C + T C + L (4 C^2 + 2 C F + 9 C + F) + 2 C         (F = 4 C: L (12 C^2 + 13 C))
        other:  2 V C + L (2 C^2 + 2 C C_kv + 3 C F + 2 C) + C         C_kv = C n_kv_head / n_head
        """
        C, F, L, V = self.n_embd, self.width_ff, self.n_layer, self.vocab_size
        if self.gpt:
            return V * C + self.block_size * C + L * (4 * C * C + 2 * C * F + 9 * C + F) + 2 * C
        C_kv = C * (self.n_kv_head or self.n_head) // self.n_head
        return 2 * V * C + L * (2 * C * C + 2 * C * C_kv + 3 * C * F + 2 * C) + C


PRESETS: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("gpt2-xl", 48, 25, 1600, 1024, 50257, "Radford et al. 2019; OpenAI's released weights"),
        Architecture("llama-7b", 32, 32, 4096, 2048, 32000, "Touvron et al. 2023, arXiv 2302.13971", n_ff=11008, gpt=False),
        Architecture(
            "mistral-7b", 32, 32, 4096, 8192, 32000, "Jiang et al. 2023, arXiv 2310.06825", n_kv_head=8, n_ff=14336, gpt=False
        ),
        Architecture("gpt3-175b", 96, 96, 12288, 2048, 50257, "Brown et al. 2020, arXiv 2005.14165, table 2.1"),
    )
}

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
    inputs of its linear layers and of GELU, and its mask.
    Differs from the source: that MLP term is Megatron-LM's (theoretical_memory_usage.py); a gated MLP stores one more F.
    Source: Korthikanti et al. 2022, arXiv 2205.05198, sections 4 and 5.
    """
    if checkpointing not in CHECKPOINTING:
        raise UsageError(f"--checkpointing is {checkpointing!r}: choose {', '.join(CHECKPOINTING)}")
    h, sbh, L = a.n_embd, s * b * a.n_embd, a.n_layer
    core = 5 * a.n_head * s * s * b
    mlp = s * b * (3 * h + 4 * a.width_ff) if a.gpt else s * b * (3 * h + 6 * a.width_ff)
    layer = {
        "none": [("attention, inputs and outputs", 11 * sbh), ("attention, (s, s) matrices", core), ("MLP", mlp),
                 ("two norms", 4 * sbh)],
        "selective": [("attention, inputs and outputs", 11 * sbh), ("MLP", mlp), ("two norms", 4 * sbh)],
        "full": [("input of the layer", 2 * sbh)],
    }[checkpointing]  # fmt: skip
    return [
        *(ActivationTerm(name, L, size) for name, size in layer),
        ActivationTerm("embedding's dropout mask", 1, sbh),
        ActivationTerm("inputs of the last norm and the output layer", 1, 4 * sbh),
        ActivationTerm("logits, in FP32", 1, 4 * s * b * a.vocab_size),
    ]
