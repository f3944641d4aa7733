"""scripts/compare_recipes.py: all runs see the same weights and batches, and its numbers are those of runs by themselves."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import LLAMA, tensors_of, write
from script_loader import load_script

from refimpl.errors import UsageError
from refimpl.precision.recipes import RECIPES
from refimpl.tools.compare_recipes import page as page_module
from refimpl.tools.compare_recipes import runs as module
from refimpl.tools.compare_recipes.page import difference_text
from refimpl.tools.compare_recipes.runs import (
    BASELINE,
    PERTURBATIONS,
    Comparison,
    RecipeRun,
    chosen_recipes,
    compare,
    for_recipe,
)
from refimpl.tools.compare_recipes.tables import IS_DIFFERENT, MATTERS_MORE, header, loss_rows, meaning, one_line_of, rows
from refimpl.training.config import Config
from refimpl.training.data import load_corpus, sample_batch
from refimpl.training.evaluate import mean_loss
from refimpl.training.init_from import First, settings_from
from refimpl.training.setup import BATCHES, EVALUATION, generator, start

SIZES: dict[str, Any] = {
    "model": "gpt", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 21, "warmup": 2,
    "eval_batches": 2,
}  # fmt: skip


def config(**more: Any) -> Config:
    return Config.of({**SIZES, "recipe": BASELINE, **more})


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(config(), ["fp32", "fp16", "pure-bf16", "bf16-sr", "fp8-delayed"], 3, lambda: None)


def test_each_run_is_as_it_would_be_alone(comparison: Comparison) -> None:
    for run in (*comparison.runs, *comparison.others):
        alone, corpus = start(run.config), load_corpus(run.config.data, SIZES["block_size"])
        rng = generator(run.config.seed, BATCHES)
        losses = [
            float(alone.step([sample_batch(corpus.train, SIZES["batch_size"], SIZES["block_size"], rng)]).loss)
            for _ in range(SIZES["steps"])
        ]
        assert losses == run.losses
        evaluated, drawn = generator(0, EVALUATION), []
        for _ in range(SIZES["eval_batches"]):
            drawn.append(sample_batch(corpus.valid, SIZES["batch_size"], SIZES["block_size"], evaluated))
        alone.state.weights_down()
        assert run.val_loss == mean_loss(alone.model, alone.state, alone.run, drawn)
        assert run.bytes_per_parameter == pytest.approx(float(run.recipe.bytes_per_parameter()))


def test_recipes_share_seed_and_loss_scale_is_their_own(comparison: Comparison) -> None:
    assert {run.config.seed for run in comparison.runs} == {0} and [run.config.seed for run in comparison.others] == [1, 2]
    assert {run.config.recipe for run in comparison.others} == {BASELINE}
    assert for_recipe(config(), "fp16").loss_scale == "dynamic" and for_recipe(config(), "bf16").loss_scale == "none"
    firsts = [run.losses[0] for run in comparison.runs]
    assert max(firsts) - min(firsts) < 0.05 < abs(firsts[0] - comparison.runs[0].losses[-1])


def test_curves_and_noise(comparison: Comparison) -> None:
    first, others = comparison.runs[0], comparison.others
    width = comparison.steps // 10
    smooth = [float(np.mean(first.losses[i - width : i])) for i in range(width, 22)]
    assert np.allclose(comparison.smooth(first.losses), smooth, rtol=0, atol=1e-12)
    assert (comparison.difference(first) == 0).all() and len(comparison.difference(first)) == len(smooth)
    losses = [first.val_loss, *(run.val_loss for run in others)]
    assert comparison.noise == max(losses) - min(losses) > 0
    ends = [float(np.mean(run.losses[-width:])) for run in (first, *others)]
    assert comparison.band()[-1] == pytest.approx(max(ends) - min(ends))


def test_weights_that_move_are_counted_by_bits(comparison: Comparison) -> None:
    moved = {run.config.recipe: run.moved for run in comparison.runs}
    assert all(len(shares) == 1 for shares in moved.values())  # 21 steps: the weights are compared at the 20th
    assert moved["fp32"][0] > 0.9 > moved["pure-bf16"][0] > 0  # rows of tokens that no batch had do not move


def test_a_run_that_cannot_go_on_says_so() -> None:
    result = compare(config(lr=1e3, warmup=0), ["fp32", "pure-fp16"], 2, lambda: None)
    (ended,) = [run for run in result.runs if run.config.recipe == "pure-fp16"]
    assert ended.ended.startswith("Inf or NaN at step") and len(ended.losses) < SIZES["steps"]
    assert ended.ended in list(rows(result))[1]


def test_an_asterisk_is_for_what_a_last_bit_does_not_explain(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeds answer another question: their noise hides what a recipe does on the same batches."""
    baseline, other = comparison.runs[0], comparison.runs[1]
    kept = other.val_loss
    # On some BLAS kernels the few losses of so short a run are equal: here they spread by a hundredth of the seeds' noise.
    for run, share in zip(comparison.changed, (0, 0.004, 0.01), strict=True):
        monkeypatch.setattr(run, "val_loss", baseline.val_loss + share * comparison.noise)
    assert 0 < comparison.drift < 0.1 * comparison.noise
    for difference, marks in (
        (0.5 * comparison.drift, 0), (1.5 * comparison.drift, 1), (-1.5 * comparison.drift, 1), (0.9 * comparison.noise, 1),
        (1.1 * comparison.noise, 2), (-1.1 * comparison.noise, 2),
    ):  # fmt: skip
        other.val_loss = baseline.val_loss + difference
        shown = list(rows(comparison))[1][4]
        assert shown.count("*") == marks and float(shown.rstrip(" *")) == pytest.approx(difference, abs=5e-5)
        assert float(shown.rstrip(" *")) != 0
    other.val_loss = kept


