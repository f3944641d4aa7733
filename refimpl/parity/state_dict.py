"""Weights to and from PyTorch: conversion between a checkpoint and a state_dict under nanoGPT's names.

A state_dict is a safetensors file, which `safetensors.torch.load_file` reads; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig, gpt_model
from refimpl.nn.models.mlp import MLPConfig, mlp_model
from refimpl.nn.models.model import Model
from refimpl.nn.names import own_name, rename, unwrapped
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import is_float
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import fp32_weights, model_of
from refimpl.training.huggingface.kinds import is_model_folder
from refimpl.training.non_finite import contents
from refimpl.training.tokenizer import BYTES, refuse_smaller

MASKS = (".attn.bias", ".attn.masked_bias")
"""Endings of the names of buffers that are saved beside weights and are not parameters."""


def to_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Return the FP32 weights of a checkpoint (its masters, if it has any) by nanoGPT's names, tied ones under both names.

    PyTorch: model.load_state_dict(safetensors.torch.load_file(...)). Errors: UsageError.
    """
    if is_model_folder(path):
        raise UsageError(f"{path} is a Hugging Face folder, whose names differ from a state_dict's: export it as a folder")
    arrays, header = checkpoint.load(path)
    model = model_of(path, header, arrays)
    weights = fp32_weights(path, arrays, model)
    return weights | {other: weights[name] for other, name in model.tied.items()}


def from_state_dict(weights: Mapping[str, np.ndarray], n_head: int) -> tuple[Model, dict[str, np.ndarray]]:
    """Return the model that a state_dict belongs to, and its parameters in FP32.

    Names may have the prefixes of DistributedDataParallel, torch.compile and Lightning, in any order, and a tied weight may
    have one of its names or both. Sizes follow from the shapes, and whether there are biases from the names; n_head (GPT
    only) follows from neither. nanoGPT's attention masks (`attn.bias` beside `attn.c_attn`) are not weights and are left out.
    Errors: UsageError that names the first tensor that is missing, unexpected or of another shape.
    """
    given = {name: array for name, array in weights.items() if not unwrapped(name).endswith(MASKS)}
    plain = {unwrapped(name): array for name, array in given.items()}
    model = _model_for(plain, n_head)
    for name in sorted(given):
        if own_name(name, model.parameters, model.tied) is None:
            raise UsageError(f"the state_dict has a tensor {name} that a {model.name} does not")
    for other, name in model.tied.items():
        if name in plain and other in plain and not np.array_equal(plain[other], plain[name], equal_nan=True):
            raise UsageError(f"{other} differs from {name}: this model ties them")
    named, _ = rename(given, model.parameters, model.tied)
    result = {}
    for name, spec in model.parameters.items():
        array = named.get(name)
        if array is None or array.shape != spec.shape or not is_float(array):
            there = "is missing" if array is None else f"is {array.dtype} {array.shape}"
            raise UsageError(f"{name} {there}; a {model.name} of these sizes has floats of shape {spec.shape}")
        result[name] = cast(array, "fp32")
    return model, result


def _model_for(weights: Mapping[str, np.ndarray], n_head: int) -> Model:
    """Return the model whose sizes these shapes have. Errors: UsageError if there is none."""
    _refuse_hugging_face(weights)
    try:
        if "transformer.wpe.weight" in weights:
            wte = weights["lm_head.weight"] if "lm_head.weight" in weights else weights["transformer.wte.weight"]
            (vocab_size, n_embd), (block_size, _) = wte.shape, weights["transformer.wpe.weight"].shape
            n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
            bias = any(name.startswith("transformer.") and name.endswith(".bias") for name in weights)
            return gpt_model(GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size, bias))
        vocab_size, n_embd = weights["wte.weight"].shape
        n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
        block_size = weights["h.0.fc.weight"].shape[1] // n_embd
        return mlp_model(MLPConfig(n_layer, n_embd, block_size, vocab_size))
    except (KeyError, ValueError, IndexError):
        held = ", ".join(sorted(weights)[:3]) or "nothing"
        raise UsageError(
            f"this is the state_dict of neither a GPT (nanoGPT's names, such as transformer.wpe.weight) nor our MLP "
            f"(wte.weight, h.0.fc.weight): it holds {held}{', ...' if len(weights) > 3 else ''}"
        ) from None


def _refuse_hugging_face(weights: Mapping[str, np.ndarray]) -> None:
    """Raise UsageError for Hugging Face's names: its GPT-2 has transposed layers, and shapes do not say all of a Llama."""
    if any(name.endswith("embed_tokens.weight") for name in weights):
        raise UsageError(
            "these are Hugging Face's names of a Llama: give the folder of this file, with its config.json, to train.py "
            "--init-from; it needs no import"
        )
    layer = next((name for name in weights if name.removeprefix("transformer.") == "h.0.attn.c_attn.weight"), None)
    if layer is None:
        return
    transposed = len(shape := weights[layer].shape) == 2 and shape[1] == 3 * shape[0]
    if transposed or not layer.startswith("transformer."):
        raise UsageError(
            "these are Hugging Face's GPT-2 names, whose linear layers (Conv1D) are the transpose of nanoGPT's: give the "
            "folder of this file, with its config.json, to train.py --init-from; it needs no import"
        )


def export(source: Path, target: Path) -> None:
    """Convert a checkpoint to a state_dict, for `scripts/convert.py export`. Errors: UsageError."""
    weights = to_state_dict(source)
    _refuse_to_overwrite(target)
    checkpoint.write_tensors(target, weights, {"format": "pt"})
    print(f"{target}: {len(weights)} tensors in FP32; read it with safetensors.torch.load_file")


def import_(source: Path, target: Path, n_head: int) -> None:
    """Convert a state_dict to a file that scripts/train.py --init-from and scripts/generate.py read."""
    weights, metadata = checkpoint.read_tensors(checkpoint.file_in(source), "state_dict")
    checkpoint.refuse_trace(source, metadata)
    if checkpoint.KEY in metadata:
        raise UsageError(
            f"{source} is already a checkpoint of refimpl: scripts/train.py --init-from and scripts/generate.py read it"
        )
    model, converted = from_state_dict(weights, n_head)
    refuse_smaller(BYTES, model.config["vocab_size"], f"the vocabulary of {source}", "train the model again on bytes")
    _refuse_to_overwrite(target)
    header = {"model": model.name, "sizes": dict(model.config), "recipe": "fp32"}
    checkpoint.save(target, {f"weights.{name}": array for name, array in converted.items()}, header)
    what = f"a {model.name} of {model.n_params:,} parameters{_about(model)}"
    held = {name: found for name, array in converted.items() if (found := contents(array))}
    if held:
        first, found = next(iter(held.items()))
        more = f", and {len(held) - 1} more tensors are not finite" if len(held) > 1 else ""
        print(f"{target}: {what}; in FP32 {first} holds {found}{more}: it can neither be trained nor generate text")
        return
    print(f"{target}: {what}; use it with train.py --init-from, or generate.py")


def _about(model: Model) -> str:
    """Return the unusual properties of an imported model, for the printed line."""
    words = [] if model.config.get("bias", True) else ["without biases"]
    if model.config["vocab_size"] > BYTES.vocab_size:
        words.append(f"with {model.config['vocab_size']} token ids, of which those above 255 are not bytes and stay unused")
    return "".join(f", {word}" for word in words)


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists: give another name, or remove it first")
