"""Mutants: take any one rounding away from an operation, or make it a wrong one, and a named test turns red.

A mutant is (recipe, site, kind). A site is a place where an operation rounds, such as `attention.scores.S` or `linear.dw.dw`
(`OpPrecision.round_to` is the only function that does). Sites are not listed here: every case of torch_cases.py runs once, and
each rounding is noted. A rounding that changes no element of the data has no mutants, and a wrong rounding counts only if it is
wrong for at least one element. The definitions have their mutants, and so have the fast versions of the NumPy backend, whose
attention then has several blocks of queries. The kinds:

    removed     the rounding is left out, and the FP32 value flows on
    disguised   the same, but the array goes on saying that it has the 16-bit format, so that only values can tell
    truncated   rounds toward zero
    twice       rounds by way of the other 16-bit format
    rarely      rounds toward zero, but only every hundredth element

(Ties are not among them: where they go is decided in one function, refimpl.numerics.casts, and test_casts.py tries every one.)

Each is switched on inside `OpPrecision.round_to`, by this test alone, while the checks of all cases that reach the site
run: the checks that the tests of operations make of the same cases. A mutant is killed *by values* if a result is none that
a correct evaluation can give, *by format* if the values pass and only the type of a result is wrong. Some that are `removed`
are *made up for*: the same FP32 array is rounded a moment later, when the next operation casts its operands in, so that no bit
of any result differs. Those are counted apart, and only if that later rounding was seen. The rest survives.

    python -m pytest tests/nn/test_mutants.py -s                 a recipe of each kind
    python -m pytest -m slow tests/nn/test_mutants.py -s         all recipes
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch_cases
from arrays import DTYPE, LOW, wide
from bounds import fast_versions
from torch_cases import CASES, Case

from refimpl.numerics.casts import cast
from refimpl.numerics.formats import format_of, widens_to
from refimpl.precision.context import OpPrecision

Array = np.ndarray
KINDS = ["removed", "disguised", "truncated", "twice", "rarely"]
ALL_CASES = [*CASES, *(Case("attention", f"math-{low}", (low,)) for low in LOW)]
RECIPES = list(dict.fromkeys(case.recipe for case in ALL_CASES))

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("torch")  # on one thread


# ------------------------------------------------------------------------------------------------------ wrong roundings


class Disguised:
    """FP32 values in an array that says that it has a 16-bit format. It can do what operations do with stored arrays."""

    def __init__(self, values: Array, fmt: str) -> None:
        self.values, self.fmt = values, fmt

    dtype = property(lambda self: DTYPE[self.fmt])
    shape = property(lambda self: self.values.shape)
    size = property(lambda self: self.values.size)
    ndim = property(lambda self: self.values.ndim)
    flags = property(lambda self: self.values.flags)
    T = property(lambda self: Disguised(self.values.T, self.fmt))

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.values, dtype)

    def __getitem__(self, key: Any) -> Disguised:
        return Disguised(self.values[key], self.fmt)

    def __setitem__(self, key: Any, x: Any) -> None:
        self.values[key] = np.asarray(x)

    def reshape(self, *shape: Any) -> Disguised:
        return Disguised(self.values.reshape(*shape), self.fmt)

    def transpose(self, *axes: Any) -> Disguised:
        return Disguised(self.values.transpose(*axes), self.fmt)

    def swapaxes(self, a: int, b: int) -> Disguised:
        return Disguised(self.values.swapaxes(a, b), self.fmt)

    def astype(self, dtype: Any) -> Array:
        return self.values.astype(dtype)


def toward_zero(x: Array, fmt: str) -> Array:
    """Rounded to the neighbor of `x` that is nearer to zero: where rounding to nearest went up, one code back."""
    y = np.asarray(cast(x, fmt))
    up = np.abs(wide(y)) > np.abs(wide(x))
    return (y.view(np.uint16) - up.astype(np.uint16)).view(y.dtype)


def by_way_of_the_other(x: Array, fmt: str) -> Array:
    """Rounded to the other 16-bit format first."""
    return cast(cast(x, "bf16" if fmt == "fp16" else "fp16"), fmt)


def one_in_a_hundred_toward_zero(x: Array, fmt: str) -> Array:
    y = np.array(cast(x, fmt))
    y.reshape(-1)[::100] = toward_zero(x, fmt).reshape(-1)[::100]
    return y


WRONG: dict[str, Callable[[Array, str], Any]] = {
    "removed": lambda x, fmt: x,
    "disguised": Disguised,
    "truncated": toward_zero,
    "twice": by_way_of_the_other,
    "rarely": one_in_a_hundred_toward_zero,
}


def is_rounding(x: Any, fmt: str) -> bool:
    return not widens_to(format_of(x), fmt)


# -------------------------------------------------------------------------------------------------------------- mutants


def site_of(case: Case, p: OpPrecision, name: str) -> str:
    """Where a case rounds. Grouped attention has the rows of `attention`, and sites of its own."""
    return f"{'grouped_' * (case.op == 'grouped_attention')}{p.op}.{name}"


@dataclass(frozen=True)
class Mutant:
    recipe: str
    site: str  # operation.site
    kind: str
    fast: bool  # in a fast version, or in a definition

    def __str__(self) -> str:
        return f"{self.recipe} {self.site} {self.kind}{' fast' * self.fast}"


@dataclass
class Site:
    """What one rounding does to the data of the cases: which cases reach it, and how many elements each kind changes."""

    cases: list[Case] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)


def results(case: Case, fast: bool) -> list[Any]:
    """Those of the fast versions with 3 + 1 queries, so that what several blocks give is put together and added up."""
    if not fast:
        return torch_cases.results(case)
    with pytest.MonkeyPatch.context() as patch, fast_versions():
        patch.setattr("refimpl.backends.numpy.attention.QUERIES", 3)
        patch.setattr("refimpl.numerics.fast_cast.SMALL", math.inf)  # it reads the bits, of which a disguise has none
        return torch_cases.results(case)


@functools.cache
def sites(recipe: str, fast: bool) -> dict[str, Site]:
    """All roundings of a recipe."""
    found, right = dict[str, Site](), OpPrecision.round_to
    for case in [case for case in ALL_CASES if case.recipe == recipe]:

        def noting(self: OpPrecision, x: Array, fmt: str, name: str, case: Case = case) -> Array:
            y = right(self, x, fmt, name)
            if is_rounding(x, fmt):
                site = found.setdefault(site_of(case, self, name), Site())
                if case not in site.cases:
                    site.cases.append(case)
                for kind in KINDS:
                    site.changed[kind] += np.count_nonzero(wide(WRONG[kind](x, fmt)) != wide(y))
            return y

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OpPrecision, "round_to", noting)
            results(case, fast)
    return found


def mutants(recipe: str, fast: bool) -> Iterator[Mutant]:
    for name, site in sites(recipe, fast).items():
        yield from (Mutant(recipe, name, kind, fast) for kind in KINDS if site.changed[kind])


GATHERED = {"attention.scores.dq", "attention.scores.dk", "attention.values.dv", "attention.softmax.P", "attention.values.O"}
GATHERED |= {"grouped_attention.values.O"}
"""These are copied into one array that `OpPrecision.empty` makes, P and O if they are computed in blocks. It must have room for
what was not rounded."""


@dataclass
class Switched:
    """A mutant while it is switched on: what it left unrounded, and which other sites have rounded the same since."""

    left_out: list[Array] = field(default_factory=list)
    made_up_for: set[str] = field(default_factory=set)


def same_values(a: Array, b: Array) -> bool:
    """Whatever their axes."""
    return a.size == b.size and np.array_equal(np.sort(a, axis=None), np.sort(b, axis=None))


def switch_on(mutant: Mutant, case: Case, patch: pytest.MonkeyPatch) -> Switched:
    """Replace `OpPrecision.round_to` by one that is wrong at the site of the mutant. A gradient that was not rounded to the
    format that its operand was seen in is not rounded to the format that it is stored in either: those are two halves of one
    cast."""
    right, right_empty, state = OpPrecision.round_to, OpPrecision.empty, Switched()
    at = {mutant.site, mutant.site + ".stored"} if mutant.kind == "removed" else {mutant.site}

    def wrong(self: OpPrecision, x: Any, fmt: str, site: str) -> Any:
        name = site_of(case, self, site)
        if not is_rounding(x, fmt):
            return right(self, x, fmt, site)
        if name in at:
            state.left_out.append(x)
            return WRONG[mutant.kind](x, fmt)
        if any(same_values(x, kept) for kept in state.left_out):
            state.made_up_for.add(name)
        return right(self, x, fmt, site)

    def roomy(self: OpPrecision, shape: tuple[int, ...], fmt: str) -> Any:
        if mutant.site in GATHERED and mutant.kind in ("removed", "disguised") and fmt in LOW:
            return WRONG[mutant.kind](np.empty(shape, np.float32), fmt)
        return right_empty(self, shape, fmt)

    patch.setattr(OpPrecision, "round_to", wrong)
    patch.setattr(OpPrecision, "empty", roomy)
    return state


right_results = functools.cache(results)


def same_bits(mutated: list[Any], right: list[Any]) -> bool:
    pairs = zip(mutated, right, strict=True)
    return all(a.dtype == b.dtype and np.array_equal(wide(a), wide(b), equal_nan=True) for a, b in pairs)


VERDICTS = ["values", "format", "made up for", "survived"]


def verdict(mutant: Mutant) -> tuple[str, str]:
    """What becomes of a mutant, and the case that says so. Each case is checked as `torch_cases.check` does."""
    wrong_format, unchanged, redone = "", True, ""
    for case in sites(mutant.recipe, mutant.fast)[mutant.site].cases:
        right = right_results(case, mutant.fast)
        formats: list[str] = []

        def note(x: Array, fmt: str, name: str, formats: list[str] = formats) -> None:
            if x.dtype != DTYPE[fmt]:
                formats.append(name)

        with pytest.MonkeyPatch.context() as patch:
            state = switch_on(mutant, case, patch)
            mutated = results(case, mutant.fast)
            patch.setattr(torch_cases, "assert_format", note)
            try:
                torch_cases.check_results(case, mutated)
            except AssertionError as error:
                return "values", f"{case}: {str(error).splitlines()[0]}"
        wrong_format = wrong_format or (f"{case}: {', '.join(formats)}" if formats else "")
        unchanged = unchanged and same_bits(mutated, right) and bool(state.made_up_for)
        redone = ", ".join(sorted(state.made_up_for))
    if wrong_format:
        return "format", wrong_format
    return ("made up for", f"at {redone}") if unchanged else ("survived", "")


def run(recipes: list[str], fast: bool) -> dict[Mutant, tuple[str, str]]:
    return {mutant: verdict(mutant) for recipe in recipes for mutant in mutants(recipe, fast)}


def table(verdicts: dict[Mutant, tuple[str, str]]) -> str:
    """A row for each recipe and kind, and what was not killed by values, by name."""
    counts = Counter((m.recipe, m.kind, what) for m, (what, _) in verdicts.items())
    lines = [f"{'recipe':14}{'kind':12}{'mutants':>9}" + "".join(f"{what:>13}" for what in VERDICTS) + f"{'killed':>9}"]
    for recipe, kind in dict.fromkeys((m.recipe, m.kind) for m in verdicts):
        row = [counts[recipe, kind, what] for what in VERDICTS]
        counted = sum(row) - row[2]
        lines.append(
            f"{recipe:14}{kind:12}{sum(row):9}" + "".join(f"{n:13}" for n in row) + f"{100 * (row[0] + row[1]) / counted:8.1f}%"
        )
    rest = [f"{what}: {m}  {why}" for what in VERDICTS[1:] for m, (w, why) in verdicts.items() if w == what]
    return "\n".join([*lines, *rest])


Record = Callable[[str, object], None]


def assert_killed(recipes: list[str], fast: bool, record: Record) -> None:
    verdicts = run(recipes, fast)
    print("\n" + table(verdicts))
    for mutant, (what, why) in verdicts.items():
        record(str(mutant), f"{what}: {why}")
    counted = [what for what, _ in verdicts.values() if what != "made up for"]
    killed = sum(what in ("values", "format") for what in counted)
    assert killed >= 0.95 * len(counted), table(verdicts)
    # A rounding that is left out, or that goes the wrong way everywhere, has no excuse; and a disguise leaves values to tell.
    missed = [str(m) for m, (what, _) in verdicts.items() if what == "survived" and m.kind in ("removed", "truncated")]
    missed += [str(m) for m, (what, _) in verdicts.items() if what != "values" and m.kind == "disguised"]
    assert not missed


fast_or_not = pytest.mark.parametrize("fast", [False, True], ids=["definitions", "fast versions"])


@fast_or_not
@pytest.mark.parametrize("recipe", ["fp16", "bf16", "amp-fp16"])
def test_every_wrong_rounding_turns_a_test_red(recipe: str, fast: bool, record_property: Record) -> None:
    assert_killed([recipe], fast, record_property)


@pytest.mark.slow
@fast_or_not
def test_every_wrong_rounding_of_every_recipe_turns_a_test_red(fast: bool, record_property: Record) -> None:
    assert_killed([recipe for recipe in RECIPES if recipe != "fp32"], fast, record_property)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fast_versions_round_where_the_definitions_do(recipe: str) -> None:
    assert {*sites(recipe, fast=True)} == {*sites(recipe, fast=False)}


def test_fp32_rounds_nowhere() -> None:
    assert sites("fp32", fast=False) == {}


def test_every_operation_that_computes_has_sites() -> None:
    # Those that only move values round nothing. relu rounds, but values that have the format already: no mutants there,
    # but for `twice` in FP16, where BF16 has too few bits for them.
    found = {site.partition(".")[0] for recipe in ("fp16", "amp-fp16") for site in sites(recipe, fast=False)}
    moving = {op for op, counterpart in torch_cases.COUNTERPARTS.items() if counterpart.formula is None}
    assert found == {*torch_cases.COUNTERPARTS, "attention", "grouped_attention", "fan_in", "cast"} - moving, found
