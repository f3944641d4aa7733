"""The table of all experiments, and the `experiments` command. Each experiment takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refimpl.errors import UsageError, unknown
from refimpl.tools.experiments.breaks import EPSILON, MASKS
from refimpl.tools.experiments.experiment import Experiment, Result
from refimpl.tools.experiments.moments import RARE_ROWS
from refimpl.tools.experiments.narrow import ACCUMULATORS_OF_HARDWARE, MX_SCALES
from refimpl.tools.experiments.toy_runs import ALL_RECIPES, MASTERS, TINY_LOSS
from refimpl.tools.experiments.updates import HUNDRED_UPDATES, MOVED_WEIGHTS
from refimpl.tools.experiments.values import ACCUMULATE, FLUSH, LOST_UPDATE
from refimpl.training.checkpoint import write_atomically
from refimpl.training.columns import table
from refimpl.training.pictures import NO_PICTURE, new_figure, save
from refimpl.training.progress_bar import ProgressBar

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        FLUSH, LOST_UPDATE, HUNDRED_UPDATES, MOVED_WEIGHTS, ACCUMULATE, ACCUMULATORS_OF_HARDWARE, MX_SCALES, MASKS, EPSILON,
        RARE_ROWS, TINY_LOSS, MASTERS, ALL_RECIPES,
    )
}  # fmt: skip


SLOW = 2.0
"""Seconds after which an experiment shows its progress."""


def show_experiments(names: Sequence[str], out: Path, seed: int, quiet: bool = False) -> None:
    """List the experiments, or run those named ('all': every one) and draw them in the folder `out`. quiet: show no progress.

    Errors: UsageError for an unknown name, a negative seed, or a folder that cannot be written.
    """
    chosen = list(EXPERIMENTS) if list(names) == ["all"] else list(dict.fromkeys(names))
    for name in chosen:
        if name not in EXPERIMENTS:
            raise UsageError(unknown("experiment", name, [*EXPERIMENTS, "all"]))
    if seed < 0:
        raise UsageError(f"--seed is {seed}: it must be 0 or more")
    if not chosen:
        rows = [[e.name, e.question, e.source] for e in EXPERIMENTS.values()]
        print(table(["experiment", "question", "source"], rows) + "\n\ngive the names of those to run, or 'all'")
    for name in chosen:
        experiment = EXPERIMENTS[name]
        with ProgressBar(experiment.steps, "step", delay=SLOW, quiet=quiet or not experiment.steps, stays=False) as bar:
            result = experiment.run(seed, bar.update) if experiment.steps else experiment.run(seed)
        print(f"{experiment.name}: {experiment.question}\n\n{table(result.header, result.rows, '  ')}\n")
        print(f"Conclusion: {result.conclusion}.")
        print(_drawn(draw(experiment, result, out, seed)), end="\n\n" if name != chosen[-1] else "\n")


def _drawn(path: Path | None) -> str:
    return f"drawn: {path}" if path else NO_PICTURE


def draw(experiment: Experiment, result: Result, folder: Path, seed: int = 0) -> Path | None:
    """Draw a result to `folder/NAME.png`, or NAME-seed1.png for seed 1, and return the path; None without matplotlib.

    Errors: UsageError if the folder cannot be written.
    """
    figure = new_figure(7, 4.5)
    if figure is None:
        return None
    axes = figure.subplots()
    experiment.draw(axes, result.data)
    axes.set_title(experiment.question)
    axes.grid(alpha=0.3)
    path = folder / f"{experiment.name}{f'-seed{seed}' if seed else ''}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {folder}: {error.strerror}") from error
    write_atomically(path, lambda temporary: save(figure, temporary))
    return path
