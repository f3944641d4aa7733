"""The formula of the byte language model of a few layers."""

from __future__ import annotations

from refimpl.nn.models.mlp import MLPConfig
from refimpl.precision.recipes import Recipe
from refimpl.training.activation_memory.terms import Flow, Line, Term, check_sizes, loss_lines, made_by, terms_of


def mlp_activations(config: MLPConfig, recipe: Recipe, batch_size: int) -> list[Term]:
    """Return what the tape of `models.mlp` stores between forward and backward, for tokens (B, T) with T = block_size.

    Errors: UsageError for a batch_size below 1.
    """
    check_sizes(batch_size, config.block_size, config.block_size)
    sizes = {"L": config.n_layer, "B": batch_size, "T": config.block_size, "C": config.n_embd, "V": config.vocab_size}
    sizes["M"] = config.n_layer - 1
    f = Flow(recipe)
    embedded = f.out("embedding", f.stored)
    hidden = f.linear(embedded)
    y = f.out("relu", hidden)
    first, later = f.saved_by_linear(embedded), f.saved_by_linear(y)
    lines: list[Line] = [
        ("tokens", "B T", "int64", "wte", "the batch itself"),
        ("h.0 fc input", "B T C", first, "h.i.fc", made_by("wte", embedded, first)),
        ("h.i relu output", "L B 4C", y, "h.i.relu", "the same memory as the input of the next linear, unless that casts it"),
    ]
    if later != y:
        lines.append(("h.i fc input, i > 0", "M B 4C", later, "h.i.fc", f"cast from {y}, which the relu keeps"))
        lines.append(("lm_head input", "B 4C", later, "lm_head", f"cast from {y}, which the last relu keeps"))
    lines += loss_lines(f, "B", f.linear(y), "the last column is used; as a view it holds the whole batch")
    return terms_of(lines, sizes)
