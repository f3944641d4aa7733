"""Training runs of a comparison of recipes.

Under each recipe the same model starts from the same weights and trains on the same batches. The runs make their steps in
turn, so that other load on the machine affects all of them, and an interrupted comparison has fewer steps. Runs that start from
a checkpoint or a Hugging Face folder may be too large for that: they are made one after another, and an interrupted
comparison has fewer recipes. Additional runs of FP32 answer two questions about a difference of losses:

    Is this recipe different from FP32 on these batches?    FP32 on the same batches, from weights changed in their last bit.
                                                            Such runs drift apart, since training is chaotic; a recipe that
                                                            drifts no further cannot be distinguished from FP32.
    Would another seed matter more?                         FP32 with other seeds: other weights and other batches; other
                                                            batches alone if all start from a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from refimpl.errors import UsageError
from refimpl.precision.policy import Policy
from refimpl.precision.recipes import RECIPES, Recipe, get_recipe
from refimpl.tools.memory.measure import forget_peak, process_memory
from refimpl.training.config import Config
from refimpl.training.data import Corpus, sample_batch
from refimpl.training.evaluate import text_loss, validation_batches
from refimpl.training.huggingface.weights import Converted
from refimpl.training.init_from import First
from refimpl.training.memory_limits import need, require_memory
from refimpl.training.progress_bar import Tick
from refimpl.training.setup import BATCHES, INIT, generator, start
from refimpl.training.signals import say

BASELINE = "fp32"
DEFAULT = ("fp32", "fp16", "bf16", "amp-bf16", "pure-bf16", "bf16-sr", "bf16-kahan", "fp8", "mxfp8", "nvfp4")
COUNT_EVERY = 20
"""The number of steps between comparisons of the weights with those before the step."""
LAST = 10
"""The final loss is the mean over the last 1/LAST of the steps; curves are smoothed over as many."""


STOPPING = "stopping: the comparison of the steps that all runs have taken follows; again to stop at once"
STOPPING_BETWEEN = "stopping: the comparison of the recipes that have taken all steps follows"
PERTURBATIONS = 3
"""FP32 runs from weights changed in their last bit."""
_PERTURBATION = 1000  # random streams from this number on: training uses none of them


@dataclass
class RecipeRun:
    """A run under one recipe, and its results so far. `ended`: why it makes no more steps, or ''.

    perturbation: 0 to start from the initial weights; 1, 2, ... for different changes of their last bits. first: weights to
    start from, in place of new ones.
    val_loss, bits_per_byte: the validation loss in nats per token, and the same per byte. unit: what a token is called.
    bytes_per_parameter: the measured size of the states' buffers. peak: the largest resident memory of this process during the
    run, None where it is not known, or other runs were there.
    """

    config: Config
    perturbation: int = 0
    first: First | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    skipped: int = 0
    ended: str = ""
    val_loss: float = float("nan")
    bits_per_byte: float = float("nan")
    unit: str = "byte"
    peak: int | None = None

    def __post_init__(self) -> None:
        self.training = start(self.config, first=self.first)
        self.batches = generator(self.config.seed, BATCHES)
        model, state = self.training.model, self.training.state
        self.n_params, self.bytes_per_parameter = model.n_params, state.nbytes / model.n_params
        if self.perturbation:
            weights = self.first[1].weights if self.first else model.initial_weights(generator(self.config.seed, INIT))
            rng = generator(self.config.seed, _PERTURBATION + self.perturbation)
            state.load_weights(Converted(weights, lambda name, x: perturbed(x, rng)))

    @property
    def recipe(self) -> Recipe:
        """Return the recipe of this run."""
        return get_recipe(self.config.recipe)

    def step(self, corpus: Corpus) -> None:
        """Make one step and time it; every COUNT_EVERY steps, also count the weights that it changed."""
        if self.ended:
            return
        config, state = self.config, self.training.state
        sizes = config.batch_size, config.block_size
        batches = [sample_batch(corpus.train, *sizes, self.batches, config.no_target) for _ in range(config.grad_accum)]
        counted = len(self.losses) % COUNT_EVERY == COUNT_EVERY - 1
        before = np.array(state.values(state.master_kind)) if counted else None
        started = time.perf_counter()
        result = self.training.step(batches)
        loss, skipped = float(result.loss), bool(result.skipped)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss)
        self.skipped += skipped
        if before is not None and not skipped:
            self.moved.append(float(np.mean(state.values(state.master_kind) != before)))
        if skipped and config.loss_scale == "none":
            self.ended = f"Inf or NaN at step {len(self.losses)}"

    def finish(self, corpus: Corpus, seed: int) -> None:
        """Compute the validation loss; `seed` chooses the batches, the same for all runs."""
        batches = validation_batches(self.config, corpus, seed)
        self.training.state.weights_down()
        loss = text_loss(self.training.model, self.training.state, self.training.run, batches)
        self.val_loss, self.bits_per_byte, self.unit = loss.nats_per_token, loss.bits_per_byte, corpus.tokenizer.unit


def perturbed(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return weights moved to the next FP32 number above or below, at random: the smallest possible change."""
    towards = np.where(rng.integers(0, 2, weights.shape) == 1, np.float32(np.inf), np.float32(-np.inf))
    return np.asarray(np.nextafter(weights, towards))


