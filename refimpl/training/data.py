"""Training text as bytes: a corpus, batches drawn from it, and the losses that a model must beat.

A token is a byte, the vocabulary is the 256 byte values: no tokenizer stands between the file and the model, any file
is a corpus, and a loss in nats a byte can be compared between files. Randomness comes only from Generators that are
handed in, so the same seed gives the same batches in every process.
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

MIB = 1 << 20
VOCAB_SIZE = 256

# A larger file is fingerprinted by evenly spaced blocks, the first and the last MiB among them.
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 16, MIB

# Two topics that share a paragraph at least this long (white space squeezed) stay on one side of the split. Shorter
# ones are phrases such as "See also:" that say nothing of where a text comes from.
SHARED_PARAGRAPH = 40

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test"}
# These differ from machine to machine under the same Python version (build paths, the distributor's hooks).
SKIPPED_FILES = re.compile(r"(_sysconfigdata.*|sitecustomize|usercustomize)\.py")


# ---------------------------------------------------------------------------------------------------- the corpus


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text to train on and text held back, each a read-only 1-D uint8 array.

    description: what the bytes are, for run records: JSON-able, equal in every process and on every machine that has
        the same bytes (so without absolute paths), with a SHA-256 that says whether two runs saw the same text.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    description: dict[str, object]


def load_corpus(spec: str, block_size: int, seed: int = 0) -> Corpus:
    """Load a corpus and check that both of its parts hold at least one block.

    spec: 'pydoc', the text of Python's own documentation (about 450 KB, comes with Python); 'stdlib', the Python
        sources of the standard library (about 10 MB); else the path of any file, text or binary, of any size: it is
        mapped, not read. A file that is itself named 'pydoc' is written './pydoc'.
    block_size: the context length T; each part needs T + 1 bytes, T inputs and the byte that follows.
    seed: shuffles and splits the documents of 'pydoc' and 'stdlib'; without effect on a file, whose first 90 % are
        for training. It belongs to the corpus, not to the run: runs on differently split text cannot be compared.
    Errors: UsageError where there is no such file, it cannot be read, or is too short.
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
        corpus = _file_corpus(spec)

    needed = block_size + 1
    if min(corpus.train.size, corpus.valid.size) < needed:
        # With a tenth for validation, rounded up, 10 T + 1 bytes are the fewest that leave T + 1 there.
        raise UsageError(
            f"{spec!r} is too short for block_size {block_size}: {corpus.train.size} bytes for training and "
            f"{corpus.valid.size} for validation, where each part needs at least {needed} bytes; give at least "
            f"{10 * block_size + 1} bytes of text, or a smaller block_size"
        )
    return corpus


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a file, mapped and not read: it may exceed the memory. Errors: UsageError that says what is wrong."""
    name = os.fspath(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UsageError(f"no such file: {name!r}; give 'pydoc', 'stdlib' or the path of a file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UsageError(f"cannot read {name!r} ({_reason(error)}); give a file that you may read") from None
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{name!r} is a directory; give one file, for instance its files joined with cat")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{name!r} is no regular file and cannot be mapped; save its content to a file first")
    if status.st_size == 0:
        raise UsageError(f"{name!r} is empty; give a file that has text in it")
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {name!r} ({_reason(error)}); give a file that you may read") from None


def _file_corpus(path: str) -> Corpus:
    """The first 90 % of a file for training, the rest for validation, both mapped."""
    tokens = map_file(path)
    boundary = tokens.size * 9 // 10
    name = os.path.basename(path)
    sample = _spaced_blocks(tokens, FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK)
    whole = len(sample) == 1
    description: dict[str, object] = {
        "name": name,
        "train_bytes": boundary,
        "valid_bytes": tokens.size - boundary,
        "split": "first 90 % for training, the rest for validation",
        "sha256": _sha256(sample),
        "sha256_of": "the file" if whole else f"{len(sample)} evenly spaced blocks of {FINGERPRINT_BLOCK} bytes",
    }
    return Corpus(name, tokens[:boundary], tokens[boundary:], description)


def _documents_corpus(name: str, families: list[list[bytes]], seed: int) -> Corpus:
    """Shuffle the families, give a tenth of the bytes to validation, and join each side's documents.

    families: documents that must stay on one side of the split lie in one list.
    A family goes to validation as long as it fits into the tenth, so one huge family cannot take it all.
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
    return Corpus(name, train, valid, description)


@functools.cache
def _documentation(seed: int) -> Corpus:
    """The corpus 'pydoc', built once in a process: each rank, and each run of a comparison, asks for it again."""
    return _documents_corpus("pydoc", _topic_families(), seed)


