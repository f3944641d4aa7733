"""Where Inf or NaN begins: each kind of fault by its name, advice that fits the recipe, runs, and what the monitor counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overflow import overflow_always
from pages import MADE
from progress_bars import NoBar
from rank_runs import SIZES
from strict_backend import STRICT

from refimpl.distributed.collectives import Comm
from refimpl.distributed.threads import run_ranks
from refimpl.errors import TrainingStopped
from refimpl.numerics.rounding_effects import OUTCOMES, effects_of
from refimpl.tools.precision_report.collect import Source, inspect
from refimpl.tools.precision_report.main import data, terminal_text
from refimpl.tools.precision_report.page import precision_page
from refimpl.tools.precision_report.verdicts import verdicts_of
from refimpl.training.config import Config
from refimpl.training.non_finite import Origin, find_origin
from refimpl.training.setup import Training, start
from refimpl.training.stopping import explained, known_since
from refimpl.training.trainer import Trainer

Array = Any
FC, PROJ = "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"
RNG = np.random.default_rng(0)
BATCH = RNG.integers(0, 200, (4, 16)), RNG.integers(0, 200, (4, 16))  # no byte of 200 and above
LARGE = RNG.standard_normal((128, 32)).astype(np.float32)


def config_of(**given: Any) -> Config:
    return Config.of({**SIZES, "batch_size": 4, "init_scale": 2.0**16, **given})


def broken(config: Config, spoil: Callable[[Training, dict[str, Array]], None]) -> Training:
    """A run before its first step, with a fault in its masters or its operations."""
    training = start(config)
    spoil(training, training.state.layout.views(training.state.values(training.state.master_kind)))
    return training


def put(name: str, at: Any, value: Any) -> Callable[[Training, dict[str, Array]], None]:
    def spoil(training: Training, masters: dict[str, Array]) -> None:
        masters[name][at] = value

    return spoil


ALL = slice(None)
KINDS: dict[str, tuple[list[str], Callable[[Training, dict[str, Array]], None], str, str, str]] = {
    # recipes; the fault; the stage, the name and part of the text that must come out
    "NaN in a weight": (
        ["fp16", "bf16", "fp32", "amp-fp16", "amp-bf16-cpu"], put(FC, (3, 4), math.nan), "parameter", FC, "has 1 NaN",
    ),
    "Inf in a weight": (["fp16", "bf16", "fp32"], put(FC, (3, 4), -math.inf), "parameter", FC, "has 1 Inf"),
    "NaN in a bias": (
        ["fp16"], put("transformer.h.0.ln_1.bias", 3, math.nan), "parameter", "transformer.h.0.ln_1.bias", "has 1 NaN",
    ),
    "NaN in a row that a token reads": (
        ["fp16"], put("transformer.wte.weight", int(BATCH[0][0, 0]), math.nan), "parameter", "transformer.wte.weight", "32 NaN",
    ),
    "NaN in a row of the tied table that no token reads": (
        ["fp16", "bf16"], put("transformer.wte.weight", 250, math.nan), "parameter", "transformer.wte.weight", "has 32 NaN",
    ),
    "a master beyond FP16": (["fp16", "amp-fp16"], put(FC, (3, 4), 1e6), "cast", FC, "finite, but its 16-bit copy has 1 Inf"),
    "an activation beyond FP16": (
        ["fp16", "amp-fp16", "amp-fp16-cpu"], put(FC, ALL, 6e4 * np.sign(LARGE)), "forward", "transformer.h.1.mlp.c_fc",
        "c_fc (linear) is the first that is not finite",
    ),
    "an activation beyond BF16": (
        ["bf16", "amp-bf16", "fp32"], put(FC, ALL, 3e38 * np.sign(LARGE)), "forward", "transformer.h.1.mlp.c_fc",
        "its inputs (transformer.h.1.ln_2) and parameters are finite",
    ),
    "an overflow in backward alone": (
        ["fp16", "bf16", "fp32"], lambda training, masters: overflow_always(training), "backward", "lm_head",
        "the loss is finite, but a gradient is not: the gradient of the output of lm_head is the first in backward order",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "recipe"), [(kind, recipe) for kind in KINDS for recipe in KINDS[kind][0]])
def test_each_kind_is_named(kind: str, recipe: str) -> None:
    _, spoil, stage, name, text = KINDS[kind]
    config = config_of(recipe=recipe)
    training = broken(config, spoil)
    S = training.loss_scale.scale
    result = training.step([BATCH])
    assert result.skipped and math.isfinite(result.loss) == (stage == "backward")
    origin = find_origin(training, [BATCH], S)
    assert (origin.stage, origin.name) == (stage, name) and text in origin.text
    assert origin.in_loss == (stage != "backward")

    words = explained(origin, config, 0, known_since(0, 1, 1))
    assert "\n" not in words and ("bf16" not in words or "fp16" in recipe)  # a run in bf16 is not told to try bf16
    assert "try --recipe" not in words.lower() or "bf16" in words
    assert ("dynamic" in words) == (stage == "backward" and recipe == "fp16" and config.loss_scale == "none")
    if stage == "parameter":
        assert "since before the first step. Neither loss scale nor learning rate is the cause" in words
    elif stage != "backward":
        assert "the loss scale is not the cause" in words
        later = explained(origin, config, 5)
        assert later.endswith("a smaller --lr if the weights have grown") and "Try if" not in later


def test_a_mistake_that_was_switched_in_is_what_to_suspect_of_a_weight_that_an_update_spoiled() -> None:
    origin = Origin("parameter", FC, f"{FC} has 1 NaN")
    assert "try a smaller --lr" in explained(origin, config_of(), 3)
    words = explained(origin, config_of(mistake="ignore-inf"), 3)
    assert "--mistake ignore-inf injected" in words and "--lr" not in words


def test_a_row_that_nothing_reads_is_no_fault() -> None:
    """The mlp's table is not tied: a NaN in a row of it that no token reads changes nothing."""
    training = broken(config_of(model="mlp", n_head=None), put("wte.weight", 250, math.nan))
    assert find_origin(training, [BATCH], np.float32(1)).stage == "gone"
    assert math.isfinite(training.step([BATCH]).loss)


