"""scripts/inspect_step.py: what it prints is what the training step did, and its numbers fit together.

Roundings are checked against NumPy's and ml_dtypes' own conversions, bits against the formula of each format.
"""

import inspect
import itertools
import json
import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from progress_bars import NoBar
from script_loader import run_here

from refimpl import step
from refimpl.errors import UsageError
from refimpl.numerics.formats import FORMATS
from refimpl.optim.loss_scalers import SCALER_RULES
from refimpl.precision.recipes import RECIPES
from refimpl.tools import step_inspector as module
from refimpl.tools.step_inspector import (
    FOLLOWED,
    PARAMETERS,
    SIZES,
    Line,
    Report,
    inspect_step,
    inspect_steps,
    report_data,
    report_text,
)
from refimpl.training.config import Config
from refimpl.training.trainer import Trainer

TIED = "transformer.wte.weight"
KEY_BIAS = ("transformer.h.0.attn.c_attn.bias", (20,))  # its exact gradient is 0; what is there comes from rounding
OVERFLOW: dict[str, Any] = {"recipe": "fp16", "init_scale": 1e9, "step": 1, "steps": 2}


@cache
def reports(recipe: str, **options: Any) -> list[Report]:
    """Three steps in a row, the first included, unless `options` say otherwise."""
    return inspect_steps(recipe, **{"step": 1, "steps": 3, **options})


def every_line(report: Report) -> list[Line]:
    return [line for block in report.blocks for line in block.lines]


def stored(line: Line) -> np.ndarray:
    """The value of a line in its own format."""
    return np.array(line.value, FORMATS[line.format].dtype)


def rounded(value: float, fmt: str) -> float:
    """Double -> fp32 -> fmt, by the libraries' own conversions."""
    x = np.array(value)
    return float((x if fmt == "fp64" else x.astype(np.float32).astype(FORMATS[fmt].dtype)).astype(np.float64))


def decoded(line: Line) -> float:
    """The value that the printed bits stand for, by the formula in formats.py."""
    row = FORMATS[line.format]
    sign, exponent, fraction = (int(field, 2) for field in line.bits.split("|"))
    top = 2**row.exponent_bits - 1
    if exponent == top:
        return math.nan if fraction else -math.inf if sign else math.inf
    significand = (exponent > 0) + fraction / 2**row.fraction_bits
    return math.copysign(math.ldexp(significand, max(exponent, 1) - row.bias), -sign)


def word(report: Report) -> str:
    return "master" if RECIPES[report.recipe].state["master"] else "weight"


def has_copy(recipe: str) -> bool:
    """Whether a step makes a copy of the master in fewer bits: by its step 1, or by autocast."""
    return bool(RECIPES[recipe].state["master"]) or recipe.startswith("amp")


def applied(recipe: str) -> list[Report]:
    found = [report for report in reports(recipe) if not report.skipped]
    assert found
    return found


# ---------------------------------------------------------------------------------------------------- every recipe


@pytest.mark.parametrize("recipe", FOLLOWED)
def test_the_bits_are_the_values(recipe: str) -> None:
    for report in reports(recipe):
        for line in every_line(report):
            if line.bits:
                assert np.array_equal(decoded(line), line.value, equal_nan=True), line


@pytest.mark.parametrize("recipe", FOLLOWED)
def test_formats_are_those_of_the_recipe(recipe: str) -> None:
    state = RECIPES[recipe].state
    for report in reports(recipe):
        assert report["grad"].format == state["grads"]
        if word(report) == "master":
            assert (report["master"].format, report["copy"].format) == (state["master"], state["weights"])
        else:
            assert report["weight"].format == state["weights"]
        if not report.skipped:
            assert (report["m_before"].format, report["m_after"].format) == (state["m"], state["m"])
            assert (report["v_before"].format, report["v_after"].format) == (state["v"], state["v"])
        assert ("copy" in report) == has_copy(recipe)
        if recipe.startswith("amp"):
            assert report["copy"].format == recipe.split("-")[1]


