"""20 steps on `reference` and on `numpy`, from the same weights and batches: the same training, but for the order of sums.

*To the bit*, where the order is the same: without the fast versions that add in another one, every loss, norm and byte of state
is equal. So states, encodings, quantization, updates, elementwise operations and products in one block are those of the
definitions.

*Free runs*: all fast versions. No number says how far they may depart, since rounding differences grow, and AdamW makes much of
small gradients. Instead the definitions run again with the terms of all matrix products in other orders. These runs and the
reference are correct alike, so the distances between them are what one more order can do; chance is allowed a factor of 2.

*Steps from the same weights*, the reference's: nothing grows, so a single wrong rounding of one fast version is far outside.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from recipe_lists import others_slow

from refimpl.backends.base import REFERENCE, Backend
from refimpl.backends.numpy.attention import QUERIES
from refimpl.backends.numpy.backend import NUMPY, WHOLE, NumPyBackend
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of, ulp, widens_to
from refimpl.parity.tolerances import distance, fp64
from refimpl.precision.context import OpPrecision
from refimpl.precision.recipes import RECIPES
from refimpl.step import Batch, forward_backward
from refimpl.training.config import Config
from refimpl.training.data import load_corpus, sample_batch
from refimpl.training.setup import BATCHES, INIT, Training, generator

pytestmark = pytest.mark.usefixtures("one_blas_thread")

SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": QUERIES + 8, "batch_size": 2},
    "llama": {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": QUERIES + 8, "batch_size": 2, "norm_eps": 1e-3},
    "mlp": {"n_layer": 2, "n_embd": 32, "block_size": 8, "batch_size": 64},
}
"""Attention has two blocks of queries; each product is one block."""
LARGER: dict[str, dict[str, Any]] = SMALL | {
    model: {**SMALL[model], "n_head": 2, "n_embd": 64, "batch_size": 8} for model in ("gpt", "llama")
}
"""So many elements that each order rounds some of them the other way in each step: then distances are no matter of luck. Heads
of 32: 1 / sqrt(32) is no power of 2, so that scaling rounds.
"""
STEPS = 20
MODELS = ("gpt", "llama", "mlp")
PLAIN = {("fp32", "gpt"), ("fp16", "gpt"), ("bf16", "llama"), ("fp16", "mlp")}
EXPLODES = {("pure-fp16", "llama")}
"""Second moments of small gradients are 0 in FP16, and the updates up to 1 / eps times too large: losses rise to 100, and how
far two runs are apart is chance.
"""
OTHER_KINDS = {("apex-o2", "gpt"), ("bf16-sr", "gpt"), ("adam-8bit", "gpt"), ("fp8", "gpt"), ("nvfp4", "mlp")}
IN_FORMATS = ("fp64", "fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu")
"""The policies without quantized products, in which one element rounded the other way can move the scale of a tensor."""


def config(recipe: str, model: str, sizes: Mapping[str, Mapping[str, Any]] = LARGER) -> Config:
    """A training that, with a loss scale, skips its first steps, and later one after the scale has grown."""
    common = {"steps": STEPS, "warmup": 4, "lr": 1e-3, "init_scale": 2.0**24, "growth_interval": 4}
    return Config.of({"model": model, "recipe": recipe, **sizes[model], **common})


def started(c: Config, backend: Backend) -> Training:
    training = c.make_training(backend)
    training.state.load_weights(training.model.initial_weights(generator(c.seed, INIT)), rounded=c.rounds_masters)
    return training


def batches(c: Config) -> list[Batch]:
    corpus, rng = load_corpus(c.data, c.block_size), generator(c.seed, BATCHES)
    return [sample_batch(corpus.train, c.batch_size, c.block_size, rng) for _ in range(c.steps)]


# --------------------------------------------------------------------------------------------------------- orders of sums

REORDERED = (
    "attention", "fused_attention", "grouped_attention", "fused_grouped_attention", "layernorm", "llama_rmsnorm", "embedding",
)  # fmt: skip
"""The fast versions that add in another order, as table.py says; `linear` only if a product is several blocks of rows."""


class SameOrder(NumPyBackend):
    """The NumPy backend with the definitions in place of the fast versions that add in another order."""

    @property
    def ops(self) -> Mapping[str, Op]:
        return {name: op for name, op in NUMPY.ops.items() if name not in REORDERED}


@dataclass(frozen=True)
class OtherOrder(Backend):
    """The definitions, with the terms of all matrix products in an order drawn from `seed`."""

    seed: int = 0

    def matmul(self, a: Array, b: Array, acc: str) -> Array:
        order = np.random.default_rng(self.seed).permutation(a.shape[-1])
        return super().matmul(a[..., order], b[..., order, :], acc)


SAME_ORDER = SameOrder("same order", np, on_host=True)
CORRECT = (REFERENCE, *(OtherOrder(f"order {seed}", np, on_host=True, seed=seed) for seed in range(3)))


def bound(correct: Sequence[Array], fmt: str) -> float:
    """Twice the largest distance between correct results; and three results rounded the other way, one ulp of the largest each,
    for results so few that no order changes any."""
    largest = max(np.abs(np.nan_to_num(fp64(x))).max() for x in correct)
    return 2 * max(distance(a, b) for a, b in itertools.combinations(correct, 2)) + math.sqrt(3) * ulp(fmt, float(largest))


def finest(a: Array) -> str:
    return "fp64" if format_of(a) == "fp64" else "fp32"


# -------------------------------------------------------------------------------------------------------------- trainings


@dataclass
class Trained:
    """What a training computed. `counts`: loss scale and skip of each step, and the number of updates."""

    losses: Array
    norms: Array
    counts: list[Any]
    weights: Array
    buffers: dict[str, bytes]


def train(c: Config, backend: Backend) -> Trained:
    training = started(c, backend)
    results = [training.step([batch]) for batch in batches(c)]
    state = training.state
    return Trained(
        np.array([r.loss for r in results]),
        np.array([r.grad_norm for r in results]),
        [*((float(r.loss_scale), bool(r.skipped)) for r in results), int(state.t)],
        np.array(state.values(state.master_kind)),
        {kind: buffer.tobytes() for kind, buffer in state.buffers.items()},
    )


@pytest.mark.parametrize(("recipe", "model"), others_slow(
    itertools.product(RECIPES, MODELS), plain=PLAIN | OTHER_KINDS
))  # fmt: skip
def test_with_sums_in_the_same_order_every_bit_is_the_same(recipe: str, model: str) -> None:
    c = config(recipe, model, SMALL)
    a, b = train(c, REFERENCE), train(c, SAME_ORDER)
    assert a.counts == b.counts and a.losses.tobytes() == b.losses.tobytes() and a.norms.tobytes() == b.norms.tobytes()
    assert [kind for kind in a.buffers if a.buffers[kind] != b.buffers[kind]] == []


def test_these_sizes_have_one_block_per_product_and_several_of_queries() -> None:
    for model, sizes in SMALL.items():
        rows = sizes["batch_size"] * (1 if model == "mlp" else sizes["block_size"])
        largest = max(math.prod(spec.shape) for spec in config("fp32", model, SMALL).make_model().parameters.values())
        assert rows * largest <= WHOLE
    assert QUERIES < SMALL["gpt"]["block_size"] < 2 * QUERIES


def assert_agrees(found: Trained, correct: list[Trained]) -> None:
    """Equal loss scales, skips and numbers of updates; losses and weights as near as other orders of sums."""
    reference = correct[0]
    assert found.counts == reference.counts
    for of in (lambda run: run.losses, lambda run: run.weights):
        assert distance(of(found), of(reference)) <= bound([of(run) for run in correct], finest(of(reference)))


@pytest.mark.parametrize(("recipe", "model"), others_slow(
    (case for case in itertools.product(RECIPES, MODELS) if case not in EXPLODES), plain=PLAIN
))  # fmt: skip
def test_twenty_steps_agree(recipe: str, model: str) -> None:
    c = config(recipe, model)
    correct = [train(c, backend) for backend in CORRECT]
    assert_agrees(train(c, NUMPY), correct)
    if c.loss_scale == "dynamic":  # all that the loss scale can do happens
        scales, skipped = zip(*correct[0].counts[:-1], strict=True)
        assert any(skipped) and not all(skipped) and any(b > a for a, b in itertools.pairwise(scales))


# ------------------------------------------------------------------------------------------- each step from the same weights


@dataclass(frozen=True)
class Start:
    """Where a step of the reference began."""

    batch: Batch
    S: Array
    weights: Array


def starts(c: Config) -> list[Start]:
    """Those of the steps that were not skipped."""
    training, found = started(c, REFERENCE), list[Start]()
    for batch in batches(c):
        training.state.weights_down()
        start = Start(batch, training.loss_scale.scale, training.state.weights.copy())
        if not training.step([batch]).skipped:
            found.append(start)
    return found


def from_these(c: Config, backend: Backend, starts: list[Start]) -> dict[str, Array]:
    """The losses, and the gradients of all steps by parameter: in thirds, since attention's has the rows of q, k and v."""
    training, losses, found = started(c, backend), list[Array](), dict[str, list[Array]]()
    with np.errstate(all="ignore"):
        for start in starts:
            training.state.weights[...] = start.weights
            losses.append(forward_backward(training.model, [start.batch], training.state, start.S, training.run))
            for name, gradient in training.state.grad_views.items():
                for i, part in enumerate(np.array_split(fp64(gradient).reshape(-1) / float(start.S), 3)):
                    found.setdefault(f"{name} {i}", []).append(part)
    return {"loss": np.array(losses), **{name: np.stack(parts) for name, parts in found.items()}}


