"""Tiny folders as Hugging Face's libraries write them, made with NumPy and safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from refimpl.nn.models.model import Model
from refimpl.nn.models.registry import make_model
from refimpl.training.huggingface.config_json import described

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4,
    "activation_function": "gelu_pytorch_tanh",
}  # fmt: skip


def model_of(table: Mapping[str, Any]) -> Model:
    """The model that a config.json describes."""
    found = described(dict(table), "F")
    return make_model(found.model, found.sizes)


def tensors_of(table: Mapping[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names and in its shapes: those of GPT-2's linear layers are (n_in, n_out)."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, spec in model_of(table).parameters.items():
        shape = spec.shape
        if table["model_type"] == "gpt2" and len(shape) == 2 and name.split(".")[-2] not in ("wte", "wpe"):
            shape = shape[::-1]
        result[name] = rng.standard_normal(shape, np.float32).astype(dtype)
    return result


def write(folder: Path, table: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """Write config.json and the tensors, in one file or in shards with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        own = names[n::shards]
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
