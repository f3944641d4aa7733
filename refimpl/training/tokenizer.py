"""Tokenizers: what a token is. Bytes by default, or a tokenizer.json of Hugging Face's (`--tokenizer FILE`).

Both have the same interface, so that no other module asks which one a run has. Text is bytes everywhere, as it is in a file; a
tokenizer.json reads it as UTF-8.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refimpl.errors import UsageError, one_line

FILE = "tokenizer.json"
"""The name of a tokenizer's file in the folder of a model or run."""
LONGEST_SEQUENCE = 16
"""Tokens that a stream decodes again at most, in the hope that a character is incomplete. It has at most four bytes."""


class TextStream(Protocol):
    """Text from token ids that come one after another: what is returned is valid, and never taken back."""

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token: '' while a character is incomplete."""

    def rest(self) -> str:
        """Return what is still held back. Bytes that are not UTF-8 become \\xff, or U+FFFD."""


class Tokenizer(Protocol):
    """Text -> token ids, and back.

    name: 'bytes', or the path of the file. checksum: equal for tokenizers of equal contents. vocab_size: the largest id + 1.
    unit: what a token is called. ends: ids after which no text follows. contents: those of the file, if there is one.
    """

    name: str
    checksum: str
    vocab_size: int
    unit: str
    ends: frozenset[int]
    contents: bytes | None

    @property
    def dtype(self) -> np.dtype:
        """Return the smallest unsigned type that holds all ids."""

    def encode(self, text: bytes, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, in `dtype`, and how many of its bytes each stands for, int64.

        start: where the text begins in its file, for errors: UsageError for a text that the tokenizer cannot read.
        """

    def stream(self) -> TextStream:
        """Return a new stream of text."""


def refuse_smaller(
    tokenizer: Tokenizer,
    vocab_size: int,
    whose: str,
    advice: str = "give the tokenizer.json of the model by --tokenizer, or train it again on bytes",
) -> None:
    """Raise UsageError for a vocabulary with fewer ids than the tokenizer.

    whose: what has it, for the message. advice: what to do where the ids are those of bytes.
    """
    if vocab_size >= tokenizer.vocab_size:
        return
    if tokenizer.name == BYTES.name:
        raise UsageError(
            f"{whose} is {vocab_size}, but text is read and written as bytes, which needs {BYTES.vocab_size} ids: {advice}"
        )
    raise UsageError(
        f"{whose} is {vocab_size}, but {tokenizer.name} has {tokenizer.vocab_size} ids: it is the tokenizer of another model"
        + (", or --vocab-size is too small" if whose == "--vocab-size" else "")
    )


# ---------------------------------------------------------------------------------------------------------------- bytes


