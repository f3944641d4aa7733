"""The `recipes` command: recipes and policies as tables and as data."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from refimpl.precision.policy import EVERY_OTHER, SAME, Policy, Precision
from refimpl.precision.recipes import RECIPES, STATE_KINDS, Recipe, get_recipe
from refimpl.training.console import json_text, table

_KEY = f"""\
{EVERY_OTHER!r} stands for every operation without a row of its own; a row with a dot is a part of an operation.
{SAME!r} as inputs: each operand keeps its format; as out: the widest format among the operands."""


def show_recipes(name: str | None = None, as_json: bool = False) -> None:
    """Print all recipes and policies, or one recipe. Errors: UsageError for an unknown name."""
    chosen = list(RECIPES.values()) if name is None else [get_recipe(name)]
    if as_json:
        print(json_text(recipes_data(chosen)))
    else:
        print(recipes_text(chosen) if name is None else recipe_text(chosen[0]))


def recipes_data(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Return recipes, and the policies that they use, as plain data."""
    return {
        "recipes": {
            recipe.name: {
                "summary": recipe.summary,
                "source": recipe.source,
                "policy": recipe.policy.name,
                "state": {kind: recipe.state[kind] or None for kind in STATE_KINDS},
                "loss_scale": recipe.loss_scale,
                "masters_from": recipe.masters_from,
                "bytes_per_parameter": float(recipe.bytes_per_parameter()),
            }
            for recipe in recipes
        },
        "policies": {
            policy.name: {
                row: {"inputs": p.inputs if isinstance(p.inputs, str) else dict(p.inputs), "acc": p.acc, "out": p.out}
                for row, p in policy.rows.items()
            }
            for policy, _ in _policies(recipes)
        },
    }


def recipes_text(recipes: Sequence[Recipe]) -> str:
    """Return the table of recipes, then one table per policy."""
    header = ["recipe", *STATE_KINDS, "loss scale", "bytes", "summary"]
    rows = [
        [r.name, *(r.state[kind] or "-" for kind in STATE_KINDS), r.loss_scale, _number(r.bytes_per_parameter()), r.summary]
        for r in recipes
    ]
    parts = [
        "Recipes: the format of each kind of model state, the default loss scale, and the bytes per parameter of the states\n"
        "with AdamW. '-': there is no such state; without a master the weights are their own masters.",
        table(header, rows),
        f"Policies: the formats inside every operation.\n{_KEY}",
    ]
    for policy, users in _policies(recipes):
        parts.append(f"policy {policy.name}, of {', '.join(users)}\n{_policy_table(policy)}")
    return "\n\n".join(parts)


def recipe_text(recipe: Recipe) -> str:
    """Return one recipe in detail."""
    defaults = f"default loss scale: {recipe.loss_scale}"
    if recipe.state["master"]:
        defaults += f"\nmasters start from: the {recipe.masters_from} weights"
    return "\n\n".join(
        [
            f"recipe {recipe.name}: {recipe.summary}\nsource: {recipe.source}\n{defaults}",
            f"model states, with AdamW\n{_state_table(recipe)}",
            f"policy {recipe.policy.name}: the formats inside every operation\n{_policy_table(recipe.policy)}",
            _KEY,
        ]
    )


def _state_table(recipe: Recipe) -> str:
    kept = recipe.buffers()
    rows = []
    for name, part in kept.items():
        shared = f"  {part.dtype.itemsize} for {part.values}" if part.values > 1 else ""
        shared += "  for embeddings only, not in the total" if part.first is not None else ""
        rows.append([name, recipe.state.get(name, part.dtype.name), _number(part.bytes_per_parameter) + shared])
    if "master" not in kept:
        rows.append(["master", "-", "0  the weights are their own masters"])
    rows.append(["total", "", _number(recipe.bytes_per_parameter())])
    return table(["buffer", "stored as", "bytes per parameter"], rows, "  ")


def _number(size: Fraction) -> str:
    """Return bytes per parameter as text, without trailing zeros."""
    return f"{float(size):.6g}"


def _policy_table(policy: Policy) -> str:
    last = sorted(policy.rows.items(), key=lambda item: item[0] == EVERY_OTHER)
    rows = [[row + "  every other operation" * (row == EVERY_OTHER), _inputs(p), p.acc, p.out] for row, p in last]
    return table(["row", "inputs", "acc", "out"], rows, "  ")


def _inputs(p: Precision) -> str:
    return p.inputs if isinstance(p.inputs, str) else ", ".join(f"{operand}: {fmt}" for operand, fmt in p.inputs.items())


def _policies(recipes: Sequence[Recipe]) -> list[tuple[Policy, list[str]]]:
    """Return the policies in the order of the recipes, each once, with the recipes that use it."""
    users: dict[str, tuple[Policy, list[str]]] = {}
    for recipe in recipes:
        users.setdefault(recipe.policy.name, (recipe.policy, []))[1].append(recipe.name)
    return list(users.values())
