"""The data behind the precision report: where a run comes from, what is counted of it, and what is said of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe_lists import others_slow

import refimpl.tools.precision_report.collect
from refimpl.errors import UsageError
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.rounding_effects import Counts
from refimpl.numerics.rounding_words import percent
from refimpl.parity.trace import Trace, record, save
from refimpl.precision.recipes import RECIPES, get_recipe
from refimpl.tools.precision_report.collect import (
    SWEEP,
    Inspection,
    Movement,
    fresh,
    from_checkpoint,
    from_trace,
    inspect,
    low_format,
    sweep_scales,
)
from refimpl.tools.precision_report.counts import kind_of, layer_of
from refimpl.tools.precision_report.tables import summary
from refimpl.tools.precision_report.verdicts import plain_name, verdicts_of
from refimpl.training.config import Config
from refimpl.training.metrics import read_metrics
from refimpl.training.run import train

TINY: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 6, "warmup": 2, "lr": 1e-2,
}  # fmt: skip
EVERY = [(recipe, model) for recipe in RECIPES for model in ("gpt", "mlp")]
ROUNDINGS = ("fp64", "fp16", "bf16", "amp-fp16", "bf16-sr", "bf16-remainder", "adam-8bit", "fp8-delayed", "mxfp8", "nvfp4")
OF_EACH_KIND = [*((recipe, "gpt") for recipe in ROUNDINGS), *((recipe, "mlp") for recipe in ("fp32", "fp16", "nvfp4"))]
"""Of EVERY: each kind of site once; the other model with no rounding, with those of FP16 alone, and with quantized operands."""


def config(recipe: str = "fp16", **more: Any) -> Config:
    return Config.of({**TINY, "recipe": recipe, **more})


@pytest.fixture(autouse=True)
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three loss scales at the end of an inspection, not thirteen: most tests look at what comes before."""
    monkeypatch.setattr(refimpl.tools.precision_report.collect, "SWEEP", SWEEP[::6])


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_trace_is_the_same_run_once_more(tmp_path: Path) -> None:
    """To the bit on the reference backend: on others watched steps run definitions in place of fast versions."""
    trace = record(config(backend="reference"))
    save(tmp_path / "t.safetensors", trace)
    source = from_trace(tmp_path / "t.safetensors")
    rows = inspect(source, every=2).rows
    assert [np.float32(row.loss) for row in rows] == [trace.get(step, "2.loss") for step in trace.steps]
    assert source.steps == 6 and "trace t.safetensors" in source.what


@pytest.mark.parametrize("recipe", ["apex-o2", "megatron-bf16", "bf16-remainder", "bf16-sr", "fp8-delayed", "nvfp4"])
def test_the_trace_of_any_recipe_is_the_same_run_once_more(recipe: str, tmp_path: Path) -> None:
    """Its start, its random numbers and its scales too."""
    trace = record(config(recipe, backend="reference"))
    save(tmp_path / "t.safetensors", trace)
    rows = inspect(from_trace(tmp_path / "t.safetensors")).rows
    assert [np.float32(row.loss) for row in rows] == [trace.get(step, "2.loss") for step in trace.steps]


def test_a_trace_without_a_configuration_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "t.safetensors", Trace({}, record(config()).tensors))
    with pytest.raises(UsageError, match="holds no configuration"):
        from_trace(tmp_path / "t.safetensors")


def test_a_checkpoint_goes_on_as_the_resumed_run_does_and_stays_as_it_is(tmp_path: Path) -> None:
    flags = {**TINY, "recipe": "fp16", "backend": "reference", "eval_every": 3, "log_every": 1}
    flags |= {"eval_batches": 1, "sample_bytes": 0}
    train({**flags, "steps": 9}, tmp_path / "whole", False, False, None)
    train({**flags, "steps": 9}, tmp_path / "part", False, False, None)
    with (tmp_path / "part" / "metrics.jsonl").open("a") as log:  # a line that the checkpoint has not come to: resuming cuts it
        log.write('{"step": 10, "loss": 1.0}\n')
    before = {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()}
    source = from_checkpoint(tmp_path / "part", 3)
    assert "at step 9" in source.what and source.config.steps == 12
    rows = inspect(source).rows
    assert {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()} == before
    train({"steps": 12}, tmp_path / "part", True, False, None)
    resumed = [row["loss"] for row in read_metrics(tmp_path / "part").steps][9:]
    assert [row.loss for row in rows] == resumed and len(resumed) == 3


