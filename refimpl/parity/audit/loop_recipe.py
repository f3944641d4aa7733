"""`LoopRecipe`: an audited loop as a recipe of refimpl's, read off one of its steps, and the nearest of refimpl's own.

The distance to a recipe is a sum of

    for each row of the policy's table that the loop has   the share of its places that depart from the recipe's row
    for weights, gradients, masters, moments               1 for each kind stored in another way (weights 1.5, m and v 1/2)
    for the loss scale                                     1 if one has none and the other has, 1/2 between static and dynamic

A place departs where an operand was rounded to another format than the row says, where sums are in other bits, or where the
result is in another format, unless all that read it round it to that one first. Rows outside the table are compared where
`loop_rows.LIKE` names a row for them. What masters start from cannot be seen in a step, and is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refimpl.numerics.formats import FORMATS, widens_to, widest
from refimpl.parity.audit.loop_rows import LOW, UNKNOWN, LoopRow, folded, rows_of
from refimpl.parity.audit.loop_states import EMA, FROZEN, LoopStates, ScaleRule, scale_rule, states_of
from refimpl.parity.audit.step import View
from refimpl.precision.policy import SAME, Policy, Precision
from refimpl.precision.policy_checks import ROWS
from refimpl.precision.policy_variants import ATTENTION, with_attention
from refimpl.precision.recipes import RECIPES, STATE_KINDS, Recipe
from refimpl.training.columns import whole_table as table

MOST_PLACES = 2
"""How many places of a row the table shows."""
OUTSIDE = "(...): not one of refimpl's operations"
KINDS_OF_ATTENTION = {
    "unfused": "operation by operation",
    "fused": "one kernel that reads 16 bits, as SDPBackend.FLASH_ATTENTION",
    "math": "in FP32 inside, rounded once, as SDPBackend.MATH",
}
"""The words for `policy_variants.ATTENTION`."""
NORMS = ("layernorm", "rmsnorm")
WEIGHT_OF_STATE = {"weights": 1.5, "m": 0.5, "v": 0.5}
"""Of the others it is 1. What the weights are is said of a recipe first."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A line of the table: all places where an operation has the same formats. places: with repeated layers folded."""

    operation: str
    inputs: str
    sums: str
    output: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Departure:
    """What differs from a recipe in one respect. what: in words, as in 'rmsnorm in BF16'. places: folded, () for states."""

    what: str
    places: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Return it as a part of a sentence."""
        return f"{self.what} at {_listed(self.places)}" if self.places else self.what


@dataclass(frozen=True)
class LoopRecipe:
    """A loop as a recipe.

    table: what its operations do. states, scale: what it keeps, and how it scales the loss. nearest: the name of refimpl's
    recipe that is nearest, at a distance; also: others as near. departures: what differs from the nearest. attention: which of
    `policy_variants.ATTENTION` it is, '' without.
    """

    table: tuple[TableRow, ...]
    states: LoopStates
    scale: ScaleRule
    nearest: str
    distance: float
    also: tuple[str, ...]
    departures: tuple[Departure, ...]
    attention: str = ""

    @property
    def sentence(self) -> str:
        """Return the nearest recipe and what differs from it."""
        parts = [departure.text for departure in self.departures]
        last = f", and {parts[-1]}" if len(parts) > 1 else "".join(parts[-1:])
        but = f", but {', '.join(parts[:-1])}{last}" if parts else ""
        trained = "trained parameter" if self.states.of(FROZEN) else "parameter"
        return f"{self.nearest}{but}: {self.states.bytes_per_parameter:.4g} bytes per {trained}"

    def lines(self) -> list[str]:
        """Return everything as text."""
        rows = [[r.operation, r.inputs, r.sums, r.output, _places(r)] for r in self.table]
        states = [
            [s.kind, s.encoding or s.format, "-" if s.kind in (FROZEN, EMA) else f"{s.bytes / max(self.states.trained, 1):.6g}"]
            for s in self.states.states
        ]
        return [
            self.sentence,
            *([f"equally near: {', '.join(self.also)}"] if self.also else []),
            "",
            *table(["operation", "inputs", "sums", "output", "where"], rows).split("\n"),
            *([OUTSIDE] if any(row.operation.startswith("(") for row in self.table) else []),
            "",
            *table(["state", "stored as", "bytes per parameter"], states).split("\n"),
            "",
            *([f"attention: {KINDS_OF_ATTENTION[self.attention]}"] if self.attention else []),
            f"loss scale: {self.scale.text}",
        ]

    def data(self) -> dict[str, Any]:
        """Return everything as plain data, for audit.json."""
        return {
            "sentence": self.sentence,
            "nearest": self.nearest,
            "distance": self.distance,
            "also": list(self.also),
            "attention": self.attention,
            "differences": [{"what": d.what, "places": list(d.places)} for d in self.departures],
            "operations": [{**asdict(row), "places": list(row.places)} for row in self.table],
            "states": [{**asdict(state), "bytes": state.bytes} for state in self.states.states],
            "trained": self.states.trained,
            "bytes_per_parameter": self.states.bytes_per_parameter,
            "loss_scale": {**asdict(self.scale), "text": self.scale.text},
        }


def recipe_of(view: View, scaler: Any = None) -> LoopRecipe:
    """Return the recipe of a loop, from an audited step that has ended as steps do. scaler: its GradScaler, None without."""
    rows, states, scale = rows_of(view.step), states_of(view), scale_rule(view, scaler)
    kinds = _kinds_of_attention(rows)
    distances = {
        (name, kind): _distance_of_rows(with_attention(recipe.policy, kind), rows) + _distance_of_rest(recipe, states, scale)
        for name, recipe in RECIPES.items()
        for kind in kinds
    }
    least = min(distances.values())
    (name, kind), *others = (key for key, distance in distances.items() if distance == least)
    recipe = RECIPES[name]
    departures = (
        *_departures_of_rows(with_attention(recipe.policy, kind), rows), *_departures_of_states(recipe, states),
        *_departures_of_scale(recipe, scale),
    )  # fmt: skip
    also = tuple(dict.fromkeys(other for other, _ in others if other != name))
    attention = kind if any(row.like.startswith("attention") for row in rows) else ""
    return LoopRecipe(_table(rows), states, scale, name, least, also, departures, attention)


def _kinds_of_attention(rows: Sequence[LoopRow]) -> tuple[str, ...]:
    """Return the kinds of `policy_variants.ATTENTION` that the attention may be."""
    fused = any(row.key == "attention" for row in rows)
    apart = any(row.key.startswith("attention.") for row in rows)
    return tuple(kind for kind in ATTENTION if not fused or apart or kind == "fused") if fused or apart else ATTENTION[:1]


# ------------------------------------------------------------------------------------------------- distance


def _distance_of_rows(policy: Policy, rows: Sequence[LoopRow]) -> float:
    found = _by_key(rows).items()
    return sum(sum(bool(_differs(row, policy.row(key))) for row in places) / len(places) for key, places in found)


def _distance_of_rest(recipe: Recipe, states: LoopStates, scale: ScaleRule) -> float:
    total = sum(WEIGHT_OF_STATE.get(kind, 1.0) for kind in _other_states(recipe, states))
    wanted = "none" if recipe.loss_scale == "none" else "dynamic"
    return total + (0.0 if wanted == scale.kind else 1.0 if "none" in (wanted, scale.kind) else 0.5)


def _by_key(rows: Iterable[LoopRow]) -> dict[str, list[LoopRow]]:
    """Return the rows that the table has, by their keys there."""
    found: dict[str, list[LoopRow]] = {}
    for row in rows:
        if row.like in ROWS:
            found.setdefault(row.like, []).append(row)
    return found


def _differs(row: LoopRow, p: Precision) -> dict[str, str]:
    """Return what departs from a policy's row, with what is observed: some of 'inputs', 'sums' and 'output'."""
    found = {}
    if any(operand.rounded != _expected_input(p, operand.arrived) for operand in row.inputs):
        found["inputs"] = row.formats
    low = p.acc not in ("fp32", "fp64")
    if row.sums != UNKNOWN and (row.sums != LOW if low else row.sums not in ("fp32", "-")):
        found["sums"] = row.sums
    if not {row.output, row.rounds_to} & _expected_outputs(p, row):
        found["output"] = row.output
    return found


