"""Formulas for activation memory: the bytes that the tape stores between forward and backward.

Each line of the tables below is an array that an operation of `refimpl/nn` saves for backward: its shape, and its format under
the recipe's policy. `tools/memory/measure.py` compares these lines with the arrays of a real tape, byte for byte.

    L layers   B sequences   T positions   C width   H heads   V vocabulary   M = L - 1

Every piece of memory has one line: views have none (q, k and v, split heads, rows, joined bytes), and an array that two
operations save is listed at the first of them. Python's own objects, such as shapes and names, are not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig
from refimpl.nn.models.mlp import MLPConfig
from refimpl.numerics.formats import FORMATS, widest
from refimpl.precision.policy import SAME
from refimpl.precision.recipes import Recipe
from refimpl.precision.state_encodings import get_encoding


@dataclass(frozen=True)
class Term:
    """One line of the formula: a number of elements of one format. `h.i` in a name or place means all L layers together.

    shape: the elements as a product of the letters above, such as 'L B T 3C'. place: the operation that saves the array first.
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


@dataclass(frozen=True)
class Row:
    """A tensor of a layer: its bytes by the paper's formula, its bytes on our tape, and why they differ."""

    tensor: str
    paper: int
    ours: int
    why: str


def nbytes(terms: Iterable[Term]) -> int:
    """Return the bytes of all terms."""
    return sum(term.nbytes for term in terms)


_Line = tuple[str, str, str, str, str]
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
        """Return the format of the residual stream: in every recipe that of the first sum, of the two embeddings."""
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

    def probabilities(self, qkv: str) -> str:
        """Return the format of P, the softmax output of attention."""
        return self.out("attention.softmax", self.out("attention.scale", self.out("attention.scores", qkv, qkv)))


def gpt_activations(config: GPTConfig, recipe: Recipe, batch_size: int, block_size: int) -> list[Term]:
    """Return what the tape of `models.gpt` stores between forward and backward, for tokens (B, T).

    The sum over a layer, with 2 bytes per value and 4 per statistic (recipes fp16 and bf16):

        32 B T C + 2 B H T^2 + 16 B T

    `block_size` is T, at most the model's own. Errors: UsageError for sizes that the model does not support.
    """
    _check_sizes(batch_size, block_size, config.block_size)
    sizes = {"L": config.n_layer, "B": batch_size, "T": block_size, "C": config.n_embd, "H": config.n_head}
    f = Flow(recipe)
    x = f.stream
    top = f.out("layernorm", x)
    lines: list[_Line] = [
        ("tokens", "B T", "int64", "transformer.wte", "the batch itself"),
        ("positions", "T", "int64", "transformer.wpe", "0, 1, ..."),
        *_attention_lines(f, x),
        *_mlp_lines(f, x),
        *_norm_lines(f, "ln_f", "", "transformer.ln_f", x),
        ("lm_head input", "B T C", f.saved_by_linear(top), "lm_head", _made_by("ln_f", top, f.saved_by_linear(top))),
        *_loss_lines(f, "B T", f.linear(top), "the batch itself"),
    ]
    return _terms(lines, sizes | {"V": config.vocab_size})


def _attention_lines(f: Flow, x: str) -> list[_Line]:
    """Return the first half of a block: ln_1, c_attn, attention, c_proj. x: the format of the residual stream."""
    place, h = "transformer.h.i", f.out("layernorm", x)
    kept, qkv = f.saved_by_linear(h), f.linear(h)
    P = f.probabilities(qkv)
    O = f.out("attention.values", P, qkv)  # noqa: E741
    kept_O = f.saved_by_linear(O)
    return [
        *_norm_lines(f, "h.i ln_1", "L ", f"{place}.ln_1", x),
        ("h.i attn.c_attn input", "L B T C", kept, f"{place}.attn.c_attn", _made_by("ln_1", h, kept)),
        ("h.i attention qkv", "L B T 3C", qkv, f"{place}.attn", "the output of attn.c_attn; q, k and v are views of it"),
        *(_fused_lines(f, O, f"{place}.attn") if f.fused_attention else [
            ("h.i attention P", "L B H T T", P, f"{place}.attn", "the softmax output, masked half included")]),
        *([] if f.fused_attention and kept_O == O else [
            ("h.i attn.c_proj input", "L B T C", kept_O, f"{place}.attn.c_proj", _made_by("attention", O, kept_O))]),
    ]  # fmt: skip