@pytest.mark.parametrize("recipe", [name for name in FOLLOWED if has_copy(name)])
def test_the_copy_is_the_master_rounded(recipe: str) -> None:
    for report in reports(recipe):
        master, copy = report[word(report)], report["copy"]
        assert copy.value == rounded(master.value, copy.format)
        assert report["rounding"].value == copy.value - master.value
        ulps = float(report["rounding"].remark.split()[0])
        assert abs(ulps) <= 0.5
        assert ulps != 0 or RECIPES[recipe].masters_from == "rounded"
        if not report.skipped:
            new = report["copy_after"]
            assert new.value == rounded(report[f"{word(report)}_after"].value, new.format)
            assert report["copy_moved"].value == (new.value != copy.value)


@pytest.mark.parametrize("recipe", FOLLOWED)
def test_the_gradient_on_its_way_up(recipe: str) -> None:
    for report in reports(recipe):
        g, scale = report["grad"].value, report["loss_scale"].value
        assert report["widened"].value == g
        assert report["inverse_scale"].value * scale == 1
        unscaled = report["unscaled"]
        assert unscaled.value == g / scale  # a power of two: exact
        assert unscaled.format == ("fp64" if recipe == "fp64" else "fp32")
        assert stored(report["clipped"]) == stored(unscaled) * stored(report["clip"])
        assert report["found_inf"].value == report.skipped == (not math.isfinite(report["norm"].value))
        if not report.skipped:
            assert report["clip"].value == pytest.approx(min(1, 1 / (report["norm"].value + 1e-6)), rel=1e-6)
        assert ("without_scale" in report) == (scale != 1)
        if "without_scale" in report:
            without = report["without_scale"]
            assert without.value == rounded(unscaled.value, without.format)


@pytest.mark.parametrize("recipe", FOLLOWED)
def test_the_update_is_the_difference_of_the_masters(recipe: str) -> None:
    for report in applied(recipe):
        kind = word(report)
        old, new, change, decay = (report[key] for key in (f"{kind}_before", f"{kind}_after", "change", "decay"))
        assert old.value == report[kind].value
        assert report["update"].value == new.value - old.value
        # Adam's rule, run on the element alone, explains the new master to the last bit.
        wide = FORMATS[change.format].dtype
        assert new.value == rounded(float(np.array(old.value, wide) * stored(decay) + stored(change)), new.format)


@pytest.mark.parametrize("recipe", FOLLOWED)
def test_the_moments_are_those_of_adam(recipe: str) -> None:
    for report in applied(recipe):
        m, v, g = report["m_before"].value, report["v_before"].value, report["clipped"].value
        # Three fp32 operations of half an ulp each, and the rounding to the format that the moment is kept in.
        for key, exact in (("m_after", m + 0.1 * (g - m)), ("v_after", 0.95 * v + 0.05 * g * g)):
            row = FORMATS[report[key].format]
            error = 3 * FORMATS["fp32"].eps + row.eps / 2
            assert report[key].value == pytest.approx(exact, rel=error, abs=row.smallest_subnormal / 2)


@pytest.mark.parametrize("recipe", FOLLOWED)
def test_each_step_begins_where_the_last_one_ended(recipe: str) -> None:
    sequence = reports(recipe)
    assert [report.step for report in sequence] == [1, 2, 3]
    for before, after in itertools.pairwise(sequence):
        assert after["loss_scale"].value == before["scale_after"].value
        assert after.skipped_before == before.skipped_before + before.skipped
        if before.skipped:
            assert after[word(after)].value == before[word(before)].value
            continue
        assert after[word(after)].bits == before[f"{word(before)}_after"].bits
        if "copy" in after:
            assert after["copy"].bits == before["copy_after"].bits
        if not after.skipped:
            assert after["t"].value == before["t"].value + 1
            assert (after["m_before"].bits, after["v_before"].bits) == (before["m_after"].bits, before["v_after"].bits)


@pytest.mark.parametrize("recipe", ["fp16", "amp-bf16"])
def test_the_step_is_the_one_that_training_takes(recipe: str, tmp_path: Path) -> None:
    config = Config.of({"recipe": recipe, **SIZES, "lr": 3e-4, "steps": 3, "eval_batches": 1})
    Trainer(config, tmp_path).train(NoBar())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row, report in zip(rows, reports(recipe), strict=True):
        assert (row["loss"], row["loss_scale"]) == (report["loss"].value, report["loss_scale"].value)
        assert row["skipped"] == report.skipped
        if not report.skipped:
            assert (row["grad_norm"], row["lr"]) == (report["norm"].value, report["lr"].value)


