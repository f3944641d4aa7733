"""The closed formulas for activations against real tapes, byte for byte, and against the published formula."""

from __future__ import annotations

import itertools
import re
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from recipe_lists import MECHANISMS, others_slow

from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig
from refimpl.nn.models.llama import LlamaConfig
from refimpl.nn.models.mlp import MLPConfig
from refimpl.numerics.formats import format_of, is_float
from refimpl.precision.policy import Policy, Precision
from refimpl.precision.policy_variants import ATTENTION
from refimpl.precision.recipes import RECIPES, Recipe, get_recipe
from refimpl.step import Batch
from refimpl.tools.memory.measure import sizes_of
from refimpl.tools.memory.tape import arrays_in, computed_again, forward, held_by, owner, tape_memory
from refimpl.training.activation_memory import (
    Term,
    against_paper,
    count,
    gpt_activations,
    llama_activations,
    mlp_activations,
    moments,
    nbytes,
    weight_copies,
)
from refimpl.training.config import Config
from refimpl.training.setup import INIT, Training, generator

SIZES = [(1, 1, 8, 4, 1, 4), (2, 2, 16, 8, 3, 5), (3, 4, 32, 16, 2, 16)]  # n_layer, n_head, n_embd, block_size, B, T


def training_of(config: Config, T: int, policy: Policy | None = None) -> tuple[Training, Batch]:
    """A run before its first step, and a batch of T tokens per sequence."""
    training = config.make_training(config.make_backend())
    training.run.policy = policy or training.run.policy
    training.state.load_weights(training.model.initial_weights(generator(0, INIT)))
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, 256, (config.batch_size, T)) for _ in range(2))
    return training, (tokens, targets)


def tape_of(config: Config, T: int, policy: Policy | None = None) -> Any:
    return forward(*training_of(config, T, policy))


def by_place(terms: list[Term]) -> dict[str, int]:
    places: dict[str, int] = {}
    for term in terms:
        places[term.place] = places.get(term.place, 0) + term.nbytes
    return places


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_what_the_tape_of_the_gpt_holds(recipe: str, sizes: tuple[int, ...]) -> None:
    L, H, C, block, B, T = sizes
    given = {"recipe": recipe, "n_layer": L, "n_head": H, "n_embd": C, "block_size": block, "batch_size": B}
    activation = "gelu_new" if L == 3 else "gelu_tanh"
    activations, copies = tape_memory(tape_of(Config.of({**given, "activation": activation}), T))
    config = GPTConfig(L, H, C, block, activation=activation)
    assert by_place(gpt_activations(config, get_recipe(recipe), B, T)) == activations
    assert sum(term.nbytes for term in weight_copies(config, get_recipe(recipe))) == copies
    assert bool(copies) == recipe.startswith("amp")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("L", "C", "block", "B"), [(1, 4, 3, 1), (2, 8, 5, 4), (3, 6, 2, 3)])
def test_what_the_tape_of_the_mlp_holds(recipe: str, L: int, C: int, block: int, B: int) -> None:
    given = {"model": "mlp", "recipe": recipe, "n_layer": L, "n_embd": C, "block_size": block, "batch_size": B}
    activations, copies = tape_memory(tape_of(Config.of(given), block))
    assert by_place(mlp_activations(MLPConfig(L, C, block), get_recipe(recipe), B)) == activations
    assert sum(term.nbytes for term in weight_copies(MLPConfig(L, C, block), get_recipe(recipe))) == copies


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_what_the_tape_of_the_gpt_holds_with_checkpointing(recipe: str, sizes: tuple[int, ...]) -> None:
    """After forward, and in backward when the last block has been computed again."""
    L, H, C, block, B, T = sizes
    given = {"recipe": recipe, "n_layer": L, "n_head": H, "n_embd": C, "block_size": block, "batch_size": B}
    training, batch = training_of(Config.of({**given, "checkpointing": "full"}), T)
    tape = forward(training, batch)
    after_forward, in_backward = map(by_place, moments(GPTConfig(L, H, C, block), get_recipe(recipe), B, T, "full"))
    activations, copies = tape_memory(tape)
    assert activations == after_forward
    assert copies == nbytes(weight_copies(GPTConfig(L, H, C, block), get_recipe(recipe)))
    assert computed_again(training, tape) == in_backward


