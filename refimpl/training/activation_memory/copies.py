"""The 16-bit copies of weights that autocast makes."""

from __future__ import annotations

from refimpl.nn.models.gpt import GPTConfig
from refimpl.nn.models.llama import LlamaConfig
from refimpl.nn.models.registry import Sizes
from refimpl.precision.recipes import Recipe
from refimpl.training.activation_memory.terms import Flow, Term, count


def weight_copies(config: Sizes, recipe: Recipe) -> list[Term]:
    """Return the 16-bit copies of weights that the tape stores within a step. They do not depend on B and T.

    Autocast casts an FP32 parameter of a linear layer once per step, and all its uses share the copy. A recipe that stores
    its weights in 16 bits has no copies, nor have norms and embeddings, which read their parameters as stored.
    The output layer of the GPT is the token embedding (V, C), which is cast for that use only; so is a tied one of llama.
    """
    f, c = Flow(recipe), config
    sizes = {"L": c.n_layer, "M": c.n_layer - 1, "T": c.block_size, "C": c.n_embd, "V": c.vocab_size}
    if isinstance(c, GPTConfig):
        weights, biases = "12 L C C + V C", "9 L C" if c.bias else ""
    elif isinstance(c, LlamaConfig):
        sizes |= {"H": c.n_head, "K": c.n_kv_head, "D": c.head_dim, "F": c.ffn_dim}
        weights = "2 L H D C + 2 L K D C + 3 L F C + V C"
        given = {"L H D + 2 L K D": c.qkv_bias, "L C": c.o_bias, "2 L F + L C": c.mlp_bias}
        biases = " + ".join(shape for shape, has in given.items() if has)
    else:
        weights, biases = "4 T C C + 16 M C C + 4 V C", "4 L C + V"
    note = "made by autocast, freed with the tape"
    return [
        Term(f"16-bit weight copies: {what}", count(shape, sizes), f.leaf(operand), shape, note=note)
        for what, operand, shape in (("weights", "w", weights), ("biases", "b", biases))
        if shape and f.leaf(operand) != f.stored
    ]
