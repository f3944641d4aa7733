"""Recipes: ways to train, each one row of data.

A recipe is a policy (the formats inside every operation) plus the formats that the model states are kept in, whether
there are masters, and the loss scale. No code asks which recipe runs: what differs is in these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refimpl.errors import UsageError
from refimpl.formats import FORMATS
from refimpl.policy import EVERY_OTHER, SAME, Policy, Precision

STATE_KINDS = ("weights", "grads", "master", "m", "v")


@dataclass(frozen=True)
class Recipe:
    """A way to train. `state` says which format each kind of model state is kept in, and '' means that it is not kept.

    Without a separate master the weights are their own master: the optimizer updates them directly.
    `loss_scale` is the default of the recipe: 'dynamic', 'none', or a number for a static scale.
    """

    name: str
    summary: str
    source: str
    policy: Policy
    state: Mapping[str, str]
    loss_scale: str

    def state_formats(self, moments: tuple[str, ...] = ("m", "v"), grad_accum: int = 1) -> dict[str, str]:
        """The states that are really kept: kind -> format.

        moments: those that the optimizer keeps (AdamW m and v, SGD with momentum m, plain SGD none).
        grad_accum: with more than one micro-batch gradients are summed, and sums are kept in FP32 at least.
        """
        formats = {kind: self.state[kind] for kind in STATE_KINDS if self.state[kind]}
        if grad_accum > 1 and FORMATS[formats["grads"]].bits < 32:
            formats["grads"] = "fp32"
        return {kind: fmt for kind, fmt in formats.items() if kind not in ("m", "v") or kind in moments}

    def bytes_per_parameter(self, moments: tuple[str, ...] = ("m", "v"), grad_accum: int = 1) -> int:
        """Model states in bytes a parameter: 2+2+4+4+4 = 16 for the note's recipe with Adam."""
        return sum(FORMATS[fmt].itemsize for fmt in self.state_formats(moments, grad_accum).values())


def _state(weights: str, grads: str, master: str, moments: str) -> dict[str, str]:
    return {"weights": weights, "grads": grads, "master": master, "m": moments, "v": moments}


def _uniform(fmt: str, acc: str) -> Policy:
    """Every tensor in one format, sums in `acc`; the loss in `acc` too, from logits cast up to it."""
    return Policy(fmt, {EVERY_OTHER: Precision(fmt, acc, fmt), "cross_entropy": Precision(acc, acc, acc)})


def _autocast_cuda(low: str) -> Policy:
    """The op lists of torch.autocast('cuda'): products low, normalisation, softmax and losses FP32, others as they come."""
    product, high = Precision(low, "fp32", low), Precision("fp32", "fp32", "fp32")
    return Policy(
        f"autocast-cuda-{low}",
        {
            "linear": product,
            "matmul": product,
            "attention.scores": product,
            "attention.values": product,
            "attention.softmax": high,
            "softmax": high,
            "layernorm": high,
            "rmsnorm": high,
            "cross_entropy": high,
            EVERY_OTHER: Precision(SAME, "fp32", SAME),
        },
    )


def _autocast_cpu(low: str) -> Policy:
    """The op lists of torch.autocast('cpu'): products low, losses FP32; softmax and layernorm stay in the input's format."""
    product, high = Precision(low, "fp32", low), Precision("fp32", "fp32", "fp32")
    return Policy(
        f"autocast-cpu-{low}",
        {
            "linear": product,
            "matmul": product,
            "attention.scores": product,
            "attention.values": product,
            "cross_entropy": high,
            EVERY_OTHER: Precision(SAME, "fp32", SAME),
        },
    )


_NOTE = "the note 'Mixed-precision training in LLM'; Micikevicius et al. 2018, arXiv 1710.03740"
_AUTOCAST = "PyTorch, aten/src/ATen/autocast_mode.h"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp64", "all in double precision, to check formulas apart from rounding", "-",
               _uniform("fp64", "fp64"), _state("fp64", "fp64", "", "fp64"), "none"),
        Recipe("fp32", "all in single precision: the baseline", "-",
               _uniform("fp32", "fp32"), _state("fp32", "fp32", "", "fp32"), "none"),
        Recipe("fp16", "FP16 weights and gradients, FP32 masters, dynamic loss scale: the note's algorithm", _NOTE,
               _uniform("fp16", "fp32"), _state("fp16", "fp16", "fp32", "fp32"), "dynamic"),
        Recipe("bf16", "BF16 weights and gradients, FP32 masters; its range needs no loss scale", _NOTE,
               _uniform("bf16", "fp32"), _state("bf16", "bf16", "fp32", "fp32"), "none"),
        Recipe("amp-fp16", "FP32 weights, each operation cast by the lists of CUDA autocast", _AUTOCAST,
               _autocast_cuda("fp16"), _state("fp32", "fp32", "", "fp32"), "dynamic"),
        Recipe("amp-bf16", "FP32 weights, each operation cast by the lists of CUDA autocast", _AUTOCAST,
               _autocast_cuda("bf16"), _state("fp32", "fp32", "", "fp32"), "none"),
        Recipe("amp-fp16-cpu", "FP32 weights, each operation cast by the lists of CPU autocast", _AUTOCAST,
               _autocast_cpu("fp16"), _state("fp32", "fp32", "", "fp32"), "dynamic"),
        Recipe("amp-bf16-cpu", "FP32 weights, each operation cast by the lists of CPU autocast", _AUTOCAST,
               _autocast_cpu("bf16"), _state("fp32", "fp32", "", "fp32"), "none"),
        Recipe("pure-fp16", "everything in FP16, no masters: the mistake that the algorithm avoids",
               "Micikevicius et al. 2018, section 3.1", _uniform("fp16", "fp32"),
               _state("fp16", "fp16", "", "fp16"), "none"),
        Recipe("pure-bf16", "everything in BF16, no masters: the mistake that the algorithm avoids",
               "Micikevicius et al. 2018, section 3.1", _uniform("bf16", "fp32"),
               _state("bf16", "bf16", "", "bf16"), "none"),
    )
}  # fmt: skip


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Errors: UsageError that lists the names."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
