"""Hugging Face's config.json -> the name and the sizes of one of our models, and back.

    llama     model_type llama (also SmolLM2), mistral, qwen2 (also Qwen2.5), qwen3
    gpt       model_type gpt2

Whatever would make the model compute something else than ours does is refused by name. A key that is absent has the default
of transformers' class for that model_type, but for sizes such as num_attention_heads, which must be there.

Source: transformers 5.24, models/*/configuration_*.py and modeling_rope_utils.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError, one_line
from refimpl.nn.models.gpt import GPTConfig
from refimpl.training.huggingface.rope_parameters import read_rope, written_rope
from refimpl.training.schema import FINITE, Integer, Maybe, OneOf, Real, Table, Text, Words, check

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", ADAPTER)
"""Files of a model, beside config.json, which no run writes."""
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
"""The values of model_type that our llama computes."""
MODEL_TYPES = (*LLAMAS, "gpt2")

_SIZE = Integer(1, 2**31 - 1)
_MAYBE_SIZE, _FLAG, _EPS = Maybe(_SIZE), OneOf((True, False)), Real(0, 1)
_LLAMA = Table(
    {
        "vocab_size": _SIZE, "hidden_size": _SIZE, "intermediate_size": _SIZE, "num_hidden_layers": _SIZE,
        "num_attention_heads": _SIZE, "max_position_embeddings": _SIZE,
    },
    {
        "num_key_value_heads": _MAYBE_SIZE, "head_dim": _MAYBE_SIZE, "rms_norm_eps": _EPS, "tie_word_embeddings": _FLAG,
        "hidden_act": Text(), "attention_bias": _FLAG, "mlp_bias": _FLAG, "rope_theta": Maybe(FINITE),
        "rope_scaling": Maybe(Table()), "rope_parameters": Maybe(Table()), "partial_rotary_factor": Maybe(FINITE),
        "layer_types": Maybe(Words()), "use_sliding_window": Maybe(_FLAG), "sliding_window": _MAYBE_SIZE,
        "max_window_layers": Maybe(Integer(0, 2**31 - 1)),
    },
)  # fmt: skip
_GPT2 = Table(
    {"vocab_size": _SIZE, "n_positions": _SIZE, "n_embd": _SIZE, "n_layer": _SIZE, "n_head": _SIZE},
    {"n_inner": _MAYBE_SIZE, "activation_function": Text(), "layer_norm_epsilon": _EPS, "tie_word_embeddings": _FLAG},
)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LAYER_NORM_EPS = 1e-5
_ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_tanh"}
"""activation_function of GPT-2 -> ours."""


@dataclass(frozen=True)
class Described:
    """What a config.json describes: the name of our model, its sizes, and lines for the user about what differs."""

    model: str
    sizes: dict[str, Any]
    notes: tuple[str, ...] = ()


def is_hugging_face(folder: Path) -> bool:
    """Return whether this is a folder with a model's config.json. The config.json of our runs has no model_type."""
    try:
        table = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(table, dict) and ("model_type" in table or "architectures" in table)


def file_of_hugging_face(folder: Path) -> str | None:
    """Return the name of a file that shows that a folder is a Hugging Face model, damaged or not; None for other folders."""
    if is_hugging_face(folder):
        return CONFIG
    return next((name for name in _FILES if os.path.exists(folder / name)), None)


def read_config(path: Path) -> Described:
    """Return what a config.json describes. path: the file, or its folder.

    Errors: UsageError that names what is missing, damaged, or computed otherwise by our models.
    """
    path = path / CONFIG if os.path.isdir(path) else path
    return described(read_table(path), str(path))


