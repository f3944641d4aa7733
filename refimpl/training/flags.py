"""The flags of the scripts that train: one for each field of `Config`, with its help text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from refimpl.optim.optimizer import SCHEDULES
from refimpl.optim.scaler_rules import SCALERS
from refimpl.precision.recipes import RECIPES
from refimpl.training.config import MODEL_DEFAULTS, Config

HELP = {
    "model": "gpt or mlp",
    "recipe": ", ".join(RECIPES),
    "backend": "numpy or cupy",
    "data": "pydoc (Python's manual), stdlib (its library's sources), or a file of any kind",
    "examples": "blocks of any bytes, or lines: blocks that end with their line, the rest padded and without targets (gpt)",
    "steps": "training steps",
    "batch_size": "sequences a micro-batch",
    "block_size": "bytes of context",
    "n_layer": "layers",
    "n_head": "attention heads (gpt)",
    "n_embd": "width",
    "vocab_size": "token ids; data are bytes, so 256 at least",
    "bias": "biases in the linear layers and layer norms (gpt); nanoGPT's bias=False is --no-bias",
    "optimizer": "adamw or sgd",
    "momentum": "momentum of sgd",
    "beta1": "decay of AdamW's first moments",
    "beta2": "decay of AdamW's second moments",
    "eps": "what AdamW adds to the root of the second moments",
    "lr": "largest learning rate",
    "min_lr": "learning rate at the end of a cosine or linear schedule (default: lr / 10)",
    "schedule": f"learning rate after warm-up: {', '.join(SCHEDULES)}",
    "warmup": "updates of linear warm-up",
    "weight_decay": "decoupled decay of matrices (0 for sgd unless given)",
    "clip": "largest gradient norm; 0 does not clip",
    "grad_accum": "micro-batches a step, their gradients summed in FP32",
    "ignore_index": "the target that has no part in the loss",
    "loss_mean": "over tokens (all targets that count) or over micro-batches (the mean of their means)",
    "masters_from": "original (the FP32 weights) or rounded (their copy in the model's format) (default: the recipe's)",
    "attention": "unfused (each operation rounds), fused (as one kernel, FlashAttention), or math (all FP32, one rounding)",
    "loss_scale": f"dynamic (torch), none, a number, or as another project: {', '.join(SCALERS)} (default: the recipe's)",
    "init_scale": "where a loss scale that adapts starts, if not where its project lets it start",
    "growth_interval": "good steps before it doubles, if not as many as in its project",
    "hysteresis": "overflows before it halves (2), for those of the projects that wait",
    "growth_factor": "what the loss scale grows by (default: its project's, 2)",
    "backoff_factor": "what an overflow multiplies it by (default: 1/2; 1/growth factor where its project has one factor)",
    "scale_floor": "least loss scale, for those of the projects that have one (default: its project's)",
    "seed": "of weights, batches, evaluation and sample",
    "mistake": "a known mistake to make on purpose (`python scripts/mistakes.py` lists them)",
    "eval_every": "steps between evaluations, each followed by a checkpoint",
    "eval_batches": "batches an evaluation",
    "log_every": "steps between looks at the device",
    "sample_bytes": "bytes of text to generate at the end",
    "zero": "of several ranks, which share each batch: the ZeRO stage, 0 to 3 (docs/ranks.md)",
}
INTEGERS = {
    "steps", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "warmup", "grad_accum",
    "growth_interval", "hysteresis", "ignore_index", "seed", "eval_every", "eval_batches", "log_every", "sample_bytes",
    "zero",
}  # fmt: skip
NUMBERS = {"momentum", "beta1", "beta2", "eps", "lr", "min_lr", "weight_decay", "clip", "init_scale",
           "growth_factor", "backoff_factor", "scale_floor"}  # fmt: skip


def _default(name: str) -> str:
    per_model = [f"{model} {values[name]}" for model, values in MODEL_DEFAULTS.items() if name in values]
    default = getattr(Config, name)
    return f" ({', '.join(per_model)})" if per_model else "" if default is None else f" ({default})"


def add_config_flags(
    parser: argparse.ArgumentParser, names: Iterable[str] = HELP, defaults: Mapping[str, Any] | None = None
) -> None:
    """Add a flag for each of these fields of Config. One that is not given leaves no trace in the parsed arguments.

    defaults: fields for which the script has a default of its own.
    """
    own = defaults or {}
    for name in names:
        flag, default = f"--{name.replace('_', '-')}", own.get(name, argparse.SUPPRESS)
        if isinstance(getattr(Config, name, None), bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=HELP[name])
            continue
        kind = int if name in INTEGERS else float if name in NUMBERS else str
        text = HELP[name] + (f" ({own[name]})" if name in own else _default(name))
        parser.add_argument(flag, type=kind, default=default, help=text)
