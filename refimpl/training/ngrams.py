"""Unigram, bigram and trigram models: the losses that a trained model must beat to have learned more than counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refimpl.training.data import MIB, Corpus, spaced_blocks
from refimpl.training.tokenizer import BYTES

VOCAB_SIZE = 256
SMOOTHING = 0.01
SAMPLE_BLOCKS = 64
PIECE = MIB  # positions counted at a time; limits the int64 temporaries to 8 MiB each


@dataclass(frozen=True)
class NgramBaselines:
    """The losses of n-gram models, which a trained model must beat to have learned more than n-grams.

    entropies: n -> nats per byte on the validation part, for each n that is not longer than it.
    train_bytes, valid_bytes: the numbers of bytes read; sampled: whether that is less than all of them.
    """

    entropies: dict[int, float]
    train_bytes: int
    valid_bytes: int
    sampled: bool


def ngram_baselines(corpus: Corpus) -> NgramBaselines:
    """Return the baselines of a corpus of bytes. For other tokens there are none: tables of all trigrams would be too large."""
    if corpus.tokenizer is not BYTES:
        return NgramBaselines({}, 0, 0, False)
    return ngram_entropies(corpus.train, corpus.valid)


def ngram_entropies(
    train: np.ndarray, valid: np.ndarray, max_train_bytes: int = 32 * MIB, max_valid_bytes: int = 4 * MIB
) -> NgramBaselines:
    """Return the cross-entropies on `valid` of unigram, bigram and trigram models counted on `train`.

    p(c | context) = (count(context c) + 0.01) / (count(context) + 2.56), with the n - 1 bytes before c as context. A context
    is counted only where a byte follows it, so that the 256 probabilities sum to 1. The mean is over the bytes of `valid` with
    a full context.

    A part longer than its limit is sampled: 64 evenly spaced blocks from its start to its end, together as long as the limit
    (rounded down to whole blocks). No n-gram spans two of them.
    Memory: at most 64 MiB, 4 k**3 bytes for the trigram counts of k different bytes, and temporaries of a few times 8 MiB.
    """
    train_blocks = spaced_blocks(train, SAMPLE_BLOCKS, max_train_bytes // SAMPLE_BLOCKS)
    valid_blocks = spaced_blocks(valid, SAMPLE_BLOCKS, max_valid_bytes // SAMPLE_BLOCKS)
    train_bytes = sum(block.size for block in train_blocks)
    valid_bytes = sum(block.size for block in valid_blocks)
    ranks, entropies = _ranks([*train_blocks, *valid_blocks]), {}
    for n in (1, 2, 3):
        if max(block.size for block in valid_blocks) >= n:
            entropies[n] = _cross_entropy(_ngram_counts(train_blocks, n, ranks), valid_blocks, n, ranks)
    sampled = train_bytes < train.size or valid_bytes < valid.size
    return NgramBaselines(entropies, train_bytes, valid_bytes, sampled)


def _ranks(blocks: list[np.ndarray]) -> np.ndarray:
    """Return the rank of each byte among the k that occur, int64 (256,): count tables then have k columns, not 256."""
    occurs = np.zeros(VOCAB_SIZE, bool)
    for block in blocks:
        for start in range(0, block.size, PIECE):
            occurs[block[start : start + PIECE]] = True
    return np.cumsum(occurs) - 1


def _ngram_counts(blocks: list[np.ndarray], n: int, ranks: np.ndarray) -> np.ndarray:
    """Return the counts of the n-grams: int32 (k**(n-1), k), with a row per context and a column per next byte, by rank."""
    k = int(ranks[-1]) + 1
    counts = np.zeros(k**n, np.int32)
    for codes in _ngram_codes(blocks, n, ranks):
        if counts.size <= codes.size:
            counts += np.bincount(codes, minlength=counts.size)
        else:  # bincount would allocate another table of k**n per piece
            np.add.at(counts, codes, 1)
    return counts.reshape(-1, k)


def _cross_entropy(counts: np.ndarray, blocks: list[np.ndarray], n: int, ranks: np.ndarray) -> float:
    """Return the mean of -log p over the n-grams of the blocks, in nats, given counts (k**(n-1), k)."""
    context_counts = counts.sum(1)
    total, positions = 0.0, 0
    for codes in _ngram_codes(blocks, n, ranks):
        contexts, following = np.divmod(codes, counts.shape[1])
        p = (counts[contexts, following] + SMOOTHING) / (context_counts[contexts] + SMOOTHING * VOCAB_SIZE)
        total -= float(np.log(p).sum())
        positions += codes.size
    return total / positions


def _ngram_codes(blocks: list[np.ndarray], n: int, ranks: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the n-grams of the blocks in order, as int64 numbers whose digits are ranks, at most PIECE at a time."""
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