def test_perturbed_weights_are_next_to_the_first_ones(comparison: Comparison) -> None:
    """On the same batches, each time others, by one unit in the last place of each weight."""
    assert [run.perturbation for run in comparison.changed] == [1, 2, 3] == [i + 1 for i in range(PERTURBATIONS)]
    assert {run.config for run in comparison.changed} == {comparison.runs[0].config}
    starts = [RecipeRun(config(), i).training.state.master.copy() for i in range(3)]
    for a, b in ((0, 1), (0, 2)):
        np.testing.assert_array_max_ulp(starts[a], starts[b], 1)
        assert (starts[a] != starts[b]).all()
    assert 0.4 < np.mean(starts[1] > starts[0]) < 0.6 and 0.4 < np.mean(starts[1] == starts[2]) < 0.6
    assert (RecipeRun(config(), 1).training.state.master == starts[1]).all()  # the same each time
    losses = [run.losses for run in (comparison.runs[0], *comparison.changed)]
    assert np.ptp([row[0] for row in losses]) < 1e-5 and len({tuple(row) for row in losses}) == 4
    ends = [run.val_loss for run in (comparison.runs[0], *comparison.changed)]
    assert comparison.drift == max(ends) - min(ends)
    assert len(comparison.drift_band()) == len(comparison.band()) and (comparison.drift_band() < comparison.band()).all()


def test_each_band_says_which_question_it_answers(comparison: Comparison) -> None:
    table, told = "\n".join(meaning(comparison)), difference_text(comparison)
    for text in (table, told):
        assert IS_DIFFERENT in text and MATTERS_MORE in text and "last bit" in text and "3 seeds" in text
    assert f"{comparison.drift:.2g}" in table and f"{comparison.noise:.2g}" in table
    assert "5 additional FP32 runs" in table and f"{comparison.seconds:.0f} s" in table


# ----------------------------------------------------------------------------------------------------------- what is asked for


def test_names_of_recipes() -> None:
    assert chosen_recipes("bf16, fp8,bf16") == ["fp32", "bf16", "fp8"]
    everything = chosen_recipes("all")
    assert everything[0] == "fp32" and {"fp64", "nvfp4", "adam-8bit"} < set(everything)
    assert set(RECIPES) - set(everything) == {"fp8-14bit", "fp8-14bit-128", "fp16-sums", "fp16-sums-64"}
    assert chosen_recipes("all,fp8-14bit")[-1] == "fp8-14bit"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipes", "fp17"], "unknown recipe 'fp17'"),
        (["--recipes", ","], "--recipes names none"),
        (["--seeds", "1"], "--seeds is 1"),
        (["--perturbations", "0"], "--perturbations is 0"),
        (["--no-page", "--out", "x.html"], "contradict"),
        (["--steps", "0"], "--steps is 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_step(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RecipeRun, "step", None)  # called, it would raise another error
    with pytest.raises(UsageError, match=message):
        run_script([*flags, *([] if "--no-page" in flags else ["--no-page"])])


def run_script(flags: list[str]) -> None:
    script = load_script("compare_recipes")
    arguments = vars(script.parser().parse_args([*flags, *SMALL]))
    own = {name: arguments.pop(name) for name in script.OWN_FLAGS}
    script.compare_recipes(arguments, **own, command="python scripts/compare_recipes.py --steps 4")


SMALL = [
    "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "8", "--batch-size", "4", "--eval-batches", "2",
    "--warmup", "2",
]  # fmt: skip


def test_the_script_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the page needs matplotlib")
    target, numbers = tmp_path / "deep" / "page.html", tmp_path / "data.json"
    flags = ["--recipes", "fp16,mxfp4", "--steps", "4", "--seeds", "2", "--perturbations", "1"]
    flags += ["--out", str(target), "--json", str(numbers)]
    run_script(flags)
    shown = capsys.readouterr().out
    assert f"written: {target}" in shown and f"written: {numbers}" in shown
    table = [line.split()[0] for line in shown.splitlines()[2:5]]
    assert table == ["fp32", "fp16", "mxfp4"]
    page = target.read_text(encoding="ascii")
    assert page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "") and page.count("<script") == 1
    for recipe in table:
        assert f">{recipe}<" in page
    stored = json.loads(numbers.read_text())
    assert [run["recipe"] for run in stored["runs"]] == ["fp32", "fp16", "mxfp4", "fp32"]
    assert stored["steps"] == 4 and all(len(run["losses"]) == 4 for run in stored["runs"])
    assert [run["perturbation"] for run in stored["perturbed"]] == [1] and stored["drift"] < stored["noise"]


