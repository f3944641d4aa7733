"""Formulas for activation memory with gradient checkpointing: what the tape stores at the two moments that can be the largest.

    after forward    what is below the blocks, the input of each block, and what is above: the last norm, logits, loss
    in backward      what is below, the inputs of all blocks but the last, and what that one saves when it is computed again;
                     what is above has been freed

Both are lines of the model's formula, of which those of a block count once or become its input. With 2 bytes per value (recipe
fp16), a block of GPT takes 2 B T C bytes after forward, and 32 B T C + 2 B H T^2 + 16 B T in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from refimpl.nn.models.llama import LlamaConfig
from refimpl.nn.models.mlp import MLPConfig
from refimpl.nn.models.registry import Sizes
from refimpl.precision.recipes import Recipe
from refimpl.training.activation_memory.gpt import gpt_activations
from refimpl.training.activation_memory.llama import llama_activations
from refimpl.training.activation_memory.mlp import mlp_activations
from refimpl.training.activation_memory.terms import Flow, Term, nbytes


def moments(
    model: Sizes, recipe: Recipe, batch_size: int, block_size: int, checkpointing: str = "none"
) -> list[list[Term]]:
    """Return what the tape stores after forward; with checkpointing 'full', also when the last block has been computed again.

    For tokens (B, T), where T is the mlp's own block_size. Errors: UsageError for sizes that a model does not support.
    """
    if isinstance(model, MLPConfig):
        return [mlp_activations(model, recipe, batch_size)]
    if isinstance(model, LlamaConfig):
        terms = llama_activations(model, recipe, batch_size, block_size)
    else:
        terms = gpt_activations(model, recipe, batch_size, block_size)
    if checkpointing == "none":
        return [terms]
    return [after_forward(terms, Flow(recipe).stream), in_backward(terms, Flow(recipe).stream, model.n_layer)]


def largest(stored: Sequence[Sequence[Term]]) -> Sequence[Term]:
    """Return the moment with the most bytes."""
    return max(stored, key=nbytes)


def after_forward(terms: Sequence[Term], stream: str) -> list[Term]:
    """Return the terms where each block stores its input alone. terms: those of a model that stores all. stream: its format."""
    below, block, shared, above = parts(terms)
    inputs = block_inputs(block, stream)
    return [*below, inputs, *(replace(t, place=inputs.place) for t in shared), *above]


def in_backward(terms: Sequence[Term], stream: str, n_layer: int) -> list[Term]:
    """Return the terms when the last block has been computed again, which holds its input as what its first norm saves."""
    below, block, shared, _ = parts(terms)
    inputs = block_inputs(block, stream)
    others = replace(inputs, elements=inputs.elements // n_layer * (n_layer - 1), shape=inputs.shape.replace("L ", "M "))
    one = [replace(t, elements=t.elements // n_layer, shape=t.shape.replace("L ", ""), note="computed again") for t in block]
    if n_layer == 1:
        return [*below, *shared, *one]
    return [*below, others, *(replace(t, place=inputs.place) for t in shared), *one]


def block_inputs(block: Sequence[Term], stream: str) -> Term:
    """Return the term of the blocks' inputs: as many elements as their first operation reads, in the format of the stream."""
    name, place = (text.partition(end)[0] for text, end in ((block[0].name, " "), (block[0].place, ".i.")))
    return replace(block[0], name=f"{name} input", fmt=stream, place=f"{place}.i", note="kept to compute the block again")


def parts(terms: Sequence[Term]) -> tuple[list[Term], list[Term], list[Term], list[Term]]:
    """Return the terms below the blocks, those of each block, what all blocks read (RoPE's angles), and the terms above."""
    inside = [i for i, term in enumerate(terms) if ".i." in term.place]
    first, end = inside[0], inside[-1] + 1
    block, shared = ([t for t in terms[first:end] if ("L" in t.shape) == each] for each in (True, False))
    return list(terms[:first]), block, shared, list(terms[end:])
