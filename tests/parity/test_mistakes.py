"""Every known mistake is noticed: a trace of a run that makes it departs where the table says, and is explained by its name.

Beside that, what each mistake does to training, as the table's text has it: the loss, the scale, the weights.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import DOCS
from progress_bars import NoBar
from recipe_lists import others_slow
from scaler_traces import exhausted
from strict_backend import STRICT

from refimpl.errors import TrainingStopped, UsageError
from refimpl.numerics.casts import widen
from refimpl.optim.loss_scalers import SCALER_RULES
from refimpl.parity import mistake_table
from refimpl.parity.judge import Judge, explanations, judge_trace
from refimpl.parity.mistakes import MISTAKES, listing
from refimpl.parity.mistakes_forward import _toward_zero
from refimpl.parity.trace import Trace, record
from refimpl.step import forward_backward
from refimpl.training.config import Config
from refimpl.training.setup import start
from refimpl.training.trainer import Trainer

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "lr": 1e-3, "steps": 3, "warmup": 1,
}  # fmt: skip

# What a mistake needs in order to show, and as many micro-batches as it takes.
SETTINGS: dict[str, dict[str, Any]] = {
    **mistake_table.SETTINGS,
    **{name: {**mistake_table.SETTINGS.get(name, {}), "grad_accum": 2} for name in mistake_table.NEEDS_SEVERAL},
    "accumulate-in-16-bits": {"grad_accum": 4},
}


MADE = [name for name in MISTAKES if name != "scaler-not-restored"]
"""Those that show in a run from its start."""


def config(name: str, **more: Any) -> Config:
    return Config.of({**TINY, "recipe": "fp16", **SETTINGS.get(name, {}), **more})


@functools.cache
def trace_of(name: str, mistake: str) -> Trace:
    """A run in the settings of a mistake, with that mistake or another."""
    return record(config(name, mistake=mistake))


def both(name: str, **more: Any) -> tuple[Trace, Trace]:
    """The same run without and with the mistake."""
    return record(config(name, **more)), record(config(name, mistake=name, **more))


@pytest.mark.parametrize("name", MADE)
def test_a_trace_of_the_mistake_departs_where_the_table_says(name: str) -> None:
    first = next((f for f in Judge(config(name), trace_of(name, name)).findings() if f.departs), None)
    assert first is not None
    assert first.point == MISTAKES[name].departs, first


OF_ALL_KINDS = ("no-masters", "cast-twice", "softmax-in-16-bits", "accumulate-in-16-bits", "unscale-after-clip", "decay-all")
"""Of the weights, the operations, the sums over micro-batches, the gradients, the update."""


@pytest.mark.parametrize("name", others_slow(MADE, plain=OF_ALL_KINDS))
def test_with_the_mistake_switched_in_the_trace_agrees_to_the_bit(name: str) -> None:
    findings = list(Judge(config(name), trace_of(name, name), name).findings())
    assert len(findings) > 100 and not any(f.departs for f in findings)
    assert all(f.identical == 1 for f in findings)


@pytest.mark.parametrize("name", others_slow(MADE, plain=OF_ALL_KINDS))
def test_on_a_device_it_is_the_same_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "make_backend", lambda self: STRICT)
    first = next((f for f in Judge(config(name), record(config(name, mistake=name))).findings() if f.departs), None)
    assert first is not None and first.point == MISTAKES[name].departs


@pytest.mark.parametrize("settings", sorted({name if name in SETTINGS else "none" for name in MISTAKES}))
def test_without_a_mistake_nothing_departs(settings: str) -> None:
    assert not any(f.departs for f in judge_trace(config(settings), trace_of(settings, "none")))


@pytest.mark.parametrize("name", ["missing-cast", "eps-inside-root"])
def test_no_other_mistake_explains_it(name: str) -> None:
    first = next(f for f in Judge(config(name), trace_of(name, name)).findings() if f.departs)
    assert explanations(config(name), trace_of(name, name), first) == [name]


LLAMA: dict[str, dict[str, Any]] = {
    "cast-twice": {"qkv_bias": True}, "sum-in-16-bits": {}, "missing-cast": {}, "softmax-in-16-bits": {}, "norm-in-16-bits": {},
    "residual-truncated": {}, "tied-gradient-dropped": {}, "loss-in-16-bits": {},
}  # fmt: skip
"""Mistakes that are made in operations, and which a Llama has as a GPT does."""


@pytest.mark.parametrize("name", LLAMA)
def test_a_llama_has_them_too_and_they_are_named(name: str) -> None:
    more = {"model": "llama", **LLAMA[name]}
    trace = record(config(name, mistake=name, **more))
    first = next(f for f in judge_trace(config(name, **more), trace) if f.departs)
    assert first.point == MISTAKES[name].departs and explanations(config(name, **more), trace, first) == [name]


@pytest.mark.parametrize(("recipe", "attention"), [("fp16", "unfused"), ("amp-bf16", "math"), ("bf16", "fused")])
def test_nothing_departs_in_a_llama_whose_sums_have_another_order(recipe: str, attention: str) -> None:
    """Two groups of two heads, and two blocks of queries: the definitions, judged by the fast versions."""
    more = {"model": "llama", "n_head": 4, "n_kv_head": 2, "recipe": recipe, "attention": attention, "block_size": 72}
    trace = record(config("none", backend="reference", steps=1, **more))
    findings = judge_trace(config("none", steps=1, **more), trace)
    assert len(findings) > 100 and not any(f.departs for f in findings)
    assert min(f.identical for f in findings) < 1


SCHEDULES = ({"schedule": "cosine"}, {"schedule": "linear"}, {"schedule": "constant", "warmup": 0})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("betas", mistake_table.BETAS, ids=str)
@pytest.mark.parametrize("grad_accum", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_named_beside_other_settings(name: str, grad_accum: int, betas: dict[str, Any], schedule: dict[str, Any]) -> None:
    if grad_accum == 1 and name in mistake_table.NEEDS_SEVERAL:
        pytest.skip("it needs several micro-batches")
    if schedule["schedule"] == "constant" and MISTAKES[name].departs == "4.lr":
        schedule = {"schedule": "constant", "warmup": 3}  # a rate that never changes shows nobody where its schedule stands
    more = {"grad_accum": grad_accum, **betas, **schedule}
    trace = mistake_table.trace_with(name, **more)
    assert mistake_table.outcome(mistake_table.config_for(name, **more), trace, name)[0] == "named"


def test_one_is_named_beside_other_settings() -> None:
    """The slow test above has all of them, beside many."""
    name, more = "unscale-after-clip", {"beta2": 0.999, "schedule": "constant"}
    trace = mistake_table.trace_with(name, **more)
    assert mistake_table.outcome(mistake_table.config_for(name, **more), trace, name)[0] == "named"


def test_what_could_not_be_judged_is_never_called_good() -> None:
    """Rounding alone passes the weaker bound, which is all that is left without activations."""
    trace = mistake_table.trace_with("cast-twice")
    c = mistake_table.config_for("cast-twice")
    assert mistake_table.outcome(c, mistake_table.without(trace, None), "cast-twice") == ("not judged", "")
    assert not [k for k in mistake_table.without(trace, None).tensors if "activation" in k]
    kept = mistake_table.without(trace, ["lm_head"]).tensors
    assert "1/2.activations/lm_head" not in kept and "1/2.activation_grads/transformer.ln_f" in kept


PAGE = DOCS / "traces.md"


def table_of_the_page() -> dict[str, str]:
    """Name -> line of the table in docs/traces.md."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines if line.split("`")[1] in MISTAKES}


def test_the_page_has_a_line_for_each_and_none_agrees() -> None:
    page = table_of_the_page()
    assert list(page) == list(MISTAKES)
    for line in page.values():
        cells = [cell for text in line.strip("|").split("|")[2:] for cell in text.strip().split("; ")]
        assert set(cells) <= {"named", "found", "not judged", "-"} and "named" in cells, line


def test_a_part_of_a_line_of_the_page_is_what_the_command_finds() -> None:
    """One micro-batch and our betas; the slow test below has all of all lines."""
    cells = [cell.strip() for cell in table_of_the_page()["cast-twice"].strip("|").split("|")]
    assert mistake_table.outcomes("cast-twice", {"grad_accum": 1}) == cells[2:5] == ["named", "named", "not judged"]


@pytest.mark.slow
@pytest.mark.usefixtures("pythons_manual")
@pytest.mark.parametrize("name", MISTAKES)
def test_each_line_of_the_page_is_what_the_command_prints(name: str) -> None:
    assert mistake_table.table([name]).splitlines()[-1] == table_of_the_page()[name]


# -- what one sees ------------------------------------------------------------------------------------------------------


def losses(trace: Trace) -> np.ndarray:
    return np.array([trace.get(step, "2.loss") for step in trace.steps], float)


def values(trace: Trace, point: str) -> list[float]:
    return [float(trace.tensors[f"{step}/{point}"]) for step in trace.steps]


def flat(trace: Trace, step: int, point: str) -> np.ndarray:
    return np.concatenate([widen(x, "fp64").ravel() for x in trace.at(step, point).values()])


def move(trace: Trace) -> float:
    """How far the masters have gone, in L2."""
    return float(np.linalg.norm(flat(trace, trace.steps[-1], "4.master") - flat(trace, 0, "4.master")))


def test_no_masters_loses_small_updates() -> None:
    right, wrong = both("no-masters", recipe="bf16", lr=1e-5, steps=4, weight_decay=0.0)
    moved = [np.mean(flat(t, 4, "1.weights") != flat(t, 1, "1.weights")) for t in (right, wrong)]
    print(f"of the weights {moved[0]:.1%} have moved with masters, {moved[1]:.1%} without")
    # A single update of 1e-5 moves a BF16 weight only below a certain size; with masters several add up, and the size that
    # they can move grows with their number: 34 % against 14 % of the weights.
    assert moved[1] < moved[0] / 2


def test_stale_weights_never_learn() -> None:
    right, wrong = both("stale-weights", steps=6)
    weights = [flat(wrong, step, "1.weights") for step in wrong.steps]
    assert all(np.array_equal(weights[0], w) for w in weights)
    assert losses(right)[-1] < losses(wrong)[-1] - 0.05  # the same batch: 5.41 against 5.52


def test_a_scale_in_16_bits_begins_with_a_skip() -> None:
    right, wrong = both("scale-in-16-bits")
    assert values(right, "3.found_inf") == [0, 0, 0]
    assert values(wrong, "3.found_inf") == [1, 0, 0] and values(wrong, "2.loss_scale") == [np.inf, 32768, 32768]


@pytest.mark.parametrize("name", [
    "cast-twice", "missing-cast", "sum-in-16-bits", "softmax-in-16-bits", "norm-in-16-bits", "rope-frequencies-in-16-bits",
    "rope-angles-in-16-bits",
])  # fmt: skip
def test_a_rounding_more_or_less_does_not_show_in_the_loss(name: str) -> None:
    right, wrong = both(name, steps=20, lr=5e-3)
    apart = np.abs(losses(right) - losses(wrong)).max()
    print(f"{name}: losses {apart:.1e} apart in 20 steps")
    assert 0 < apart < 0.01  # a step of two correct runs may differ by as much: test_gpu_check.py, with four times the rows
    assert losses(wrong)[-1] < losses(wrong)[0] - 0.5


def test_a_loss_in_16_bits_moves_in_steps() -> None:
    right, wrong = (losses(t) for t in both("loss-in-16-bits"))
    assert all(loss * 256 % 1 == 0 for loss in wrong)  # FP16's spacing between 4 and 8
    assert not all(loss * 256 % 1 == 0 for loss in right)


def test_a_dropped_tied_gradient_is_smaller_but_learns() -> None:
    right, wrong = both("tied-gradient-dropped", steps=20, lr=5e-3)
    name = "transformer.wte.weight"
    norms = [np.linalg.norm(widen(t.at(1, "3.unscaled")[name], "fp64")) for t in (right, wrong)]
    assert norms[1] != norms[0] and losses(wrong)[-1] < losses(wrong)[0] - 0.5


def test_sums_of_micro_batches_in_16_bits_are_less_exact() -> None:
    settings = {"grad_accum": 32, "steps": 1, "recipe": "bf16"}
    right, wrong = both("accumulate-in-16-bits", **settings)
    truth = flat(record(config("accumulate-in-16-bits", **{**settings, "recipe": "fp64"})), 1, "3.unscaled")
    errors = [np.linalg.norm(flat(t, 1, "3.unscaled") - truth) for t in (right, wrong)]
    print(f"error of the sum of 32 micro-batches: {errors[0]:.2e} in FP32, {errors[1]:.2e} in 16 bits")
    # Both round each micro-batch's gradient; the sum is rounded 31 times more, to the coarser spacing of a sum: here 3 times.
    assert errors[1] > 1.5 * errors[0]


def test_no_unscale_is_hidden_by_adam_and_not_by_sgd() -> None:
    right, wrong = (move(t) for t in both("no-unscale"))
    assert wrong == pytest.approx(right, rel=1e-3)  # clipping divides S out again, but for its own 1e-6 beside the norm
    right, wrong = (move(t) for t in both("no-unscale", optimizer="sgd", clip=0.0, steps=1))
    assert wrong == pytest.approx(65536 * right, rel=1e-3)


def test_unscale_twice_stops_sgd_and_slows_adam() -> None:
    right, wrong = (move(t) for t in both("unscale-twice", optimizer="sgd"))
    assert wrong < right / 1000
    right, wrong = (move(t) for t in both("unscale-twice"))
    assert wrong < 0.9 * right  # gradients below 6e-4 fall below eps = 1e-8 when they are divided by 65536: here 0.58


def test_an_ignored_inf_makes_the_weights_nan() -> None:
    right, wrong = both("ignore-inf")
    assert np.isfinite(flat(right, 3, "4.master")).all()
    assert np.isnan(flat(wrong, 3, "4.master")).any() and np.isnan(losses(wrong)[1:]).all()


def test_clipping_first_stops_sgd() -> None:
    right, wrong = (move(t) for t in both("unscale-after-clip", optimizer="sgd"))
    assert wrong < right / 1000


def test_a_scale_that_never_backs_off_skips_for_ever() -> None:
    right, wrong = both("scale-never-backs-off", steps=12)
    assert 0 in values(right, "3.found_inf")
    assert values(wrong, "3.found_inf") == [1.0] * 12 and move(wrong) == 0


def test_a_skipped_step_that_counts_runs_ahead() -> None:
    right, wrong = both("t-advances-on-skip", steps=4, warmup=10)
    lr = [values(t, "4.lr") for t in (right, wrong)]
    assert lr[0][0] == lr[0][1] and lr[1][0] < lr[1][1]  # the first steps overflow


def test_a_scheduler_that_counts_skipped_steps_runs_ahead_of_adam() -> None:
    right, wrong = both("scheduler-steps-on-skip", steps=5, warmup=10, init_scale=2.0**21)
    skipped = values(wrong, "3.found_inf")
    assert skipped == values(right, "3.found_inf") and 0 < sum(skipped) < 5 and skipped[0]
    lr, early = values(wrong, "4.lr"), values(right, "4.lr")
    assert lr == pytest.approx([1e-3 * (step + 1) / 11 for step in range(5)])  # a step of warm-up each, skipped or not
    first = skipped.index(0.0)  # the first update, of size lr where eps does not act: its bias correction is that of t = 1
    moved = [np.abs(flat(t, first + 1, "4.master") - flat(t, 0, "4.master")).max() for t in (right, wrong)]
    assert moved[1] / moved[0] == pytest.approx(lr[first] / early[first], rel=0.02)


def test_a_scale_that_has_grown_halves_the_gradient() -> None:
    right, wrong = both("unscale-by-updated-scale", steps=1)
    assert values(right, "4.scale") == values(wrong, "4.scale") == [512.0]
    assert np.array_equal(2 * flat(wrong, 1, "3.unscaled"), flat(right, 1, "3.unscaled"))


def test_a_loss_that_is_not_averaged_makes_gradients_n_times_as_large() -> None:
    right, wrong = both("loss-not-averaged", grad_accum=4, steps=1, recipe="fp32")
    np.testing.assert_allclose(flat(wrong, 1, "2.grads"), 4 * flat(right, 1, "2.grads"), rtol=1e-4, atol=1e-8)
    assert losses(wrong) == losses(right)


def test_a_mean_of_means_is_that_of_unequal_micro_batches() -> None:
    right, wrong = both("mean-of-means", grad_accum=3, steps=1, recipe="fp32")
    counts = [(targets != config("mean-of-means").ignore_index).sum() for _, targets in right.inputs(1) or ()]
    assert len({int(n) for n in counts}) > 1 and losses(right) != losses(wrong)
    same = [flat(t, 1, "3.unscaled") for t in both("mean-of-means", examples="blocks", steps=1)]
    assert np.array_equal(*same)  # full micro-batches have as many targets each


def test_unscaling_after_each_micro_batch_leaves_the_last() -> None:
    right, wrong = (flat(t, 1, "2.grads") for t in both("unscale-each-micro-batch", steps=1))
    assert np.linalg.norm(wrong) < np.linalg.norm(right)
    c = config("unscale-each-micro-batch", mistake="unscale-each-micro-batch", grad_accum=3, steps=1, init_scale=1024.0)
    training, trace = start(c, faults=MISTAKES), record(c)
    batches, gradients = trace.inputs(1), list[np.ndarray]()
    assert batches is not None
    for batch in batches:  # each alone, from a third of S
        state = config("unscale-each-micro-batch", grad_accum=3, init_scale=1024.0).make_training(training.state.backend)
        state.state.load_weights(trace.at(0, "4.master"))
        state.state.weights_down()
        forward_backward(state.model, [batch], state.state, np.float32(1024 / 3), state.run)
        gradients.append(widen(state.state.grads, "fp64"))
    expected = (gradients[0] / 1024 + gradients[1]) / 1024 + gradients[2]
    np.testing.assert_allclose(flat(trace, 1, "2.grads"), expected, rtol=1e-5, atol=1e-9)


def test_gradients_that_are_not_zeroed_add_up() -> None:
    right, wrong = both("gradients-not-zeroed", lr=1e-12, weight_decay=0.0, clip=0.0, recipe="fp32")
    own = [flat(right, step, "2.grads") for step in (1, 2, 3)]  # the weights hardly move, so each step's gradient is its own
    np.testing.assert_allclose(flat(wrong, 3, "2.grads"), own[0] + own[1] + own[2], rtol=1e-4, atol=1e-7)


def test_a_truncated_residual_is_an_ulp_nearer_to_zero_in_half_of_its_elements() -> None:
    right, wrong = both("residual-truncated", steps=1)
    a, b = (widen(t.at(1, "2.activations")["transformer.h.0.residual_1"], "fp64") for t in (right, wrong))
    assert (np.abs(b) <= np.abs(a)).all() and 0.3 < (a != b).mean() < 0.6
    y = np.float16([1 + 2**-10, -1 - 2**-10, 1, np.inf])  # rounded up, down, not at all, and overflowed
    assert _toward_zero(np.float32([1 + 2**-11 + 2**-13, -1 - 2**-11 - 2**-13, 1, 7e4]), y).tolist() == [1, -1, 1, 65504]


def test_decay_of_norms_shrinks_their_gains() -> None:
    right, wrong = both("decay-all", lr=0.01, weight_decay=0.5, warmup=0, steps=1)
    name = "transformer.ln_f.weight"
    np.testing.assert_allclose(wrong.at(1, "4.master")[name] - right.at(1, "4.master")[name], -0.01 * 0.5, rtol=1e-3)


def test_a_scale_that_is_not_restored_is_found_where_a_run_goes_on() -> None:
    name = "scaler-not-restored"
    right, wrong = (mistake_table.resumed(config(name, mistake=mistake, init_scale=2.0**21), 2) for mistake in ("none", name))
    assert values(right, "2.loss_scale") == [2.0**19] and values(wrong, "2.loss_scale") == [2.0**21]
    c = config(name, init_scale=2.0**21)
    assert not any(f.departs for f in judge_trace(c, right))
    first = next(f for f in judge_trace(c, wrong) if f.departs)
    assert first.point == MISTAKES[name].departs == "2.loss_scale" and explanations(c, wrong, first) == [name]


def test_eps_inside_the_root_slows_small_gradients() -> None:
    right, wrong = (flat(t, 1, "4.master") - flat(t, 0, "4.master") for t in both("eps-inside-root", weight_decay=0.0))
    trace = trace_of("eps-inside-root", "none")
    small = np.abs(flat(trace, 1, "3.unscaled")) < 1e-5
    lr = values(trace, "4.lr")[0]
    assert small.sum() > 100 and np.abs(right[small]).max() > 0.9 * lr  # Adam's first step is lr, however small g is
    assert np.abs(wrong[small]).max() < 1e-5 / 1e-4 * lr  # g / sqrt(g^2 + 1e-8)


def test_eps_in_16_bits_is_nan_where_nothing_was_learned() -> None:
    right, wrong = both("eps-in-16-bits", init_scale=1.0)  # so small a scale that gradients of rare bytes are zero
    assert np.isfinite(flat(right, 3, "4.master")).all() and np.isnan(flat(wrong, 3, "4.master")).any()


def test_coupled_decay_fills_the_moments() -> None:
    right, wrong = both("coupled-decay")
    name = "transformer.wpe.weight"
    difference = widen(wrong.at(1, "4.m")[name], "fp64") - right.at(1, "4.m")[name]
    np.testing.assert_allclose(difference, 0.1 * 0.1 * right.at(0, "4.master")[name], rtol=1e-3, atol=1e-9)  # (1-beta1) wd w


def test_no_bias_correction_scales_the_first_update() -> None:
    right, wrong = (flat(t, 1, "4.master") - flat(t, 0, "4.master") for t in both("no-bias-correction", weight_decay=0.0))
    large = np.abs(right) > 9e-4  # eps does not act, and rounding to the spacing of the master is small
    np.testing.assert_allclose(wrong[large] / right[large], 0.1 / np.sqrt(0.05), rtol=1e-2)


# -- the switch --------------------------------------------------------------------------------------------------------


def test_unknown_mistakes_and_runs_without_room_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown mistake 'x': choose one of no-masters"):
        record(config("x", mistake="x"))
    for name, more, needs in (
        ("no-masters", {"recipe": "fp32"}, "separate masters"),
        ("cast-twice", {"recipe": "fp32"}, "in 16 bits"),
        ("cast-twice", {"bias": False}, "linear layers with a bias"),
        ("rope-angles-in-16-bits", {"model": "gpt"}, "rotary positions"),
        ("rope-frequencies-in-16-bits", {"recipe": "fp32"}, "in 16 bits"),
        ("norm-in-16-bits", {"model": "llama", "recipe": "fp16"}, "keeps it in FP32"),
        ("missing-cast", {"model": "mlp", "n_head": 0}, "attention"),
        ("tied-gradient-dropped", {"model": "mlp", "n_head": 0}, "tied weights"),
        ("no-unscale", {"recipe": "bf16"}, "a loss scale"),
        ("unscale-after-clip", {"clip": 0.0}, "--clip above 0"),
        ("accumulate-in-16-bits", {"grad_accum": 1}, "--grad-accum above 1"),
        ("norm-in-16-bits", {"recipe": "fp16"}, "keeps it in FP32"),
        ("coupled-decay", {"weight_decay": 0.0}, "--weight-decay above 0"),
        ("eps-inside-root", {"optimizer": "sgd"}, "--optimizer adamw"),
        ("scale-never-backs-off", {"loss_scale": "1024"}, "a loss scale that adapts"),
        ("scale-in-16-bits", {"recipe": "bf16"}, "a loss scale that adapts"),
        ("cast-twice", {"recipe": "fp8"}, "in 16 bits"),
        ("sum-in-16-bits", {"recipe": "fp16-sums"}, "in 16 bits with FP32 sums"),
        ("no-unscale", {"recipe": "apex-o2"}, "unscales in the update"),
        ("loss-not-averaged", {"grad_accum": 1}, "--grad-accum above 1"),
        ("unscale-each-micro-batch", {"grad_accum": 1}, "--grad-accum above 1"),
        ("unscale-each-micro-batch", {"recipe": "bf16"}, "a loss scale"),
        ("mean-of-means", {"loss_mean": "micro-batches"}, "--loss-mean tokens"),
        ("gradients-not-zeroed", {"recipe": "fp16"}, "FP32 weights"),
        ("residual-truncated", {"recipe": "amp-bf16"}, "residuals in 16 bits"),
        ("scheduler-steps-on-skip", {"loss_scale": "1024"}, "a loss scale that adapts"),
        ("unscale-by-updated-scale", {"loss_scale": "1024"}, "a loss scale that adapts"),
        ("decay-all", {"weight_decay": 0.0}, "--weight-decay above 0"),
        ("missing-cast", {"attention": "fused"}, "--attention unfused"),
        ("softmax-in-16-bits", {"attention": "math"}, "--attention unfused"),
    ):
        with pytest.raises(UsageError, match=f"--mistake {name} needs .*{needs}"):
            record(config(name, mistake=name, **more))


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu", "fp32"])
def test_every_mistake_runs_in_every_recipe_that_has_room_for_it(recipe: str) -> None:
    ran = 0
    for name in MISTAKES:
        try:
            trace = record(Config.of({**TINY, "recipe": recipe, "mistake": name, "steps": 1, "grad_accum": 2}))
        except UsageError:
            continue
        ran += trace.steps == [1]
    assert ran >= (5 if recipe == "fp32" else 10)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_runs_or_says_what_it_needs(name: str) -> None:
    for recipe in ("bf16-kahan", "apex-o2", "fp8-delayed"):
        try:
            record(Config.of({**TINY, "recipe": recipe, "mistake": name, "steps": 1, "grad_accum": 2}))
        except UsageError as error:
            assert str(error).startswith(f"--mistake {name} needs ")


def test_an_ignored_inf_reaches_the_weights_through_fp32_gradients_too() -> None:
    trace = record(config("ignore-inf", recipe="apex-o2", mistake="ignore-inf"))
    assert np.isnan(flat(trace, 3, "4.master")).any()


@pytest.mark.parametrize("name", ["scale-in-16-bits", "scale-never-backs-off"])
@pytest.mark.parametrize("scaler", SCALER_RULES)
def test_a_mistaken_loss_scale_is_still_its_projects(name: str, scaler: str) -> None:
    """Whoever trains asks it for its floor, and whether it is exhausted."""
    own = config(name, loss_scale=scaler, init_scale=4.0).make_loss_scale()
    training = start(config(name, loss_scale=scaler, init_scale=4.0, mistake=name), faults=MISTAKES)
    scale = training.loss_scale
    rule = SCALER_RULES[scaler]
    assert isinstance(scale, type(own)) and scale.state_dict() == own.state_dict()
    for _ in range(20):
        own.update(np.bool_(True))
        scale.update(np.bool_(True))
    deaf = name == "scale-never-backs-off"
    assert exhausted(scale) == (bool(rule.stops) and not deaf) == (exhausted(own) and not deaf)
    assert float(scale.scale) >= 4 if deaf else float(scale.scale) == np.float16(float(own.scale))


def test_a_run_with_a_mistaken_scale_ends_at_the_floor_of_its_project(tmp_path: Path) -> None:
    more = {"loss_scale": "deepspeed", "hysteresis": 1, "init_scale": 4.0, "lr": 1e9, "warmup": 0, "clip": 0.0, "steps": 40}
    c = config("scale-in-16-bits", mistake="scale-in-16-bits", log_every=5, eval_batches=1, **more)
    run = Trainer(c, tmp_path, faults=MISTAKES)
    with pytest.raises(TrainingStopped, match="the loss scale is 1, below which deepspeed does not go"):
        run.train(NoBar())


def test_a_replaced_state_keeps_the_seed_of_its_random_numbers() -> None:
    for seed in (0, 7):
        c = config("accumulate-in-16-bits", recipe="bf16-sr", mistake="accumulate-in-16-bits", seed=seed)
        training = start(c, faults=MISTAKES)
        assert training.state.seed == seed


def test_the_listing_names_them_all() -> None:
    text = listing()
    assert len(MISTAKES) >= 30 and all(f"{m.name}" in text and m.what in text and m.seen in text for m in MISTAKES.values())
