"""GGUF files of the llama architecture -> tensors and config.json under Hugging Face's names, and a tokenizer.json.

    token_embd.weight       model.embed_tokens.weight
    blk.i.attn_norm.weight  model.layers.i.input_layernorm.weight, and so on: `_NAMES`
    output.weight           lm_head.weight; absent where it is tied
    rope_freqs.weight       not a weight: what frequencies are divided by, from which `llama3`'s scaling is read

The rows of q and k are permuted back: GGUF rotates the neighbors (2i, 2i + 1) of a head, Hugging Face the halves (i, i + D/2).
Quantized blocks become FP32, exactly as the `gguf` package dequantizes them.

Source: llama.cpp, convert_hf_to_gguf.py; transformers 5.24, modeling_gguf_pytorch_utils.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.models.registry import make_model
from refimpl.nn.rope_scaling import RopeScaling, inverse_frequencies
from refimpl.numerics.casts import cast
from refimpl.training.schema import FINITE, Integer, Kind, OneOf, check

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_DIVISORS = "rope_freqs.weight"
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_SIZE = Integer(1, 2**31 - 1)
EXTRA = "GGUF files are read through the package gguf: pip install gguf"


class GGUFTensors(Mapping[str, np.ndarray]):
    """The tensors of a file in FP32 under Hugging Face's names, each dequantized when it is asked for."""

    def __init__(self, path: Path, stored: Mapping[str, Any], heads: Mapping[str, int]) -> None:
        """stored: Hugging Face's name -> the tensor of the `gguf` package. heads: the same -> heads whose rows are permuted."""
        self._path, self._stored, self._heads = path, stored, heads

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf import dequantize

        tensor = self._stored[name]
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError:
            raise UsageError(f"{self._path}: {name} is {tensor.tensor_type.name}, which gguf cannot dequantize") from None
        values = cast(values, "fp32").reshape(self.shape(name))
        return unpermuted(values, self._heads[name]) if name in self._heads else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is not read for it."""
        return tuple(int(n) for n in reversed(self._stored[name].shape))


def unpermuted(w: np.ndarray, n_head: int) -> np.ndarray:
    """Return q or k rows in Hugging Face's order: (heads, D/2, 2) -> (heads, 2, D/2) along the first axis."""
    return w.reshape(n_head, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@dataclass(frozen=True)
class GGUF:
    """What a file holds. sizes: those of our llama. metadata: the file's keys and values."""

    sizes: dict[str, Any]
    tensors: GGUFTensors
    metadata: dict[str, Any]


def read_gguf(path: Path) -> GGUF:
    """Return what a GGUF file of the llama architecture holds. Errors: UsageError that says what is damaged or unknown."""
    metadata, stored = _open(path)
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UsageError(f"{path} has the architecture {kind!r:.60}: only llama is converted")
    if metadata.get("split.count", 0) not in (0, 1):
        raise UsageError(
            f"{path} is one of {metadata['split.count']!r:.20} files: merge these with llama.cpp's gguf-split --merge"
        )
    divisors = stored.pop(_DIVISORS, None)
    renamed = {_renamed(path, name): tensor for name, tensor in stored.items()}
    sizes = _sizes(path, metadata, renamed)
    if divisors is not None:
        sizes["rope_scaling"] = _llama3(path, divisors.data, sizes)
    heads = {name: sizes["n_head"] for name in renamed if ".q_proj." in name}
    heads |= {name: sizes["n_kv_head"] for name in renamed if ".k_proj." in name}
    tensors = GGUFTensors(path, renamed, heads)
    _check_tensors(path, sizes, tensors)
    return GGUF(sizes, tensors, metadata)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metadata and tensors of a file by GGUF's names."""
    _refuse_others(path)
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UsageError(EXTRA) from None
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        reason = f"damaged, or cut off after {path.stat().st_size:,} bytes: get it again"
        raise UsageError(f"{path} is not a valid GGUF file: it is {reason}") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _refuse_others(path: Path) -> None:
    """Raise UsageError for what is no GGUF file, before the package is asked for."""
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder: give the GGUF file itself; a Hugging Face folder needs no conversion")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise UsageError(f"there is no {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if start not in (b"GGUF", b"FUGG"):  # FUGG: big-endian
        raise UsageError(f"{path} is not a valid GGUF file: it does not begin with GGUF")


def _renamed(path: Path, name: str) -> str:
    """Return Hugging Face's name of a tensor. Errors: UsageError for one that a llama lacks."""
    if name in _NAMES:
        return _NAMES[name]
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _LAYER_NAMES:
        raise UsageError(f"{path} has a tensor {name}, which our llama lacks")
    return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"


def _sizes(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of our llama that the metadata describe."""

    def of(key: str, kind: Kind, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        check(value, kind, str(path), f"llama.{key}")
        return value

    if experts := of("expert_count", Integer(0), 0):
        raise UsageError(f"{path} has {experts} experts: only models without experts are converted")
    scaling = of("rope.scaling.type", OneOf(("none", "linear")), "none")
    factor = of("rope.scaling.factor", FINITE, 1.0)
    n_head, n_embd = of("attention.head_count", _SIZE), of("embedding_length", _SIZE)
    head_dim = of("attention.key_length", _SIZE, n_embd // n_head)
    of("rope.dimension_count", OneOf((head_dim,)), head_dim)  # our llama rotates all channels of a head
    if "model.embed_tokens.weight" not in tensors:
        raise UsageError(f"{path} has no token_embd.weight")
    biases = {part: any(f".{part}.bias" in name for name in tensors) for part in ("q_proj", "o_proj", "up_proj")}
    return {
        "n_layer": of("block_count", _SIZE), "n_head": n_head, "n_kv_head": of("attention.head_count_kv", _SIZE, n_head),
        "n_embd": n_embd, "head_dim": head_dim, "ffn_dim": of("feed_forward_length", _SIZE),
        "block_size": of("context_length", _SIZE), "vocab_size": int(tensors["model.embed_tokens.weight"].shape[-1]),
        "rope_theta": float(of("rope.freq_base", FINITE, 10000.0)),
        "rope_scaling": "default" if scaling == "none" or factor == 1 else f"linear,factor={float(factor)}",
        "norm_eps": _decimal(of("attention.layer_norm_rms_epsilon", FINITE)), "qk_norm": False, "qkv_bias": biases["q_proj"],
        "o_bias": biases["o_proj"], "mlp_bias": biases["up_proj"], "tied": "lm_head.weight" not in tensors,
    }  # fmt: skip


def _llama3(path: Path, divisors: np.ndarray, sizes: Mapping[str, Any]) -> str:
    """Return the scaling that divides frequencies by these numbers: llama3 with the settings that all of its models have.

    Errors: UsageError if there is none.
    """
    theta, D, factor = sizes["rope_theta"], sizes["head_dim"], float(divisors.max(initial=0))
    if divisors.shape == (D // 2,) and 1 < factor < math.inf:
        text = f"llama3,factor={factor},low=1.0,high=4.0,original=8192"
        plain, scaled = (inverse_frequencies(theta, D, RopeScaling.parse(kind), 1) for kind in ("default", text))
        # each side has some ten roundings to FP32; another setting would change whole percents
        if np.allclose(divisors * scaled, plain, rtol=2**-18, atol=0):
            return text
    raise UsageError(f"{path} has {_DIVISORS} that are not llama3's: other scalings of rotary positions are not converted")


def _check_tensors(path: Path, sizes: dict[str, Any], tensors: GGUFTensors) -> None:
    """Raise UsageError for the first tensor that is missing, surplus or of another shape."""
    if sizes["n_layer"] > len(tensors):  # before a table of 2^31 layers is built
        raise UsageError(f"{path} says {sizes['n_layer']} layers, but there are {len(tensors)} tensors")
    parameters = make_model("llama", sizes).parameters
    for name, spec in parameters.items():
        if name not in tensors:
            raise UsageError(f"{path} has no {name} (as Hugging Face calls it)")
        if tensors.shape(name) != spec.shape:
            raise UsageError(f"{path}: {name} has shape {tensors.shape(name)}; by its metadata it has {spec.shape}")
    surplus = tensors.keys() - parameters.keys()
    if surplus:
        raise UsageError(f"{path} has {min(surplus)} (as Hugging Face calls it), which a model of these sizes lacks")


def _decimal(value: float) -> float:
    """Return the shortest decimal number that FP32 rounds to `value`, which was stored in FP32: 9.9999997e-06 -> 1e-05."""
    return float(np.format_float_scientific(cast(np.array(value), "fp32")[()], unique=True))
