"""Weights to and from PyTorch: a checkpoint becomes a state_dict under nanoGPT's names, and the way back.

The state_dict is written as a safetensors file: `safetensors.torch.load_file` reads it, and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl import checkpoint
from refimpl.cast import cast
from refimpl.errors import UsageError
from refimpl.formats import is_float
from refimpl.models import GPTConfig, MLPConfig, Model, gpt, mlp
from refimpl.state_file import fp32_weights, model_of


def to_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The FP32 weights of a checkpoint by nanoGPT's names: the masters where it has them; a tied weight under both names.

    PyTorch: model.load_state_dict(safetensors.torch.load_file(...)). Errors: UsageError.
    """
    arrays, header = checkpoint.load(path)
    model = model_of(path, header, arrays)
    weights = fp32_weights(path, arrays, model)
    return weights | {other: weights[name] for other, name in model.tied.items()}


def from_state_dict(weights: Mapping[str, np.ndarray], n_head: int) -> tuple[Model, dict[str, np.ndarray]]:
    """The model that a state_dict belongs to, and its parameters in FP32.

    Sizes are read off the shapes; n_head cannot be (GPT only). nanoGPT's attention masks (`attn.bias` beside `attn.c_attn`)
    are no weights and are left out. Errors: UsageError that names the first tensor that is missing, surplus or misshapen.
    """
    given = {name.removeprefix("_orig_mod."): array for name, array in weights.items()}
    given = {name: array for name, array in given.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    model = _model_for(given, n_head)
    result = {}
    for name, spec in model.parameters.items():
        array = given.pop(name, None)
        if array is None or array.shape != spec.shape or not is_float(array):
            there = "is missing" if array is None else f"is {array.dtype} {array.shape}"
            raise UsageError(f"{name} {there}; a {model.name} of these sizes has floats of shape {spec.shape}")
        result[name] = cast(array, "fp32")
    for other, name in model.tied.items():
        if not np.array_equal(cast(given.pop(other, result[name]), "fp32"), result[name]):
            raise UsageError(f"{other} differs from {name}: this model ties them")
    if given:
        raise UsageError(f"the state_dict has a tensor {min(given)} that a {model.name} does not")
    return model, result


def _model_for(weights: Mapping[str, np.ndarray], n_head: int) -> Model:
    """The model whose sizes these shapes have."""
    try:
        if "transformer.wte.weight" in weights:
            vocab_size, n_embd = weights["transformer.wte.weight"].shape
            block_size = weights["transformer.wpe.weight"].shape[0]
            n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
            return gpt(GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size))
        vocab_size, n_embd = weights["wte.weight"].shape
        n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
        block_size = weights["h.0.fc.weight"].shape[1] // n_embd
        return mlp(MLPConfig(n_layer, n_embd, block_size, vocab_size))
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(f"this is the state_dict of neither a GPT (nanoGPT's names) nor our MLP: {error}") from error


def export(source: Path, target: Path) -> None:
    """What `scripts/convert.py export` does: checkpoint -> state_dict. Errors: UsageError."""
    weights = to_state_dict(source)
    _refuse_to_overwrite(target)
    checkpoint.write_tensors(target, weights, {"format": "pt"})
    print(f"{target}: {len(weights)} tensors in FP32; read it with safetensors.torch.load_file")


def import_(source: Path, target: Path, n_head: int) -> None:
    """What `scripts/convert.py import` does: state_dict -> a file for train.py --init-from and generate.py."""
    weights, _ = checkpoint.read_tensors(source, "state_dict")
    model, converted = from_state_dict(weights, n_head)
    _refuse_to_overwrite(target)
    header = {"model": model.name, "sizes": dict(model.config), "recipe": "fp32"}
    checkpoint.save(target, {f"weights.{name}": array for name, array in converted.items()}, header)
    print(f"{target}: a {model.name} of {model.n_params:,} parameters; use it with train.py --init-from, or generate.py")


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists: give another name, or remove it first")