def read_table(path: Path) -> dict[str, Any]:
    """Return the table in a config.json. Errors: UsageError for a file that cannot be read, is no JSON, or holds no table."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"invalid JSON ({one_line(error, 200)})"
        raise UsageError(f"{path} cannot be read: {reason}; it may be cut off: get it again") from error
    if not isinstance(table, dict):
        raise UsageError(f"{path} holds {type(table).__name__} {str(table)!r:.40}, not the table of a model's settings")
    return table


def described(table: Any, where: str) -> Described:
    """Return what the table of a config.json describes. where: the file, for messages. Errors: UsageError."""
    check(table, Table(), where)
    kind = table.get("model_type")
    if {"model", "recipe"} <= table.keys() and kind is None:
        raise UsageError(f"{where} is of a run: `python scripts/convert.py export RUN NEW` makes it a Hugging Face folder")
    if kind not in MODEL_TYPES:
        what = f"model_type {kind!r:.60}" if "model_type" in table else "no model_type"
        raise UsageError(f"{where} has {what}: the supported models are {', '.join(MODEL_TYPES)}")
    if table.get("quantization_config"):
        raise UsageError(f"{where} has a quantization_config: its weights are quantized; take the unquantized model")
    if table.get("is_encoder_decoder") or table.get("add_cross_attention"):
        raise UsageError(f"{where} has cross-attention, which our models lack")
    return _gpt(table, where) if kind == "gpt2" else _llama(table, kind, where)


def _llama(table: Mapping[str, Any], kind: str, where: str) -> Described:
    check(table, _LLAMA, where)
    if table.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UsageError(f"{where} has hidden_act {table['hidden_act']!r:.60}: our llama has silu only")
    if table.get("rope_interleaved"):
        raise UsageError(f"{where} has rope_interleaved: our llama rotates the halves of a head, as Hugging Face's does")
    n_embd, n_head = table["hidden_size"], table["num_attention_heads"]
    if kind != "llama" and "num_key_value_heads" not in table:
        raise UsageError(f"{where}: num_key_value_heads is missing")
    head_dim = table.get("head_dim") or (128 if kind == "qwen3" else n_embd // n_head)
    attention_bias, positions = table.get("attention_bias", False), table["max_position_embeddings"]
    theta, scaling = read_rope(table, positions, where)
    window = _window(table, kind, where)
    notes: tuple[str, ...] = ()
    if window is not None and window < positions:
        # within the window each token sees all tokens before it, so that a model of `window` positions computes the same
        notes = (
            f"{where} has a sliding window of {window:,} tokens: of its {positions:,} positions the first {window:,} are used",
        )
        positions = window
    sizes = {
        "n_layer": table["num_hidden_layers"], "n_head": n_head, "n_kv_head": table.get("num_key_value_heads") or n_head,
        "n_embd": n_embd, "head_dim": head_dim, "ffn_dim": table["intermediate_size"], "block_size": positions,
        "vocab_size": table["vocab_size"], "rope_theta": theta, "rope_scaling": scaling,
        "norm_eps": float(table.get("rms_norm_eps", 1e-6)), "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2" or (attention_bias and kind != "mistral"),
        "o_bias": attention_bias and kind in ("llama", "qwen3"), "mlp_bias": kind == "llama" and table.get("mlp_bias", False),
        "tied": table.get("tie_word_embeddings", False),
    }  # fmt: skip
    return Described("llama", sizes, notes)


def _window(table: Mapping[str, Any], kind: str, where: str) -> int | None:
    """Return the shortest sliding window of any layer, or None. Errors: UsageError for layers of other types."""
    types = table.get("layer_types") or []
    other = next((name for name in types if name not in _LAYER_TYPES), None)
    if other is not None:
        raise UsageError(f"{where} has layer_types with {other!r:.60}: all layers of our llama have full attention")
    if kind == "llama":
        return None  # LlamaConfig has no window
    if kind == "mistral":
        window: int | None = table.get("sliding_window", 4096)
        return window
    if not table.get("use_sliding_window", False):
        return None
    first = table.get("max_window_layers", 28)
    some = "sliding_attention" in types if types else first is not None and first < table["num_hidden_layers"]
    return table.get("sliding_window", 4096) if some else None


def _gpt(table: Mapping[str, Any], where: str) -> Described:
    check(table, _GPT2, where)
    expected = {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
        "layer_norm_epsilon": _LAYER_NORM_EPS, "n_inner": 4 * table["n_embd"],
    }  # fmt: skip
    for name, ours in expected.items():
        value = table.get(name)
        if value is not None and value != ours:
            raise UsageError(f"{where} has {name} {value!r:.60}: our gpt has {ours} only")
    activation = table.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UsageError(
            f"{where} has activation_function {activation!r:.60}: our gpt has GELU by tanh only, gelu_new or gelu_pytorch_tanh"
        )
    notes = []
    if table.get("reorder_and_upcast_attn"):
        notes.append(f"{where} has reorder_and_upcast_attn, which is left out: the policy says what attention computes in")
    sizes = {name: table[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    sizes |= {"block_size": table["n_positions"], "activation": _ACTIVATIONS[activation]}
    return Described("gpt", sizes, tuple(notes))


# -- the way out -------------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel",
}  # fmt: skip
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Formats of weights -> their names in config.json."""


