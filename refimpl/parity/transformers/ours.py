"""Our side of a comparison: the settings and the weights that a Hugging Face folder gives, and batches for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.backends.choose import ON_HOST
from refimpl.errors import UsageError
from refimpl.nn.rope_scaling import RopeScaling
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast
from refimpl.precision.policy import Policy, Precision
from refimpl.precision.recipes import Recipe, get_recipe
from refimpl.training.config import Config
from refimpl.training.data import sample_batch
from refimpl.training.huggingface.weights import read_model

RECIPES = ("fp32", "pure-bf16", "bf16", "fp16", "amp-bf16-cpu", "amp-fp16-cpu")
"""The recipes that PyTorch trains a model of transformers by, on the CPU."""
ATTENTION = {"eager": "unfused", "sdpa": "fused"}
"""transformers' name of an attention -> ours."""
DEFAULTS: Mapping[str, Any] = {
    "steps": 20, "batch_size": 1, "block_size": 64, "lr": 1e-4, "warmup": 5, "init_scale": 1024.0, "growth_interval": 8,
}  # fmt: skip
"""A small first scale: the first pass shall not overflow, since its gradients are compared."""
TOKENIZER = "tokenizer.json"

class WithMask(Config):
    """The settings of transformers' GPT-2 under autocast: with its mask, which has FP32, softmax has FP32 on the CPU too."""

    def make_recipe(self) -> Recipe:
        """Return the recipe with that row."""
        recipe = super().make_recipe()
        rows = {**recipe.policy.rows, "attention.softmax": Precision("fp32", "fp32", "fp32")}
        return replace(recipe, policy=Policy(f"{recipe.policy.name}, FP32 mask", rows))


Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Ours:
    """Our side. weights: FP32, by our names. attention: transformers' name of it. notes: what a user should know."""

    config: Config
    weights: Mapping[str, np.ndarray]
    attention: str = "eager"
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path, flags: Mapping[str, Any], attention: str = "eager") -> Ours:
        """Read a folder. flags: settings of the training. Errors: UsageError for what cannot be compared."""
        if attention not in ATTENTION:
            raise UsageError(f"--attention is {attention!r}: with --hf choose eager or sdpa")
        recipe = flags.get("recipe", "fp32")
        get_recipe(recipe)
        if recipe not in RECIPES:
            raise UsageError(f"PyTorch has no counterpart of recipe {recipe}: with --hf choose one of {', '.join(RECIPES)}")
        model, weights, notes = read_model(folder)
        settings = {**DEFAULTS, **flags}
        settings["steps"] = max(1, settings["steps"])  # the first pass is none, and one step is no training
        sizes = {**model.config, "model": model.name, "n_positions": model.config["block_size"]}
        if RopeScaling.parse(sizes.get("rope_scaling", "default")).kind == "dynamic":  # made for longer sequences
            sizes["n_positions"] = max(sizes["n_positions"], settings["block_size"])
        if settings["block_size"] > sizes["n_positions"]:
            raise UsageError(f"--tokens is {settings['block_size']}: the model has {sizes['n_positions']} positions")
        if (folder / TOKENIZER).is_file():
            settings.setdefault("tokenizer", str(folder / TOKENIZER))
        elif "data" in flags:
            raise UsageError(f"--data is {flags['data']}: {folder} has no {TOKENIZER} to read it with")
        elif "tokenizer" not in flags:
            notes = (*notes, f"{folder} has no {TOKENIZER}: the tokens are drawn at random")
        masked = model.name == "gpt" and recipe.startswith("amp-") and attention == "eager"
        config = (WithMask if masked else Config).of({**sizes, **settings, "attention": ATTENTION[attention]})
        if config.grad_accum > 1 or config.optimizer != "adamw" or config.loss_scale not in ("dynamic", "none"):
            raise UsageError("with --hf PyTorch trains by AdamW, with a GradScaler or none, one micro-batch per step")
        if config.backend not in ON_HOST:
            raise UsageError(f"--backend is {config.backend}: with --hf choose {' or '.join(ON_HOST)}")
        return cls(config, weights, attention, notes)

    @property
    def S(self) -> float:
        """Return what backward starts from in the pass that is compared."""
        return self.config.init_scale if self.config.loss_scale == "dynamic" else 1.0

    def read_weights(self) -> dict[str, Array]:
        """Return the weights in the format that the passes of the recipe read."""
        fmt = self.config.make_recipe().state["weights"]
        return {name: cast(self.weights[name], fmt) for name in self.weights}

    def batches(self) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Return (tokens, targets, overflow) per step. overflow: put an Inf into the gradients, which is done twice."""
        config = self.config
        rng = np.random.default_rng(config.seed + 1)
        shape = config.batch_size, config.block_size
        corpus = config.make_corpus().train if config.tokenizer != "bytes" else None
        again = config.loss_scale == "dynamic" and config.steps >= 7
        injected = {config.steps // 7, config.steps // 2} if again else set()
        batches = []
        for i in range(config.steps):
            if corpus is None:
                drawn = rng.integers(0, config.vocab_size, (shape[0], shape[1] + 1))
                tokens, targets = drawn[:, :-1].copy(), drawn[:, 1:].copy()
            else:
                tokens, targets = sample_batch(corpus, *shape, rng)
            batches.append((tokens, targets, i in injected))
        return batches