def test_a_curve_that_leaves_the_axis_is_said_to(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    diverging = comparison.runs[1]
    monkeypatch.setattr(diverging, "losses", [*diverging.losses[:-1], 1e6])
    for what in ("loss", "difference"):
        captions = " ".join(picture.caption for picture in page_module._pictures(comparison, what))
        assert re.findall(r"(\S+) goes beyond the axis", captions) == ["fp16"], captions


def test_all_recipes_take_fewer_steps_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, int]] = []

    def stop(config: Config, *_: Any) -> None:
        seen.append((config.steps, config.warmup))
        raise UsageError("enough")

    monkeypatch.setattr("refimpl.tools.compare_recipes.page.compare", stop)
    for flags in (["--recipes", "bf16"], ["--recipes", "all"], ["--recipes", "all", "--steps", "7"]):
        with pytest.raises(UsageError, match="enough"):
            run_script([*flags, "--no-page"])
    assert [steps for steps, _ in seen] == [200, 60, 7] and {warmup for _, warmup in seen} == {2}


def test_without_matplotlib_only_the_page_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="needs matplotlib"):
        run_script(["--recipes", "bf16", "--steps", "1"])
    run_script(["--recipes", "bf16", "--steps", "1", "--no-page"])
    assert "bf16" in capsys.readouterr().out and not list(tmp_path.iterdir())


def interrupted(after: int) -> Callable[[], None]:
    left = [after]

    def tick() -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return tick


def test_ctrl_c_leaves_a_shorter_comparison() -> None:
    result = compare(config(), ["fp32", "bf16"], 2, interrupted(3))
    assert [len(run.losses) for run in (*result.runs, *result.others)] == [3, 3, 3]
    assert all(np.isfinite(run.val_loss) for run in result.runs) and len(list(rows(result))) == 2