def _fused_lines(f: Flow, O: str, place: str) -> list[_Line]:  # noqa: E741
    """Return what fused attention saves: its output and a number per row, and no T x T array."""
    return [
        ("h.i attention O", "L B T C", O, place, "its output, which attn.c_proj reads: the same memory, unless that casts it"),
        ("h.i attention log(sum(exp S))", "L B H T", f.row("attention.softmax").acc, place, "a value per row"),
    ]


def _mlp_lines(f: Flow, x: str) -> list[_Line]:
    """Return the second half of a block: ln_2, c_fc, gelu, c_proj. x: the format of the residual stream."""
    place, h = "transformer.h.i", f.out("layernorm", x)
    kept, u = f.saved_by_linear(h), f.linear(h)
    g = f.out("gelu_tanh", u)
    kept_g = f.saved_by_linear(g)
    return [
        *_norm_lines(f, "h.i ln_2", "L ", f"{place}.ln_2", x),
        ("h.i mlp.c_fc input", "L B T C", kept, f"{place}.mlp.c_fc", _made_by("ln_2", h, kept)),
        ("h.i mlp.gelu input", "L B T 4C", f.cast("gelu_tanh", "x", u), f"{place}.mlp.gelu", "the output of mlp.c_fc"),
        ("h.i mlp.c_proj input", "L B T 4C", kept_g, f"{place}.mlp.c_proj", _made_by("mlp.gelu", g, kept_g)),
    ]


def _norm_lines(f: Flow, name: str, each: str, place: str, x: str) -> list[_Line]:
    """Return what a layer norm saves: its input and two statistics per row. each: 'L ' if every layer has one."""
    return [
        (f"{name} input", f"{each}B T C", f.cast("layernorm", "x", x), place, "the residual stream; additions do not save it"),
        (f"{name} mean and rstd", f"2 {each}B T", f.row("layernorm").acc, place, "a value per row, in the accumulation format"),
    ]


def _loss_lines(f: Flow, rows: str, logits: str, targets: str) -> list[_Line]:
    """Return what cross-entropy saves: the logits without a widened copy, two numbers per row, and the number of rows."""
    return [
        ("logits", f"{rows} V", logits, "loss", "the output of lm_head, as stored"),
        ("loss largest and log_sum", f"2 {rows}", f.row("cross_entropy").acc, "loss", "a value per row, in its `acc`"),
        ("loss rows that count", "1", f.row("cross_entropy").acc, "loss", "those whose target is not ignored, in its `acc`"),
        ("targets", "B T", "int64", "loss", targets),
    ]


def _made_by(source: str, made: str, kept: str) -> str:
    """Return which output an input is: the same memory if it was not cast, else a copy; the output is not saved then."""
    return f"the output of {source}" + ("" if made == kept else f", cast from {made}, which is not saved")


def mlp_activations(config: MLPConfig, recipe: Recipe, batch_size: int) -> list[Term]:
    """Return what the tape of `models.mlp` stores between forward and backward, for tokens (B, T) with T = block_size.

    Errors: UsageError for a batch_size below 1.
    """
    _check_sizes(batch_size, config.block_size, config.block_size)
    sizes = {"L": config.n_layer, "B": batch_size, "T": config.block_size, "C": config.n_embd, "V": config.vocab_size}
    sizes["M"] = config.n_layer - 1
    f = Flow(recipe)
    embedded = f.out("embedding", f.stored)
    hidden = f.linear(embedded)
    y = f.out("relu", hidden)
    first, later = f.saved_by_linear(embedded), f.saved_by_linear(y)
    lines: list[_Line] = [
        ("tokens", "B T", "int64", "wte", "the batch itself"),
        ("h.0 fc input", "B T C", first, "h.i.fc", _made_by("wte", embedded, first)),
        ("h.i relu output", "L B 4C", y, "h.i.relu", "the same memory as the input of the next linear, unless that casts it"),
    ]
    if later != y:
        lines.append(("h.i fc input, i > 0", "M B 4C", later, "h.i.fc", f"cast from {y}, which the relu keeps"))
        lines.append(("lm_head input", "B 4C", later, "lm_head", f"cast from {y}, which the last relu keeps"))
    lines += _loss_lines(f, "B", f.linear(y), "the last column is used; as a view it holds the whole batch")
    return _terms(lines, sizes)