def _expected_outputs(p: Precision, row: LoopRow) -> set[str]:
    """Return the formats in which a row gives its result: of SAME it is the widest among the operands.

    Operands that were widened first may count as what they were made of. PyTorch's norms on the CPU take an x in 16 bits with
    FP32 weights, and give the format of x.
    """
    if p.out != SAME:
        return {p.out}
    if not row.inputs:
        return {row.output}
    norm = {row.inputs[0].read} if row.key in NORMS else set()
    return {widest(*(operand.rounded for operand in row.inputs)), widest(*(operand.read for operand in row.inputs))} | norm


def _expected_input(p: Precision, arrived: str) -> str:
    """Return the narrowest format to which a row rounds an operand: a cast to a wider one changes nothing."""
    wanted = p.input("x")
    return arrived if wanted == SAME or (wanted in FORMATS and widens_to(arrived, wanted)) else wanted


def _other_states(recipe: Recipe, states: LoopStates) -> dict[str, str]:
    """Return the kinds of states that a loop stores in another way than a recipe, with the loop's, '' if it has none."""
    moments = tuple(kind for kind in ("m", "v") if states.of(kind))
    wanted = recipe.state_encodings(moments, max(states.micro_batches, 1))
    found = {kind: states.encoding(kind) for kind in STATE_KINDS}
    known = {kind: encoding for kind, encoding in found.items() if encoding or kind not in ("grads", "weights")}
    return {kind: encoding for kind, encoding in known.items() if encoding != wanted.get(kind, "")}