@pytest.mark.parametrize("recipe", FOLLOWED)
def test_text_and_json_show_every_line(recipe: str) -> None:
    for report in reports(recipe):
        text = report_text(report)
        assert text.isascii() and all(line == line.rstrip() for line in text.splitlines())
        for line in every_line(report):
            assert any(all(part in shown for part in (line.quantity, line.bits, line.text, line.remark))
                       for shown in text.splitlines()), line  # fmt: skip
        data = report_data(report)
        keys = [line["key"] for block in data["blocks"] for line in block["lines"]]
        assert len(keys) == len(set(keys)) and keys == [line.key for line in every_line(report)]


def test_sources_are_where_they_are_said_to_be() -> None:
    cited = {source for recipe in FOLLOWED for r in reports(recipe) for block in r.blocks for source in block.sources}
    assert {source.split()[1] for source in cited} >= {
        "State.weights_down", "cast", "forward_backward", "cast_forward", "inverse_of", "check_and_measure", "clip_coefficient",
        "Optimizer.update", "AdamW.update_block", "DynamicLossScale.update", "StaticLossScale.update",
    }  # fmt: skip
    for source in cited:
        place, name = source.split()
        path, line = place.split(":")
        assert f"def {name.split('.')[-1]}(" in (ROOT / path).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("recipe", ["fp16", "amp-bf16"])
def test_each_value_and_source_stands_in_the_step_that_computes_it(recipe: str) -> None:
    """By the numbered comments of `train_step`: a function that it calls after `# 4.` is of block 4."""
    numbered = re.split(r"\n    # (?=[1-4]\. )", inspect.getsource(step.train_step))
    for report in (*reports(recipe), *reports(**OVERFLOW)):
        for block, code in zip(report.blocks, numbered[1:], strict=True):
            assert block.title[:2] == code[:2]
            here = {"clip", "clipped"} & {line.key for line in block.lines}
            assert here == ({"clip", "clipped"} if "clip_coefficient(" in code else set())
            for called in ("weights_down", "forward_backward", "inverse_of", "check_and_measure", "clip_coefficient", "update"):
                cited = any(source.split()[1].split(".")[-1] == called for source in block.sources)
                assert cited == (f"{called}(" in code), (called, block.title)


# ---------------------------------------------------------------------------------------------------- what it teaches


def test_without_masters_the_update_is_rounded_away_and_with_them_it_is_not() -> None:
    pure, kept = reports("pure-bf16", step=1, steps=1)[0], reports("bf16", step=1, steps=1)[0]
    assert pure["update"].value == 0 and pure["weight_moved"].value is False
    assert "rounded away" in pure["update"].remark and pure["change"].value != 0
    assert kept["update"].value != 0 and kept["copy_moved"].value is False
    assert kept["copies_moved"].value < 50 < kept["masters_moved"].value
    assert pure["weights_moved"].value < 50


def test_the_default_is_the_first_step_that_updates() -> None:
    first, second = reports("fp16", init_scale=2.0**18)[:2]
    assert first.skipped and not second.skipped  # seed 0 overflows once at 2^18
    (default,) = inspect_steps(init_scale=2.0**18)
    assert default == second and default.skipped_before == 1
    assert "skipped before it" in report_text(default)


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    before, after = reports(**OVERFLOW)
    for report in (before, after):
        assert report.skipped and report["found_inf"].value is True and "update" not in report
        assert report["master_after"].bits == report["master"].bits
        assert report["weights_after"].bits == report["copy"].bits
        assert (report["m_after"].value, report["v_after"].value, report["t"].value) == (0, 0, 0)
        assert all("CHANGED" not in line.remark for line in every_line(report))
        assert report["scale_after"].value == report["loss_scale"].value / 2
        assert report.blocks[3].title == "4. update: skipped"
    assert before["loss_scale"].value == 1e9
    assert re.search(r"a gradient of \S+ is Inf or NaN", before["found_inf"].remark)
    assert not math.isfinite(before["grad"].value) and "not known" in before["without_scale"].remark


