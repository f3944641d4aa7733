"""The `compare_recipes` command: trains, prints the table, and writes the page `recipes.html`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.tools.compare_recipes.runs import BASELINE, DEFAULT, PERTURBATIONS, Comparison, RecipeRun, chosen_recipes, compare
from refimpl.tools.compare_recipes.tables import IS_DIFFERENT, MATTERS_MORE, header, loss_rows, meaning, one_line_of, rows
from refimpl.training.columns import table as text_table
from refimpl.training.config import Config
from refimpl.training.console import json_text
from refimpl.training.html.figures import Picture, as_svg, legend_above
from refimpl.training.html.made import Made, made_now
from refimpl.training.html.page import document, figures, paragraphs, section, table
from refimpl.training.init_from import settings_from
from refimpl.training.outputs import target
from refimpl.training.palette import GRAY, colors_of
from refimpl.training.progress_bar import ProgressBar

PAGE = Path("runs/recipes.html")
STEPS, STEPS_OF_ALL, STEPS_FROM, WARMUP = 200, 60, 20, 10
"""Defaults of --steps (fewer with all recipes, and with --init-from) and --warmup."""


def compare_recipes(
    given: Mapping[str, Any],
    recipes: str | None,
    seeds: int,
    out: Path | None,
    no_page: bool,
    json_file: Path | None,
    command: str,
    perturbations: int = PERTURBATIONS,
    overwrite: bool = False,
    init_from: Path | None = None,
    quiet: bool = False,
) -> None:
    """Train, print the tables, and write the page and the data.

    given: fields of Config. recipes: names with commas between, None for DEFAULT. init_from: a checkpoint or a folder of
    Hugging Face to start from, one recipe after another, each with a line at its end. quiet: show no progress.
    Errors: UsageError before any step.
    """
    recipes = ",".join(DEFAULT) if recipes is None else recipes
    names = chosen_recipes(recipes)
    steps = STEPS_FROM if init_from else STEPS_OF_ALL if "all" in recipes.split(",") else STEPS
    given, first = {"steps": steps, "warmup": WARMUP, **given, "recipe": names[0]}, None
    if init_from is not None:
        given, first = settings_from(init_from, given)
    config = Config.of(given)
    if no_page and out is not None:
        raise UsageError("--no-page and --out contradict each other: choose one")
    if not no_page:
        _need_matplotlib()
    page_file = None if no_page else target("--out", out, PAGE, overwrite)
    data_file = None if json_file is None else target("--json", json_file, json_file, overwrite)
    ticks = config.steps * (1 if first is None else len(names) + seeds - 1 + perturbations)
    with ProgressBar(ticks, "step", quiet=quiet) as bar:

        def ended(run: RecipeRun) -> None:
            if not quiet:
                bar.write(one_line_of(run, config.seed))

        comparison = compare(config, names, seeds, bar.update, perturbations, first, ended)
    print(text_table(header(comparison), list(rows(comparison))), *meaning(comparison), sep="\n")
    print(LOSSES, text_table(*loss_rows(comparison)), sep="\n")
    if data_file is not None:
        print(f"written: {data_file.write_text(json_text(data(comparison)) + chr(10))}")
    if page_file is not None:
        page = recipes_page(comparison, made_now(command, "numpy", "ml_dtypes"))
        print(f"written: {page_file.write_text(page)} (open it in a browser)")


def _need_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise UsageError("the page needs matplotlib: pip install matplotlib (or give --no-page)") from None


def data(comparison: Comparison) -> dict[str, Any]:
    """Return all results as plain data."""
    return {
        "steps": comparison.steps,
        "noise": comparison.noise,
        "drift": comparison.drift,
        "runs": [_run_data(run) for run in (*comparison.runs, *comparison.others)],
        "perturbed": [{"perturbation": run.perturbation, **_run_data(run)} for run in comparison.changed],
    }


def _run_data(run: RecipeRun) -> dict[str, Any]:
    return {
        "recipe": run.config.recipe, "seed": run.config.seed, "losses": run.losses, "val_loss": run.val_loss,
        "val_bits_per_byte": run.bits_per_byte,
        "bytes_per_parameter": run.bytes_per_parameter, "skipped": run.skipped, "moved": run.moved,
        "seconds": run.seconds, "peak": run.peak, "ended": run.ended or None,
    }  # fmt: skip


def recipes_page(comparison: Comparison, made: Made) -> str:
    """Return the page. The same arguments give the same text."""
    described = [[run.config.recipe, run.recipe.summary, run.recipe.source] for run in comparison.runs]
    sections = [
        section(
            "At the end",
            table("All recipes", header(comparison), list(rows(comparison)), sortable=True),
            paragraphs(meaning(comparison)),
        ),
        section(
            "Loss",
            paragraphs([loss_text(comparison)]),
            figures(_pictures(comparison, "loss")),
            table(LOSSES, *loss_rows(comparison)),
        ),
        section(
            "Difference from FP32", paragraphs([difference_text(comparison)]), figures(_pictures(comparison, "difference"))
        ),
        section("The recipes", table("The recipes", ["recipe", "summary", "source"], described, sentences=True)),
    ]
    config = comparison.runs[0].config
    return document(f"Recipes compared: {config.model}, {comparison.runs[0].n_params:,} parameters", sections, made)


LOSSES = "The loss of the batch of a step, before its update:"


def loss_text(comparison: Comparison) -> str:
    """Return the text on the smoothing of the curves."""
    width = comparison.width
    mean = f"The training loss, as the mean of the last {width} steps: one step with a large loss shows as {width} of them. "
    return f"{mean if width > 1 else 'The training loss. '}FP32 is gray in each figure."


def difference_text(comparison: Comparison) -> str:
    """Return the text on the bands in the figures of differences."""
    is_thin = float(comparison.drift_band().max()) < 0.1 * _linear_below(comparison)
    thin = " Here it is no wider than a line." if is_thin else ""
    return (
        f"The smoothed loss minus that of FP32 on the same batches; the axis is linear up to differences of "
        f"{_linear_below(comparison):.1g}, and logarithmic beyond. "
        f"The dark band answers: {IS_DIFFERENT} Its width is the difference between FP32 runs on these batches from weights "
        f"changed in their last bit ({len(comparison.changed)} of them): inside it, a recipe is no different from FP32.{thin} "
        f"The light band answers: {MATTERS_MORE} Its width is the difference between FP32 runs with "
        f"{1 + len(comparison.others)} seeds, that is other {comparison.seeded}: inside it, the seed matters more."
    )


CURVES = 5
"""Curves per figure beside that of FP32."""


def _pictures(comparison: Comparison, what: str) -> list[Picture]:
    """Return figures of CURVES recipes each."""
    runs, result = comparison.runs[1:], []
    for start in range(0, len(runs), CURVES):
        shown = runs[start : start + CURVES]
        names = ", ".join(run.config.recipe for run in shown)

        def draw(axes: Any, shown: Any = shown) -> None:
            _draw(axes, comparison, shown, what)

        said = [f"{run.config.recipe} ended: {run.ended}." for run in shown if run.ended]
        top = _top(comparison, what)
        for run in shown:
            curve = np.abs(_curve(comparison, run, what))
            most = float(np.max(curve, initial=0, where=np.isfinite(curve)))
            if most > top:
                said.append(f"{run.config.recipe} goes beyond the axis, up to {most:.3g}.")
        caption = " ".join(said)
        result.append(Picture(f"{what}-{start}", names, f"{what} of {names} by step", caption, as_svg(f"{what}-{start}", draw)))
    return result


def _draw(axes: Any, comparison: Comparison, shown: Any, what: str) -> None:
    """Draw the curves of some recipes, and FP32's curve or bands for comparison."""

    def steps(curve: np.ndarray, taken: int) -> np.ndarray:
        return np.arange(taken - len(curve) + 1, taken + 1)

    if what == "loss":
        reference = comparison.smooth(comparison.runs[0].losses)
        axes.plot(steps(reference, comparison.steps), reference, color=GRAY, lw=4, label="fp32")
    else:
        bands = (comparison.band(), "#e4e4e4", "fp32, other seeds"), (comparison.drift_band(), "#a8a8a8", "fp32, last bit")
        for band, color, label in bands:
            axes.fill_between(steps(band, comparison.steps), -band, band, color=color, lw=0, label=label)
    _, *colors = colors_of([BASELINE, *(run.config.recipe for run in shown)])
    for i, (run, color) in enumerate(zip(shown, colors, strict=True)):  # curves may cover each other: later ones are thinner
        curve = _curve(comparison, run, what)
        axes.plot(steps(curve, len(run.losses)), curve, color=color, lw=3 - 0.5 * i, label=run.config.recipe)
    top = _top(comparison, what)
    if what == "difference":
        axes.set_yscale("symlog", linthresh=_linear_below(comparison))
        axes.set_ylim(-top, top)
        axes.set_yticks(*_ticks(_linear_below(comparison), top))
        axes.set_yticks([], minor=True)
    else:
        least = np.nanmin([np.nanmin(line.get_ydata()) for line in axes.lines])
        axes.set_ylim(least - 0.05 * (top - least), min(axes.get_ylim()[1], top))
    axes.set_xlabel("step")
    axes.set_ylabel(f"nats per {comparison.runs[0].unit}")
    legend_above(axes)


def _curve(comparison: Comparison, run: RecipeRun, what: str) -> np.ndarray:
    return comparison.smooth(run.losses) if what == "loss" else comparison.difference(run)


def _top(comparison: Comparison, what: str) -> float:
    """Return the end of the vertical axis: a run that diverges must not flatten the others."""
    if what == "loss":
        return 1.2 * float(comparison.smooth(comparison.runs[0].losses).max())
    return 4 * float(comparison.band()[-1])


def _linear_below(comparison: Comparison) -> float:
    """Return the difference up to which the axis of differences is linear."""
    return max(float(comparison.drift_band()[-1]), 1e-4 * _top(comparison, "difference"))


def _ticks(least: float, top: float) -> tuple[list[float], list[str]]:
    """Return places and labels of ticks: 0 and some powers of ten on both sides, so few that their labels do not touch."""
    first, last = math.ceil(math.log10(least)), math.floor(math.log10(top))
    exponents = range(last, first - 1, -max(1, math.ceil((last - first + 1) / 3)))
    sides = [(sign * 10.0**e, f"${mark}10^{{{e}}}$") for e in exponents for sign, mark in ((-1, "-"), (1, ""))]
    return [0.0, *(at for at, _ in sides)], ["0", *(label for _, label in sides)]