def test_a_run_that_was_resumed_beyond_its_plan_goes_on_from_there(tmp_path: Path) -> None:
    flags = {**TINY, "recipe": "bf16", "eval_batches": 1, "sample_bytes": 0}
    train({**flags, "steps": 2}, tmp_path / "run", False, False, None)
    train({"steps": 4}, tmp_path / "run", True, False, None)
    source = from_checkpoint(tmp_path / "run", 1)
    assert "at step 4" in source.what and source.config.steps == 5


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run in"):
        from_checkpoint(tmp_path, 3)


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_the_first_the_last_and_every_nth_step_are_looked_at() -> None:
    assert [s["step"] for s in inspect(fresh(config(steps=6)), every=4).sampled] == [1, 4, 6]


def test_totals_are_the_sums_over_the_steps() -> None:
    result = inspect(fresh(config()), every=1, what_if=("e4m3",))
    assert [s["step"] for s in result.sampled] == [1, 2, 3, 4, 5, 6]
    for site, counts in result.sites.items():
        assert counts.elements == sum(s["sites"][site]["elements"] for s in result.sampled)
        assert counts.flushed == sum(s["sites"][site]["flushed"] for s in result.sampled)
    assert result.others["e4m3"].keys() == result.sites.keys()
    assert all("gradients" in site or site in result.sites for site in result.unscaled)


def test_gradients_are_unscaled_by_the_scale_of_their_own_step() -> None:
    """The loss scale doubles every step here, so the unscaled binades stay where they are while the scaled ones wander."""
    result = inspect(fresh(config(init_scale=16.0, growth_interval=1, steps=2, lr=1e-9)), every=1)
    assert [s["loss_scale"] for s in result.sampled] == [16.0, 32.0]
    site = "lm_head:linear.dw.dw"
    first, second = (s["sites"][site]["exponents"][1] for s in result.sampled)
    unscaled = result.unscaled[site].exponents
    assert unscaled is not None and unscaled[1] == max(first - 4, second - 5)


@pytest.mark.parametrize(
    ("recipe", "low"),
    [("fp16", "fp16"), ("bf16", "bf16"), ("amp-fp16", "fp16"), ("amp-bf16-cpu", "bf16"), ("fp32", "bf16")],
)
def test_the_format_that_weights_are_held_against(recipe: str, low: str) -> None:
    assert low_format(get_recipe(recipe)) == low
    if recipe == "fp32":
        assert low_format(get_recipe(recipe), ("e4m3", "fp16")) == "fp16"


def test_values_that_have_a_scale_of_their_own_are_judged_as_they_are_rounded() -> None:
    """No loss scale moves them, so nothing is said of what another one would do."""
    result = inspect(fresh(config("nvfp4", loss_scale="1024", steps=2)))
    quantized = {site for site, counts in result.sites.items() if counts.fmt == "e2m1"}
    gradients = {site for site in quantized if kind_of(site) == "activation gradients"}
    assert gradients and not gradients & result.unscaled.keys()
    for verdict in verdicts_of(result):
        assert ("divided by its own scale" in verdict.text) == (verdict.site in quantized)
        assert verdict.site not in quantized or not re.search(r"S = 1|S of this run|below overflow", verdict.text)
    _, _, gradients_sentence, _ = summary(result)
    counts = [result.sites[site] for site in gradients]
    flushed = sum(c.flushed for c in counts) / sum(c.elements - c.zeros for c in counts)
    assert flushed > 0.001
    assert f"Quantized gradients have scales of their own: {percent(flushed)} of the nonzero values" in gradients_sentence
    assert gradients_sentence.startswith("Without a loss scale") and "of the nonzero 16-bit gradients" in gradients_sentence


@pytest.mark.parametrize(
    ("recipe", "not_counted"),
    [("bf16-kahan", "weights (bf16-kahan)"), ("adam-8bit", "m (int8-signed) and v (int8-unsigned)"),
     ("adam-fp8", "m (e4m3-blocks) and v (e4m3-blocks)"), ("bf16-sr", ""), ("bf16-remainder", ""), ("bf16", "")],
)  # fmt: skip
def test_states_whose_roundings_are_not_counted_are_named(recipe: str, not_counted: str) -> None:
    result = inspect(fresh(config(recipe, steps=2)))
    assert any(f"The roundings of {not_counted} are not counted" in sentence for sentence in summary(result)) == bool(
        not_counted
    )
    assert any(site.endswith("update.weights") for site in result.sites) == (recipe in ("bf16-sr", "adam-8bit", "adam-fp8"))


def test_a_master_in_two_halves_is_a_master() -> None:
    """As the same master in one piece: the halves are put together, and the upper one is its copy."""
    whole, halves = (inspect(fresh(config(recipe))) for recipe in ("bf16", "bf16-remainder"))
    for a, b in zip(whole.rows, halves.rows, strict=True):
        assert a.masters_still == b.masters_still and a.loss == pytest.approx(b.loss, rel=1e-3)
        assert a.weights_still == pytest.approx(b.weights_still, abs=0.01)
    downs = [{site for site in result.sites if site.endswith(":weights_down")} for result in (whole, halves)]
    assert downs[0] == downs[1] and len(downs[0]) > 0