def test_a_skip_after_updates_leaves_moments_and_copy() -> None:
    """The 16-bit copy is compared with the one that the skipped step made, not with an older one."""
    *_, last = inspect_steps("bf16", step=1, steps=2, lr=1e20)
    assert last.skipped and last["t"].value == 1 and last["m_after"].value != 0
    assert all("CHANGED" not in line.remark for line in every_line(last))
    assert "stops" in last["scale_after"].remark


def test_a_state_that_changes_in_a_skipped_step_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an update that ignores found_inf does not pass unseen."""
    real = step.train_step

    def careless(model: Any, batches: Any, state: Any, *rest: Any) -> Any:
        result = real(model, batches, state, *rest)
        state.master[:] += 1
        return result

    monkeypatch.setattr("refimpl.training.setup.train_step", careless)
    report = inspect_steps(**{**OVERFLOW, "steps": 1})[0]
    assert "CHANGED" in report["master_after"].remark and "CHANGED" not in report["m_after"].remark


def test_the_copy_shown_is_the_one_that_the_step_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: weights that step 1 did not make are shown as they are, not as they should be."""
    real = step.train_step

    def careless(model: Any, batches: Any, state: Any, *rest: Any) -> Any:
        result = real(model, batches, state, *rest)
        state.weights[:] = 0
        return result

    monkeypatch.setattr("refimpl.training.setup.train_step", careless)
    report = inspect_steps("bf16", step=1)[0]
    assert report["copy"].value == 0 and report["rounding"].value == -report["master"].value


def test_an_endless_overflow_is_shown_after_some_patience() -> None:
    (report,) = inspect_steps("fp16", init_scale=1e30)
    assert report.skipped and report.step == module.PATIENCE + 1 and report.skipped_before == module.PATIENCE


def test_what_the_loss_scale_saves() -> None:
    parameter, index = KEY_BIAS
    (report,) = inspect_steps("fp16", parameter, index)
    assert report["unscaled"].value != 0 and report["without_scale"].value == 0
    assert "flushed to zero" in report["without_scale"].remark
    assert 16 >= report["flushed_without_scale"].value > 0
    # The weight gradient of the tied embedding is far above: it is kept.
    (report,) = inspect_steps("fp16", TIED, (32, 0))
    assert report["without_scale"].remark == "kept" and report["without_scale"].value == report["unscaled"].value


def test_a_static_scale_and_a_dynamic_one_can_be_asked_for() -> None:
    report = inspect_steps("bf16", loss_scale="1024", step=1)[0]
    assert report["loss_scale"].value == 1024 and report["scale_after"].remark == "does not adapt"
    report = inspect_steps("bf16", loss_scale="dynamic", init_scale=8, step=1)[0]
    assert report["loss_scale"].value == 8 and report["scale_after"].remark == "grows after 1999 more good steps in a row"


@pytest.mark.parametrize(
    ("scaler", "remarks"),
    [
        ("dynamic", ["1e+09 * 0.5: backs off", "5e+08 * 0.5: backs off"]),
        ("megatron", ["an overflow that is tolerated: backs off at the next one", "1e+09 * 0.5: backs off"]),
        ("apex-kernel", ["an overflow that is tolerated: backs off at the next one", "1e+09 * 0.5: backs off"]),
        ("chainer", ["backs off to 65504, its ceiling", "at 65504, its ceiling"]),
    ],
)
def test_the_remark_on_the_scale_is_its_scalers(scaler: str, remarks: list[str]) -> None:
    assert [r["scale_after"].remark for r in reports(**OVERFLOW, loss_scale=scaler)] == remarks


@pytest.mark.parametrize(("scaler", "more"), [("torch", 1999), ("flax", 2000), ("deepspeed", 1000), ("megatron", 999)])
def test_a_scaler_that_grows_late_says_so(scaler: str, more: int) -> None:
    report = inspect_steps("bf16", loss_scale=scaler, init_scale=8, step=1)[0]
    assert report["scale_after"].remark == f"grows after {more} more good steps in a row"


def test_an_overflow_leaves_what_it_may_not_change_where_fp32_gradients_are_kept() -> None:
    """main_grads are made anew by every step, skipped or not: no state that an update would have to leave alone."""
    (report,) = inspect_steps("apex-o2", init_scale=1e9, step=1)
    assert report.skipped and all("CHANGED" not in line.remark for line in every_line(report))
    assert "main_grads_after" not in report and report["unscaled"].remark.endswith("stored in main_grads")


