"""Tiny folders that transformers itself writes: a model of each architecture that ours computes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}
KINDS = (
    "llama", "llama tied", "llama biases", "llama llama3", "llama linear", "llama yarn", "llama dynamic", "mistral", "qwen2",
    "qwen3", "gpt2", "gpt2 gelu_new",
)  # fmt: skip


def _config(kind: str) -> Any:
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    first, _, more = kind.partition(" ")
    if first == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return GPT2Config(**sizes, activation_function=more or "gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0)
    options: dict[str, Any] = {}
    if more in ROPES:
        options["rope_parameters"] = {"rope_type": more, "rope_theta": 10000.0, **ROPES[more]}
    options |= {"max_position_embeddings": 12} if more == "dynamic" else {}  # a longer sequence changes the base
    options |= {"attention_bias": True, "mlp_bias": True} if more == "biases" else {}
    options |= {"head_dim": 16} if first == "qwen3" else {"sliding_window": None} if first == "mistral" else {}
    options |= {"tie_word_embeddings": True} if more == "tied" or first == "qwen3" else {}
    kinds: dict[str, Callable[..., Any]] = {
        "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
    }  # fmt: skip
    return kinds[first](**{**SIZES, **options})


def write_checkpoint(kind: str, folder: Path, seed: int = 1) -> Path:
    """Write the folder: weights N(0, 0.1^2), those of norms 1 + N(0, 0.1^2), so that each of them shows."""
    model = _random_model(_config(kind), seed)
    model.save_pretrained(folder)
    return folder


def write_deep_checkpoint(folder: Path, seed: int) -> Path:
    """Write a Llama of 16 layers: from the third on a few channels are large, as in trained models."""
    import torch
    from transformers import LlamaConfig

    sizes = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 16, "num_attention_heads": 6}
    model = _random_model(LlamaConfig(**{**SIZES, **sizes}, tie_word_embeddings=True), seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in (1, 2):
        rows = torch.randint(0, 96, (2,), generator=generator)
        model.model.layers[layer].mlp.down_proj.weight.data[rows] *= 30
    model.save_pretrained(folder)
    return folder


def _random_model(config: Any, seed: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
        is_norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        parameter.data = 1 + drawn if is_norm else drawn
    return model