@dataclass
class FromTheSameWeights:
    """Steps of the reference: where they start, and the losses and gradients of correct runs from there."""

    config: Config
    starts: list[Start]
    correct: list[dict[str, Array]]

    def outside(self, backend: Backend) -> dict[str, float]:
        """Return what a backend computes that no order of sums does, with its distance in multiples of the bound."""
        low = self.config.make_recipe().policy.row("linear.y").out  # gradients that autocast keeps in FP32 were rounded to it
        ratios = {}
        for name, x in from_these(self.config, backend, self.starts).items():
            correct = [run[name] for run in self.correct]
            ratios[name] = distance(x, correct[0]) / bound(correct, finest(x) if name == "loss" else low)
        return {name: ratio for name, ratio in ratios.items() if ratio > 1}


@functools.cache
def steps_of(recipe: str, model: str) -> FromTheSameWeights:
    c = config(recipe, model)
    at = starts(c)
    assert len(at) >= STEPS // 2
    return FromTheSameWeights(c, at, [from_these(c, backend, at) for backend in CORRECT])


@pytest.mark.parametrize(("recipe", "model"), others_slow(
    itertools.product(IN_FORMATS, MODELS), plain={("fp16", "mlp"), ("amp-bf16", "mlp")}
))  # fmt: skip
def test_steps_from_the_same_weights_agree(recipe: str, model: str) -> None:
    assert steps_of(recipe, model).outside(NUMPY) == {}


