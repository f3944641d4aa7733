"""Training text as tokens: a corpus, and batches sampled from it.

A token is a byte, unless a tokenizer says otherwise: then any file is a corpus, and nothing is computed or copied. Random
numbers come only from Generators that are passed in, so that the same seed gives the same batches in every process.
"""

import functools
import hashlib
import os
import platform
import re
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.errors import UsageError
from refimpl.training.token_cache import encode_text, tokenized
from refimpl.training.tokenizer import BYTES, Tokenizer

MIB = 1 << 20

# The fingerprint of a larger file is that of evenly spaced blocks, which include the first and the last MiB.
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 16, MIB

# Two topics that share a paragraph of at least this length (white space collapsed) stay on one side of the split. Shorter
# ones are phrases such as "See also:", which do not show that text was copied.
SHARED_PARAGRAPH = 40

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test"}
# These differ from machine to machine under the same Python version (build paths, the distributor's hooks).
SKIPPED_FILES = re.compile(r"(_sysconfigdata.*|sitecustomize|usercustomize)\.py")


# ---------------------------------------------------------------------------------------------------- the corpus


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text to train on and text held back, each a 1-D array of token ids: with bytes uint8 and read-only.

    description: the identity of the text and its tokens for run records, as JSON: equal in every process and on every machine
        with the same ones (so without absolute paths), with a SHA-256 by which two runs can be compared.
    valid_lengths: the number of bytes that each token of `valid` stands for.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    description: dict[str, object]
    valid_lengths: np.ndarray
    tokenizer: Tokenizer = BYTES