def _topic_families() -> list[list[bytes]]:
    """Python's documentation topics, each under a title line; topics that share text are one family.

    A split by topic alone leaks: 'compound' holds the whole of 'if', 'while' and 'with', 'specialnames' the whole of
    'customization'. Families make sure that no paragraph of the validation part was trained on.
    """
    try:
        from pydoc_data.topics import topics  # here, for some distributions leave it out
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
    """The paragraphs that are long enough to tell that one text was copied from another, white space squeezed."""
    squeezed = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return {paragraph for paragraph in squeezed if len(paragraph) >= SHARED_PARAGRAPH}


def _stdlib_sources() -> list[list[bytes]]:
    """The standard library's .py files in the order of their names, each under a title line, each its own family."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, files in os.walk(root):
        # In place, so that walk does not enter what is skipped; config-* holds the build's own settings.
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
    """Why the system refused, without the path, which the message already names."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sha256(parts: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def _spaced_blocks(tokens: np.ndarray, count: int, length: int) -> list[np.ndarray]:
    """`count` evenly spaced slices of `length`, from the first byte to the last; [tokens] where that would be all."""
    if tokens.size <= count * length:
        return [tokens]
    starts = [(tokens.size - length) * i // (count - 1) for i in range(count)]
    return [tokens[start : start + length] for start in starts]


# ---------------------------------------------------------------------------------------------------- batches


EXAMPLES = {
    "blocks": "blocks of block_size bytes, whatever is in them",
    "lines": "blocks that end with the line they begin in: what follows is padding, without targets",
}
"""What the rows of a batch are. Lines have unequal numbers of targets, as the padded texts of most fine-tuning have."""

LINE_END, PADDING = ord("\n"), 0


def sample_batch(
    tokens: np.ndarray, batch_size: int, block_size: int, rng: np.random.Generator, no_target: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks from random places, drawn with replacement, every start equally likely.

    tokens: uint8, 1-D. Returns x, y: int64 (B, T); y[b, t] is the byte after x[b, t].
    no_target: for lines, what stands in y where there is no target (`Config.no_target`); None for whole blocks.
    Errors: UsageError where tokens hold fewer than T + 1 bytes.
    """
    _check_one_block(tokens, batch_size, block_size)
    starts = rng.integers(0, tokens.size - block_size, batch_size)  # the last start, len - T - 1, leaves room for y
    return _blocks_at(tokens, starts, block_size, no_target)


def sequential_batches(
    tokens: np.ndarray, batch_size: int, block_size: int, limit: int | None = None, no_target: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive blocks from the start, to measure the loss of a whole file. Yields x, y: int64 (B, T).

    Block i predicts the bytes i T + 1 to (i + 1) T, so every byte is predicted once, except the first, which has
    nothing before it, and a tail of fewer than T bytes, (len - 1) mod T, that fills no block. The last batch may have
    fewer rows; to average, weigh each batch by its targets.

    no_target: as in `sample_batch`; of each block only the line that it begins in is predicted then.
    limit: at most so many blocks (not batches, so that what is measured does not depend on the batch size).
    Errors: UsageError, on the first batch, where tokens hold fewer than T + 1 bytes.
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
    """x and y, int64 (B, T), of the blocks at `starts`: one gather of T + 1 bytes a row, whose two ends overlap."""
    windows = np.empty((starts.size, block_size + 1), np.int64)
    windows[...] = tokens[starts[:, None] + np.arange(block_size + 1)]
    x, y = windows[:, :-1].copy(), windows[:, 1:].copy()  # copies even of one row, which ascontiguousarray leaves a view
    if no_target is not None:
        ends = y == LINE_END
        after = np.cumsum(ends, 1) > ends  # the first line end is predicted still
        x[after], y[after] = PADDING, no_target
    return x, y


def _check_one_block(tokens: np.ndarray, batch_size: int, block_size: int) -> None:
    if batch_size < 1 or block_size < 1:
        raise UsageError(f"batch_size is {batch_size} and block_size {block_size}: both must be at least 1")
    if tokens.size < block_size + 1:
        raise UsageError(
            f"{tokens.size} bytes are too few for block_size {block_size}: at least {block_size + 1} are needed; "
            "give a longer text, or a smaller block_size"
        )


# ---------------------------------------------------------------------------------------------------- baselines

SMOOTHING = 0.01
SAMPLE_BLOCKS = 64
PIECE = MIB  # positions counted at a time: bounds the int64 work arrays to 8 MiB each


@dataclass(frozen=True)
class NgramBaselines:
    """What counting alone achieves: the losses that a trained model must beat to have learned more than n-grams.

    entropies: n -> nats a byte on the validation part; an n longer than the validation part is missing.
    train_bytes, valid_bytes: how many bytes were looked at; sampled: whether that is less than all of them.
    """

    entropies: dict[int, float]
    train_bytes: int
    valid_bytes: int
    sampled: bool


def ngram_entropies(
    train: np.ndarray, valid: np.ndarray, max_train_bytes: int = 32 * MIB, max_valid_bytes: int = 4 * MIB
) -> NgramBaselines:
    """Cross-entropy on `valid` of the unigram, bigram and trigram models counted on `train`.

    p(c | context) = (count(context c) + 0.01) / (count(context) + 2.56), where the context is the n - 1 bytes before c,
    counted where a byte follows it, so that the 256 probabilities sum to 1. The mean is over the bytes of `valid` that
    have a whole context.

    A part longer than its bound is looked at through 64 evenly spaced blocks, the first at its start and the last at
    its end, together as long as the bound (rounded down to whole blocks). No n-gram straddles two of them.
    Memory: 4 k**3 bytes for the trigram counts of texts of k different bytes, so 64 MiB at most; and work arrays of a few
    times 8 MiB.
    """
    train_blocks = _spaced_blocks(train, SAMPLE_BLOCKS, max_train_bytes // SAMPLE_BLOCKS)
    valid_blocks = _spaced_blocks(valid, SAMPLE_BLOCKS, max_valid_bytes // SAMPLE_BLOCKS)
    train_bytes = sum(block.size for block in train_blocks)
    valid_bytes = sum(block.size for block in valid_blocks)
    ranks, entropies = _ranks([*train_blocks, *valid_blocks]), {}
    for n in (1, 2, 3):
        if max(block.size for block in valid_blocks) >= n:
            entropies[n] = _cross_entropy(_ngram_counts(train_blocks, n, ranks), valid_blocks, n, ranks)
    sampled = train_bytes < train.size or valid_bytes < valid.size
    return NgramBaselines(entropies, train_bytes, valid_bytes, sampled)


def _ranks(blocks: list[np.ndarray]) -> np.ndarray:
    """The rank of each byte among those that occur, int64 (256,): tables of k bytes are smaller than tables of 256."""
    occurs = np.zeros(VOCAB_SIZE, bool)
    for block in blocks:
        for start in range(0, block.size, PIECE):
            occurs[block[start : start + PIECE]] = True
    return np.cumsum(occurs) - 1


def _ngram_counts(blocks: list[np.ndarray], n: int, ranks: np.ndarray) -> np.ndarray:
    """How often each n-gram occurs: int32 (k**(n-1), k), a row for each context, a column for each next byte, by rank."""
    k = int(ranks[-1]) + 1
    counts = np.zeros(k**n, np.int32)
    for codes in _ngram_codes(blocks, n, ranks):
        if counts.size <= codes.size:
            counts += np.bincount(codes, minlength=counts.size)
        else:  # bincount would make another table of k**n for each piece
            np.add.at(counts, codes, 1)
    return counts.reshape(-1, k)


def _cross_entropy(counts: np.ndarray, blocks: list[np.ndarray], n: int, ranks: np.ndarray) -> float:
    """Mean of -log p over the n-grams of the blocks, in nats, from counts (k**(n-1), k)."""
    context_counts = counts.sum(1)
    total, positions = 0.0, 0
    for codes in _ngram_codes(blocks, n, ranks):
        contexts, following = np.divmod(codes, counts.shape[1])
        p = (counts[contexts, following] + SMOOTHING) / (context_counts[contexts] + SMOOTHING * VOCAB_SIZE)
        total -= float(np.log(p).sum())
        positions += codes.size
    return total / positions


def _ngram_codes(blocks: list[np.ndarray], n: int, ranks: np.ndarray) -> Iterator[np.ndarray]:
    """Every n-gram of every block once, in order, as a number whose digits are ranks: int64, a bounded piece at a time."""
    k = int(ranks[-1]) + 1
    for block in blocks:
        for start in range(0, block.size - n + 1, PIECE):
            stop = min(start + PIECE, block.size - n + 1)
            digits = ranks[block[start : stop + n - 1]]
            codes = np.zeros(stop - start, np.int64)
            for i in range(n):
                codes *= k
                codes += digits[i : i + stop - start]
            yield codes
