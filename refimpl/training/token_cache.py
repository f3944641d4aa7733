"""A corpus as token ids, which are computed once and kept in a file beside the text.

The file has the ids of both parts and a checksum of the text, of the tokenizer and of itself. One that is damaged, or of
another text or tokenizer, is written again, and a line on standard error says why.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.errors import UsageError
from refimpl.training import checkpoint
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.tokenizer import BYTES, Tokenizer

ENDING = ".tokens"
VERSION = 1
PIECE = 1 << 18
"""Bytes that are tokenized at a time. Another number makes other tokens where a text has no lines: change VERSION with it."""
PATIENCE = 5.0
"""Seconds after which tokenizing shows its progress."""
_CUTS = tuple(map(re.compile, (rb"\n(?=[!-~])", rb"\n(?=[\x80-\xff])", rb"[^\s](?= [^\s])", rb"(?s).(?=[^\x80-\xbf])")))
"""Places to cut a text, the best first: after a line and before ASCII, or another character; before a word; or a character."""


@dataclass(frozen=True, eq=False)
class TokenizedParts:
    """The token ids of a text for training and one for validation, and how many bytes each token of the latter stands for."""

    train: np.ndarray
    valid: np.ndarray
    valid_lengths: np.ndarray


def tokenized(
    tokenizer: Tokenizer, train: np.ndarray, valid: np.ndarray, name: str, folder: Path | None, quiet: bool = False
) -> TokenizedParts:
    """Return the tokens of a corpus, from the cache if it has them. Else tokenize, and write the cache.

    train, valid: the bytes of the text. name: that of the text. folder: that of its file, for the cache; None, or a folder that
    cannot be written to: the user's own. quiet: show no progress.
    Errors: UsageError for a text that the tokenizer cannot read.
    """
    text = _checksum(train, valid)
    identity: dict[str, object] = {"text": text, "tokenizer": tokenizer.checksum, "way to tokenize": VERSION}
    ending = f"{tokenizer.checksum[:12]}{ENDING}"
    places = [] if folder is None else [folder / f"{name}.{ending}"]
    places.append(user_cache() / f"{text[:12]}.{name}"[:180] / ending)
    for path in places:
        if os.path.exists(path):  # Path.exists raises for a folder that may not be searched
            try:
                return _read(path, identity, tokenizer)
            except UsageError as error:
                print(f"note: {error}; the text is tokenized again", file=sys.stderr)
    parts = _tokenize(tokenizer, train, valid, quiet)
    _write(places, parts, identity)
    return parts


def user_cache() -> Path:
    """Return the folder for caches of the user: $XDG_CACHE_HOME/refimpl, or ~/.cache/refimpl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "refimpl"


def _checksum(train: np.ndarray, valid: np.ndarray) -> str:
    digest = hashlib.sha256(f"{train.size} {valid.size} ".encode())
    for part in (train, valid):
        digest.update(part.data)
    return digest.hexdigest()


# -- the file ----------------------------------------------------------------------------------------------------------


def _write(places: list[Path], parts: TokenizedParts, identity: dict[str, object]) -> None:
    """Write the cache to the first place that can be written to, or say that there is none."""
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(path, vars(parts), identity)
            return
        except (UsageError, OSError) as error:
            reason = error
    print(f"note: the tokens are not kept, and the next run computes them again: {reason}", file=sys.stderr)


def _read(path: Path, identity: dict[str, object], tokenizer: Tokenizer) -> TokenizedParts:
    """Return the tokens in a cache. Errors: UsageError that says why they cannot be used."""
    arrays, header = checkpoint.load(path)
    for key, value in identity.items():
        if header.get(key) != value:
            raise UsageError(f"{path} has the tokens of another {key}")
    if arrays.keys() != set(TokenizedParts.__dataclass_fields__):
        raise UsageError(f"{path} is damaged: it has the tensors {', '.join(sorted(arrays))}")
    return TokenizedParts(**arrays)


# -- the tokens --------------------------------------------------------------------------------------------------------


def encode_text(tokenizer: Tokenizer, text: np.ndarray, quiet: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a text, given as bytes, and how many of these each stands for. Of bytes nothing is copied.

    quiet: show no progress.
    """
    if tokenizer is BYTES:
        return text, np.broadcast_to(np.uint8(1), text.shape)  # ones that take no memory
    with _progress(text.size, quiet) as bar:
        return _encode(tokenizer, text, 0, bar.update)


def _tokenize(tokenizer: Tokenizer, train: np.ndarray, valid: np.ndarray, quiet: bool) -> TokenizedParts:
    with _progress(train.size + valid.size, quiet) as bar:
        train_ids, _ = _encode(tokenizer, train, 0, bar.update)
        valid_ids, lengths = _encode(tokenizer, valid, train.size, bar.update)
    return TokenizedParts(train_ids, valid_ids, lengths)


def _progress(size: int, quiet: bool) -> ProgressBar:
    """Return a bar that appears when PATIENCE is over."""
    return ProgressBar(size, "B", "tokenizing", delay=PATIENCE, quiet=quiet)


def _encode(
    tokenizer: Tokenizer, text: np.ndarray, place: int, tick: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a text and the bytes that each stands for, piece by piece, both in the smallest type.

    place: where the text begins in its file. tick: callback with the number of bytes after each piece.
    """
    ids, lengths, start = [np.zeros(0, tokenizer.dtype)], [np.zeros(0, np.uint8)], 0
    while start < text.size:
        piece = text[start : start + PIECE + 1].tobytes()
        piece = piece[: _cut(piece)]
        piece_ids, piece_lengths = tokenizer.encode(piece, place + start)
        ids.append(piece_ids)
        lengths.append(np.array(piece_lengths, np.min_scalar_type(piece_lengths.max(initial=0))))
        start += len(piece)
        tick(len(piece))
    return np.concatenate(ids), np.concatenate(lengths)


def _cut(piece: bytes) -> int:
    """Return where to end a piece, of which one byte more is given, so that pieces have the tokens of the whole text.

    After a line that is followed by no white space byte-level tokenizers begin a new word. Where a piece has no such place,
    tokens at its end may be others than in the whole text.
    """
    if len(piece) <= PIECE:
        return len(piece)
    ends = (max((found.end() for found in pattern.finditer(piece)), default=0) for pattern in _CUTS)
    return next(filter(None, ends), PIECE)