def test_a_scaler_that_starts_at_1_is_a_loss_scale() -> None:
    sentences = [summary(inspect(fresh(config(loss_scale=scale, steps=1))))[2] for scale in ("chainer", "none")]
    assert sentences[0].startswith("S was 1, and") and sentences[1].startswith("There is no loss scale (S = 1), and")


def test_movement_by_hand() -> None:
    """1 + 2^-12 is not a bf16 value: the copy of the master moves after a while, the weight without master never does."""
    training = config("bf16").make_training(config("bf16").make_backend())
    training.state.master[...] = 1.0
    movement = Movement(training.state, "bf16")
    outcome = training.step([(np.zeros((1, 8), np.int64), np.zeros((1, 8), np.int64))])
    training.state.master[...] = 1.0 + 2.0**-12
    row = movement.row(1, outcome, training.state)
    assert (row.masters_still, row.weights_still, row.alone_still) == (0.0, 1.0, 1.0)
    for step in range(2, 17):
        training.state.master[...] = 1.0 + step * 2.0**-12
        row = movement.row(step, outcome, training.state)
    assert (row.weights_moved, row.alone_moved) == (0.0, 0.0)  # 1 + 2^-8 is the tie; it goes to the even 1
    training.state.master[...] = 1.0 + 17 * 2.0**-12
    row = movement.row(17, outcome, training.state)
    assert (row.weights_still, row.weights_moved, row.alone_moved) == (0.0, 1.0, 0.0)


def test_without_masters_nothing_is_imagined() -> None:
    source = fresh(config("pure-bf16"))
    start = cast(source.training.state.master.copy(), "bf16")
    rows = inspect(source).rows
    assert rows[-1].masters_still is None and rows[-1].weights_moved is None
    assert rows[-1].alone_moved == np.mean(widen(source.training.state.weights) != widen(start))


def test_the_sweep_flushes_less_and_overflows_more_as_the_scale_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    source = fresh(config())
    inspect(source)
    monkeypatch.setattr(refimpl.tools.precision_report.collect, "SWEEP", SWEEP)
    before = source.training.state.master.copy()
    rows = sweep_scales(source.training, next(iter(fresh(config()).batches)))
    assert [row["exponent"] for row in rows] == list(SWEEP)
    assert rows[0]["layers"].keys() == {"embedding", "block 0", "block 1", "head"}
    flushed = [row["layers"]["block 0"][0] for row in rows]
    assert flushed[0] > 0 and flushed == sorted(flushed, reverse=True)
    overflowed = [sum(layer[1] for layer in row["layers"].values()) for row in rows]
    assert overflowed[0] == 0 and overflowed[-1] > 0
    assert np.array_equal(before, source.training.state.master)
    assert source.training.run.monitor is None and source.training.state.monitor is None


@pytest.mark.parametrize(("recipe", "model"), others_slow(EVERY, plain=OF_EACH_KIND))
def test_every_recipe_and_model_can_be_inspected(recipe: str, model: str) -> None:
    result = inspect(fresh(config(recipe, model=model, n_layer=1, steps=2)), what_if=("e5m2",))
    assert len(result.rows) == 2 and all(math.isfinite(row.loss) for row in result.rows)
    assert bool(result.sites) == (recipe not in ("fp32", "fp64"))
    assert len(verdicts_of(result)) == len(result.sites)


def test_a_run_that_only_skips_ends_with_what_was_seen() -> None:
    result = inspect(fresh(config(lr=1e3, warmup=0, steps=400, init_scale=2.0**20)))
    assert len(result.rows) < 400 and all(row.skipped for row in result.rows[-50:])
    assert f"ended at step {len(result.rows)} because the last 50 were all skipped" in result.what
    assert verdicts_of(result) and result.sweep


@pytest.mark.parametrize("recipe", ["bf16", "fp32"])
def test_weights_that_become_infinite_are_no_error(recipe: str) -> None:
    assert len(inspect(fresh(config(recipe, lr=1e38, warmup=0, steps=3))).rows) == 3


