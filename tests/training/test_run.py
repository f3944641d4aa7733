"""A run from the command line's arguments to its files: training, stopping, resuming bit for bit, refusing bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overflow import overflow_always
from paths import SCRIPTS
from progress_bars import NoBar
from recipe_lists import MECHANISMS, others_slow
from script_loader import run_here

from refimpl.errors import TrainingStopped, UsageError
from refimpl.nn.models.model import Model
from refimpl.numerics.casts import widen
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.parity.mistakes import MISTAKES
from refimpl.precision.recipes import RECIPES
from refimpl.training import init_from
from refimpl.training.checkpoint import load, save
from refimpl.training.checkpoint_states import FirstWeights
from refimpl.training.config import Config
from refimpl.training.metrics import MetricsLog, read_metrics
from refimpl.training.resume import Progress
from refimpl.training.run import train
from refimpl.training.run_report import warn
from refimpl.training.setup import start
from refimpl.training.trainer import Trainer

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 8, "warmup": 2, "eval_every": 3,
    "eval_batches": 2, "log_every": 2, "sample_bytes": 5, "lr": 1e-2, "growth_interval": 3, "init_scale": 2.0**22,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A small file of real structure, so that tests do not depend on the Python version's documentation."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}; {'even' if i % 2 == 0 else 'odd'}.\n" for i in range(200)))
    return str(path)


def run(folder: Path, text: str, resume: bool = False, **flags: Any) -> int:
    given = flags if resume else {**TINY, "data": text, **flags}
    return train(given, folder, resume, False, None, faults=MISTAKES)


def stop_at(folder: Path, text: str, step: int, **flags: Any) -> None:
    """Run until Ctrl-C comes during the logging of `step`."""
    from refimpl.training.run_folder import open_folder, prepare_folder

    config, folder = prepare_folder({**TINY, "data": text, "log_every": 1, **flags}, folder, False, False)
    trainer = Trainer(config, folder, faults=MISTAKES)
    open_folder(config, folder)
    assert not trainer.train(NoBar(stop_at=step))
    assert trainer.progress.step == step


def rows_without_timing(folder: Path) -> list[list[dict[str, Any]]]:
    free = ("run", "seconds", "tokens_per_s")
    return [[{k: v for k, v in row.items() if k not in free} for row in rows] for rows in read_metrics(folder)]


EARLIEST = ("fp64", "fp32", "fp16", "bf16", "amp-fp16", "amp-bf16", "amp-fp16-cpu", "amp-bf16-cpu", "pure-bf16")
STOPS = [(recipe, step) for recipe in RECIPES if recipe != "pure-fp16" for step in (1, 3, 5) if step == 3 or recipe in EARLIEST]
STATELESS = ("fp64", "amp-fp16", "amp-bf16-cpu", "fp8-rows-dw-bf16", "mxfp8", "fp8-14bit-128", "fp16-sums-64")
OF_EACH_KIND = [*((recipe, 3) for recipe in MECHANISMS if recipe not in STATELESS), ("fp16", 1), ("fp16", 5)]
"""Of STOPS: each mechanism with a state of its own, between two evaluations; and one before and after that."""


@pytest.mark.parametrize(("recipe", "step"), others_slow(STOPS, plain=OF_EACH_KIND))
def test_resumed_run_equals_one_never_stopped(
    recipe: str, step: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refimpl.training.evaluate.WHOLE_TEXT", 0)
    assert run(tmp_path / "whole", text, recipe=recipe) == 0
    stop_at(tmp_path / "parts", text, step, recipe=recipe)
    assert run(tmp_path / "parts", text, resume=True) == 0
    whole, parts = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert rows_without_timing(tmp_path / "whole") == rows_without_timing(tmp_path / "parts")


def test_a_reader_who_has_gone_costs_no_checkpoint(text: str, tmp_path: Path) -> None:
    """`train.py | head -1` ends at the first line that nobody reads; the checkpoint of that step is written before it."""
    from refimpl.training.run_folder import open_folder, prepare_folder

    class Gone(NoBar):
        def write(self, text: str) -> None:
            raise BrokenPipeError

    config, folder = prepare_folder({**TINY, "data": text}, tmp_path, False, True)
    trainer = Trainer(config, folder)
    open_folder(config, folder)
    with pytest.raises(BrokenPipeError):
        trainer.train(Gone())
    assert load(folder / "checkpoint.safetensors")[1]["progress"]["step"] == TINY["eval_every"]


def test_resume_is_bitwise_with_skips_and_accumulation_and_sgd(text: str, tmp_path: Path) -> None:
    flags = {"init_scale": 2.0**40, "grad_accum": 2, "optimizer": "sgd", "steps": 30, "recipe": "fp16"}
    run(tmp_path / "whole", text, **flags)
    stop_at(tmp_path / "parts", text, 7, **flags)
    run(tmp_path / "parts", text, resume=True)
    skipped = [row["skipped"] for row in read_metrics(tmp_path / "whole").steps]
    assert 0 < sum(skipped) < 30
    whole, parts = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_run_that_skipped_the_generator_state_would_be_seen(text: str, tmp_path: Path) -> None:
    """Negative control of the resume test: batches from a fresh generator give another checkpoint."""
    run(tmp_path / "whole", text)
    stop_at(tmp_path / "parts", text, 3)
    from refimpl.training.run_folder import prepare_folder

    config, folder = prepare_folder({}, tmp_path / "parts", True, False)
    trainer = Trainer(config, folder)
    fresh = trainer.batches.bit_generator.state
    trainer.restore()
    trainer.batches.bit_generator.state = fresh
    trainer.train(NoBar())
    whole, parts = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() != parts.read_bytes()


LOAD_SCALES = ScalingState.load
FORGETFUL: dict[str, Callable[[ScalingState, int, Any], None]] = {
    "fp8-delayed": lambda scales, passes, arrays: LOAD_SCALES(scales, passes, {k: np.ones_like(x) for k, x in arrays.items()}),
    "nvfp4": lambda scales, passes, arrays: None,
}


@pytest.mark.parametrize("recipe", FORGETFUL)
def test_a_run_that_forgot_its_scales_or_its_draws_would_be_seen(
    recipe: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the same test: delayed scaling without its history; random bits that begin again."""
    run(tmp_path / "whole", text, recipe=recipe)
    stop_at(tmp_path / "parts", text, 3, recipe=recipe)
    monkeypatch.setattr(ScalingState, "load", FORGETFUL[recipe])
    run(tmp_path / "parts", text, resume=True)
    whole, parts = (tmp_path / name / "checkpoint.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() != parts.read_bytes()


def test_scales_of_past_steps_are_in_the_checkpoint(text: str, tmp_path: Path) -> None:
    """A tensor for each operand of the layers that are quantized: its scale and its largest values."""
    run(tmp_path / "r", text, recipe="fp8-delayed")
    arrays = load(tmp_path / "r" / "checkpoint.safetensors")[0]
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    operands = ("x.e4m3", "w.e4m3", "dy.e5m2")
    kept = [f"scales.transformer.h.0.{layer}.{operand}" for layer in layers for operand in operands]
    assert {name.rpartition(".")[0] for name in arrays if name.startswith("scales.")} == set(kept)
    for name in kept:
        history = arrays[f"{name}.amax_history"]
        assert np.count_nonzero(history) == 8 and history.dtype == np.float32  # eight steps


@pytest.mark.parametrize("lost", ["scales.transformer.h.0.mlp.c_fc.x.e4m3.amax_history", "scales."])
def test_a_file_without_half_or_all_of_the_scales_is_refused(lost: str, text: str, tmp_path: Path) -> None:
    stop_at(tmp_path / "r", text, 3, recipe="fp8-delayed")
    path = tmp_path / "r" / "checkpoint.safetensors"
    arrays, header = load(path)
    del header["version"]
    save(path, {name: array for name, array in arrays.items() if not name.startswith(lost)}, header)
    with pytest.raises(UsageError, match="damaged"):
        run(tmp_path / "r", text, resume=True)


@pytest.mark.parametrize("recipe", ["fp16", "fp8-delayed", "nvfp4", "bf16-sr"])
def test_evaluating_and_sampling_more_often_changes_no_weight(recipe: str, text: str, tmp_path: Path) -> None:
    run(tmp_path / "a", text, recipe=recipe, eval_every=1, eval_batches=3, sample_bytes=50, log_every=1)
    run(tmp_path / "b", text, recipe=recipe, eval_every=8)
    a, b = (tmp_path / name / "checkpoint.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_files_of_a_run(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "r", text, recipe="fp16") == 0
    steps, evaluations = read_metrics(tmp_path / "r")
    assert [row["step"] for row in steps] == list(range(1, 9)) and [row["step"] for row in evaluations] == [3, 6, 8]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["recipe"] == "fp16" and config["data"] == text
    arrays, header = load(tmp_path / "r" / "checkpoint.safetensors")
    assert header["progress"]["step"] == 8 and str(tmp_path) not in json.dumps(header)
    assert arrays["weights.transformer.wte.weight"].dtype == np.float16
    assert arrays["master.transformer.wte.weight"].dtype == np.float32
    np.testing.assert_array_equal(arrays["weights.lm_head.weight" if False else "weights.transformer.wte.weight"],
                                  arrays["master.transformer.wte.weight"].astype(np.float16))  # fmt: skip
    printed = capsys.readouterr().out
    assert "= 16 bytes per parameter, as measured" in printed and "trigram" in printed and "a sample of 5 bytes" in printed


@pytest.mark.parametrize(("flag", "rounded"), [(None, False), ("original", False), ("rounded", True)])
def test_masters_start_from_what_the_flag_says(flag: str | None, rounded: bool, text: str) -> None:
    """Without it from what the recipe says."""
    of_bf16, of_megatron = (start(Config.of({**TINY, "data": text, "recipe": name, "masters_from": flag})).state
                            for name in ("bf16", "megatron-bf16"))  # fmt: skip
    assert (of_bf16.master == widen(of_bf16.weights)).all() == rounded
    assert (of_megatron.master == widen(of_megatron.weights)).all() == (flag != "original")


@pytest.mark.parametrize(("warmup", "ends_within"), [(7, False), (8, True), (50, True)])
def test_a_run_that_ends_within_its_warm_up_says_so(
    warmup: int, ends_within: bool, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "r", text, warmup=warmup, init_scale=1024.0)  # a skipped step would not advance it
    note = f"note: --steps 8 ends within the warm-up, --warmup {warmup}: --lr 0.01 is not reached\n"
    reached = max(row["lr"] for row in read_metrics(tmp_path / "r").steps) == pytest.approx(TINY["lr"])
    assert (note in capsys.readouterr().out) == ends_within and reached != ends_within


def test_a_mistake_is_said_at_both_ends_and_on_the_picture(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr("refimpl.training.run_report.plot_run", lambda folder, baselines, title, unit: titles.append(title))
    run(tmp_path / "r", text, mistake="scale-never-backs-off", init_scale=1e30)
    lines = capsys.readouterr().out.splitlines()
    said = "MISTAKE injected: scale-never-backs-off: "
    assert lines[1].startswith(said) and lines[-1].startswith(said)
    assert lines[-2] == "WARNING: 8 of 8 steps (100 %) were skipped: they changed no weight"
    assert "seed 0" in titles[0] and "MISTAKE injected: scale-never-backs-off" in titles[0]


def test_a_mistake_that_nobody_handed_to_the_run_is_refused(text: str, tmp_path: Path) -> None:
    """A run must not say that it makes a mistake, and train without it."""
    given = {**TINY, "data": text, "mistake": "decay-all"}
    for refused in (lambda: start(Config.of(given)), lambda: train(given, tmp_path / "r", False, False, None)):
        with pytest.raises(UsageError, match="unknown mistake 'decay-all': choose one of none"):
            refused()
    with pytest.raises(UsageError, match=r"unknown mistake 'decay-al': .* did you mean decay-all"):
        run(tmp_path / "r", text, mistake="decay-al")
    assert not (tmp_path / "r").exists()


def test_a_resumed_run_still_makes_its_mistake(text: str, tmp_path: Path) -> None:
    flags = {"mistake": "decay-all", "recipe": "bf16"}
    run(tmp_path / "right", text, recipe="bf16")
    run(tmp_path / "whole", text, **flags)
    stop_at(tmp_path / "parts", text, 3, **flags)
    run(tmp_path / "parts", text, resume=True)
    right, whole, parts = (load(tmp_path / name)[0] for name in ("right", "whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    gains = "master.transformer.ln_f.weight"
    assert not np.array_equal(right[gains], whole[gains])
    with pytest.raises(UsageError, match="has mistake decay-all, not none: it cannot be resumed"):
        run(tmp_path / "parts", text, resume=True, mistake="none", steps=9)


@pytest.mark.parametrize(("skipped", "warned"), [(0, False), (2, False), (3, True)])
def test_more_than_a_tenth_of_the_steps_skipped_is_a_warning(
    skipped: int, warned: bool, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(Config.of({**TINY, "data": text}), tmp_path)
    trainer.progress = Progress(step=20, skipped=skipped)
    warn(trainer)
    assert capsys.readouterr().out == "WARNING: 3 of 20 steps (15 %) were skipped: they changed no weight\n" * warned


def test_the_picture_is_drawn_when_a_run_is_stopped(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal, by its numbers, and in the middle of its sample; without matplotlib that is said."""
    drawn: list[Path] = []
    monkeypatch.setattr("refimpl.training.run_report.plot_run", lambda folder, *_: drawn.append(folder))
    with pytest.raises(TrainingStopped):
        run(tmp_path / "a", text, recipe="pure-fp16", lr=1.0, steps=50)

    write = MetricsLog.write_steps

    def interrupted(self: MetricsLog, rows: list[dict[str, Any]]) -> None:
        write(self, rows)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write_steps", interrupted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(tmp_path / "b", text) == 130
    told = capsys.readouterr().out
    assert drawn == [tmp_path / "a", tmp_path / "b"]
    assert "stopped after step 2 of 8; continue with: --resume --out" in told and "it needs matplotlib" in told
    assert load(tmp_path / "b" / "checkpoint.safetensors")[1]["progress"]["step"] == 2


def test_accumulation_prints_its_bytes(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "r", text, grad_accum=2)
    printed = capsys.readouterr().out
    assert "grads 4 " in printed and "= 18 bytes per parameter" in printed and "summed over 2 micro-batches in FP32" in printed


def test_first_loss_is_that_of_a_uniform_guess(text: str, tmp_path: Path) -> None:
    run(tmp_path / "r", text, steps=1)
    assert abs(read_metrics(tmp_path / "r").steps[0]["loss"] - math.log(256)) < 0.1


def test_init_from_takes_the_masters_of_another_recipe(text: str, tmp_path: Path) -> None:
    run(tmp_path / "a", text, recipe="fp16")
    source = tmp_path / "a" / "checkpoint.safetensors"
    given = {**TINY, "data": text, "recipe": "fp32", "steps": 1, "lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}
    assert train(given, tmp_path / "b", False, False, source) == 0
    before, after = load(source)[0], load(tmp_path / "b" / "checkpoint.safetensors")[0]
    np.testing.assert_array_equal(before["master.transformer.wpe.weight"], after["weights.transformer.wpe.weight"])
    with pytest.raises(UsageError, match="differs in size"):
        train({**given, "n_embd": 32}, tmp_path / "c", False, False, source)
    assert not (tmp_path / "c").exists()


def test_init_from_samples_no_weights_and_keeps_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of the states: new weights would be as many bytes as FP32 masters, and so would those of the file."""
    run(tmp_path / "a", text, recipe="fp16")
    read, alive = init_from.read_weights, list[weakref.ref[np.ndarray]]()

    def watched(path: Path) -> FirstWeights:
        first = read(path)
        alive.extend(weakref.ref(array) for array in first.weights.values())
        return first

    def at_the_start(trainer: Trainer, *args: Any) -> int:
        assert alive and not any(array() is not None for array in alive)
        return 7

    monkeypatch.setattr(init_from, "read_weights", watched)
    monkeypatch.setattr("refimpl.training.run._train", at_the_start)
    monkeypatch.setattr(Model, "initial_weights", None)
    given = {**TINY, "data": text, "recipe": "fp32"}
    assert train(given, tmp_path / "b", False, False, tmp_path / "a" / "checkpoint.safetensors") == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"recipe": "fp17"}, "unknown recipe"),
        ({"model": "rnn"}, "unknown model"),
        ({"backend": "jax"}, "unknown backend"),
        ({"optimizer": "lion"}, "unknown optimizer"),
        ({"loss_scale": "big"}, "loss scale 'big'"),
        ({"loss_scale": "-1"}, "loss scale"),
        ({"masters_from": "nowhere"}, "--masters-from is 'nowhere': choose original or rounded"),
        ({"n_embd": 17}, "not a multiple"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"n_layer": -1}, "--n-layer is -1"),
        ({"steps": 0}, "--steps is 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"clip": -1.0}, "--clip is -1.0: it must be 0 or more and finite"),
        ({"clip": math.nan}, "--clip is nan: it must be 0 or more and finite"),
        ({"clip": math.inf}, "--clip is inf: it must be 0 or more and finite"),
        ({"momentum": 1.0}, "--momentum"),
        ({"init_scale": 0.0}, "--init-scale"),
        ({"data": "/no/such/file"}, "no such file"),
        ({"block_size": 100_000}, "block"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(flags: dict, message: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "r", text, **flags)
    assert not (tmp_path / "r").exists()


def test_cupy_without_a_gpu_is_refused(text: str, tmp_path: Path) -> None:
    cupy = sys.modules.get("cupy")
    if cupy is not None and cupy.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(UsageError, match="cupy"):
        run(tmp_path / "r", text, backend="cupy")


def test_a_folder_in_use_is_kept(text: str, tmp_path: Path) -> None:
    run(tmp_path / "r", text)
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises(UsageError, match="has a run"):
        run(tmp_path / "r", text)
    with pytest.raises(UsageError, match="recipe fp16, not bf16"):
        run(tmp_path / "r", text, resume=True, recipe="bf16")
    with pytest.raises(UsageError, match="is a file"):
        run(Path(text), text)
    with pytest.raises(UsageError, match="no run in"):
        run(tmp_path / "empty", text, resume=True)
    with pytest.raises(UsageError, match="contradict"):
        train({}, tmp_path / "r", True, True, None)
    with pytest.raises(UsageError, match="unknown recipe"):
        train({**TINY, "data": text, "recipe": "no"}, tmp_path / "r", False, True, None)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    assert train({**TINY, "data": text, "steps": 2}, tmp_path / "r", False, True, None) == 0
    assert [len(rows) for rows in read_metrics(tmp_path / "r")] == [2, 1]


def test_resume_refuses_other_data(text: str, tmp_path: Path) -> None:
    stop_at(tmp_path / "r", text, 3)
    with open(text, "a", encoding="utf-8") as file:
        file.write("one more line\n")
    with pytest.raises(UsageError, match="other data"):
        run(tmp_path / "r", text, resume=True)


def test_nan_without_a_loss_scale_stops_and_names_the_step(text: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"step \d+: the loss is nan: .*No weight was changed by this step"):
        run(tmp_path / "r", text, recipe="pure-fp16", lr=1.0, steps=50)
    assert [row for row in read_metrics(tmp_path / "r").steps if row["skipped"]]


def test_a_collapsed_scale_stops_the_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is infinite whatever the scale: after 50 steps it is clear that the scale is not why."""
    from refimpl.training.run_folder import open_folder, prepare_folder

    config, folder = prepare_folder({**TINY, "data": text, "steps": 200, "eval_every": 200}, tmp_path / "r", False, False)
    trainer = Trainer(config, folder)
    open_folder(config, folder)
    overflow_always(trainer.training)
    with pytest.raises(TrainingStopped, match=r"50 steps in a row were skipped .* the gradient of the output of lm_head is"):
        trainer.train(NoBar())
    rows = read_metrics(folder).steps
    assert all(row["skipped"] for row in rows) and 50 <= len(rows) < 60
    assert rows[-1]["loss_scale"] < 2.0**-14


def test_a_full_disk_keeps_the_old_checkpoint(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(tmp_path / "r", text, 3)
    before = (tmp_path / "r" / "checkpoint.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device"):
        run(tmp_path / "r", text, resume=True)
    assert (tmp_path / "r" / "checkpoint.safetensors").read_bytes() == before
    assert not list((tmp_path / "r").glob("*.tmp")) + list((tmp_path / "r").glob(".*"))


def test_config_fills_in_the_models_defaults() -> None:
    config = Config.of({"model": "mlp"})
    assert config.block_size == 16 and config.min_lr == pytest.approx(config.lr / 10) and config.loss_scale == "dynamic"
    assert Config.of({"optimizer": "sgd"}).weight_decay == 0.0
    assert Config.of({"recipe": "bf16"}).loss_scale == "none"


def test_command_line(text: str, tmp_path: Path) -> None:
    """Through real processes once: a run, exit codes, one line of error and no traceback."""
    script = SCRIPTS / "train.py"
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *flags, f"--data={text}", *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    good = call("--model=mlp", "--n-head=0")
    assert good.returncode == 0 and (tmp_path / "runs" / "mlp-fp16" / "checkpoint.safetensors").exists(), good.stderr
    bad = call("--recipe=fp99")
    assert bad.returncode == 2 and bad.stderr.startswith("error: unknown recipe 'fp99'") and bad.stderr.count("\n") == 1
    unused = run_here("train", *flags, f"--data={text}", "--loss-scale=128", folder=tmp_path)
    assert unused.returncode == 2 and unused.stderr.startswith("error: --init-scale 4194304.0 with loss scale 128: only")
    del flags[-2:]  # --growth-interval and --init-scale
    stopped = call("--recipe=pure-fp16", "--lr=1", "--steps=50", "--out=p")
    assert stopped.returncode == 1 and "stopped: step" in stopped.stderr and "Traceback" not in stopped.stderr
    generate = [sys.executable, str(script.with_name("generate.py")), "runs/mlp-fp16/checkpoint.safetensors"]
    sampled = subprocess.run([*generate, "--tokens=9"], capture_output=True, cwd=tmp_path, check=False)
    assert sampled.returncode == 0 and len(sampled.stdout) >= 10
    assert "nats per byte" in run_here("generate", generate[-1], f"--loss={text}", folder=tmp_path).stdout
    missing = run_here("generate", "nothing", folder=tmp_path)
    assert missing.returncode == 2 and missing.stderr.startswith("error: there is no nothing, no checkpoint at that path")


def test_all_evaluations_are_on_the_same_batches_and_the_whole_text_comes_last_if_it_is_cheap(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights that do not change, all losses are equal; that of the whole text is of other blocks."""
    still = {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "recipe": "fp32"}
    run(tmp_path / "a", text, **still)
    rows = read_metrics(tmp_path / "a").evaluations
    assert len({row["val_loss"] for row in rows}) == 1 and ["whole_text_loss" in row for row in rows] == [False, False, True]
    whole = rows[-1]["whole_text_loss"]
    size = Trainer(Config.of({**TINY, "data": text}), tmp_path / "a").corpus.valid.size
    assert whole != rows[-1]["val_loss"]
    assert f"\nvalidation loss of the whole text ({size:,} bytes) {whole:.4f} nats per byte" in capsys.readouterr().out

    monkeypatch.setattr("refimpl.training.evaluate.WHOLE_TEXT", 0)
    run(tmp_path / "b", text, **still)
    rows = read_metrics(tmp_path / "b").evaluations
    assert not any("whole_text_loss" in row for row in rows) and "whole text" not in capsys.readouterr().out


def test_ctrl_c_in_the_last_evaluation_keeps_the_step_and_resume_computes_the_loss(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is there before the evaluation begins, so that a second Ctrl-C loses nothing either."""
    from refimpl.training import evaluate

    mean_loss, folder = evaluate.mean_loss, tmp_path / "r"

    def interrupted(*given: Any) -> float:
        assert load(folder / "checkpoint.safetensors")[1]["progress"]["step"] == 8
        signal.raise_signal(signal.SIGINT)
        return mean_loss(*given)

    run(tmp_path / "whole", text, eval_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "mean_loss", interrupted)
        assert run(folder, text, eval_every=100) == 130
    said = capfd.readouterr()
    assert "stopping this evaluation, whose loss --resume computes; the checkpoint is written" in said.err
    assert f"all 8 steps are done; stopped before its evaluation ended\nevaluate with: --resume --out {folder}" in said.out
    assert not read_metrics(folder).evaluations
    assert run(folder, text, resume=True) == 0
    assert "resumed after step 8 of 8, whose validation loss is missing" in capfd.readouterr().out
    assert rows_without_timing(folder) == rows_without_timing(tmp_path / "whole")
    assert run(folder, text, resume=True) == 0 and "already at step 8" in capfd.readouterr().out


def test_a_slow_evaluation_shows_its_own_bar(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("refimpl.training.progress_bar.terminal_width", lambda stream: 80)
    run(tmp_path / "a", text)
    assert "evaluation:" not in capfd.readouterr().err
    monkeypatch.setattr("refimpl.training.evaluate.SLOW", 0.0)
    run(tmp_path / "b", text)
    assert "evaluation:" in capfd.readouterr().err


def test_the_bar_moves_after_every_step_and_results_are_read_every_log_every(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Bar(NoBar):
        def update(self, n: int = 1) -> None:
            events.append(f"bar {n}")

        def show(self, fields: str) -> None:
            events.append("results")

    config = Config.of({**TINY, "data": text, "steps": 4, "eval_every": 4})
    trainer = Trainer(config, tmp_path)
    trainer.train(Bar())
    assert events == ["bar 1", "bar 1", "results"] * 2