class ByteTokenizer:
    """Each byte is a token, so any file is a text."""

    name = checksum = "bytes"
    vocab_size = 256
    unit = "byte"
    ends: frozenset[int] = frozenset()
    contents: bytes | None = None
    dtype = np.dtype(np.uint8)

    def encode(self, text: bytes, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes, and one for each."""
        return np.frombuffer(text, np.uint8), np.ones(len(text), np.int64)

    def stream(self) -> TextStream:
        """Return a stream that holds back an incomplete UTF-8 sequence, at most three bytes."""
        return _ByteStream()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


BYTES: Tokenizer = ByteTokenizer()


# ------------------------------------------------------------------------------------------------------- tokenizer.json


def load_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer of --tokenizer: 'bytes', a tokenizer.json, or that of a folder.

    Errors: UsageError in one line for a file that is missing or not a tokenizer, and if the package is not installed.
    """
    if path == BYTES.name:
        return BYTES
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        contents = file.read_bytes()
    except FileNotFoundError:
        known = "give 'bytes', a tokenizer.json, or a folder that has one"
        raise UsageError(f"no such tokenizer: {str(file)!r}; {known}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError(f"cannot read the tokenizer {str(file)!r}: {reason}") from None
    return _parsed(str(file), contents)


@functools.lru_cache(maxsize=4)
def _parsed(name: str, contents: bytes) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as Parsed
    except ImportError:
        raise UsageError(f"--tokenizer {name} needs the package tokenizers: pip install tokenizers") from None
    try:
        return FileTokenizer(name, contents, Parsed.from_str(contents.decode()))
    except Exception as error:  # the package raises nothing more special
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else one_line(error, 200)
        raise UsageError(f"{name} is not a tokenizer.json: {reason}") from None


class FileTokenizer:
    """A tokenizer.json, in which truncation, padding, dropout and tokens added around a text are switched off.

    A special token that stands in a text as such (`<|endoftext|>`) is read as that token.
    PyTorch: transformers.AutoTokenizer(...)(text, add_special_tokens=False).
    """

    unit = "token"

    def __init__(self, name: str, contents: bytes, parsed: Any) -> None:
        self.name, self._parsed = name, parsed
        self.contents: bytes | None = contents
        self.checksum = hashlib.sha256(contents).hexdigest()
        parsed.no_truncation()
        parsed.no_padding()
        if getattr(parsed.model, "dropout", None) is not None:
            parsed.model.dropout = None
        ids = parsed.get_vocab().values()
        if not ids:
            raise ValueError("it has no tokens")
        self.vocab_size = max(ids) + 1
        self.ends = frozenset(i for i, token in parsed.get_added_tokens_decoder().items() if token.special)

    @property
    def dtype(self) -> np.dtype:
        return np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: bytes, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a UTF-8 text, and the bytes from the end of the token before to the end of each.

        So the bytes of all tokens are those of the text, whatever the tokenizer leaves out or normalizes; where several tokens
        share a character, the first of them counts all of its bytes.
        Errors: UsageError for bytes that are not UTF-8, with the place of the first.
        """
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            place = f"byte {start + error.start}, 0x{text[error.start]:02x},"
            raise UsageError(f"{place} is not UTF-8: {self.name} reads UTF-8 text only, as iconv -t UTF-8 writes it") from None
        encoding = self._parsed.encode(decoded, add_special_tokens=False)
        ids = np.array(encoding.ids, self.dtype)
        if not ids.size:
            return ids, np.zeros(0, np.int64)
        codes = np.frombuffer(decoded.encode("utf-32-le"), np.uint32)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)  # bytes per character in UTF-8
        byte_of = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
        ends = np.maximum.accumulate(byte_of[np.array(encoding.offsets, np.int64)[:, 1]])
        ends[-1] = len(text)
        return ids, np.diff(ends, prepend=0)

    def stream(self) -> TextStream:
        """Return a stream that holds back tokens whose text may be the beginning of a character."""
        return _TokenStream(self._parsed)


class _TokenStream:
    """Decodes the last tokens again with each new one, since its text may depend on them: spaces, or bytes of a character."""

    def __init__(self, parsed: Any) -> None:
        self._parsed = parsed
        self._tokens: list[int] = []
        self._shown = 0  # characters of the text of _tokens

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._text(self._tokens)
        complete = text.rstrip("\ufffd")
        if len(complete) < len(text) and len(self._tokens) > LONGEST_SEQUENCE:  # no beginning of a character is that long
            self._tokens, self._shown, shown = [], 0, self._shown
            return text[shown:]
        new = complete[self._shown :]
        self._shown = max(self._shown, len(complete))
        if complete == text:
            self._forget()
        return new

    def _forget(self) -> None:
        """Keep the last tokens that are text by themselves: what follows may depend on them, but on none before."""
        for n in range(1, min(len(self._tokens), 5)):
            text = self._text(self._tokens[-n:])
            if text and "\ufffd" not in text:
                self._tokens, self._shown = self._tokens[-n:], len(text)
                return

    def rest(self) -> str:
        text = self._text(self._tokens)
        new, self._shown = text[self._shown :], len(text)
        return new

    def _text(self, tokens: list[int]) -> str:
        return str(self._parsed.decode(tokens, skip_special_tokens=True))

