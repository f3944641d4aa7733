"""The flags of the scripts that train: one per field of `Config`, with its help text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from refimpl.errors import UsageError
from refimpl.optim.loss_scalers import SCALER_RULES, find_scaler
from refimpl.optim.schedule import SCHEDULES
from refimpl.precision.recipes import RECIPES, get_recipe
from refimpl.training.config import KINDS, MODEL_DEFAULTS, STARTS, Config, Flags, flag

HELP = {
    "model": "gpt, llama or mlp",
    "recipe": ", ".join(RECIPES),
    "backend": "numpy (fast), reference (the definitions, without any fast version) or cupy (an NVIDIA GPU)",
    "data": "pydoc (Python's manual), stdlib (its library's sources), or any file",
    "tokenizer": "bytes, a tokenizer.json, or a folder that has one",
    "examples": "blocks of consecutive tokens, or lines: blocks that end with a line, padded (gpt, llama)",
    "steps": "training steps",
    "batch_size": "sequences per micro-batch",
    "block_size": "tokens of context",
    "n_layer": "layers",
    "n_head": "attention heads (gpt, llama)",
    "n_embd": "width",
    "vocab_size": "number of token ids (default: the tokenizer's)",
    "bias": "biases in linear layers and layer norms (gpt); --no-bias is nanoGPT's bias=False",
    "activation": "gelu_tanh, or gelu_new as Hugging Face's GPT-2 computes it, rounded at every step (gpt)",
    "n_kv_head": "heads of keys and values (llama; half of --n-head)",
    "head_dim": "width of a head (llama; --n-embd / --n-head)",
    "ffn_dim": "width of the gated MLP (llama; 8/3 of --n-embd)",
    "rope_theta": "base of the frequencies of positions",
    "rope_scaling": "scaling of the frequencies: default; linear,factor=4; llama3,factor=32; or dynamic or yarn with factor=2,"
    "original=2048, where original is the number of positions of pretraining",
    "norm_eps": "eps of the norms",
    "qk_norm": "normalize queries and keys, as Qwen3",
    "qkv_bias": "biases of queries, keys and values, as Qwen2",
    "o_bias": "bias of attention's output layer",
    "mlp_bias": "biases of the MLP",
    "tied": "use the token embedding as output layer",
    "n_positions": "positions of the model, if more than --block-size (gpt, llama)",
    "optimizer": "adamw or sgd",
    "momentum": "momentum of sgd",
    "beta1": "decay of AdamW's first moments",
    "beta2": "decay of AdamW's second moments",
    "eps": "added to the root of AdamW's second moments",
    "lr": "largest learning rate",
    "min_lr": "learning rate at the end of a cosine or linear schedule (default: lr / 10)",
    "schedule": f"learning rate after warm-up: {', '.join(SCHEDULES)}",
    "warmup": "updates of linear warm-up",
    "weight_decay": "decoupled decay of matrices (0 for sgd unless given)",
    "clip": "largest gradient norm; 0 disables clipping",
    "grad_accum": "micro-batches per step, whose gradients are summed in FP32",
    "ignore_index": "target value that is left out of the loss",
    "loss_mean": "mean over tokens (all targets but ignored ones), or over micro-batches (the mean of their means)",
    "masters_from": "masters start from the original FP32 weights, or from rounded ones (default: the recipe's)",
    "attention": "unfused (each operation rounds), fused (one kernel, as FlashAttention), or math (all FP32, one rounding)",
    "checkpointing": "none, or full: store each block's input only, and compute the block again in backward; the same bits",
    "loss_scale": f"dynamic (torch), none, a number, or a project's rule: {', '.join(SCALER_RULES)} (default: the recipe's)",
    "init_scale": "first value of a loss scale that adapts (default: its project's)",
    "growth_interval": "good steps before the loss scale grows (default: its project's)",
    "hysteresis": "overflows before the loss scale backs off (2), for the projects that have one",
    "growth_factor": "factor by which the loss scale grows (default: its project's, 2)",
    "backoff_factor": "factor of the loss scale at an overflow (default: 1/2; 1/growth factor for projects with one factor)",
    "scale_floor": "smallest loss scale, for the projects that have one (default: its project's)",
    "seed": "seed of weights, batches, evaluation and sample",
    "mistake": "known mistake to inject (`python scripts/mistakes.py` lists them)",
    "eval_every": "steps between evaluations, each followed by a checkpoint",
    "eval_batches": "batches per evaluation, the same ones each time",
    "log_every": "steps between reads of the results, for which a device must wait",
    "sample_bytes": "bytes of text to generate at the end; tokens, with a tokenizer",
    "keep": "checkpoints to keep, as in best,last,3: of the lowest validation loss, the last one (always), and the last 3",
    "log": "logs beside metrics.jsonl: tensorboard, wandb or both with a comma (docs/logs.md)",
    "zero": "ZeRO stage, 0 to 3, for training on several ranks (docs/ranks.md)",
}


def _default(name: str) -> str:
    per_model = [f"{model} {values[name]}" for model, values in MODEL_DEFAULTS.items() if name in values]
    default = getattr(Config, name, None)
    return f" ({', '.join(per_model)})" if per_model else "" if default is None else f" ({default})"


def refuse_unused(given: Flags) -> None:
    """Raise UsageError for a flag of a loss scale that adapts where the flags make it a constant one, which would ignore it."""
    kind = given.get("loss_scale") or get_recipe(given.get("recipe", Config.recipe)).loss_scale
    for name in STARTS:
        if name in given and find_scaler(kind) is None:
            what = f"{flag(name)} {given[name]} with loss scale {kind}"
            raise UsageError(f"{what}: only one that adapts has it, as --loss-scale dynamic")


def add_config_flags(
    parser: argparse.ArgumentParser, names: Iterable[str] = HELP, defaults: Mapping[str, Any] | None = None
) -> None:
    """Add a flag for each of these fields of Config. A flag that is not given is absent from the parsed arguments.

    defaults: the fields for which the script has its own default.
    """
    own = defaults or {}
    for name in names:
        default = own.get(name, argparse.SUPPRESS)
        if KINDS[name] == "bool":
            parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=default, help=HELP[name])
            continue
        parse = {"int": int, "float": float, "str": str}[KINDS[name]]
        text = HELP[name] + (f" ({own[name]})" if name in own else _default(name))
        parser.add_argument(flag(name), type=parse, default=default, help=text)