def test_ctrl_c_in_the_middle_of_a_step_drops_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, step = [0], module.RecipeRun.step

    def interrupting(self: RecipeRun, corpus: Any) -> None:
        calls[0] += 1
        if calls[0] == 4 * 2 + 2:  # in the third round, after the first of four
            raise KeyboardInterrupt
        step(self, corpus)

    monkeypatch.setattr(module.RecipeRun, "step", interrupting)
    result = compare(config(), ["fp32", "bf16"], 2, lambda: None, 1)
    assert [len(run.losses) for run in (*result.runs, *result.others, *result.changed)] == [2, 2, 2, 2]
    monkeypatch.setattr(module.RecipeRun, "step", lambda self, corpus: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare(config(), ["fp32", "bf16"], 2, lambda: None)


def test_other_weights_would_be_another_comparison(comparison: Comparison) -> None:
    """Negative control: the same recipe from other weights does not have the losses of the first."""
    other = RecipeRun(replace(comparison.runs[0].config, seed=5))
    other.step(load_corpus("pydoc", SIZES["block_size"]))
    assert other.losses[0] != comparison.runs[0].losses[0]


# ----------------------------------------------------------------------------------------------------- from a folder's weights

FROM: dict[str, Any] = {
    "tokenizer": "bytes", "block_size": 8, "batch_size": 2, "steps": 3, "warmup": 0, "eval_batches": 1, "lr": 1e-3,
    "recipe": BASELINE,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = {**LLAMA, "vocab_size": 256}
    small = {name: 0.1 * array for name, array in tensors_of(table).items()}
    return write(tmp_path_factory.mktemp("compared") / "hf", table, small)


def begun(folder: Path) -> tuple[Config, First]:
    given, first = settings_from(folder, FROM)
    return Config.of(given), first


def test_a_folder_is_where_all_runs_start_one_after_another(folder: Path) -> None:
    config, first = begun(folder)
    ticks: list[int] = []
    ended: list[str] = []
    result = compare(
        config, ["fp32", "bf16", "mxfp4"], 2, lambda: ticks.append(1), 1, first, lambda run: ended.append(one_line_of(run, 0))
    )
    assert [line.split(":")[0] for line in ended] == ["fp32", "fp32, seed 1", "fp32, last bits changed (1)", "bf16", "mxfp4"]
    bf16 = result.runs[1]
    assert ended[3] == f"bf16: loss {bf16.losses[-1]:.4f}, validation {bf16.val_loss:.4f}, {sum(bf16.seconds):.0f} s"
    assert len(ticks) == 3 * 5 and result.seeded == "batches"
    corpus = config.make_corpus()
    for run in (*result.runs, *result.others):
        assert not hasattr(run, "training")  # its states have gone before the next run begins
        alone, rng = start(run.config), generator(run.config.seed, BATCHES)
        alone.state.load_weights(first[1].weights)
        losses = [float(alone.step([sample_batch(corpus.train, 2, 8, rng)]).loss) for _ in range(3)]
        assert losses == run.losses
    (changed,) = result.changed
    assert result.runs[0].losses == pytest.approx(changed.losses, abs=1e-4)
    same, other = (RecipeRun(config, i, first).training.state.master for i in range(2))
    assert (same == np.concatenate([array.reshape(-1) for array in first[1].weights.values()])).all()
    np.testing.assert_array_max_ulp(same, other, 1)
    assert (same != other).all()


def test_the_table_has_the_peak_of_runs_that_were_alone(folder: Path, comparison: Comparison) -> None:
    config, first = begun(folder)
    result = compare(config, ["fp32", "fp16"], 2, lambda: None, 1, first)
    if not result.has_peaks:
        pytest.skip("this system does not forget a peak of memory")
    assert header(result)[-1] == "peak GiB" and 0.05 < float(list(rows(result))[1][-1]) < 50
    assert "peak GiB" in "\n".join(meaning(result)) and "other batches, differ" in "\n".join(meaning(result))
    assert header(comparison)[-1] == "ms per step" and "peak GiB" not in "\n".join(meaning(comparison))


def test_the_losses_of_the_first_steps_and_of_the_last(comparison: Comparison) -> None:
    heads, lines = loss_rows(comparison)
    assert heads == ["recipe", "step 1", "step 2", "step 5", "step 10", "step 20", "step 21"]
    for line, run in zip(lines, comparison.runs, strict=True):
        assert line == [run.config.recipe, *(f"{run.losses[i]:.4f}" for i in (0, 1, 4, 9, 19, 20))]
    ended = compare(config(lr=1e3, warmup=0), ["fp32", "pure-fp16"], 2, lambda: None, 1)
    assert loss_rows(ended)[1][1][-1] == "-"


def test_ctrl_c_between_recipes_leaves_those_that_are_done(folder: Path) -> None:
    config, first = begun(folder)
    result = compare(config, ["fp32", "bf16", "fp16"], 2, interrupted(3 * 4 + 2), 1, first)
    assert [run.config.recipe for run in result.runs] == ["fp32", "bf16"] and len(result.changed) == len(result.others) == 1
    with pytest.raises(KeyboardInterrupt):  # without all of FP32's runs no difference means anything
        compare(config, ["fp32", "bf16"], 2, interrupted(3 * 3 - 1), 1, first)


def test_the_script_starts_from_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, numbers = load_script("compare_recipes"), tmp_path / "data.json"
    flags = "--recipes bf16 --seeds 2 --perturbations 1 --tokenizer bytes --block-size 8 --batch-size 2 --eval-batches 1"
    more = ["--init-from", str(folder), "--no-page", "--json", str(numbers)]
    arguments = vars(script.parser().parse_args([*flags.split(), *more]))
    own = {name: arguments.pop(name) for name in script.OWN_FLAGS}
    script.compare_recipes(arguments, **own, command="")
    assert "step 20" in capsys.readouterr().out  # the default
    stored = json.loads(numbers.read_text())["runs"]
    assert [len(run["losses"]) for run in stored] == [20, 20, 20]
    with pytest.raises(UsageError, match="n_layer 2 instead of 3"):
        script.compare_recipes({**arguments, "n_layer": 3}, **{**own, "json_file": None}, command="")
    with pytest.raises(UsageError, match="no checkpoint at"):
        script.compare_recipes({}, **{**own, "json_file": None, "init_from": tmp_path / "none"}, command="")
