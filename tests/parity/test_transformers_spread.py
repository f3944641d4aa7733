"""Two bounds of the comparison with transformers: of a gradient's distance from FP64, and of the L2 norm of a rounding.

What would turn this red: an order that changes the function; a bound that PyTorch is outside of by itself; a fault in one
gradient, or in a few results of many, that the bound does not see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.numerics.casts import cast
from refimpl.numerics.formats import ulp
from refimpl.precision.policy import Policy, Precision
from refimpl.precision.recipes import Recipe
from refimpl.training.config import Config

torch = pytest.importorskip("torch", reason="the comparison with transformers needs torch==2.13.0")
pytest.importorskip("transformers", reason="the comparison with transformers needs transformers==5.24.0")

from hf_checkpoints import write_checkpoint, write_deep_checkpoint  # noqa: E402
from test_transformers import permuted  # noqa: E402

from refimpl.parity.transformers import comparison, following  # noqa: E402
from refimpl.parity.transformers.distances import FACTOR, Pass, reference  # noqa: E402
from refimpl.parity.transformers.following import LARGEST, Compared  # noqa: E402
from refimpl.parity.transformers.ours import Ours  # noqa: E402
from refimpl.parity.transformers.printed import report  # noqa: E402
from refimpl.parity.transformers.sites import Counterpart  # noqa: E402
from refimpl.parity.transformers.spread import ORDERS, distances_in_other_orders, widest_ratio  # noqa: E402
from refimpl.parity.transformers.training import TransformersTraining  # noqa: E402


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave PyTorch's number of threads as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read(folder: Path, recipe: str, **more: Any) -> Ours:
    return Ours.read(folder, {"block_size": 8, "batch_size": 1, "steps": 1, "recipe": recipe, **more})


def passes(folder: Path, ours: Ours, n: int) -> tuple[list[dict[str, float]], TransformersTraining]:
    """The distances of a pass and of n in other orders, and the training that made them."""
    theirs = TransformersTraining(ours.config, folder)
    tokens, targets, _ = ours.batches()[0]
    exact = reference(theirs.ours, ours.read_weights(), ours.config.make_backend(), (tokens, targets), ours.S)
    theirs.forward_backward(tokens, targets, ours.S)
    return distances_in_other_orders(theirs, exact.grads, (tokens, targets), ours.S, ours.config.seed, n), theirs


# -- one gradient's distance from FP64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama biases", "qwen3", "gpt2"])
def test_a_model_in_another_order_is_the_same_function(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(kind, tmp_path)
    ours = read(folder, "fp32")
    found, theirs = passes(folder, ours, 2)
    assert len(found) == 3 and all(each.keys() == ours.weights.keys() for each in found)
    assert max(d for each in found for d in each.values()) < 1e-5  # another function is 1 away
    assert found[0] != found[1] != found[2]
    for name, parameter in theirs.model.named_parameters():
        there = parameter.detach().numpy()
        assert parameter.grad is None and np.array_equal(there.T if name in theirs.transposed else there, ours.weights[name])


def test_the_widest_ratio_is_over_gradients_and_passes_but_for_a_few_fp32_roundings() -> None:
    assert widest_ratio([{"a": 0.1, "b": 2.0}, {"a": 0.3, "b": 1.0}]) == pytest.approx(3, rel=1e-4)
    assert widest_ratio([{"a": 1e-7}, {"a": 4e-7}]) == 1 == widest_ratio([{"a": 0.0}, {"a": 0.0}])


@pytest.mark.parametrize(("recipe", "factor"), [("fp32", 1.0001), ("pure-bf16", 1.2)])
def test_a_fault_in_one_gradient_is_named(
    recipe: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is off by a factor in one gradient of 21, which neither the median nor a rounding of theirs shows."""
    folder, name = write_checkpoint("llama", tmp_path), "model.layers.1.self_attn.k_proj.weight"
    run_pass = comparison.run_pass

    def with_fault(*arguments: Any) -> Pass:
        made = run_pass(*arguments)
        return made._replace(grads={**made.grads, name: made.grads[name] * np.float32(factor)})

    monkeypatch.setattr(comparison, "run_pass", with_fault)
    result = comparison.compare(folder, read(folder, recipe))
    assert not result.agrees and [d.name for d in result.far] == [name], report(result)
    assert result.spread is not None and 1 <= result.spread < 3
    assert "PyTorch's passes with sums in other orders differ by up to" in report(result)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_bound_is_neither_too_narrow_for_pytorch_by_itself_nor_for_ours(seed: int, tmp_path: Path) -> None:
    """In deep models with large channels a factor of 2 between two passes of PyTorch is common, twice the spread is not.

    Each of 12 passes is judged like ours beside each other one: by the spread of that one and 8 more.
    """
    folder, beyond_two, n = write_deep_checkpoint(tmp_path, seed), 0, ORDERS + 3
    for recipe in ("fp32", "fp16", "pure-bf16", "amp-bf16-cpu"):
        ours = read(folder, recipe, block_size=32, seed=seed)
        found, outside = passes(folder, ours, n)[0], 0
        for i, j in itertools.permutations(range(n + 1), 2):
            others = [found[j], *[each for k, each in enumerate(found) if k not in (i, j)][:ORDERS]]
            pair = widest_ratio([found[i], found[j]])
            beyond_two += pair > FACTOR
            outside += pair > FACTOR * widest_ratio(others)
        assert outside <= 0.02 * n * (n + 1), recipe
        result = comparison.compare(folder, ours)
        assert result.agrees, report(result)
    assert beyond_two > 0.1 * n * (n + 1)  # in FP32 and FP16


