"""Tokenizers made on the spot: files of the package tokenizers, and one of our own that needs no package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.training.tokenizer import TextStream

TEXT = (
    "The quick brown fox jumps over the lazy dog, and then (it says) over 1234 others.\n"
    "Grüße aus Köln: «Où est-ce?» — déjà vu…\n\n\tif x == 12:\n        return f'{x:>10}'  # done\n\n\n"
    "漢字とかな、混ぜて書く。絵文字 😀👩‍👩‍👧 も。\r\nLast line without   end  "
)
END = "<|end|>"


def byte_level(folder: Path, vocab_size: int = 320, text: str = TEXT, **settings: Any) -> Path:
    """Write a byte-level BPE, as GPT-2, Llama 3 and Qwen have it, to FOLDER/tokenizer.json, and return the path."""
    tokenizers = pytest.importorskip("tokenizers")
    result = tokenizers.Tokenizer(tokenizers.models.BPE())
    result.pre_tokenizer = settings.get("pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    result.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    result.train_from_iterator([text], trainer)
    return saved(result, folder)


def sentence_pieces(folder: Path, text: str = TEXT) -> Path:
    """Write a BPE of characters with bytes for the unknown ones and ▁ for spaces, as Llama 2 and Mistral have it."""
    tokenizers = pytest.importorskip("tokenizers")
    parts = tokenizers.normalizers, tokenizers.decoders
    known = sorted(set("▁" + text.replace(" ", "")) - set("漢字😀é\n\t"))
    tokens = ["<s>", *(f"<0x{i:02X}>" for i in range(256)), *known]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "o"), ("▁o", "v")]
    vocabulary = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    result = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    result.normalizer = parts[0].Sequence([parts[0].Prepend("▁"), parts[0].Replace(" ", "▁")])
    decoders = [parts[1].Replace("▁", " "), parts[1].ByteFallback(), parts[1].Fuse(), parts[1].Strip(" ", 1, 0)]
    result.decoder = parts[1].Sequence(decoders)
    return saved(result, folder)


def saved(tokenizer: Any, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


class Pairs:
    """Two bytes are a token, and a single byte at the end of a piece is one: 256 + 65,536 ids."""

    name, checksum, unit = "pairs", "p" * 64, "token"
    vocab_size = 256 + 65536
    ends: frozenset[int] = frozenset()
    contents: bytes | None = None
    dtype = np.dtype(np.uint32)

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: bytes, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        ids = [256 + 256 * a + b for a, b in zip(text[::2], text[1::2], strict=False)] + [*text[len(text) // 2 * 2 :]]
        lengths = [2] * (len(text) // 2) + [1] * (len(text) % 2)
        return np.array(ids, self.dtype), np.array(lengths, np.int64)

    def stream(self) -> TextStream:
        raise NotImplementedError