# ------------------------------------------------------------------------------------------------- words


def _departures_of_rows(policy: Policy, rows: Sequence[LoopRow]) -> Iterator[Departure]:
    """Yield what the operations do in another way, the same at several places once."""
    for key, places in _by_key(rows).items():
        p = policy.row(key)
        groups: dict[str, list[str]] = {}
        for row in places:
            differs = _differs(row, p)
            if differs:
                groups.setdefault(_in_words(row, differs), []).append(row.place)
        for what, where in groups.items():
            yield Departure(what, tuple(folded(where, (row.place for row in places))))


def _in_words(row: LoopRow, differs: Mapping[str, str]) -> str:
    """Return what an operation does in another way."""
    name = row.key
    if {"inputs", "output"} <= set(differs) and row.formats == row.output:
        also = f", summed in {differs['sums']}" if "sums" in differs and differs["sums"] != LOW else ""
        return f"{name} in {row.output.upper()}{also}"
    parts = [f"reads {differs['inputs'].upper()}"] if "inputs" in differs else []
    parts += [f"sums in {_bits(differs['sums'])}"] if "sums" in differs else []
    parts += [f"gives {differs['output'].upper()}"] if "output" in differs else []
    return f"{name} that {' and '.join(parts)}"


def _bits(sums: str) -> str:
    return sums if sums == LOW else sums.upper()


NAMES = {"weights": "weights", "grads": "gradients", "main_grads": "a copy of the gradients", "master": "masters"}


def _departures_of_states(recipe: Recipe, states: LoopStates) -> Iterator[Departure]:
    other = _other_states(recipe, states)
    if "m" in other and "v" in other and _stored(other["m"]) == _stored(other["v"]):
        yield Departure(f"moments in {_stored(other.pop('m'))}")
        other.pop("v")
    names = {**NAMES, "m": "first moments", "v": "second moments"}
    for kind, encoding in other.items():
        if not encoding:
            yield Departure(f"no {names[kind].removeprefix('a ')}")
        elif kind == "grads" and states.micro_batches > 1:
            yield Departure(f"gradients of {states.micro_batches} micro-batches summed in {encoding.upper()}")
        else:
            yield Departure(f"{names[kind]} in {_stored(encoding)}")


def _stored(encoding: str) -> str:
    """Return an encoding in words: 'BF16', or 'BF16, rounded stochastically'."""
    fmt, _, how = encoding.partition("-")
    return f"{fmt.upper()}{HOW_STORED.get(how, '')}"


HOW_STORED = {
    "stochastic": ", rounded stochastically", "kahan": " with Kahan compensation", "remainder": " with remainders",
    "signed": " with a scale per block", "unsigned": " with a scale per block", "blocks": " with a scale per block",
}  # fmt: skip
"""The words for what follows the format in the name of an encoding."""

def _departures_of_scale(recipe: Recipe, scale: ScaleRule) -> Iterator[Departure]:
    wanted = "none" if recipe.loss_scale == "none" else "dynamic"
    if wanted != scale.kind:
        static = f"a static loss scale of {scale.scale:g}"
        yield Departure({"none": "no loss scale", "static": static, "dynamic": "a dynamic loss scale"}[scale.kind])


def _listed(places: Sequence[str]) -> str:
    names = [place or "the model" for place in places]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ------------------------------------------------------------------------------------------------- table


def _table(rows: Sequence[LoopRow]) -> tuple[TableRow, ...]:
    """Return the lines of the table: refimpl's rows in its order, then operations outside of it."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    known: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        known.setdefault((row.key, row.formats, row.output), set()).add(row.sums)
    for row in rows:
        told = known[row.key, row.formats, row.output] - {UNKNOWN}
        sums = next(iter(told)) if row.sums == UNKNOWN and len(told) == 1 else row.sums
        groups.setdefault((row.key, row.formats, sums, row.output), []).append(row.place)
    among: dict[str, list[str]] = {}
    for row in rows:
        among.setdefault(row.key, []).append(row.place)
    order = {key: i for i, key in enumerate(ROWS)}
    ranked = sorted(groups.items(), key=lambda item: order.get(item[0][0], len(order)))
    return tuple(TableRow(*key, len(where), tuple(folded(where, among[key[0]]))) for key, where in ranked)


def _places(row: TableRow) -> str:
    shown = ", ".join(place or "(the model)" for place in row.places[:MOST_PLACES])
    more = len(row.places) - MOST_PLACES
    return f"{shown}, and {more} more" if more > 0 else shown