class Dropped(Config):
    """Settings whose recipe keeps the product of gate and up in FP32 in one layer of 16."""

    def make_recipe(self) -> Recipe:
        recipe = super().make_recipe()
        rows = {**recipe.policy.rows, "model.layers.7.mlp.act:swiglu": Precision("bf16", "fp32", "fp32")}
        return replace(recipe, policy=Policy(recipe.policy.name, rows))


def without_a_rounding(ours: Ours) -> Ours:
    return replace(ours, config=Dropped(**asdict(ours.config)))


def with_another_theta(ours: Ours) -> Ours:
    return replace(ours, config=replace(ours.config, rope_theta=10100.0))


def with_another_eps(ours: Ours) -> Ours:
    return replace(ours, config=replace(ours.config, norm_eps=1e-6))


def with_other_weights(ours: Ours, changed: dict[str, np.ndarray]) -> Ours:
    return replace(ours, weights={name: changed.get(name, ours.weights[name]) for name in ours.weights})


def with_rows_not_permuted(ours: Ours) -> Ours:
    name = "model.layers.7.self_attn.q_proj.weight"
    return with_other_weights(ours, {name: permuted(ours.weights[name], 6)})


def with_gate_and_up_exchanged(ours: Ours) -> Ours:
    gate, up = (f"model.layers.7.mlp.{part}_proj.weight" for part in ("gate", "up"))
    return with_other_weights(ours, {gate: ours.weights[up], up: ours.weights[gate]})


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "place"), [
    (without_a_rounding, "model.layers.7.mlp.act"), (with_another_theta, "model.layers.0.self_attn.q_rope"),
    (with_another_eps, "model.layers.0.input_layernorm"), (with_rows_not_permuted, "model.layers.7.self_attn.q_proj"),
    (with_gate_and_up_exchanged, "model.layers.7.mlp.gate_proj"),
])  # fmt: skip
def test_a_fault_in_a_deep_model_is_named(fault: Callable[[Ours], Ours], place: str, tmp_path: Path) -> None:
    """Negative control of both bounds, where they are wide: in weights and tokens that the other tests have not."""
    folder = write_deep_checkpoint(tmp_path, 14)
    result = comparison.compare(folder, fault(read(folder, "pure-bf16", block_size=32, seed=14)))
    assert not result.agrees and place in {each.place for each in [*result.apart[:1], *result.unseen[:1]]}, report(result)


# -- the L2 norm of a rounding's differences ---------------------------------------------------------------------------------


def one(ours: np.ndarray, theirs: np.ndarray) -> Compared:
    result: Any = type("Result", (), {"operation": type("Operation", (), {"verdicts": ()})})
    return following.compared("place", "op.site", cast(ours, "bf16"), Counterpart(cast(theirs, "bf16"), result))


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def flipped(x: np.ndarray, places: Any) -> np.ndarray:
    """A BF16 array some of whose results are off by one ulp of their own, or two."""
    y = np.asarray(cast(x, "bf16"), np.float32)
    y[places] *= np.float32(1 + 2**-7)
    return y


def test_results_that_differ_by_their_own_ulp_are_within_the_norm_and_a_few_large_differences_are_not() -> None:
    x = drawn(20_000)
    few = np.argsort(np.abs(x))[:: 20_000 // 22]
    right = one(x, flipped(x, few))
    assert 20 <= right.differ <= right.allowed < 23.1 and right.norm < 0.5 and not right.departs
    off = x.copy()
    off[few] += 0.9 * ulp("bf16", float(np.abs(x).max()))  # as many, none by more than an ulp of the largest
    wrong = one(off, x)
    assert wrong.differ <= wrong.allowed and wrong.largest <= 1 and wrong.norm > 1 and wrong.departs


def test_zeros_on_both_sides_say_nothing() -> None:
    """The gradient of a table of many rows: those of 4 tokens are not zero, and a tenth of one is off."""
    table = np.zeros((50_000, 16), np.float32)
    table[:4] = drawn(4, 16)
    result = one(flipped(table, np.s_[:4, :2]), table)
    assert result.elements == 64 and 4 <= result.differ < 1e-3 * table.size and result.departs


def test_the_spacing_is_the_mean_square_of_the_ulps() -> None:
    x = np.concatenate([drawn(300), [0, 0, 1e-40, 3e-39]]).astype(np.float32)
    wide = np.asarray(cast(x, "bf16"), np.float32)
    ulps = np.array([ulp("bf16", float(abs(value))) for value in wide if value])
    expected = float((ulps**2).mean() / ulps.max() ** 2)
    assert one(flipped(x, 0), x).spacing == pytest.approx(expected)


def test_bernsteins_inequality_leaves_a_chance_of_a_pass_in_a_thousand() -> None:
    """The derivation of LARGEST: at every mean M, in units of u^2, over 3000 roundings."""
    least = min((m + LARGEST) ** 2 / (2 * (m + (m + LARGEST) / 3)) for m in np.linspace(0, 100, 10_001))
    assert least == pytest.approx(9 / 8 * LARGEST, rel=1e-3) and 3000 * math.exp(-least) < 1e-3
