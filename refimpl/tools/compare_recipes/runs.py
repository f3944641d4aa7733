"""Training runs of a comparison of recipes.

Under each recipe the same model starts from the same weights and trains on the same batches. The runs make their steps in
turn, so that other load on the machine affects all of them, and an interrupted comparison has fewer steps. Additional runs of
FP32 answer two questions about a difference of losses:

    Is this recipe different from FP32 on these batches?    FP32 on the same batches, from weights changed in their last bit.
                                                            Such runs drift apart, since training is chaotic; a recipe that
                                                            drifts no further cannot be distinguished from FP32.
    Would another seed matter more?                         FP32 with other seeds: other weights and other batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.precision.policy import Policy
from refimpl.precision.recipes import RECIPES, Recipe, get_recipe
from refimpl.training.config import Config
from refimpl.training.data import Corpus, sample_batch
from refimpl.training.evaluate import text_loss, validation_batches
from refimpl.training.memory_limits import need, require_memory
from refimpl.training.setup import BATCHES, INIT, generator, start
from refimpl.training.signals import say

BASELINE = "fp32"
DEFAULT = ("fp32", "fp16", "bf16", "amp-bf16", "pure-bf16", "bf16-sr", "bf16-kahan", "fp8", "mxfp8", "nvfp4")
COUNT_EVERY = 20
"""The number of steps between comparisons of the weights with those before the step."""
LAST = 10
"""The final loss is the mean over the last 1/LAST of the steps; curves are smoothed over as many."""


STOPPING = "stopping: the comparison of the steps that all runs have taken follows; again to stop at once"
PERTURBATIONS = 3
"""FP32 runs from weights changed in their last bit."""
_PERTURBATION = 1000  # random streams from this number on: training uses none of them


@dataclass
class RecipeRun:
    """A run under one recipe, and its results so far. `ended`: why it makes no more steps, or ''.

    val_loss, bits_per_byte: the validation loss in nats per token, and the same per byte. unit: what a token is called.
    perturbation: 0 to start from the initial weights; 1, 2, ... for different changes of their last bits.
    """

    config: Config
    perturbation: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    skipped: int = 0
    ended: str = ""
    val_loss: float = float("nan")
    bits_per_byte: float = float("nan")
    unit: str = "byte"

    def __post_init__(self) -> None:
        self.training = start(self.config)
        self.batches = generator(self.config.seed, BATCHES)
        if self.perturbation:
            weights = self.training.model.initial_weights(generator(self.config.seed, INIT))
            rng = generator(self.config.seed, _PERTURBATION + self.perturbation)
            self.training.state.load_weights({name: perturbed(x, rng) for name, x in weights.items()})

    @property
    def recipe(self) -> Recipe:
        """Return the recipe of this run."""
        return get_recipe(self.config.recipe)

    @property
    def bytes_per_parameter(self) -> float:
        """Return the measured size of the states' buffers per parameter."""
        return self.training.state.nbytes / self.training.model.n_params

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

    def smooth(self, losses: Sequence[float]) -> np.ndarray:
        """Return running means of losses over a tenth of the steps, each at the last step that it includes."""
        width = min(len(losses), max(1, self.steps // LAST))
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
    config: Config, recipes: Sequence[str], seeds: int, tick: Callable[[], Any], perturbations: int = PERTURBATIONS
) -> Comparison:
    """Train under each recipe.

    config: the FP32 run. seeds: number of FP32 runs with different seeds. perturbations: number of FP32 runs from weights
    changed in their last bit. tick: callback after each step. Ctrl-C ends the comparison after the steps that all runs made.
    Errors: UsageError for fewer than 2 seeds or 1 perturbation, or if memory cannot hold all runs; KeyboardInterrupt if no
    step was finished.
    """
    if seeds < 2:
        raise UsageError(f"--seeds is {seeds}: it must be at least 2, to compare two runs")
    if perturbations < 1:
        raise UsageError(f"--perturbations is {perturbations}: it must be at least 1")
    configs = [for_recipe(config, name) for name in recipes]
    others_configs = [replace(config, seed=config.seed + i) for i in range(1, seeds)]
    require_memory([need(each) for each in (*configs, *others_configs, *[config] * perturbations)], "the comparison")
    corpus = config.make_corpus()
    runs, others = [RecipeRun(each) for each in configs], [RecipeRun(each) for each in others_configs]
    changed = [RecipeRun(config, i) for i in range(1, perturbations + 1)]
    everyone = (*runs, *others, *changed)
    try:
        for _ in range(config.steps):
            for run in everyone:
                run.step(corpus)
            tick()
    except KeyboardInterrupt:
        say(STOPPING)
        finished = min(len(run.losses) for run in everyone if not run.ended)
        if not finished:
            raise
        for run in everyone:
            del run.losses[finished:]
    for run in everyone:
        run.finish(corpus, config.seed)
    return Comparison(runs, others, changed)


def for_recipe(config: Config, name: str) -> Config:
    """Return the configuration of the same run under another recipe, with that recipe's loss scale."""
    return replace(config, recipe=name, loss_scale=get_recipe(name).loss_scale)


HEADER = ("recipe", "bytes", "loss", "validation", "minus fp32", "skipped", "moved", "ms per step")


def rows(comparison: Comparison) -> Iterator[list[str]]:
    """Yield one row per recipe. One asterisk marks a difference from FP32, two a difference larger than that of seeds."""
    baseline = comparison.runs[0]
    for run in comparison.runs:
        yield [
            run.config.recipe,
            f"{run.bytes_per_parameter:.4g}",
            f"{comparison.smooth(run.losses)[-1]:.4f}",
            f"{run.val_loss:.4f}",
            run.ended or ("" if run is baseline else _marked(run.val_loss - baseline.val_loss, comparison)),
            str(run.skipped),
            f"{100 * float(np.mean(run.moved)):.1f} %" if run.moved else "-",
            f"{1e3 * median(run.seconds):.0f}",
        ]


def _marked(difference: float, comparison: Comparison) -> str:
    """Return a difference with its asterisks and four decimals, or with one digit if these would all be 0."""
    text = f"{difference:+.0e}" if 0 < abs(difference) < 0.00005 else f"{difference:+.4f}"
    if abs(difference) <= comparison.drift:
        return text
    return text + (" *" if abs(difference) <= comparison.noise else " **")


def meaning(comparison: Comparison) -> list[str]:
    """Return sentences that explain the columns."""
    baseline, seeds, width = comparison.runs[0], 1 + len(comparison.others), max(1, comparison.steps // LAST)
    more = len(comparison.others) + len(comparison.changed)
    return [
        f"{comparison.steps} steps from the same weights on the same batches. loss: the mean of the last {width} steps. "
        f"validation: in nats per {baseline.unit}, on the same {baseline.config.eval_batches} batches for all; "
        f"FP32's is {baseline.bits_per_byte:.4f} bits per byte.",
        f"*: {IS_DIFFERENT} Yes: its validation loss differs from FP32's by more than {comparison.drift:.2g}, the largest "
        f"difference between FP32 runs on the same batches whose initial weights are changed in their last bit "
        f"({_times(len(comparison.changed))}).",
        f"{MATTERS_MORE} Yes, unless there are two asterisks: the validation losses of FP32 with {seeds} seeds, that is other "
        f"weights and batches, differ by up to {comparison.noise:.2g}.",
        f"bytes: model states per parameter, as measured. moved: share of the weights (or masters) that an update changed, "
        f"at every {COUNT_EVERY}th step. Times are of NumPy on this machine, without 16-bit or 8-bit arithmetic: fewer "
        f"bits are slower here, but faster on a device that has it. All steps took {comparison.seconds:.0f} s, of which the "
        f"{more} additional FP32 runs took {sum(sum(run.seconds) for run in (*comparison.others, *comparison.changed)):.0f} s.",
    ]


IS_DIFFERENT = "Is this recipe different from FP32 on these batches?"
MATTERS_MORE = "Would another seed matter more?"
"""The two questions; FP32 runs from changed weights answer the first, those with other seeds the second."""


def _times(n: int) -> str:
    return f"{n} time{'s' * (n != 1)}"