@pytest.mark.parametrize("recipe", sorted({*RECIPES} - {*FOLLOWED}))
def test_recipes_whose_states_are_no_plain_numbers_are_refused(recipe: str) -> None:
    with pytest.raises(UsageError, match=f"recipe {recipe} stores weights as bf16-.* this command cannot show"):
        inspect_steps(recipe)


def test_biases_are_not_decayed() -> None:
    report = inspect_steps("fp32", "transformer.ln_f.bias")[0]
    assert report.index == (3,) and report["decay"].value is False
    assert report["weight_after"].value == report["change"].value  # it was 0


def test_the_tied_embedding_has_both_names() -> None:
    tied, first = (inspect_steps("amp-fp16", name, step=1)[0] for name in ("lm_head.weight", TIED))
    assert tied == first and tied.parameter == TIED and "copy" in tied


def test_a_weight_of_llama() -> None:
    for recipe in ("fp16", "amp-bf16"):
        (report,) = inspect_steps(recipe, model="llama")
        assert (report.parameter, report.index) == (PARAMETERS["llama"], (3, 5)) and "copy" in report and not report.skipped
    tied = inspect_steps("bf16", "lm_head.weight", step=1, model="llama")[0]
    assert tied.parameter == "model.embed_tokens.weight"


def test_seeds_and_runs() -> None:
    assert reports("bf16") == inspect_steps("bf16", step=1, steps=3)
    assert reports("bf16")[0]["loss"] != inspect_steps("bf16", step=1, seed=1)[0]["loss"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    inspect_step(as_json=True, **OVERFLOW)
    (first, second) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (first["step"], second["step"], first["skipped"], first["parameter"]) == (1, 2, True, PARAMETERS["gpt"])
    lines = {line["key"]: line for block in first["blocks"] for line in block["lines"]}
    assert lines["grad"]["value"] is None and lines["grad"]["bits"].split("|")[1] == "11111"


# ---------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": "fp17"}, list(RECIPES)),
        ({"model": "mlp"}, ["unknown model 'mlp'", "gpt, llama"]),
        ({"parameter": "transformer.h.9.mlp.c_fc.weight"}, [PARAMETERS["gpt"], TIED, "transformer.ln_f.bias"]),
        ({"index": (64, 0)}, ["64,0", "(64, 16)", "0..63, 0..15"]),
        ({"index": (-1, 0)}, ["-1,0", "0..63, 0..15"]),
        ({"index": (1,)}, ["1 numbers", "0..63, 0..15"]),
        ({"step": 0}, ["--step", "at least 1"]),
        ({"steps": 0}, ["--steps", "at least 1"]),
        ({"seed": -1}, ["--seed"]),
        ({"lr": math.nan}, ["--lr"]),
        ({"loss_scale": "large"}, ["dynamic, none, or a number"]),
        ({"init_scale": -1.0}, ["--init-scale"]),
        ({"recipe": "bf16", "init_scale": 8.0}, ["--loss-scale dynamic"]),
    ],
)
def test_wrong_input_says_what_is_right(options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        inspect_steps(**options)
    assert all(part in str(caught.value) for part in says), caught.value


def test_the_script_runs_and_ends_with_2_on_wrong_input() -> None:
    command = [sys.executable, ROOT / "scripts" / "inspect_step.py", "--recipe", "amp-bf16", "--index", "3,5"]
    good = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (good.returncode, good.stderr) == (0, "") and good.stdout.startswith("recipe amp-bf16, training step 1: ")
    bad = run_here("inspect_step", "--parameter", "nothing")
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.startswith("error: unknown parameter 'nothing': choose")
    assert bad.stderr.count("\n") == 1
    listed = "".join(run_here("inspect_step", "--help").stdout.split())  # lines are broken at hyphens
    assert all(name in listed for name in (*FOLLOWED, *SCALER_RULES)) and "bf16-kahan" not in listed
    for wrong in (["inspect_step", "--index", "x"], ["recipes", "--recipe", "fp17"]):
        assert run_here(*wrong).returncode == 2
