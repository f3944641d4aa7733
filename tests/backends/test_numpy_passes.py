"""The host's fast versions of updates: bit for bit what the rules' own formulas give, and used for these rules alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import refimpl.optim.layout
from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.backend import NUMPY, SHARED, NumPyBackend
from refimpl.backends.numpy.table import PASSES
from refimpl.nn.models.model import Model, Parameter
from refimpl.numerics.casts import cast
from refimpl.optim.adamw import AdamW
from refimpl.optim.optimizer import FAST_PASSES, Optimizer, Rule
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.optim.state import State
from refimpl.precision.recipes import get_recipe

RULES: dict[str, Rule] = {
    "adamw": AdamW(weight_decay=0.3), "adamw, other betas": AdamW((0.99, 1 - 1e-9), eps=0.0),
    "sgd": SGD(0.9, weight_decay=0.3), "sgd without momentum": SGD(0.0),
}  # fmt: skip
SHAPES = {"a": (5, 7), "b": (300,), "c": (3, 40), "d": (2, 3, 2), "e": (1,), "f": (900, 1)}
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1.0, -1.0, 65504.0, -3e38, 1e30, np.inf, -np.inf, np.nan]


def state_of(backend: Backend, recipe: str, rule: Rule, special: bool, **shapes: tuple[int, ...]) -> State:
    """A state in the middle of training; with special values in a third of each buffer, if wanted."""
    parameters = {name: Parameter(shape, std=1.0) for name, shape in shapes.items()}
    state = State(Model("toy", {}, parameters, {}, None, None), get_recipe(recipe).state_encodings(rule.moments), backend)
    rng = np.random.default_rng(1)
    for kind, buffer in state.buffers.items():
        values = rng.standard_normal(buffer.size) * 10.0 ** rng.uniform(-3, 1, buffer.size)
        values = np.where(special & (rng.random(buffer.size) < 1 / 3), rng.choice(SPECIAL, buffer.size), values)
        with np.errstate(all="ignore"):
            buffer[...] = cast(values**2 if kind == "v" and not special else values, state.formats[kind])
    state.t = np.int64(3)
    return state


def updated(state: State, rule: Rule, clip: Any = 1.0, inverse_scale: float = 2.0**-7 / 3) -> dict[str, bytes]:
    """The bytes of all buffers after an update, every NaN the same: which of two a sum hands on is the processor's choice."""
    with np.errstate(all="ignore"):
        Optimizer(rule, Schedule(3e-3, 3e-3, 0, 9)).update(state, np.float32(inverse_scale), clip, np.False_)
    for kind, buffer in state.buffers.items():
        if kind != "grads":
            buffer[np.isnan(buffer)] = np.nan
    return {kind: buffer.tobytes() for kind, buffer in state.buffers.items()}


@pytest.mark.parametrize("special", [False, True], ids=["normal", "special"])
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_fast_updates_have_the_bits_of_the_formulas(
    rule: Rule, recipe: str, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in (7, 512, 1 << 16):
        monkeypatch.setattr(refimpl.optim.layout, "BLOCK", block)
        for clip in (1.0, np.float32(0.37)):
            fast, plain = (state_of(backend, recipe, rule, special, **SHAPES) for backend in (NUMPY, REFERENCE))
            before = fast.master.copy()
            assert updated(fast, rule, clip) == updated(plain, rule, clip)
            assert (fast.master != before).mean() > 0.5
            assert np.isnan(fast.master).any() == special


@pytest.mark.parametrize("rule", [RULES["adamw"], RULES["sgd"]], ids=["adamw", "sgd"])  # others divide the blocks alike
def test_the_bits_are_the_same_where_threads_share_the_blocks(rule: Rule) -> None:
    fast, plain = (state_of(backend, "fp16", rule, True, a=(700, 1000), b=(SHARED,)) for backend in (NUMPY, REFERENCE))
    assert updated(fast, rule) == updated(plain, rule)


# ------------------------------------------------------------------------------------------------------ which is chosen


def calls(rule: Rule, recipe: str) -> list[str]:
    """The fast versions that an update calls: here they do nothing else than say so."""
    called: list[str] = []

    def note(name: str, *arguments: Any) -> None:
        called.append(name)

    @dataclass(frozen=True)
    class Watched(NumPyBackend):
        passes = {name: partial(note, name) for name in PASSES}  # type: ignore[assignment]  # noqa: RUF012

    backend = Watched("watched", np, on_host=True)
    model = Model("toy", {}, {"a": Parameter((30, 10), std=1.0)}, {}, None, None)
    state = State(model, get_recipe(recipe).state_encodings(rule.moments), backend)
    Optimizer(rule, Schedule(3e-3, 3e-3, 0, 9)).update(state, np.float32(1), 1.0, np.False_)
    assert state.t == 1
    return called


def test_each_rule_has_its_own() -> None:
    assert set(PASSES) == set(FAST_PASSES.values()) and REFERENCE.passes == {}
    for name, rule in RULES.items():
        assert calls(rule, "fp16") == [FAST_PASSES[type(rule)]], name


@pytest.mark.parametrize("recipe", ["pure-bf16", "bf16-moments", "apex-o2", "fp64", "bf16-kahan", "adam-8bit"])
def test_states_that_are_not_fp32_are_updated_by_the_formula(recipe: str) -> None:
    assert calls(AdamW(), recipe) == []


@dataclass(frozen=True)
class OtherFormula(AdamW):
    """A rule whose weights all become 7."""

    def update_block(self, w: Any, g: Any, moments: Any, scalars: Any, xp: Any) -> None:
        w[...] = 7


@dataclass(frozen=True)
class OtherDecay(SGD):
    """A rule whose matrices all become 0."""

    def decay(self, w: Any, g: Any, scalars: Any) -> None:
        w[...] = g[...] = 0


def test_a_subclass_runs_what_it_says() -> None:
    """Whatever it overrides: a fast version of AdamW is not that of a rule derived from it."""
    assert calls(OtherFormula(), "fp32") == calls(OtherDecay(), "fp32") == []
    seven, zero = (state_of(NUMPY, "fp32", rule, False, **SHAPES) for rule in (OtherFormula(), OtherDecay(0.0)))
    updated(seven, OtherFormula())
    updated(zero, OtherDecay(0.0))
    assert (seven.master == 7).all()
    assert not any(view.any() for view in zero.layout.views(zero.master).values() if view.ndim > 1)


# ------------------------------------------------------------------------------------------------------ negative control


def test_a_change_of_one_operation_is_seen() -> None:
    fast, plain = (state_of(backend, "fp32", AdamW(), False, **SHAPES) for backend in (NUMPY, REFERENCE))
    ours, theirs = updated(fast, AdamW()), updated(plain, replace(AdamW(), eps=2e-8))
    assert ours["weights"] != theirs["weights"] and ours["m"] == theirs["m"]
