"""The `recipes` command: recipes and policies as tables and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from refimpl.errors import UsageError
from refimpl.nn.ops import OPS, fan_in
from refimpl.numerics.formats import FORMATS
from refimpl.precision.policy import EVERY_OTHER, SAME, Policy, Precision
from refimpl.precision.policy_checks import PARTS
from refimpl.precision.recipes import RECIPES, STATE_KINDS, Recipe, get_recipe
from refimpl.precision.state_encodings import get_encoding
from refimpl.training.columns import table
from refimpl.training.console import json_text

MOVES = ("reshape", "transpose", "split")
"""Operations that compute nothing, and so use no row."""

_KEY = f"""\
{EVERY_OTHER!r} stands for every operation without a row of its own; a row with a dot is a part of an operation.
{SAME!r} as inputs: each operand keeps its format; as out: the widest format among the operands."""


def show_recipes(name: str | None = None, as_json: bool = False, rows: bool = False) -> None:
    """Print all recipes and policies, or one recipe.

    rows: print the row that applies to each operation instead, or as JSON in addition.
    Errors: UsageError for an unknown name, or for rows as text of all recipes.
    """
    chosen = list(RECIPES.values()) if name is None else [get_recipe(name)]
    if as_json:
        print(json_text(recipes_data(chosen, rows)))
    elif rows:
        if name is None:
            raise UsageError("--rows prints the rows of one recipe: --recipe fp16 --rows")
        print(rows_text(chosen[0]))
    else:
        print(recipes_text(chosen) if name is None else recipe_text(chosen[0]))


def recipes_data(recipes: Sequence[Recipe], rows: bool = False) -> dict[str, Any]:
    """Return recipes, and the policies that they use, as plain data. rows: also the row that applies to each operation."""
    applied = {"rows": {r.name: {row.name: row.data() for row in applied_rows(r)} for r in recipes}} if rows else {}
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
        "policies": {policy.name: {row: _row_data(p) for row, p in policy.rows.items()} for policy, _ in _policies(recipes)},
    } | applied


def _row_data(p: Precision) -> dict[str, Any]:
    return {"inputs": p.inputs if isinstance(p.inputs, str) else dict(p.inputs), "acc": p.acc, "out": p.out}


def recipes_text(recipes: Sequence[Recipe]) -> str:
    """Return the table of recipes, then one table per policy."""
    header = ["recipe", *STATE_KINDS, "loss scale", "bytes", "summary"]
    rows = [
        [r.name, *(r.state[kind] or "-" for kind in STATE_KINDS), r.loss_scale, _number(r.bytes_per_parameter()), r.summary]
        for r in recipes
    ]
    parts = [
        "Recipes: the format of each kind of model state, the default loss scale, and the bytes per parameter of the states "
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


# ------------------------------------------------------------------------------------------- the row of each operation


@dataclass(frozen=True)
class AppliedRow:
    """The row that an operation or a part of one gets, with its key in the policy's table.

    name: 'layernorm', 'linear.y', or 'lm_head:linear.y' where a layer has a row of its own.
    """

    name: str
    precision: Precision
    key: str

    def data(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {**_row_data(self.precision), "key": self.key}


def applied_rows(recipe: Recipe) -> list[AppliedRow]:
    """Return the row of every operation and part: all operations of `nn.ops`, and the tape's `fan_in` and `cast`."""
    policy = recipe.policy
    places = sorted({key.partition(":")[0] for key in policy.rows if ":" in key})
    result = []
    for op in dict.fromkeys([*(op.key for op in OPS.values() if op.name not in (*MOVES, "cast")), fan_in.key]):
        names = [f"{op}.{part}" for part in PARTS.get(op, ())] or [op]
        result += [AppliedRow(name, policy.row(name), policy.row_key(name)) for name in names]
        for place in places:
            keys = {name: policy.row_key(name, place) for name in names}
            own = {name: key for name, key in keys.items() if ":" in key}
            result += [AppliedRow(f"{place}:{name}", policy.rows[key], key) for name, key in own.items()]
    return result + shared_casts(recipe)


def shared_casts(recipe: Recipe) -> list[AppliedRow]:
    """Return the casts of parameters that the tape makes once per step for all uses, or an empty list.

    The format is that of the row which reads the parameter: under autocast `linear.y` reads FP32 weights in 16 bits.
    """
    stored, found = get_encoding(recipe.state["weights"]).fmt, dict[tuple[str, str], AppliedRow]()
    for op in OPS.values():
        for _, operand in op.params:
            key = recipe.policy.row_key(f"{op.name}.y")  # of an operation without parts its own row
            fmt = recipe.policy.rows[key].input(operand)
            if fmt in FORMATS and fmt != stored and FORMATS[fmt].bits == 16:
                found[fmt, key] = AppliedRow("cast", Precision(stored, "-", fmt), key)
    return list(found.values())


def rows_text(recipe: Recipe) -> str:
    """Return the row of every operation and part as a table, with one line per operand where these differ."""
    lines = []
    for row in applied_rows(recipe):
        first, *others = _inputs(row.precision).split(", ")
        lines.append([row.name, first, row.precision.acc, row.precision.out, row.key])
        lines += [["", operand, "", "", ""] for operand in others]
    return "\n\n".join(
        [
            f"The rows of recipe {recipe.name}, policy {recipe.policy.name}",
            table(["operation", "inputs", "acc", "out", "key"], lines),
            _ROWS_KEY + _CAST_KEY * bool(shared_casts(recipe)),
        ]
    )


_ROWS_KEY = f"""\
inputs: the formats that the operands are cast to. acc: that of the sums and of
all arithmetic between. out: that of the result.
key: of the row in the policy's table. It is the most specific one there: for
linear.y of the layer lm_head the first of lm_head:linear.y, lm_head:linear,
linear.y, linear, {EVERY_OTHER!r}.
{SAME!r} as inputs: each operand keeps its format; as out: the widest among them.
fan_in adds the gradients of a tensor that has several uses.
{", ".join(MOVES)} compute nothing and keep the format."""

_CAST_KEY = """
cast: the 16-bit copy of a parameter, made once per step for all its uses. Its
format is that of the row that reads the parameter."""


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