def test_the_loss_of_a_later_micro_batch_comes_before_the_gradient_of_an_earlier_one() -> None:
    """S is too large for backward, and the second micro-batch reads a NaN: the loss is what is told of."""
    training = broken(config_of(model="mlp", n_head=None, grad_accum=2, recipe="fp16"), put("wte.weight", 250, math.nan))
    bad = np.full_like(BATCH[0], 250), BATCH[1]
    assert find_origin(training, [BATCH, BATCH], np.float32(2.0**40)).stage == "backward"
    origin = find_origin(training, [BATCH, bad], np.float32(2.0**40))
    assert (origin.stage, origin.name) == ("parameter", "wte.weight")


def test_no_target_at_all() -> None:
    config = config_of(grad_accum=2)
    training, nothing = start(config), (BATCH[0], np.full_like(BATCH[1], -100))
    assert find_origin(training, [nothing, nothing], np.float32(1)).stage == "targets"
    assert find_origin(training, [nothing, BATCH], np.float32(1)).stage == "gone"
    words = explained(find_origin(training, [nothing, nothing], np.float32(1)), config, 5)
    assert "all targets of the step are ignored (-100)" in words and "--ignore-index" in words


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_name_the_same_thing(stage: int) -> None:
    """Only the second rank's rows read the NaN; all ranks say so."""
    config = config_of(model="mlp", n_head=None, batch_size=4, zero=stage, recipe="fp16")

    def run(comm: Comm) -> tuple[str, str]:
        training = start(config, comm)
        weights = training.model.initial_weights(np.random.default_rng(0))
        weights["wte.weight"][250] = math.nan
        training.state.load_weights(weights)
        tokens = np.full((2, 16), 250) if comm.rank == 1 else BATCH[0][:2]
        origin = find_origin(training, [(tokens, BATCH[1][:2])], np.float32(1))
        return origin.stage, origin.name

    assert run_ranks(2, run) == [("parameter", "wte.weight")] * 2


def test_on_a_device() -> None:
    training = config_of(recipe="fp16").make_training(STRICT)
    weights = training.model.initial_weights(np.random.default_rng(0))
    weights[FC][3, 4] = math.nan
    training.state.load_weights(weights)
    origin = find_origin(training, [training.model.batch_on(STRICT, *BATCH)], STRICT.from_host(np.float32(65536).reshape(())))
    assert origin.text == f"{FC} has 1 NaN"


# -------------------------------------------------------------------------------------------------------------- a run


def trainer_of(folder: Path, **given: Any) -> Trainer:
    folder.mkdir()
    text = folder / "text"
    text.write_bytes(bytes(RNG.integers(97, 120, 4000).astype(np.uint8)))
    return Trainer(config_of(data=str(text), eval_batches=1, sample_bytes=0, **given), folder)


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "fp32"])
def test_a_run_with_a_nan_in_a_weight_ends_at_once_and_names_it(recipe: str, tmp_path: Path) -> None:
    """With a loss scale too: no scale can mend it, so 50 skipped steps would show nothing."""
    run = trainer_of(tmp_path / "r", recipe=recipe, steps=300, eval_every=300)
    run.state.layout.views(run.state.values(run.state.master_kind))[FC][3, 4] = math.nan
    with pytest.raises(TrainingStopped) as error:
        run.train(NoBar())
    assert str(error.value).startswith(f"step 1: the loss is nan: {FC} has 1 NaN since before the first step. Neither")
    assert "--lr" not in str(error.value) and "--recipe" not in str(error.value)


def test_an_overflow_in_forward_is_told_once_and_ends_the_run_whatever_the_scale(tmp_path: Path) -> None:
    run = trainer_of(tmp_path / "r", recipe="fp16", steps=100, eval_every=100)
    run.state.layout.views(run.state.master)[FC][...] = 6e4 * np.sign(LARGE)
    bar = NoBar()
    with pytest.raises(TrainingStopped, match=r"50 steps in a row were skipped and .*c_fc \(linear\) is the first"):
        run.train(bar)
    assert [text for text in bar.written if "the loss is" in text] == [bar.written[0]]
    assert bar.written[0].startswith("step 1: the loss is ") and "--recipe bf16" in bar.written[0]