def load_corpus(spec: str, block_size: int, seed: int = 0, tokenizer: Tokenizer = BYTES, quiet: bool = False) -> Corpus:
    """Load a corpus and check that both of its parts have at least one block.

    spec: 'pydoc', the text of Python's own documentation (about 450 KB, included in Python); 'stdlib', the Python
        sources of the standard library (about 10 MB); else the path of any file, of any size. As bytes it is memory-mapped, not
        read; under a tokenizer its tokens are in memory. For a file that is itself named 'pydoc', give './pydoc'.
    block_size: the context length T; each part needs T + 1 tokens, T inputs and the one that follows.
    seed: shuffles and splits the documents of 'pydoc' and 'stdlib'; no effect on a file, whose first 90 % are for training.
        It belongs to the corpus, not to the run: runs on differently split text cannot be compared.
    tokenizer: makes the tokens; see `token_cache.tokenized`. The text is split alike under each, so bits per byte compare.
    quiet: show no progress.
    Errors: UsageError for a file that does not exist, cannot be read, is too short, or is not text for the tokenizer.
    """
    if block_size < 1:
        raise UsageError(f"block_size is {block_size}: it must be at least 1")
    if seed < 0:
        raise UsageError(f"the seed of a corpus is {seed}: it must be 0 or more")
    if spec == "pydoc":
        corpus = _documentation(seed)
    elif spec == "stdlib":
        corpus = _documents_corpus("stdlib", _stdlib_sources(), seed)
    else:
        corpus = _file_corpus(spec, tokenizer)
    if tokenizer is not BYTES:
        corpus = _under(tokenizer, corpus, None if spec in ("pydoc", "stdlib") else Path(spec).parent, quiet)

    needed, unit = block_size + 1, tokenizer.unit
    if min(corpus.train.size, corpus.valid.size) < needed:
        # With a tenth for validation, rounded up, 10 T + 1 bytes are the fewest that leave T + 1 there.
        raise UsageError(
            f"{spec!r} is too short for block_size {block_size}: {corpus.train.size} {unit}s for training and "
            f"{corpus.valid.size} for validation, where each part needs at least {needed} {unit}s; give at least "
            f"{10 * block_size + 1} {unit}s of text, or a smaller block_size"
        )
    return corpus


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the bytes of a file, memory-mapped, so that it may exceed the memory. Errors: UsageError."""
    name = os.fspath(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UsageError(f"no such file: {name!r}; give 'pydoc', 'stdlib' or the path of a file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UsageError(f"cannot read {name!r} ({_reason(error)}); give a file that you may read") from None
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{name!r} is a directory; give one file, for instance its files concatenated with cat")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{name!r} is not a regular file and cannot be mapped; save its content to a file first")
    if status.st_size == 0:
        raise UsageError(f"{name!r} is empty; give a file that has text in it")
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {name!r} ({_reason(error)}); give a file that you may read") from None


def _under(tokenizer: Tokenizer, corpus: Corpus, folder: Path | None, quiet: bool) -> Corpus:
    """Return a corpus of bytes under a tokenizer. folder: that of its file, for the cache. Errors: UsageError."""
    try:
        parts = tokenized(tokenizer, corpus.train, corpus.valid, corpus.name, folder, quiet)
    except UsageError as error:
        raise UsageError(f"{corpus.name} cannot be tokenized: {error}") from None
    made = {"tokenizer": tokenizer.checksum, "train_tokens": parts.train.size, "valid_tokens": parts.valid.size}
    return Corpus(corpus.name, parts.train, parts.valid, corpus.description | made, parts.valid_lengths, tokenizer)


def _of_bytes(name: str, train: np.ndarray, valid: np.ndarray, description: dict[str, object]) -> Corpus:
    """Return a corpus whose tokens are bytes."""
    return Corpus(name, train, valid, description, encode_text(BYTES, valid)[1])


def _file_corpus(path: str, tokenizer: Tokenizer) -> Corpus:
    """Return the bytes of a file, memory-mapped: the first 90 % for training, the rest for validation.

    Under a tokenizer that reads characters, validation begins with a whole one.
    """
    tokens = map_file(path)
    boundary = tokens.size * 9 // 10
    if tokenizer is not BYTES:
        boundary += next((i for i, byte in enumerate(tokens[boundary : boundary + 3]) if byte & 0xC0 != 0x80), 0)
    name = os.path.basename(path)
    sample = spaced_blocks(tokens, FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK)
    whole = len(sample) == 1
    description: dict[str, object] = {
        "name": name,
        "train_bytes": boundary,
        "valid_bytes": tokens.size - boundary,
        "split": "first 90 % for training, the rest for validation",
        "sha256": _sha256(sample),
        "sha256_of": "the file" if whole else f"{len(sample)} evenly spaced blocks of {FINGERPRINT_BLOCK} bytes",
    }
    return _of_bytes(name, tokens[:boundary], tokens[boundary:], description)


def _documents_corpus(name: str, families: list[list[bytes]], seed: int) -> Corpus:
    """Return the corpus of documents: shuffled, split with a tenth of the bytes for validation, and joined.

    families: lists of documents that must stay on one side of the split. A family goes to validation if it fits into the rest
    of the tenth, so that one huge family cannot fill it.
    """
    rng = np.random.default_rng(seed)
    shuffled = [families[i] for i in rng.permutation(len(families))]
    room = sum(len(document) for family in families for document in family) // 10
    train_documents: list[bytes] = []
    valid_documents: list[bytes] = []
    for family in shuffled:
        size = sum(len(document) for document in family)
        if size <= room:
            room -= size
            valid_documents += family
        else:
            train_documents += family

    train = np.frombuffer(b"\n\n".join(train_documents), np.uint8)
    valid = np.frombuffer(b"\n\n".join(valid_documents), np.uint8)
    description: dict[str, object] = {
        "name": name,
        "train_bytes": train.size,
        "valid_bytes": valid.size,
        "split": f"a tenth for validation by whole documents, shuffled with seed {seed}",
        "train_documents": len(train_documents),
        "valid_documents": len(valid_documents),
        "python": platform.python_version(),
        "sha256": _sha256([train, valid]),
        "sha256_of": "the training part, then the validation part",
    }
    return _of_bytes(name, train, valid, description)


@functools.cache
def _documentation(seed: int) -> Corpus:
    """Return the corpus 'pydoc'. Cached, since each rank and each run of a comparison loads it."""
    return _documents_corpus("pydoc", _topic_families(), seed)


def _topic_families() -> list[list[bytes]]:
    """Return Python's documentation topics, each under a title line; topics that share text are one family.

    A split by topic alone leaks: 'compound' has all of 'if', 'while' and 'with', and 'specialnames' all of 'customization'.
    With families, no paragraph of the validation part is trained on.
    """
    try:
        from pydoc_data.topics import topics  # imported here, since some distributions lack it
    except ImportError:
        raise UsageError("this Python came without pydoc_data; give 'stdlib' or the path of a file") from None

    families: list[tuple[set[str], list[bytes]]] = []
    for name in sorted(topics):
        paragraphs = _paragraphs(topics[name])
        documents = [f"Topic: {name}\n\n{topics[name].strip()}\n".encode()]
        apart = []
        for other_paragraphs, other_documents in families:
            if paragraphs & other_paragraphs:
                paragraphs |= other_paragraphs
                documents = other_documents + documents
            else:
                apart.append((other_paragraphs, other_documents))
        families = [*apart, (paragraphs, documents)]
    return [documents for _, documents in families]


def _paragraphs(text: str) -> set[str]:
    """Return the paragraphs of at least SHARED_PARAGRAPH characters, white space collapsed."""
    collapsed = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return {paragraph for paragraph in collapsed if len(paragraph) >= SHARED_PARAGRAPH}


def _stdlib_sources() -> list[list[bytes]]:
    """Return the standard library's .py files, sorted by name, each under a title line and in a family of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, files in os.walk(root):
        # In place, so that walk skips these folders; config-* has the settings of the build.
        subfolders[:] = [s for s in subfolders if s not in SKIPPED_FOLDERS and not s.startswith("config-")]
        paths += [Path(folder, f) for f in files if f.endswith(".py") and not SKIPPED_FILES.fullmatch(f)]
    families = []
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            source = path.read_bytes().strip()
        except OSError as error:
            reason = _reason(error)
            raise UsageError(f"cannot read the standard library's {path.name} ({reason}); give 'pydoc'") from None
        if source:
            families.append([b"# " + os.fsencode(path.relative_to(root).as_posix()) + b"\n\n" + source + b"\n"])
    if not families:
        raise UsageError("this Python came without the sources of its standard library; give 'pydoc' or a file's path")
    return families


