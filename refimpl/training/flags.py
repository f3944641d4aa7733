"""The flags of the scripts that train: one per field of `Config`, with its help text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from refimpl.backends.choose import BACKENDS
from refimpl.errors import UsageError
from refimpl.nn.checkpointing import CHECKPOINTING
from refimpl.nn.models.model import LOSS_MEANS
from refimpl.optim.loss_scalers import SCALER_RULES, find_scaler
from refimpl.optim.schedule import SCHEDULES
from refimpl.precision.policy_variants import ATTENTION
from refimpl.precision.recipes import RECIPES, get_recipe
from refimpl.training.arguments import file_name, one_of
from refimpl.training.config import KINDS, MODEL_DEFAULTS, STARTS, Config, Flags, flag
from refimpl.training.data import EXAMPLES

GROUPS: dict[str, dict[str, str]] = {
    "model": {
        "model": "gpt, llama or mlp",
        "n_layer": "layers",
        "n_head": "attention heads, of gpt and llama",
        "n_embd": "width",
        "block_size": "tokens of context",
        "vocab_size": "number of token ids (default: the tokenizer's)",
        "n_positions": "positions of gpt or llama (default: --block-size)",
        "bias": "biases in the linear layers and layer norms of gpt",
        "activation": "of gpt: gelu_tanh, or gelu_new, as Hugging Face's GPT-2 computes it, rounded at every step",
    },
    "model (llama only)": {
        "n_kv_head": "heads of keys and values (default: half of --n-head)",
        "head_dim": "width of a head (default: --n-embd / --n-head)",
        "ffn_dim": "width of the gated MLP (default: 8/3 of --n-embd)",
        "rope_theta": "base of the frequencies of positions",
        "rope_scaling": "scaling of these frequencies: default; linear,factor=4; llama3,factor=32; or dynamic or yarn with "
        "factor=2,original=2048, where original is the number of positions of pretraining",
        "norm_eps": "eps of the norms",
        "qk_norm": "normalize queries and keys, as in Qwen3",
        "qkv_bias": "biases of queries, keys and values, as in Qwen2",
        "o_bias": "bias of attention's output layer",
        "mlp_bias": "biases of the MLP",
        "tied": "use the token embedding as output layer",
    },
    "text": {
        "data": "pydoc (Python's manual), stdlib (its library's sources), or a file",
        "tokenizer": "bytes, a tokenizer.json, or a folder that has one",
        "examples": "blocks (of consecutive tokens), or lines (a block ends with the line it begins in, padded; gpt and llama)",
        "ignore_index": "target value that is left out of the loss",
        "loss_mean": "mean over tokens (all targets but ignored ones), or over micro-batches (the mean of their means)",
    },
    "precision": {
        "recipe": "the format of each tensor: fp32, fp16, bf16, amp-fp16, fp8, ... (`python scripts/recipes.py` lists all)",
        "masters_from": "masters start from the original FP32 weights, or from rounded ones (default: the recipe's)",
        "attention": "unfused (each operation rounds), fused (one kernel, FlashAttention's), or math (all FP32, one rounding)",
        "backend": "numpy (fast), reference (the definitions, without any fast version) or cupy (an NVIDIA GPU)",
        "checkpointing": "none, or full (store only each block's input, and recompute the block in backward; the same bits)",
        "mistake": "known mistake to inject (`python scripts/mistakes.py` lists them)",
    },
    "loss scale": {
        "loss_scale": f"dynamic, none, a number, or the rule of a project: {', '.join(SCALER_RULES)} (default: the recipe's)",
        "init_scale": "first value of a loss scale that adapts (default: its project's)",
        "growth_interval": "good steps before it grows (default: its project's)",
        "growth_factor": "factor by which it grows (default: its project's)",
        "backoff_factor": "factor at an overflow (default: 1/2; 1/growth factor for projects with one factor)",
        "hysteresis": "overflows before it backs off, for the projects that have one (default: 2)",
        "scale_floor": "smallest value, for the projects that have one (default: its project's)",
    },
    "optimizer": {
        "optimizer": "adamw or sgd",
        "lr": "largest learning rate",
        "min_lr": "learning rate at the end of a cosine or linear schedule (default: lr / 10)",
        "schedule": f"learning rate after warm-up: {', '.join(SCHEDULES)}",
        "warmup": "updates of linear warm-up",
        "weight_decay": "decoupled decay of matrices (default: 0.1; 0 for sgd)",
        "clip": "largest gradient norm; 0 disables clipping",
        "beta1": "decay of AdamW's first moments",
        "beta2": "decay of AdamW's second moments",
        "eps": "added to the root of AdamW's second moments",
        "momentum": "momentum of sgd",
    },
    "run": {
        "steps": "training steps",
        "batch_size": "sequences per micro-batch",
        "grad_accum": "micro-batches per step, whose gradients are summed in FP32",
        "seed": "seed of weights, batches, evaluation and sample",
        "eval_every": "steps between evaluations, each followed by a checkpoint",
        "eval_batches": "batches per evaluation, the same ones each time",
        "log_every": "steps between updates of the progress line, or between lines in a file; a GPU must wait for each",
        "sample_bytes": "bytes of text to generate at the end, or tokens with a tokenizer",
        "keep": "checkpoints to keep, as in best,last,3: that of the lowest validation loss, the last one (always), the last 3",
        "log": "logs beside metrics.jsonl: tensorboard, wandb, or both with a comma between them (docs/logs.md)",
        "zero": "ZeRO stage, 0 to 3, for training on several ranks (docs/ranks.md) (default: one rank)",
    },
}
"""The help texts of all flags, by the heading that they stand under in the help of a command."""

DEFAULT = re.compile(r" \(default: [^()]*\)$")
"""The default in a help text."""
HELP = {name: text for group in GROUPS.values() for name, text in group.items()}

NAMES: dict[str, Iterable[str]] = {
    "model": MODEL_DEFAULTS, "recipe": RECIPES, "backend": BACKENDS, "examples": EXAMPLES, "optimizer": ("adamw", "sgd"),
    "schedule": SCHEDULES, "loss_mean": LOSS_MEANS, "attention": ATTENTION, "checkpointing": CHECKPOINTING,
    "loss_scale": ("dynamic", "none", *SCALER_RULES),
}  # fmt: skip
"""The values of the flags that take a known name."""


def _default(name: str) -> str:
    """Return ' (default: ...)'; that of each model, if they differ."""
    given = {model: values.get(name) for model, values in MODEL_DEFAULTS.items()}
    per_model = {model: value for model, value in given.items() if value or value is False}  # 0 where a model has none
    values = list(dict.fromkeys(per_model.values())) or [getattr(Config, name, None)]
    if len(values) == 1:
        shown = {True: "on", False: "off"}.get(values[0], values[0]) if KINDS[name] == "bool" else values[0]
        return "" if shown is None or DEFAULT.search(HELP[name]) else f" (default: {shown})"
    models = {value: " and ".join(model for model in per_model if per_model[model] == value) for value in values}
    return f" (default: {', '.join(f'{value} for {names}' for value, names in models.items())})"


def refuse_unused(given: Flags) -> None:
    """Raise UsageError for an ignored flag: that of an adapting loss scale with a constant one, or --n-head of an mlp."""
    if given.get("model") == "mlp" and given.get("n_head"):
        raise UsageError(f"--n-head {given['n_head']} is for --model gpt or llama: leave it out")
    kind = given.get("loss_scale") or get_recipe(given.get("recipe", Config.recipe)).loss_scale
    for name in STARTS:
        if name in given and find_scaler(kind) is None:
            what = f"{flag(name)} {given[name]} with loss scale {kind}"
            raise UsageError(f"{what}: only a dynamic one has this setting, such as --loss-scale dynamic")


def add_config_flags(
    parser: argparse.ArgumentParser,
    names: Iterable[str] = HELP,
    defaults: Mapping[str, Any] | None = None,
    said: Mapping[str, object] = MappingProxyType({}),
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add a flag for each of these fields of Config, under the headings of GROUPS.

    A flag that is not given is absent from the parsed arguments. defaults: the fields for which the command has its own.
    said: what the help says of other defaults of the command's own. texts: its own help texts, with the default.
    """
    chosen, own, shown = set(names), defaults or {}, {**(defaults or {}), **said}
    for title, group_texts in GROUPS.items():
        group = parser.add_argument_group(title) if chosen & group_texts.keys() else parser
        for name in (name for name in group_texts if name in chosen):
            usual = DEFAULT.sub("", HELP[name]) + f" (default: {shown[name]})" if name in shown else HELP[name] + _default(name)
            add_config_flag(group, name, texts.get(name, usual), own.get(name, argparse.SUPPRESS))


def add_config_flag(group: Any, name: str, text: str, default: Any = argparse.SUPPRESS) -> None:
    """Add the flag of a field of Config with a help text. group: a parser, or a group of one."""
    if KINDS[name] == "bool":
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    kind, what = {"int": (int, "N"), "float": (float, "X"), "str": (str, "NAME")}[KINDS[name]]
    metavar = {"data": "FILE", "tokenizer": "FILE", "zero": "STAGE"}.get(name, what)
    parse = one_of(NAMES[name]) if name in NAMES else file_name if metavar == "FILE" else kind
    group.add_argument(flag(name), type=parse, default=default, metavar=metavar, help=text)
