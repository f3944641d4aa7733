"""One line of a formula, the formats of a forward pass, and the lines that all models share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.formats import FORMATS, widest
from refimpl.precision.policy import SAME
from refimpl.precision.recipes import Recipe
from refimpl.precision.state_encodings import get_encoding


@dataclass(frozen=True)
class Term:
    """One line of the formula: a number of elements of one format. `h.i` or `layers.i` in a name or place means all L layers.

    shape: the elements, a product of the package's letters such as 'L B T 3C'. place: the operation that saves the array first.
    """

    name: str
    elements: int
    fmt: str  # one of `formats.FORMATS`, or NumPy's name of an integer type
    shape: str = ""
    place: str = ""
    note: str = ""

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return self.elements * itemsize(self.fmt)


Line = tuple[str, str, str, str, str]
"""A `Term` before its elements are counted: name, shape, format, place, note."""


def itemsize(fmt: str) -> int:
    """Return the bytes of a value of a floating-point format or an integer type ('int64')."""
    return FORMATS[fmt].itemsize if fmt in FORMATS else np.dtype(fmt).itemsize


def count(shape: str, sizes: Mapping[str, int]) -> int:
    """Return the number of elements of a shape in letters, a product or a sum of products.

    >>> count("2 B T 3C + V", {"B": 5, "T": 7, "C": 11, "V": 1})
    2311
    """

    def value(factor: str) -> int:
        return int(factor) if factor.isdigit() else sizes[factor]

    return sum(math.prod(value(factor) for factor in re.findall(r"\d+|[A-Z]", product)) for product in shape.split("+"))


class Flow:
    """The formats of the tensors of a forward pass, by the recipe's policy, as `context.OpPrecision` does to arrays."""

    def __init__(self, recipe: Recipe) -> None:
        self.row, self.stored = recipe.policy.row, get_encoding(recipe.state["weights"]).fmt
        self.fused_attention = recipe.policy.fused_attention

    @property
    def stream(self) -> str:
        """Return the format of the residual stream: in every recipe that of a sum of two embeddings."""
        return self.out("add", self.out("embedding", self.stored), self.out("embedding", self.stored))

    def cast(self, op: str, operand: str, x: str) -> str:
        """Return the format in which an operation reads an operand of format x."""
        fmt = self.row(op).input(operand)
        return fmt if fmt in FORMATS else x  # unchanged; or quantized, of which nothing is saved

    def out(self, op: str, *operands: str) -> str:
        """Return the format of an operation's result."""
        fmt = self.row(op).out
        return widest(*operands) if fmt == SAME else fmt

    def leaf(self, operand: str) -> str:
        """Return the format in which `linear` gets a parameter: as it is stored, or that of autocast's shared copy."""
        fmt = self.cast("linear.y", operand, self.stored)
        return fmt if FORMATS[fmt].bits == 16 else self.stored

    def linear(self, x: str) -> str:
        """Return the format of y = x w^T + b."""
        return self.out("linear.y", x, self.leaf("w"))

    def saved_by_linear(self, x: str) -> str:
        """Return the format in which `linear` saves its input: as cast for y, if dw = dy^T x reads it in that format too."""
        same = self.row("linear.dw").input("x") == self.row("linear.y").input("x")
        return self.cast("linear.y", "x", x) if same else x

    def probabilities(self, qkv: str, softmax: str = "attention.softmax") -> str:
        """Return the format of P, the softmax output of attention. softmax: the key of its row."""
        return self.out(softmax, self.out("attention.scale", self.out("attention.scores", qkv, qkv)))


def nbytes(terms: Iterable[Term]) -> int:
    """Return the bytes of all terms."""
    return sum(term.nbytes for term in terms)


def loss_lines(f: Flow, rows: str, logits: str, targets: str) -> list[Line]:
    """Return what cross-entropy saves: the logits without a widened copy, two numbers per row, and the number of rows."""
    return [
        ("logits", f"{rows} V", logits, "loss", "the output of lm_head, as stored"),
        ("loss largest and log_sum", f"2 {rows}", f.row("cross_entropy").acc, "loss", "a value per row, in its `acc`"),
        ("loss rows that count", "1", f.row("cross_entropy").acc, "loss", "those whose target is not ignored, in its `acc`"),
        ("targets", "B T", "int64", "loss", targets),
    ]


def made_by(source: str, made: str, kept: str) -> str:
    """Return which output an input is: the same memory if it was not cast, else a copy; the output is not saved then."""
    return f"the output of {source}" + ("" if made == kept else f", cast from {made}, which is not saved")


def check_sizes(batch_size: int, block_size: int, longest: int) -> None:
    """Raise UsageError for a batch of no tokens, or of more per sequence than the model has positions."""
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: it must be at least 1")
    if not 1 <= block_size <= longest:
        raise UsageError(f"block_size is {block_size}: it must be at least 1, and at most the model's own, {longest}")


def terms_of(lines: list[Line], sizes: Mapping[str, int]) -> list[Term]:
    """Return lines as terms, whose elements are counted. sizes: letter -> size."""
    return [Term(name, count(shape, sizes), fmt, shape, place, note) for name, shape, fmt, place, note in lines]