def config_table(model: str, sizes: Mapping[str, Any], fmt: str, tokens: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the table of config.json for a model of ours, in the layouts of transformers 5 and 4.

    fmt: the format of the weights. tokens: bos_token_id, eos_token_id, pad_token_id, which are null if they are not given.
    Errors: UsageError for a model that transformers has no architecture for.
    """
    if model not in ("gpt", "llama"):
        raise UsageError(
            f"Hugging Face has no architecture for a model {model!r}: only gpt and llama can be exported as a folder"
        )
    kind, table = ("gpt2", _gpt_table(sizes)) if model == "gpt" else _llama_table(sizes)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(tokens or {})
    common = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "dtype": DTYPES[fmt], "torch_dtype": DTYPES[fmt]}
    return {**common, **table, **ids, "vocab_size": sizes["vocab_size"], "use_cache": True}


def _gpt_table(sizes: Mapping[str, Any]) -> dict[str, Any]:
    theirs, activation = {ours: name for name, ours in _ACTIVATIONS.items()}, sizes.get("activation", GPTConfig.activation)
    return {
        "n_layer": sizes["n_layer"], "n_head": sizes["n_head"], "n_embd": sizes["n_embd"], "n_positions": sizes["block_size"],
        "activation_function": theirs[activation], "layer_norm_epsilon": _LAYER_NORM_EPS, "tie_word_embeddings": True,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip


def _llama_table(sizes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the model_type that has these norms and biases, and its table."""
    biases = tuple(bool(sizes[name]) for name in ("qkv_bias", "o_bias", "mlp_bias"))
    if sizes["qk_norm"]:
        kind = "qwen3" if biases in ((False, False, False), (True, True, False)) else None
    elif biases == (True, False, False):
        kind = "qwen2"
    else:
        kind = "llama" if biases[0] == biases[1] else None
    if kind is None:
        has = ", ".join(f"{name} {sizes[name]}" for name in ("qk_norm", "qkv_bias", "o_bias", "mlp_bias"))
        raise UsageError(f"Hugging Face has no llama, qwen2 or qwen3 with {has}: it cannot be exported as a folder")
    if kind == "llama" and sizes["n_embd"] % sizes["n_head"]:
        raise UsageError(
            f"transformers requires that hidden_size {sizes['n_embd']} is a multiple of num_attention_heads {sizes['n_head']}"
        )
    positions, rope = written_rope(sizes)
    table = {
        "hidden_size": sizes["n_embd"], "intermediate_size": sizes["ffn_dim"], "num_hidden_layers": sizes["n_layer"],
        "num_attention_heads": sizes["n_head"], "num_key_value_heads": sizes["n_kv_head"], "head_dim": sizes["head_dim"],
        "hidden_act": "silu", "max_position_embeddings": positions, "rms_norm_eps": sizes["norm_eps"],
        "attention_dropout": 0.0, "tie_word_embeddings": sizes["tied"], **rope,
    }  # fmt: skip
    own = {"llama": ("attention_bias", "mlp_bias"), "qwen2": (), "qwen3": ("attention_bias",)}[kind]
    return kind, table | {name: biases[0] if name == "attention_bias" else biases[2] for name in own}
