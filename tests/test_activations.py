"""The closed formulas for activations against real tapes, byte for byte, and against the published formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.activations import Term, against_paper, count, gpt_activations, mlp_activations, weight_copies
from refimpl.config import Config
from refimpl.errors import UsageError
from refimpl.measure_memory import forward, held
from refimpl.models import GPTConfig, MLPConfig
from refimpl.recipes import RECIPES, get_recipe
from refimpl.trainer import INIT, generator

SIZES = [(1, 1, 8, 4, 1, 4), (2, 2, 16, 8, 3, 5), (3, 4, 32, 16, 2, 16)]  # n_layer, n_head, n_embd, block_size, B, T


def tape_of(config: Config, T: int) -> Any:
    parts = config.make_parts(config.make_backend())
    parts.state.load_weights(parts.model.initial_weights(generator(0, INIT)))
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, 256, (config.batch_size, T)) for _ in range(2))
    return forward(parts, (tokens, targets))


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
    activations, copies = held(tape_of(Config.of(given), T))
    config = GPTConfig(L, H, C, block)
    assert by_place(gpt_activations(config, get_recipe(recipe), B, T)) == activations
    assert sum(term.nbytes for term in weight_copies(config, get_recipe(recipe))) == copies
    assert bool(copies) == recipe.startswith("amp")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("L", "C", "block", "B"), [(1, 4, 3, 1), (2, 8, 5, 4), (3, 6, 2, 3)])
def test_what_the_tape_of_the_mlp_holds(recipe: str, L: int, C: int, block: int, B: int) -> None:
    given = {"model": "mlp", "recipe": recipe, "n_layer": L, "n_embd": C, "block_size": block, "batch_size": B}
    activations, copies = held(tape_of(Config.of(given), block))
    assert by_place(mlp_activations(MLPConfig(L, C, block), get_recipe(recipe), B)) == activations
    assert sum(term.nbytes for term in weight_copies(MLPConfig(L, C, block), get_recipe(recipe))) == copies


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_a_layer_in_16_bits_by_its_sum(recipe: str) -> None:
    """32 B T C + 2 B H T^2 + 16 B T, as the docstring has it: the difference that one layer more makes."""
    B, T, C, H = 3, 8, 16, 2
    two, one = (
        sum(term.nbytes for term in gpt_activations(GPTConfig(L, H, C, T), get_recipe(recipe), B, T)) for L in (2, 1)
    )
    assert two - one == 32 * B * T * C + 2 * B * H * T * T + 16 * B * T


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