# --------------------------------------------------------------------------------------------------- that these can fail

Wrong = Callable[[Array, Array], Array]


def missing(x: Array, y: Array) -> Array:
    return x


def toward_zero(x: Array, y: Array) -> Array:
    """Where rounding went away from zero, one code back."""
    return (y.view(np.uint16) - (np.abs(fp64(y)) > np.abs(fp64(x))).astype(np.uint16)).view(y.dtype)


def sites_of(recipe: str, model: str) -> list[str]:
    """Where the fast versions of a model round."""
    found, c, right = dict[str, None](), config(recipe, model), OpPrecision.round_to

    def noting(self: OpPrecision, x: Array, fmt: str, site: str) -> Array:
        if self.op.partition(".")[0] in NUMPY.ops and not widens_to(format_of(x), fmt):
            found[f"{self.op}.{site}"] = None
        return right(self, x, fmt, site)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpPrecision, "round_to", noting)
        started(c, NUMPY).step(batches(c)[:1])
    return list(found)


def switch_on(wrong: Wrong, at: str, patch: pytest.MonkeyPatch) -> None:
    """Make the rounding of one site a wrong one."""
    right = OpPrecision.round_to

    def round_to(self: OpPrecision, x: Array, fmt: str, site: str) -> Array:
        y = right(self, x, fmt, site)
        return wrong(x, y) if f"{self.op}.{site}" == at and not widens_to(format_of(x), fmt) else y

    patch.setattr(OpPrecision, "round_to", round_to)


@pytest.mark.parametrize("site", ["linear.y.y", "linear.dx.dx", "attention.values.P"])
def test_a_missing_rounding_of_a_fast_version_is_noticed(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, where FP32 values flow on; in a recipe of one format the next operation makes up for it."""
    steps = steps_of("amp-bf16", "gpt")
    switch_on(missing, site, monkeypatch)
    assert steps.outside(NUMPY) != {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "amp-bf16"])
def test_every_rounding_of_a_fast_version_that_goes_the_wrong_way_is_noticed(recipe: str) -> None:
    """In FP16, 8 times finer, most are too; test_mutants.py finds all of them there, operation by operation."""
    steps, missed = steps_of(recipe, "gpt"), []
    for site in sites_of(recipe, "gpt"):
        with pytest.MonkeyPatch.context() as patch:
            switch_on(toward_zero, site, patch)
            found = steps.outside(NUMPY)
        print(f"{recipe} {site}: {max(found.values(), default=0):.1f}")
        missed += [site] * (not found)
    assert missed == []


@pytest.mark.parametrize("site", ["add.y", "gelu_tanh.dx", "linear.db.db"])
def test_a_wrong_rounding_changes_bits_where_the_order_is_the_same(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config("fp16", "gpt", SMALL)
    right = train(c, REFERENCE).buffers
    switch_on(toward_zero, site, monkeypatch)
    wrong = train(c, SAME_ORDER).buffers
    assert all(wrong[kind] != right[kind] for kind in ("master", "m", "v"))


def test_a_wrong_rounding_is_noticed_in_free_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    c = config("bf16", "gpt")
    correct = [train(c, backend) for backend in CORRECT]
    switch_on(toward_zero, "layernorm.y", monkeypatch)
    with pytest.raises(AssertionError):
        assert_agrees(train(c, NUMPY), correct)


def test_another_number_of_skipped_steps_is_noticed() -> None:
    c = config("fp16", "gpt", SMALL)
    run = train(c, REFERENCE)
    other = train(Config.of({**vars(c), "init_scale": 2.0**20}), REFERENCE)
    assert sum(skipped for _, skipped in run.counts[:-1]) != sum(skipped for _, skipped in other.counts[:-1])
    with pytest.raises(AssertionError):
        assert_agrees(other, [run, run])
