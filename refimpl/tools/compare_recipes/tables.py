"""The table of a comparison of recipes, and the sentences that explain it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy as np

from refimpl.tools.compare_recipes.runs import COUNT_EVERY, Comparison, RecipeRun
from refimpl.training.console import count
from refimpl.training.memory_limits import GIB

HEADER = ("recipe", "bytes", "loss", "validation", "minus fp32", "skipped", "moved", "ms per step")
PEAK = "peak GiB"


def header(comparison: Comparison) -> list[str]:
    """Return the headings of `rows`: the peak of memory is among them where runs were alone in memory."""
    return [*HEADER, *([PEAK] if comparison.has_peaks else [])]


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
            *([f"{run.peak / GIB:.2f}" if run.peak else "-"] if comparison.has_peaks else []),
        ]


def loss_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the loss of each recipe at steps 1, 2, 5, 10, 20, ... and the last; '-' after a run's end.

    The loss of a step is that of its batch before the update: at step 1 it is that of the first weights.
    """
    series = (digit * 10**k for k in range(len(str(comparison.steps))) for digit in (1, 2, 5))
    steps = [*(step for step in series if step < comparison.steps), comparison.steps]
    lines = [
        [run.config.recipe, *(f"{run.losses[step - 1]:.4f}" if step <= len(run.losses) else "-" for step in steps)]
        for run in comparison.runs
    ]
    return ["recipe", *(f"step {step}" for step in steps)], lines


def one_line_of(run: RecipeRun, seed: int) -> str:
    """Return the line on a run that is done. seed: of the comparison; additional FP32 runs have others, or changed weights."""
    changed = f", last bits changed ({run.perturbation})" if run.perturbation else ""
    other = f", seed {run.config.seed}" if run.config.seed != seed else ""
    end = f", {run.ended}" if run.ended else ""
    return (
        f"{run.config.recipe}{other}{changed}: loss {run.losses[-1]:.4f}, validation {run.val_loss:.4f}{end}, "
        f"{sum(run.seconds):.0f} s"
    )


def _marked(difference: float, comparison: Comparison) -> str:
    """Return a difference with its asterisks and four decimals, or with one digit if these would all be 0."""
    text = f"{difference:+.0e}" if 0 < abs(difference) < 0.00005 else f"{difference:+.4f}"
    if abs(difference) <= comparison.drift:
        return text
    return text + (" *" if abs(difference) <= comparison.noise else " **")


def meaning(comparison: Comparison) -> list[str]:
    """Return sentences that explain the columns."""
    baseline, seeds, width = comparison.runs[0], 1 + len(comparison.others), comparison.width
    more = len(comparison.others) + len(comparison.changed)
    of_loss = f"the mean of the last {width} steps" if width > 1 else "that of the last step"
    return [
        f"{count(comparison.steps, 'step')} from the same weights on the same batches. loss: {of_loss}. "
        f"validation: in nats per {baseline.unit}, on the same {baseline.config.eval_batches} batches for all; "
        f"FP32's is {baseline.bits_per_byte:.4f} bits per byte.",
        f"*: {IS_DIFFERENT} Yes: its validation loss differs from FP32's by more than {comparison.drift:.2g}, the largest "
        f"difference between FP32 runs on the same batches whose initial weights are changed in their last bit "
        f"({_times(len(comparison.changed))}).",
        f"{MATTERS_MORE} Yes, unless there are two asterisks: the validation losses of FP32 with {seeds} seeds, that is other "
        f"{comparison.seeded}, differ by up to {comparison.noise:.2g}.",
        f"bytes: model states per parameter, as measured. moved: share of the weights (or masters) that an update changed, "
        f"at every {COUNT_EVERY}th step.{PEAKS if comparison.has_peaks else ''} "
        f"Times are of NumPy on this machine, without 16-bit or 8-bit arithmetic: fewer "
        f"bits are slower here, but faster on a device that has it. All steps took {comparison.seconds:.0f} s, of which the "
        f"{more} additional FP32 runs took {sum(sum(run.seconds) for run in (*comparison.others, *comparison.changed)):.0f} s.",
    ]


PEAKS = f" {PEAK}: the largest resident memory of this process during the run, with the file of the first weights."

IS_DIFFERENT = "Is this recipe different from FP32 on these batches?"
MATTERS_MORE = "Would another seed matter more?"
"""The two questions; FP32 runs from changed weights answer the first, those with other seeds the second."""


def _times(n: int) -> str:
    return f"{n} time{'s' * (n != 1)}"
