"""Recipes: ways to train, each one row of data.

A recipe is a policy (the formats inside every operation), an encoding for each model state, what masters start from, and a loss
scale. No code asks which recipe runs: what differs is in these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from refimpl.errors import UsageError, unknown
from refimpl.numerics.formats import FORMATS
from refimpl.precision.policy import Policy, autocast_cpu, autocast_cuda, uniform
from refimpl.precision.policy_variants import low_products, with_sums
from refimpl.precision.state_encodings import BufferSpec, buffers_of

MASTERS_FROM = ("original", "rounded")
STATE_KINDS = ("weights", "grads", "main_grads", "master", "m", "v")


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    state: kind of model state -> its encoding, a name of `state_encodings.ENCODINGS`; '' for a state that is not kept. Without
    a master the optimizer updates the weights themselves.
    loss_scale: the default loss scale, a name or a number as a run's settings have it.
    masters_from: what masters start from, the 'original' FP32 weights or their 'rounded' copy.
    """

    name: str
    summary: str
    source: str
    policy: Policy
    state: Mapping[str, str]
    loss_scale: str
    masters_from: str = "original"

    def state_encodings(self, moments: tuple[str, ...] = ("m", "v"), grad_accum: int = 1) -> dict[str, str]:
        """Return the states that a run keeps: kind -> encoding.

        moments: the moments that the optimizer keeps (AdamW m and v, SGD with momentum m, plain SGD none).
        grad_accum: the number of micro-batches. Gradients of more than one are summed in at least FP32, and need no FP32 copy.
        """
        stored = {kind: self.state[kind] for kind in STATE_KINDS if self.state[kind]}
        if grad_accum > 1 and FORMATS[stored["grads"]].bits < 32:
            stored["grads"] = "fp32"
            stored.pop("main_grads", None)
        return {kind: name for kind, name in stored.items() if kind not in ("m", "v") or kind in moments}

    def buffers(self, moments: tuple[str, ...] = ("m", "v"), grad_accum: int = 1, embeddings: int = 0) -> dict[str, BufferSpec]:
        """Return the buffers of these states: name -> the type of an element, and how many parameters share one.

        embeddings: the number of parameters that are embeddings, for encodings that store those differently.
        """
        return buffers_of(self.state_encodings(moments, grad_accum), embeddings)

    def bytes_per_parameter(self, moments: tuple[str, ...] = ("m", "v"), grad_accum: int = 1) -> Fraction:
        """Return the bytes of model states per parameter: 2+2+4+4+4 = 16 for fp16 with Adam. Source: arXiv 1910.02054, 3.1.

        Buffers that only embeddings have are not counted: their share depends on the model.
        """
        kept = self.buffers(moments, grad_accum).values()
        return sum((part.bytes_per_parameter for part in kept if part.first is None), Fraction(0))

    def bytes_by_buffer(
        self, moments: tuple[str, ...] = ("m", "v"), grad_accum: int = 1, embeddings: int = 0, n_params: int = 1
    ) -> dict[str, Fraction]:
        """Return the bytes per parameter of each buffer.

        embeddings: how many of n_params are embeddings; buffers that only those have are averaged over all parameters.
        """
        return {
            name: part.bytes_per_parameter * (1 if part.first is None else Fraction(part.first, n_params))
            for name, part in self.buffers(moments, grad_accum, embeddings).items()
        }


def _state(weights: str, grads: str, master: str, moments: str, v: str = "", main_grads: str = "") -> dict[str, str]:
    """Return a table of states. v: the encoding of second moments, where it differs from that of first moments."""
    return {
        "weights": weights, "grads": grads, "main_grads": main_grads, "master": master, "m": moments, "v": v or moments,
    }  # fmt: skip


