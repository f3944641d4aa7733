"""The tokenizer in the metadata of a GGUF file -> tokenizer.json and tokenizer_config.json, which `tokenizers` reads.

Only byte-level BPE (tokenizer.ggml.model gpt2) is written, and only where `tokenizer.ggml.pre`, which says how text is split
into words, is known here. transformers' own loader ignores that key.

Source: llama.cpp, src/llama-vocab.cpp: smollm first splits off each digit, then splits as GPT-2; llama-bpe is Llama 3's, where
words that are tokens are not built by merges, and a text begins with bos.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.training.checkpoint import write_text_atomically

_GGML = "tokenizer.ggml."
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 splits text into words: up to three digits are one."""
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}, "gpt-2": _BYTES,
    "llama-bpe": {"type": "Sequence", "pretokenizers": [_SPLIT, {**_BYTES, "use_regex": False}]},
}  # fmt: skip
"""tokenizer.ggml.pre -> the pre-tokenizer."""
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Types of tokens in GGUF."""
IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
"""Keys of config.json -> keys in GGUF, after the prefix."""


def token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return bos_token_id, eos_token_id and pad_token_id, as far as they are given."""
    return {ours: metadata[_GGML + key] for ours, key in IDS.items() if _GGML + key in metadata}


def why_not(metadata: Mapping[str, Any]) -> str | None:
    """Return None if the tokenizer can be written, else the reason."""
    model, pre = metadata.get(_GGML + "model"), metadata.get(_GGML + "pre")
    if model != "gpt2":
        return f"tokenizer.ggml.model is {model!r}, not gpt2 (byte-level BPE)"
    if pre not in PRE_TOKENIZERS:
        return f"tokenizer.ggml.pre is {pre!r}, not {' or '.join(PRE_TOKENIZERS)}"
    missing = [key for key in ("tokens", "merges") if _GGML + key not in metadata]
    return f"{_GGML}{missing[0]} is missing" if missing else None


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of tokenizer.json. Errors: UsageError for a merge that is not of two words."""
    tokens, pre = metadata[_GGML + "tokens"], metadata[_GGML + "pre"]
    merges = [merge.split(" ") for merge in metadata[_GGML + "merges"]]
    odd = next((merge for merge in merges if len(merge) != 2), None)
    if odd is not None:
        raise UsageError(f"a merge of the tokenizer is {' '.join(odd)!r:.60}, not two words")
    types = metadata.get(_GGML + "token_type", [_NORMAL] * len(tokens))
    added = [
        {
            "id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": types[i] == _CONTROL,
        }
        for i in range(len(tokens)) if types[i] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": _begins_with(metadata, pre == "llama-bpe"),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip


def _begins_with(metadata: Mapping[str, Any], usual: bool) -> dict[str, Any] | None:
    """Return the post-processor that puts bos before a text, if it does. usual: whether it does where the file does not say."""
    if not metadata.get(_GGML + "add_bos_token", usual) or _GGML + "bos_token_id" not in metadata:
        return None
    i = metadata[_GGML + "bos_token_id"]
    bos = metadata[_GGML + "tokens"][i]

    def one(text: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": text, "type_id": type_id}}]

    special = {bos: {"id": bos, "ids": [i], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": one("A", 0), "pair": one("A", 0) + one("B", 1), "special_tokens": special}


def tokenizer_config(metadata: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """Return the table of tokenizer_config.json, with which transformers' AutoTokenizer reads tokenizer.json."""
    tokens = metadata[_GGML + "tokens"]
    words = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "pad_token": "padding_token_id",
        "unk_token": "unknown_token_id",
    }
    special = {name: tokens[metadata[_GGML + key]] for name, key in words.items() if _GGML + key in metadata}
    chat = {"chat_template": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions, **special, **chat}


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, positions: int) -> None:
    """Write tokenizer.json and tokenizer_config.json. Errors: UsageError."""
    tables = {"tokenizer.json": tokenizer_json(metadata), "tokenizer_config.json": tokenizer_config(metadata, positions)}
    for name, table in tables.items():
        write_text_atomically(folder / name, json.dumps(table, ensure_ascii=False, indent=2) + "\n")