@pytest.mark.parametrize("recipe", ["fp16", "amp-fp16"])
def test_a_weight_that_overflows_in_16_bits_ends_the_run_at_the_step_that_is_skipped(recipe: str, tmp_path: Path) -> None:
    """No scale can mend it: the weight is what it was, and its copy is made again at the next step."""
    run = trainer_of(tmp_path / "r", recipe=recipe, steps=3, eval_every=3)
    run.state.layout.views(run.state.values(run.state.master_kind))[FC][3, 4] = 1e6
    with pytest.raises(TrainingStopped) as error:
        run.train(NoBar())
    assert str(error.value).startswith(f"step 1: the loss is nan: {FC} is finite, but its 16-bit copy has 1 Inf: it overflows")
    assert "--recipe" in str(error.value) and str(error.value).endswith("No weight was changed by this step")


@pytest.mark.parametrize("always", [True, False])
def test_a_row_that_overflows_ends_the_run_if_every_step_has_read_it(always: bool, tmp_path: Path) -> None:
    """Another batch may not read it: steps that were made count, and the run ends as usual."""
    run = trainer_of(tmp_path / "r", model="mlp", n_head=None, recipe="fp16", steps=3, eval_every=3)
    run.state.layout.views(run.state.master)["wte.weight"][250] = 1e6
    draw = run.next_batches

    def batches() -> Any:
        reads = always or run.progress.step == 1
        return [(np.full_like(x, 250) if reads else x, y) for x, y in draw()]

    run.next_batches = batches  # type: ignore[method-assign]
    if not always:
        assert run.train(NoBar()) and run.progress.skipped == 1
        return
    with pytest.raises(TrainingStopped, match=r"no step has changed a weight, all 3 were skipped: wte.weight is finite, but"):
        run.train(NoBar())


def test_a_run_whose_targets_are_all_ignored_says_so_and_goes_on(tmp_path: Path) -> None:
    run = trainer_of(tmp_path / "r", recipe="bf16", steps=3, eval_every=3)
    run.model = run.training.model
    draw = run.next_batches
    run.next_batches = lambda: [(x, np.full_like(y, -100)) for x, y in draw()]  # type: ignore[method-assign]
    bar = NoBar()
    assert run.train(bar)
    assert len(bar.written) == 2 and "all targets of the step are ignored" in bar.written[0]


# -------------------------------------------------------------------------------------------------------- the monitor


def test_what_arrives_non_finite_is_counted_as_such() -> None:
    x = np.array([math.nan, math.inf, -math.inf, 1.0, 0.0, 1e30, 1e-30], np.float32)
    for fmt in ("fp16", "bf16", "e4m3", "e5m2", "e2m1"):
        with np.errstate(all="ignore"):
            effects = effects_of(x, x, fmt)
        assert effects.arrived.tolist() == [True, True, True, False, False, False, False]
        assert not (effects.exact | effects.overflowed | effects.saturated | effects.rounded | effects.flushed)[:3].any()


@pytest.mark.parametrize("loss_scale", ["dynamic", "1"])
def test_the_monitor_never_calls_nan_exact(loss_scale: str) -> None:
    config = config_of(recipe="fp16", steps=2, loss_scale=loss_scale)
    training = broken(config, put(FC, (3, 4), math.nan))
    seen = inspect(Source("a run", config, training, [[BATCH], [BATCH]], 2), every=1)
    written = data(seen)
    json.dumps(written, default=str)

    weight = written["sites"][f"{FC.removesuffix('.weight')}.weight:weights_down"]
    assert weight["arrived"] == 2
    assert weight["elements"] == sum(weight[name] for name in OUTCOMES)
    assert "2 of 8192 values arrived as Inf or NaN" in weight["verdict"]
    dw = written["sites"]["transformer.h.1.mlp.c_fc:linear.dw.dw"]
    assert dw["arrived"] == dw["elements"] and dw["exact"] == 0 and dw["overflowed"] == 0
    assert dw["verdict"] == f"all {dw['elements']} values arrived as Inf or NaN, so nothing can be said about a loss scale"
    for text in (v.text for v in verdicts_of(seen)):
        assert "needs no loss scale" not in text or "arrived" not in text
    assert written["non_finite"] == f"At step 1: {FC} has 1 NaN."
    texts = [terminal_text(seen)] + ([precision_page(seen, MADE)] if find_spec("matplotlib") else [])
    for text in texts:
        assert written["non_finite"] in " ".join(text.split()) and "arrived" in text
        assert "S was 1, and 0 %" not in " ".join(text.split())


def test_a_run_in_order_has_nothing_to_say_of_it() -> None:
    config = config_of(recipe="fp16", steps=1)
    seen = inspect(Source("a run", config, start(config), [[BATCH]], 1), every=1)
    assert data(seen)["non_finite"] == "" and not any(counts.arrived for counts in seen.sites.values())