def weight_copies(config: GPTConfig | MLPConfig, recipe: Recipe) -> list[Term]:
    """Return the 16-bit copies of weights that the tape stores within a step. They do not depend on B and T.

    Autocast casts an FP32 parameter of a linear layer once per step, and all its uses share the copy. A recipe that stores
    its weights in 16 bits has no copies, nor have norms and embeddings, which read their parameters as stored.
    The output layer of the GPT is the token embedding (V, C), which is cast for that use only.
    """
    f, L = Flow(recipe), config.n_layer
    sizes = {"L": L, "M": L - 1, "T": config.block_size, "C": config.n_embd, "V": config.vocab_size}
    if isinstance(config, GPTConfig):
        weights, biases = "12 L C C + V C", "9 L C"
    else:
        weights, biases = "4 T C C + 16 M C C + 4 V C", "4 L C + V"
    note = "made by autocast, freed with the tape"
    return [
        Term(f"16-bit weight copies: {what}", count(shape, sizes), f.leaf(operand), shape, note=note)
        for what, operand, shape in (("weights", "w", weights), ("biases", "b", biases))
        if f.leaf(operand) != f.stored
    ]


def _check_sizes(batch_size: int, block_size: int, longest: int) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: it must be at least 1")
    if not 1 <= block_size <= longest:
        raise UsageError(f"block_size is {block_size}: it must be at least 1, and at most the model's own, {longest}")


def _terms(lines: list[_Line], sizes: Mapping[str, int]) -> list[Term]:
    return [Term(name, count(shape, sizes), fmt, shape, place, note) for name, shape, fmt, place, note in lines]


def against_paper(config: GPTConfig, recipe: Recipe, batch_size: int, block_size: int) -> list[Row]:
    """Return the tensors of a GPT layer, with bytes by the published formula and by ours.

        paper   34 s b h + 5 a s^2 b      s = T, b = B, h = C, a = H; values have 2 bytes, dropout masks 1

    The paper's model has dropout, ours has none; the paper leaves out statistics, which are small. Its column sums to its
    formula; ours to the `h.i` terms of `gpt_activations`, for one layer.
    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.1.
    """
    terms = gpt_activations(replace(config, n_layer=1), recipe, batch_size, block_size)
    layer = {term.name.removeprefix("h.i "): term for term in terms}
    sbh, as2b = block_size * batch_size * config.n_embd, config.n_head * block_size**2 * batch_size
    qkv, P, O = layer["attention qkv"], layer.get("attention P"), layer.get("attention O")  # noqa: E741
    norm_bytes = layer["ln_1 input"].nbytes + layer["ln_2 input"].nbytes
    statistics = layer["ln_1 mean and rstd"].nbytes + layer["ln_2 mean and rstd"].nbytes

    def both(tensor: str, paper: int, term: Term, ours: int | None = None) -> Row:
        ours, size = term.nbytes if ours is None else ours, itemsize(term.fmt)
        return Row(tensor, paper, ours, "the same" if ours == paper else f"here in {term.fmt}: {size} bytes per value, not 2")

    return [
        both("input of Q, K, V", 2 * sbh, layer["attn.c_attn input"]),
        both("Q and K", 4 * sbh, qkv, qkv.nbytes * 2 // 3),
        both("softmax output", 2 * as2b, P) if P else Row("softmax output", 2 * as2b, 0, "fused attention: computed again"),
        Row("softmax dropout mask", as2b, 0, "no dropout"),
        Row("softmax dropout output", 2 * as2b, 0, "no dropout: attention reads the softmax output itself"),
        both("V", 2 * sbh, qkv, qkv.nbytes // 3),
        both("input of the output projection", 2 * sbh, O or layer["attn.c_proj input"]),
        Row("attention dropout mask", sbh, 0, "no dropout"),
        both("input of the first MLP linear", 2 * sbh, layer["mlp.c_fc input"]),
        both("GELU input", 8 * sbh, layer["mlp.gelu input"]),
        both("input of the second MLP linear", 8 * sbh, layer["mlp.c_proj input"]),
        Row("MLP dropout mask", sbh, 0, "no dropout"),
        both("inputs of two layer norms", 4 * sbh, layer["ln_1 input"], norm_bytes),
        Row("mean and rstd of two layer norms", 0, statistics, f"saved, in {layer['ln_1 mean and rstd'].fmt}; small"),
    ]