LLAMAS: list[dict[str, Any]] = [
    {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 6, "head_dim": 2, "ffn_dim": 10, "block_size": 5, "batch_size": 1},
    {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 12, "head_dim": 4, "ffn_dim": 10, "block_size": 6, "batch_size": 3},
    {"n_layer": 3, "n_head": 6, "n_kv_head": 2, "n_embd": 16, "head_dim": 4, "ffn_dim": 24, "block_size": 7, "batch_size": 2}
    | {"n_positions": 9, "qk_norm": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "tied": False},
    {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 8, "head_dim": 6, "ffn_dim": 9, "block_size": 8, "batch_size": 2}
    | {"qk_norm": True},
    {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 8, "head_dim": 4, "ffn_dim": 9, "block_size": 4, "batch_size": 2}
    | {"qkv_bias": True, "o_bias": True},
    {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 8, "head_dim": 4, "ffn_dim": 9, "block_size": 4, "batch_size": 2}
    | {"mlp_bias": True, "tied": False},
]


def by_format(terms: list[Term]) -> dict[tuple[str, str], int]:
    """Place and format -> elements."""
    found: dict[tuple[str, str], int] = {}
    for term in terms:
        found[term.place, term.fmt] = found.get((term.place, term.fmt), 0) + term.elements
    return found


def held_by_format(tape: Any) -> dict[tuple[str, str], int]:
    """The same of a tape, with memory that several operations save at the first of them."""
    found, seen = dict[tuple[str, str], int](), {id(owner(w)) for w in tape.parameters.weights.values()}
    for name, held in held_by(tape):
        for x in map(owner, arrays_in(held)):
            if id(x) not in seen:
                seen.add(id(x))
                key = re.sub(r"\.\d+(?=\.|$)", ".i", name), format_of(x) if is_float(x) else x.dtype.name
                found[key] = found.get(key, 0) + x.size
    return found


IN_TURN = [(recipe, ATTENTION[i % len(ATTENTION)]) for i, recipe in enumerate(MECHANISMS)]
"""Each mechanism with one way to compute attention; all pairs take six seconds."""


@pytest.mark.parametrize(("recipe", "attention"), others_slow(itertools.product(RECIPES, ATTENTION), plain=IN_TURN))
def test_what_the_tape_of_llama_holds(recipe: str, attention: str) -> None:
    """Without checkpointing; and with it, after forward and in backward when the last block has been computed again."""
    for given in LLAMAS:
        config = Config.of({**given, "model": "llama", "recipe": recipe, "attention": attention})
        sizes, B, T = sizes_of(config), config.batch_size, config.block_size
        copies = nbytes(weight_copies(sizes, config.make_recipe()))
        stored, after_forward, in_backward = (
            terms for how in ("none", "full") for terms in moments(sizes, config.make_recipe(), B, T, how)
        )
        tape = tape_of(config, T)
        assert held_by_format(tape) == by_format(stored)
        assert tape_memory(tape) == (by_place(stored), copies)
        training, batch = training_of(replace(config, checkpointing="full"), T)
        tape = forward(training, batch)
        assert held_by_format(tape) == by_format(after_forward)
        assert tape_memory(tape)[1] == copies
        assert computed_again(training, tape) == by_place(in_backward)