def _reason(error: Exception) -> str:
    """Return the reason of an error without the path, which the message names already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sha256(parts: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def spaced_blocks(tokens: np.ndarray, count: int, length: int) -> list[np.ndarray]:
    """Return `count` evenly spaced slices of `length` bytes, from the first byte to the last, or [tokens] if it is shorter."""
    if tokens.size <= count * length:
        return [tokens]
    starts = [(tokens.size - length) * i // (count - 1) for i in range(count)]
    return [tokens[start : start + length] for start in starts]


# ---------------------------------------------------------------------------------------------------- batches


EXAMPLES = {
    "blocks": "blocks of block_size tokens, whatever is in them",
    "lines": "blocks that end with the line they begin in: what follows is padding, without targets",
}
"""The kinds of rows in a batch. Lines have unequal numbers of targets, like the padded texts of most fine-tuning."""

LINE_END, PADDING = ord("\n"), 0


def sample_batch(
    tokens: np.ndarray, batch_size: int, block_size: int, rng: np.random.Generator, no_target: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sample blocks with replacement, every start equally likely.

    tokens: ids, 1-D. Returns x, y: int64 (B, T); y[b, t] is the token after x[b, t].
    no_target: for lines, the value of y in the padding (`Config.no_target`); None for whole blocks.
    Errors: UsageError for fewer than T + 1 tokens.
    """
    _check_one_block(tokens, batch_size, block_size)
    starts = rng.integers(0, tokens.size - block_size, batch_size)  # the last start, len - T - 1, leaves room for y
    return _blocks_at(tokens, starts, block_size, no_target)


def sequential_batches(
    tokens: np.ndarray, batch_size: int, block_size: int, limit: int | None = None, no_target: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield consecutive blocks from the start, to compute the loss of a whole file, as x, y: int64 (B, T).

    Block i predicts the tokens i T + 1 to (i + 1) T. So every one is predicted once, except the first and a tail of
    (len - 1) mod T tokens that does not fill a block. The last batch may have fewer rows: weight each batch by its targets.

    no_target: as in `sample_batch`; then only the line in which each block begins is predicted.
    limit: the largest number of blocks (not batches, so that the result does not depend on the batch size).
    Errors: UsageError, at the first batch, for fewer than T + 1 tokens.
    """
    _check_one_block(tokens, batch_size, block_size)
    blocks = (tokens.size - 1) // block_size
    if limit is not None:
        blocks = min(blocks, limit)
    for first in range(0, blocks, batch_size):
        indices = np.arange(first, min(first + batch_size, blocks))
        yield _blocks_at(tokens, indices * block_size, block_size, no_target)


def _blocks_at(
    tokens: np.ndarray, starts: np.ndarray, block_size: int, no_target: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y, int64 (B, T), of the blocks at `starts`, from one gather of T + 1 tokens per row."""
    windows = np.empty((starts.size, block_size + 1), np.int64)
    windows[...] = tokens[starts[:, None] + np.arange(block_size + 1)]
    x, y = windows[:, :-1].copy(), windows[:, 1:].copy()  # ascontiguousarray would leave a view of a single row
    if no_target is not None:
        ends = y == LINE_END
        after = np.cumsum(ends, 1) > ends  # the first line end is still predicted
        x[after], y[after] = PADDING, no_target
    return x, y


def _check_one_block(tokens: np.ndarray, batch_size: int, block_size: int) -> None:
    if batch_size < 1 or block_size < 1:
        raise UsageError(f"batch_size is {batch_size} and block_size {block_size}: both must be at least 1")
    if tokens.size < block_size + 1:
        raise UsageError(
            f"{tokens.size} tokens are too few for block_size {block_size}: at least {block_size + 1} are needed; "
            "give a longer text, or a smaller block_size"
        )