@pytest.mark.parametrize(
    ("arguments", "message"), [({"every": 0}, "--every"), ({"what_if": ("fp8",)}, "fp8"), ({"what_if": ("e8m0",)}, "e8m0")]
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inspect(fresh(config()), **arguments)


def test_layers() -> None:
    assert layer_of("transformer.h.12.mlp.c_fc:linear.dw.dw") == "block 12"
    assert layer_of("h.1.fc:linear.dw.dw") == "block 1"
    assert layer_of("model.layers.29.self_attn:attention.scores.S") == "block 29"
    assert layer_of("model.embed_tokens:embedding.dw") == "embedding" and layer_of("model.norm:llama_rmsnorm.y") == "head"
    assert layer_of("transformer.wte.weight.grad:fan_in.sum") == "embedding"
    assert layer_of("transformer.embedding:add.db") == "embedding"
    assert layer_of("transformer.ln_f:layernorm.dx") == layer_of("loss:cross_entropy.dlogits.stored") == "head"


# -- what is said ------------------------------------------------------------------------------------------------------


def inspection_of(site: str, x: np.ndarray, scale: float | None = None, fmt: str = "fp16") -> Inspection:
    counts = Counts(fmt)
    counts.add(x, cast(x, fmt))
    result = Inspection("by hand", config(), fmt, ())
    result.add(1, scale or 1.0, {site: counts}, {})
    return result


def test_the_verdict_on_a_gradient_names_the_scale_that_saves_it() -> None:
    tiny, usual = np.full(12, 2.0**-33 * 1.5, np.float32), np.full(88, 0.5, np.float32)
    (verdict,) = verdicts_of(inspection_of("transformer.h.3.mlp.c_fc:linear.dw.dw", np.concatenate([tiny, usual])))
    assert verdict.name == "dw of block 3 mlp.c_fc" and verdict.kind == "weight gradients"
    # 1.5 * 2^-33 * 2^8 is above 2^-25, half of the smallest subnormal; 0.5 * 2^17 is beyond 65520
    remedy = "S >= 2^8 saves all but 0.10 % of it, and it overflows above 2^16"
    assert verdict.text == f"12 % would become zero in fp16 at S = 1; {remedy}"
    x = np.concatenate([tiny, usual])
    assert np.count_nonzero(cast(x * np.float32(2**7), "fp16") == 0) == 12
    assert np.count_nonzero(cast(x * np.float32(2**8), "fp16") == 0) == 0
    assert np.isfinite(widen(cast(x * np.float32(2**16), "fp16"))).all()
    assert not np.isfinite(widen(cast(x * np.float32(2**17), "fp16"))).all()


def test_the_verdict_is_on_the_unscaled_gradient() -> None:
    x = np.full(100, 2.0**-30, np.float32)
    (verdict,) = verdicts_of(inspection_of("lm_head:linear.dw.dw", x * np.float32(1024), 1024.0))
    assert "100 % would become zero in fp16 at S = 1" in verdict.text
    assert verdict.text.endswith("at the S of this run (2^10) 0 % did")


def test_no_scale_saves_a_gradient_that_is_too_wide() -> None:
    x = np.concatenate([np.full(50, 1.5 * 2.0**-40, np.float32), np.full(50, 1024, np.float32)])
    (verdict,) = verdicts_of(inspection_of("lm_head:linear.dw.dw", x))
    assert "no S saves all but 0.10 % of it: that needs 2^15, but it overflows above 2^5" in verdict.text


def test_a_gradient_in_range_needs_no_scale() -> None:
    (verdict,) = verdicts_of(inspection_of("lm_head:linear.dw.dw", np.float32([1e-30, 1.0]), fmt="bf16"))
    assert verdict.text.startswith("needs no loss scale")


def test_verdicts_on_values_and_their_order() -> None:
    result = inspection_of("a:linear.y.y", np.float32([1e6, 1.0, 0.1]))
    for site, x in (("b:linear.y.y", np.float32([1e-9, 1.0])), ("c:linear.y.y", np.float32([0.1, 0.3]))):
        result.sites[site] = inspection_of(site, x).sites[site]
    first, second, third = verdicts_of(result)
    assert first.name == "y of a" and "1 of 3 values overflowed fp16" in first.text and first.severity > 1
    assert second.name == "y of b" and "50 % of the nonzero values became zero" in second.text
    assert third.name == "y of c" and "2^17 times below overflow" in third.text and third.severity < 0.001


def test_names_and_numbers_for_people() -> None:
    assert plain_name("transformer.h.0.attn.c_attn.weight:weights_down") == "block 0 attn.c_attn.weight"
    assert plain_name("transformer.wte.weight:update.v") == "v of wte.weight"
    assert plain_name("model.layers.12.mlp.down_proj:linear.dw.dw") == "dw of block 12 mlp.down_proj"
    assert plain_name("model.norm:llama_rmsnorm.y") == "y of norm" and plain_name("lm_head:linear.y.y") == "y of lm_head"
    assert plain_name("h.1.fc:linear.dx.dx") == "dx of block 1 fc"
    assert plain_name("transformer.h.2.residual_1.grad:fan_in.sum") == "sum of gradients of block 2 residual_1"
    assert plain_name("loss:cross_entropy.dlogits.stored") == "dlogits of loss"
    assert [percent(s) for s in (0, 1, 0.123, 0.00567, 1e-7)] == ["0 %", "100 %", "12 %", "0.57 %", "0.000010 %"]
    assert [percent(s) for s in (0.9966, 0.88, 0.5)] == ["99.66 %", "88 %", "50 %"]