# Each term by the place that saves it, and where its arrays stand among those that the operation there saves.
STANDS_AT = {
    "tokens": ("transformer.wte", [0]),
    "positions": ("transformer.wpe", [0]),
    "h.i ln_1 input": ("transformer.h.i.ln_1", [0]),
    "h.i ln_1 mean and rstd": ("transformer.h.i.ln_1", [1, 2]),
    "h.i attn.c_attn input": ("transformer.h.i.attn.c_attn", [0]),
    "h.i attention qkv": ("transformer.h.i.attn", [0]),
    "h.i attention P": ("transformer.h.i.attn", [1]),
    "h.i attn.c_proj input": ("transformer.h.i.attn.c_proj", [0]),
    "h.i ln_2 input": ("transformer.h.i.ln_2", [0]),
    "h.i ln_2 mean and rstd": ("transformer.h.i.ln_2", [1, 2]),
    "h.i mlp.c_fc input": ("transformer.h.i.mlp.c_fc", [0]),
    "h.i mlp.gelu input": ("transformer.h.i.mlp.gelu", [0]),
    "h.i mlp.c_proj input": ("transformer.h.i.mlp.c_proj", [0]),
    "ln_f input": ("transformer.ln_f", [0]),
    "ln_f mean and rstd": ("transformer.ln_f", [1, 2]),
    "lm_head input": ("lm_head", [0]),
    "logits": ("loss", [0]),
    "loss largest and log_sum": ("loss", [1, 2]),
    "targets": ("loss", [3]),
    "loss rows that count": ("loss", [4]),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_term_of_the_gpt_by_its_arrays(recipe: str) -> None:
    """Elements and format of every term; together they are all arrays that the tape saves."""
    B, T, sizes = 3, 5, {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}
    tape = tape_of(Config.of({**sizes, "recipe": recipe, "batch_size": B}), T)
    saved: dict[tuple[str, int], list[np.ndarray]] = {}
    for entry in tape.entries:
        for i, x in enumerate(arrays_in(entry.saved)):
            saved.setdefault((re.sub(r"h\.\d+\.", "h.i.", entry.output.name), i), []).append(x)
    for term in gpt_activations(GPTConfig(**sizes), get_recipe(recipe), B, T):
        place, positions = STANDS_AT[term.name]
        arrays = [x for i in positions for x in saved.pop((place, i))]
        assert place == term.place
        assert sum(x.size for x in arrays) == term.elements, term.name
        assert {format_of(x) if is_float(x) else x.dtype.name for x in arrays} == {term.fmt}, term.name
    assert not saved


def other_recipes() -> dict[str, Recipe]:
    """Policies of no recipe here, in which linear keeps its input as it came, or casts what a relu keeps."""
    fp32, amp = Precision("fp32", "fp32", "fp32"), get_recipe("amp-fp16")
    rows = {
        "dw reads fp32": {"linear.dw": fp32},
        "relu and gelu in fp32": {"relu": fp32, "gelu_tanh": fp32},
        "both": {"linear.dw": fp32, "relu": fp32, "gelu_tanh": fp32},
        "layernorm out in fp16": {"layernorm": Precision("fp32", "fp32", "fp16")},
        "x and w unlike each other": {"linear": Precision({"x": "bf16", "w": "fp16"}, "fp32", "fp32")},
    }
    return {name: replace(amp, policy=Policy(name, {**amp.policy.rows, **more})) for name, more in rows.items()}


@pytest.mark.parametrize("name", other_recipes())
@pytest.mark.parametrize("model", ["gpt", "llama", "mlp"])
def test_policies_of_no_recipe(name: str, model: str) -> None:
    recipe, B, T = other_recipes()[name], 3, 4
    given = {"model": model, "recipe": "amp-fp16", "n_layer": 2, "n_embd": 8, "block_size": T, "batch_size": B}
    config = Config.of(given | ({"n_head": 2} if model != "mlp" else {}))
    sizes = sizes_of(config)
    (terms,) = moments(sizes, recipe, B, T)
    activations, copies = tape_memory(tape_of(config, T, recipe.policy))
    assert by_place(terms) == activations
    assert sum(term.nbytes for term in weight_copies(sizes, recipe)) == copies
    if model != "mlp":
        training, batch = training_of(replace(config, checkpointing="full"), T, recipe.policy)
        tape = forward(training, batch)
        after_forward, in_backward = map(by_place, moments(sizes, recipe, B, T, "full"))
        assert tape_memory(tape)[0] == after_forward and computed_again(training, tape) == in_backward


@pytest.mark.parametrize("recipe", ["fp64", "fp16", "amp-bf16"])
def test_nothing_is_alive_after_forward_that_entries_do_not_show(recipe: str) -> None:
    """What tracemalloc counts beyond the formula is Python's objects: less than one array of the residual stream."""
    B, T, C = 8, 32, 192
    config = Config.of({"recipe": recipe, "n_layer": 2, "n_head": 2, "n_embd": C, "block_size": T, "batch_size": B})
    training = config.make_training(config.make_backend())
    tokens = np.zeros((B, T), np.int64)
    forward(training, (tokens, tokens))  # what a first pass leaves in caches is not the tape's
    tracemalloc.start()
    try:
        tape = forward(training, (tokens.copy(), tokens.copy()))
        alive = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    sizes, named = GPTConfig(2, 2, C, T), get_recipe(recipe)
    terms = gpt_activations(sizes, named, B, T) + weight_copies(sizes, named)
    assert 0 <= alive - sum(term.nbytes for term in terms) < B * T * C * 2
    assert tape.entries


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_a_layer_in_16_bits_by_its_sum(recipe: str) -> None:
    """32 B T C + 2 B H T^2 + 16 B T, as the docstring has it: the difference that one layer more makes."""
    B, T, C, H = 3, 8, 16, 2
    two, one = (
        sum(term.nbytes for term in gpt_activations(GPTConfig(L, H, C, T), get_recipe(recipe), B, T)) for L in (2, 1)
    )
    assert two - one == 32 * B * T * C + 2 * B * H * T * T + 16 * B * T


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_layer_of_llama_in_16_bits_by_its_sum(recipe: str, qk_norm: bool) -> None:
    """As the docstring of `llama_activations` has it, and as docs/memory.md does for SmolLM2-135M."""
    B, T, C, H, K, D, F = 3, 8, 20, 6, 2, 4, 22
    sizes = LlamaConfig(2, H, K, C, D, F, T, qk_norm=qk_norm)
    two, one = (nbytes(llama_activations(replace(sizes, n_layer=L), get_recipe(recipe), B, T)) for L in (2, 1))
    of_norms = qk_norm * (2 * B * T * (H + K) * D + 4 * B * T * (H + K))
    assert two - one == 8 * B * T * C + 4 * B * T * (H + K) * D + 6 * B * T * F + 4 * B * H * T * T + 8 * B * T + of_norms


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_papers_column_is_its_formula_and_ours_is_ours(recipe: str, sizes: tuple[int, ...]) -> None:
    L, H, C, block, B, T = sizes
    rows = against_paper(GPTConfig(L, H, C, block), get_recipe(recipe), B, T)
    assert sum(row.paper for row in rows) == 34 * T * B * C + 5 * H * T * T * B
    one_layer = gpt_activations(GPTConfig(1, H, C, block), get_recipe(recipe), B, T)
    assert sum(row.ours for row in rows) == sum(term.nbytes for term in one_layer if term.name.startswith("h.i"))
    assert all((row.why == "the same") == (row.paper == row.ours) for row in rows)


def test_shapes_are_counted_as_written() -> None:
    assert count("2 B T 3C + V", {"B": 5, "T": 7, "C": 11, "V": 1}) == 2 * 5 * 7 * 3 * 11 + 1


@pytest.mark.parametrize(("B", "T"), [(0, 4), (1, 0), (1, 9)])
def test_impossible_sizes_are_refused(B: int, T: int) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        gpt_activations(GPTConfig(block_size=8), get_recipe("fp16"), B, T)