_MIXED = "Micikevicius et al. 2018, arXiv 1710.03740"
_AUTOCAST = "PyTorch, aten/src/ATen/autocast_mode.h"
_SR = "Gupta et al. 2015, arXiv 1502.02551; llm.c, train_gpt2.cu -w 0"
_FP8 = "Micikevicius et al. 2022, arXiv 2209.05433"
_TE = "NVIDIA Transformer Engine, common/recipe"
_MX = "Rouhani et al. 2023, arXiv 2310.10537"
_SUMS = "DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2"
_FP16, _BF16 = uniform("fp16", "fp32"), uniform("bf16", "fp32")
_MASTERS = _state("bf16", "bf16", "fp32", "fp32")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp64", "all in double precision, to check formulas apart from rounding", "-",
               uniform("fp64", "fp64"), _state("fp64", "fp64", "", "fp64"), "none"),
        Recipe("fp32", "all in single precision: the baseline", "-",
               uniform("fp32", "fp32"), _state("fp32", "fp32", "", "fp32"), "none"),
        Recipe("fp16", "FP16 weights and gradients, FP32 masters, dynamic loss scale: the published algorithm", _MIXED,
               _FP16, _state("fp16", "fp16", "fp32", "fp32"), "dynamic"),
        Recipe("bf16", "BF16 weights and gradients, FP32 masters; its range needs no loss scale",
               "Kalamkar et al. 2019, arXiv 1905.12322", _BF16, _state("bf16", "bf16", "fp32", "fp32"), "none"),
        Recipe("amp-fp16", "FP32 weights, each operation cast as listed by CUDA autocast", _AUTOCAST,
               autocast_cuda("fp16"), _state("fp32", "fp32", "", "fp32"), "dynamic"),
        Recipe("amp-bf16", "FP32 weights, each operation cast as listed by CUDA autocast", _AUTOCAST,
               autocast_cuda("bf16"), _state("fp32", "fp32", "", "fp32"), "none"),
        Recipe("amp-fp16-cpu", "FP32 weights, each operation cast as listed by CPU autocast", _AUTOCAST,
               autocast_cpu("fp16"), _state("fp32", "fp32", "", "fp32"), "dynamic"),
        Recipe("amp-bf16-cpu", "FP32 weights, each operation cast as listed by CPU autocast", _AUTOCAST,
               autocast_cpu("bf16"), _state("fp32", "fp32", "", "fp32"), "none"),
        Recipe("pure-fp16", "everything in FP16, no masters: the mistake that the algorithm avoids",
               "Micikevicius et al. 2018, section 3.1", _FP16, _state("fp16", "fp16", "", "fp16"), "none"),
        Recipe("pure-bf16", "everything in BF16, no masters: the mistake that the algorithm avoids",
               "Micikevicius et al. 2018, section 3.1", _BF16, _state("bf16", "bf16", "", "bf16"), "none"),
        Recipe("bf16-no-master", "BF16 weights and gradients, FP32 moments, no masters: what masters are for",
               "Zamirai et al. 2020, arXiv 2010.06192", _BF16, _state("bf16", "bf16", "", "fp32"), "none"),
        Recipe("bf16-sr", "no masters: BF16 weights, rounded stochastically after each update", _SR,
               _BF16, _state("bf16-stochastic", "bf16", "", "fp32"), "none"),
        Recipe("bf16-kahan", "no masters: BF16 weights, and their rounding errors in BF16",
               "Zamirai et al. 2020, arXiv 2010.06192; torchdistx, AnyPrecisionAdamW",
               _BF16, _state("bf16-kahan", "bf16", "", "bf16"), "none"),
        Recipe("bf16-remainder", "BF16 weights, and 16 more bits that make them FP32 masters",
               "TransformerEngine, multi_tensor/adam.cu; Megatron-LM, store_param_remainders",
               _BF16, _state("bf16-remainder", "bf16", "", "fp32"), "none"),
        Recipe("bf16-moments", "bf16 with the moments in BF16 too", "DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.3",
               _BF16, _state("bf16", "bf16", "fp32", "bf16"), "none"),
        Recipe("fp16-moments", "bf16 with the moments in FP16: squares of small gradients become 0, the updates huge",
               "optax issue 1754; chainer issue 6299", _BF16, _state("bf16", "bf16", "fp32", "fp16"), "none"),
        Recipe("adam-8bit", "bf16-sr with 8-bit moments, one scale per 256 values",
               "Dettmers et al. 2022, arXiv 2110.02861; torchao, optim.AdamW8bit",
               _BF16, _state("bf16-stochastic", "bf16", "", "int8-signed", "int8-unsigned"), "none"),
        Recipe("adam-8bit-fp32-embeddings", "adam-8bit with FP32 moments for embeddings: 8 bytes more per parameter",
               "Dettmers et al. 2022, arXiv 2110.02861, section 2.3; bitsandbytes, StableEmbedding", _BF16,
               _state("bf16-stochastic", "bf16", "", "int8-signed-embeddings-fp32", "int8-unsigned-embeddings-fp32"), "none"),
        Recipe("adam-fp8", "bf16-sr with e4m3 moments, one scale per 256 values", "torchao, optim.AdamWFp8",
               _BF16, _state("bf16-stochastic", "bf16", "", "e4m3-blocks"), "none"),
        Recipe("megatron-bf16", "bf16 with FP32 gradients; masters start from the rounded weights",
               "Megatron-LM, docs of the distributed optimizer",
               _BF16, _state("bf16", "fp32", "fp32", "fp32"), "none", "rounded"),
        Recipe("apex-o2", "fp16 with an FP32 copy of the gradients; masters start from the rounded weights",
               "NVIDIA Apex, amp O2; Megatron-LM's fp16", _FP16,
               _state("fp16", "fp16", "fp32", "fp32", main_grads="fp32"), "dynamic", "rounded"),
        Recipe("fp8", "bf16 with linear layers in FP8: e4m3 forward, e5m2 for gradients, one scale per tensor",
               f"{_FP8}; {_TE}",
               low_products("fp8", "e4m3-tensor", dy="e5m2-tensor"), _MASTERS, "none"),
        Recipe("fp8-delayed", "fp8 with scales from the largest values of the last 1024 steps", _TE,
               low_products("fp8-delayed", "e4m3-delayed", dy="e5m2-delayed"), _MASTERS, "none"),
        Recipe("fp8-e4m3", "fp8 with gradients in e4m3 too", _FP8,
               low_products("fp8-e4m3", "e4m3-tensor"), _MASTERS, "none"),
        Recipe("fp8-rows", "e4m3 with a power of two as the scale of each row", "torchao, float8 rowwise",
               low_products("fp8-rows", "e4m3-rows"), _MASTERS, "none"),
        Recipe("fp8-rows-dw-bf16", "fp8-rows, but weight gradients stay in BF16", "torchao, float8 rowwise_with_gw_hp",
               low_products("fp8-rows-dw-bf16", "e4m3-rows", dw=("bf16", "bf16")), _MASTERS, "none"),
        Recipe("fp8-blocks", "e4m3 with a scale per 1x128 activations and 128x128 weights; FP32 gradients, BF16 moments",
               "DeepSeek-AI 2024, arXiv 2412.19437, section 3.3",
               low_products("fp8-blocks", "e4m3-1x128", w="e4m3-128x128"),
               _state("bf16", "fp32", "fp32", "bf16"), "none"),
        Recipe("mxfp8", "MX: e4m3 with a power of two per 32 values, rounded up", f"{_MX}; {_TE}",
               low_products("mxfp8", "mx-e4m3-rceil"), _MASTERS, "none"),
        Recipe("mxfp8-floor", "mxfp8 with the OCP scales, with which large values saturate", f"OCP MX v1.0; {_MX}",
               low_products("mxfp8-floor", "mx-e4m3-floor"), _MASTERS, "none"),
        Recipe("mxfp6", "MX with 6 bits: e2m3 forward, e3m2 for gradients", _MX,
               low_products("mxfp6", "mx-e2m3-floor", dy="mx-e3m2-floor"), _MASTERS, "none"),
        Recipe("mxfp4", "MX with 4 bits, e2m1: too few for gradients rounded to nearest", _MX,
               low_products("mxfp4", "mx-e2m1-floor"), _MASTERS, "none"),
        Recipe("nvfp4", "e2m1 with an FP8 scale per 16 values; gradients rounded stochastically, dw from rotated operands",
               "NVIDIA 2025, arXiv 2509.25149",
               low_products("nvfp4", "nvfp4", "nvfp4-16x16", "nvfp4-sr", dw=("nvfp4-rotated-sr", "nvfp4-rotated")),
               _MASTERS, "none"),
        Recipe("fp8-14bit", "fp8-e4m3 on tensor cores whose sums keep 14 fraction bits", _SUMS,
               low_products("fp8-14bit", "e4m3-tensor", acc="e8m14"), _MASTERS, "none"),
        Recipe("fp8-14bit-128", "fp8-14bit, promoted to FP32 every 128 products", _SUMS,
               low_products("fp8-14bit-128", "e4m3-tensor", acc="e8m14/128"), _MASTERS, "none"),
        Recipe("fp16-sums", "fp16 whose linear layers sum in FP16", "Micikevicius et al. 2018, section 3.3",
               with_sums("fp16-sums", "fp16"), _state("fp16", "fp16", "fp32", "fp32"), "dynamic"),
        Recipe("fp16-sums-64", "fp16-sums in chunks of 64", "Wang et al. 2018, arXiv 1812.08011",
               with_sums("fp16-sums-64", "fp16/64/fp16"), _state("fp16", "fp16", "fp32", "fp32"), "dynamic"),
    )
}  # fmt: skip


def get_recipe(name: str) -> Recipe:
    """Return the recipe of that name. Errors: UsageError that lists the names."""
    if name not in RECIPES:
        raise UsageError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