@dataclass(frozen=True)
class Comparison:
    """All runs: one per recipe, FP32 first; FP32 with other seeds; and FP32 from weights changed in their last bit."""

    runs: Sequence[RecipeRun]
    others: Sequence[RecipeRun]
    changed: Sequence[RecipeRun]

    @property
    def has_peaks(self) -> bool:
        """Return whether the peak of memory is known of any run."""
        return any(run.peak for run in self.runs)

    @property
    def seeded(self) -> str:
        """Return what another seed changes."""
        return "weights and batches" if self.runs[0].first is None else "batches"

    @property
    def seconds(self) -> float:
        """Return the time of all steps of all runs."""
        return sum(sum(run.seconds) for run in (*self.runs, *self.others, *self.changed))

    @property
    def drift(self) -> float:
        """Return the largest difference between validation losses of FP32 from weights that differ in their last bit.

        A larger difference means that a recipe is different from FP32 on these batches.
        """
        losses = [run.val_loss for run in (self.runs[0], *self.changed)]
        return max(losses) - min(losses)

    @property
    def steps(self) -> int:
        """Return the number of steps of the FP32 run."""
        return len(self.runs[0].losses)

    @property
    def noise(self) -> float:
        """Return the largest difference between validation losses of FP32 with different seeds.

        A smaller difference means that another seed would matter more than the recipe.
        """
        losses = [run.val_loss for run in (self.runs[0], *self.others)]
        return max(losses) - min(losses)

    @property
    def width(self) -> int:
        """Return the number of steps that a smoothed loss is the mean of."""
        return max(1, self.steps // LAST)

    def smooth(self, losses: Sequence[float]) -> np.ndarray:
        """Return running means of losses over a tenth of the steps, each at the last step that it includes."""
        width = min(len(losses), self.width)
        return np.asarray(np.convolve(losses, np.full(width, 1 / width), "valid"))

    def difference(self, run: RecipeRun) -> np.ndarray:
        """Return a run's smoothed loss minus FP32's on the same batches, up to the run's last step."""
        return self.smooth(np.subtract(run.losses, self.runs[0].losses[: len(run.losses)]).tolist())

    def band(self) -> np.ndarray:
        """Return, per step, the largest difference between smoothed losses of FP32 with different seeds."""
        return np.asarray(np.ptp([self.smooth(run.losses) for run in (self.runs[0], *self.others)], axis=0))

    def drift_band(self) -> np.ndarray:
        """Return, per step, the largest difference between smoothed losses of FP32 from weights differing in their last bit."""
        return np.asarray(np.ptp([self.smooth(run.losses) for run in (self.runs[0], *self.changed)], axis=0))


def chosen_recipes(text: str) -> list[str]:
    """Return the recipes of a comma-separated list, FP32 first, each once. 'all': those that do not emulate an accumulator.

    Errors: UsageError for an unknown name or an empty list.
    """
    names: list[str] = [BASELINE]
    for word in filter(None, (word.strip() for word in text.split(","))):
        fast = [name for name, recipe in RECIPES.items() if _is_fast(recipe.policy)]
        names += fast if word == "all" else [get_recipe(word).name]
    if len(names) == 1:
        raise UsageError(f"--recipes names none: give 'all', or some of {', '.join(RECIPES)}")
    return list(dict.fromkeys(names))


def _is_fast(policy: Policy) -> bool:
    """Return whether the BLAS computes all sums; other accumulators are emulated, dozens of times as slowly."""
    return all(row.acc in ("fp32", "fp64") for row in policy.rows.values())


def compare(
    config: Config,
    recipes: Sequence[str],
    seeds: int,
    tick: Tick,
    perturbations: int = PERTURBATIONS,
    first: First | None = None,
    ended: Callable[[RecipeRun], Any] = lambda run: None,
) -> Comparison:
    """Train under each recipe.

    config: the FP32 run. seeds: number of FP32 runs with different seeds. perturbations: number of FP32 runs from weights
    changed in their last bit. tick: callback after each step of all runs, or with `first` of one. first: weights to start from.
    ended: with `first`, callback after each run.
    Ctrl-C ends the comparison after the steps that all runs made, or with `first` after the recipes that made all steps.
    Errors: UsageError for fewer than 2 seeds or 1 perturbation, or if memory cannot hold the runs; KeyboardInterrupt if there
    is nothing to compare yet.
    """
    if seeds < 2:
        raise UsageError(f"--seeds is {seeds}: it must be at least 2, to compare two runs")
    if perturbations < 1:
        raise UsageError(f"--perturbations is {perturbations}: it must be at least 1")
    configs = [for_recipe(config, name) for name in recipes]
    others = [replace(config, seed=config.seed + i) for i in range(1, seeds)]
    makers = [partial(RecipeRun, each, first=first) for each in (config, *others)]
    makers += [partial(RecipeRun, config, i, first) for i in range(1, perturbations + 1)]
    makers += [partial(RecipeRun, each, first=first) for each in configs[1:]]
    needs = [need(maker.args[0]) for maker in makers]
    for together in [needs] if first is None else [[one] for one in needs]:
        require_memory(together, "the comparison")
    corpus = config.make_corpus()
    runs = _in_turn(makers, config, corpus, tick) if first is None else _one_by_one(makers, config, corpus, tick, ended)
    if len(runs) < seeds + perturbations:
        raise KeyboardInterrupt
    return Comparison([runs[0], *runs[seeds + perturbations :]], runs[1:seeds], runs[seeds : seeds + perturbations])


Makers: TypeAlias = Sequence[Callable[[], RecipeRun]]


def _in_turn(makers: Makers, config: Config, corpus: Corpus, tick: Tick) -> list[RecipeRun]:
    """Return all runs after the steps that all of them made, one step of each at a time; [] if they made none."""
    runs = [make() for make in makers]
    try:
        for _ in range(config.steps):
            for run in runs:
                run.step(corpus)
            tick()
    except KeyboardInterrupt:
        say(STOPPING)
        finished = min(len(run.losses) for run in runs if not run.ended)
        if not finished:
            return []
        for run in runs:
            del run.losses[finished:]
    for run in runs:
        run.finish(corpus, config.seed)
    return runs


def _one_by_one(
    makers: Makers, config: Config, corpus: Corpus, tick: Tick, ended: Callable[[RecipeRun], Any]
) -> list[RecipeRun]:
    """Return the runs that made all steps, each of which was alone in memory, with its peak."""
    runs: list[RecipeRun] = []
    try:
        for make in makers:
            known = forget_peak()
            run = make()
            for _ in range(config.steps):
                run.step(corpus)
                tick()
            run.finish(corpus, config.seed)
            memory = process_memory() if known else None
            run.peak = memory and memory[1]
            del run.training
            runs.append(run)
            ended(run)
    except KeyboardInterrupt:
        say(STOPPING_BETWEEN)
    return runs


def for_recipe(config: Config, name: str) -> Config:
    """Return the configuration of the same run under another recipe, with that recipe's loss scale."""
    return replace(config, recipe=name, loss_scale=get_recipe(name).loss_scale)
