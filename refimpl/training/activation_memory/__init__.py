"""Formulas for activation memory: the bytes that the tape stores between forward and backward.

    terms.py          a line of a formula, and the formats of a forward pass
    gpt.py, llama.py, mlp.py   the lines of each model; GPT's beside the published formula
    checkpointed.py   the two moments of a step with gradient checkpointing; the formula of any model
    copies.py         16-bit copies of weights under autocast

Each line of the formulas is an array that an operation of `refimpl/nn` saves for backward: its shape, and its format under
the recipe's policy. `tools/memory/measure.py` compares these lines with the arrays of a real tape, byte for byte.

    L layers   B sequences   T positions   C width   H heads   V vocabulary   M = L - 1
    K heads of keys and values   D width of a head   F width of the MLP

Every piece of memory has one line: views have none (split heads, rows, joined bytes), and an array that two operations save is
listed at the first of them. Python's own objects, such as shapes and names, are not counted.
"""

from __future__ import annotations

from refimpl.training.activation_memory.checkpointed import largest, moments
from refimpl.training.activation_memory.copies import weight_copies
from refimpl.training.activation_memory.gpt import Row, against_paper, gpt_activations
from refimpl.training.activation_memory.llama import llama_activations
from refimpl.training.activation_memory.mlp import mlp_activations
from refimpl.training.activation_memory.terms import Term, count, itemsize, nbytes

__all__ = [
    "Row", "Term", "against_paper", "count", "gpt_activations", "itemsize", "largest", "llama_activations", "mlp_activations",
    "moments", "nbytes", "weight_copies",
]  # fmt: skip
