"""The tensors of a folder under the names of our models, checked before any is loaded; and back, under Hugging Face's names.

    llama   our names are Hugging Face's
    gpt     the weights of GPT-2's linear layers (Conv1D) are transposed: (n_in, n_out)

The first word of all names, `model` or `transformer`, is absent from files of a model without its head, and in OpenAI's files.
Buffers are not weights and are ignored: rotary frequencies (`rotary_emb.inv_freq`), which old files have, and GPT-2's attention
masks (`h.i.attn.bias`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.models.model import Model
from refimpl.nn.models.registry import make_model
from refimpl.nn.names import nearest, own_name
from refimpl.numerics.casts import cast
from refimpl.training.huggingface.config_json import CONFIG, read_config
from refimpl.training.huggingface.files import read_folder

_BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
_FIRST_WORD = {"gpt": "transformer", "llama": "model"}
_TRANSPOSED = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
_ROWS = 4096  # compared at a time


class Converted(Mapping[str, np.ndarray]):
    """Arrays of a mapping, each converted when it is asked for, so that one is in memory at a time."""

    def __init__(self, arrays: Mapping[str, np.ndarray], convert: Callable[[str, np.ndarray], np.ndarray]) -> None:
        self._arrays, self._convert = arrays, convert

    def __getitem__(self, name: str) -> np.ndarray:
        return self._convert(name, self._arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def read_model(folder: Path) -> tuple[Model, Mapping[str, np.ndarray], tuple[str, ...]]:
    """Return the model of a folder, its weights in FP32 by our names, and notes for the user.

    Everything is checked here; a weight is read and converted when it is asked for. Errors: UsageError that names what is
    missing, surplus, damaged or unknown, and, when a weight is asked for, for NaN and Inf.
    """
    described = read_config(folder)
    arrays = read_folder(folder)
    if described.sizes["n_layer"] > len(arrays):  # before a table of 2^31 layers is built
        raise UsageError(f"{folder / CONFIG} says {described.sizes['n_layer']} layers, but there are {len(arrays)} tensors")
    try:
        model = make_model(described.model, described.sizes)
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG}: {error}") from None
    named = own_weights(arrays, model, folder)

    def convert(name: str, array: np.ndarray) -> np.ndarray:
        wide: np.ndarray = cast(array, "fp32")
        refuse_non_finite(folder, name, wide)
        return wide

    return model, Converted(named, convert), described.notes


def refuse_non_finite(path: Path, name: str, array: np.ndarray) -> None:
    """Raise UsageError for weights with NaN or Inf: nothing but NaN comes of them."""
    finite = np.isfinite(array)
    if not finite.all():
        nan, n = np.count_nonzero(np.isnan(array)), array.size - np.count_nonzero(finite)
        raise UsageError(
            f"{path}: {name} has {nan:,} NaN and {n - nan:,} Inf among its {array.size:,} values in FP32: its training "
            "diverged, or the file is damaged; take another checkpoint of the model"
        )


def own_weights(arrays: Mapping[str, np.ndarray], model: Model, folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a folder by our names and in our shapes: views, in the formats of the files.

    Errors: UsageError for the first tensor that the model lacks, or of another shape, and for tied tensors that differ.
    """
    named: dict[str, np.ndarray] = {}
    source: dict[str, str] = {}
    word = _FIRST_WORD[model.name]
    for name, array in arrays.items():
        if _BUFFERS.fullmatch(name):
            continue
        full = name if name.startswith((word + ".", "lm_head.")) else f"{word}.{name}"
        own = own_name(full, model.parameters, model.tied)
        if own is None:
            raise UsageError(f"{folder} has a tensor {name}, which its {CONFIG} has no place for{_like(full, model)}")
        shape = model.parameters[own].shape
        if array.shape != (expected := shape[::-1] if _is_transposed(model, own) else shape):
            raise UsageError(f"{folder}: {name} has shape {array.shape}; by its {CONFIG} it has {expected}")
        array = array.T if _is_transposed(model, own) else array
        if own in named and not _same(array, named[own]):
            raise UsageError(
                f"{folder}: {name} differs from {source[own]}, but {CONFIG} ties them; transformers would not tie them: set "
                "tie_word_embeddings to false there"
            )
        named.setdefault(own, array)
        source.setdefault(own, name)
    _refuse_missing(model, named, folder)
    return {name: named[name] for name in model.parameters}


def _refuse_missing(model: Model, named: Mapping[str, np.ndarray], folder: Path) -> None:
    missing = [name for name in model.parameters if name not in named]
    if missing == ["lm_head.weight"]:
        raise UsageError(
            f"{folder} has no lm_head.weight, and its {CONFIG} does not tie it to the embedding: transformers would "
            "initialize it at random; if it is tied, set tie_word_embeddings to true there"
        )
    if missing:
        more = f", nor {len(missing) - 1} more of {len(model.parameters)}" if len(missing) > 1 else ""
        raise UsageError(f"{folder} has no tensor {missing[0]}{more}, which its {CONFIG} requires")


def _like(name: str, model: Model) -> str:
    close = nearest(name, model.parameters)
    return f"; the nearest is {close}" if close else ""


def _is_transposed(model: Model, name: str) -> bool:
    """Return whether Hugging Face has the transpose of a parameter: in GPT-2's linear layers."""
    return model.name == "gpt" and _TRANSPOSED.fullmatch(name) is not None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two matrices have equal values, in formats that may differ."""
    pieces = (slice(i, i + _ROWS) for i in range(0, len(a), _ROWS))
    return all(np.array_equal(cast(a[piece], "fp64"), cast(b[piece], "fp64"), equal_nan=True) for piece in pieces)


def their_weights(model: Model, weights: Mapping[str, np.ndarray], fmt: str) -> tuple[Mapping[str, np.ndarray], dict[str, int]]:
    """Return weights under Hugging Face's names in a format, and the bytes of each. Tied ones are there once.

    GPT-2 always has biases there: those that a model of ours lacks are zeros.
    """
    shapes = {name: spec.shape for name, spec in model.parameters.items()}
    if model.name == "gpt" and not model.config.get("bias", True):
        biases = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items() if _has_bias(name)}
        absent = {name: np.broadcast_to(np.float32(0), shape) for name, shape in biases.items()}
        weights, shapes = {**weights, **absent}, {**shapes, **biases}

    def convert(name: str, array: np.ndarray) -> np.ndarray:
        rounded: np.ndarray = cast(array.T if _is_transposed(model, name) else array, fmt)
        return rounded

    size = np.dtype("u2" if fmt in ("fp16", "bf16") else "u4").itemsize
    return Converted(weights, convert), {name: size * math.prod(shape) for name, shape in shapes.items()}


def _has_bias(name: str) -> bool:
    """Return whether Hugging Face's GPT-2 has a bias beside this weight: everywhere but in the embeddings."""
    return name.endswith(".weight") and name.split(".")[-2] not in ("wte", "wpe")
