"""refimpl.training.resume: what a resumed run may change, and that folders of earlier runs are read as they were written."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import UsageError
from refimpl.training import checkpoint
from refimpl.training.config import LLAMA, Config
from refimpl.training.resume import FIXED, IN_CHECKPOINT, MAY_CHANGE
from refimpl.training.run import train
from refimpl.training.trainer import Trainer

GIVEN: dict[str, Any] = {
    "model": "mlp", "n_layer": 1, "n_embd": 4, "block_size": 4, "batch_size": 2, "steps": 4, "warmup": 1, "lr": 1e-2,
    "eval_batches": 1, "sample_bytes": 0, "data": "text",
}  # fmt: skip
WRITTEN = """{
  "model": "mlp", "recipe": "fp16", "backend": "numpy", "data": "text", "examples": "blocks", "steps": 4, "batch_size": 2,
  "block_size": 4, "n_layer": 1, "n_head": 0, "n_embd": 4, "vocab_size": 256, "bias": true, "activation": "gelu_tanh",
  "n_kv_head": null, "head_dim": null, "ffn_dim": null, "rope_theta": null, "rope_scaling": null, "norm_eps": null,
  "qk_norm": null, "qkv_bias": null, "o_bias": null, "mlp_bias": null, "tied": null, "n_positions": null, "optimizer": "adamw",
  "momentum": 0.9, "beta1": 0.9, "beta2": 0.95, "eps": 1e-08, "lr": 0.01, "min_lr": 0.001, "schedule": "cosine", "warmup": 1,
  "weight_decay": 0.1, "clip": 1.0, "grad_accum": 1, "ignore_index": -100, "loss_mean": "tokens", "masters_from": null,
  "attention": "unfused", "loss_scale": "dynamic", "init_scale": 65536.0, "growth_interval": 2000, "hysteresis": null,
  "growth_factor": null, "backoff_factor": null, "scale_floor": null, "seed": 0, "mistake": "none", "eval_every": 100,
  "eval_batches": 1, "log_every": 10, "sample_bytes": 0, "zero": null
}"""
"""config.json of a run with these flags, as November 2026 wrote it."""
LATER = (*LLAMA, "n_positions", "activation")
"""Fields that config.json had not from the beginning."""

ADDED = {"checkpointing": "none", "tokenizer": "bytes", "keep": "last", "log": "none"}
"""The settings that came later, with the values that such a run has."""


def settings_in(run: Path) -> dict[str, Any]:
    """config.json without the run's name in logs, which each run has for itself."""
    table: dict[str, Any] = json.loads((run / "config.json").read_text())
    assert len(table.pop("run")) == 8
    return table


OTHER: dict[str, Any] = {
    "model": "gpt", "recipe": "bf16", "backend": "cupy", "data": "stdlib", "examples": "lines", "steps": 6, "batch_size": 4,
    "block_size": 8, "n_layer": 2, "n_head": 1, "n_embd": 8, "vocab_size": 257, "bias": False,
    "activation": "gelu_new", "n_kv_head": 2,
    "head_dim": 2, "ffn_dim": 8, "rope_theta": 100.0, "rope_scaling": "default", "norm_eps": 1e-6, "qk_norm": True,
    "qkv_bias": True, "o_bias": True, "mlp_bias": True, "tied": False, "n_positions": 8, "optimizer": "sgd",
    "momentum": 0.5, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "lr": 0.02, "min_lr": 0.002, "schedule": "linear", "warmup": 2,
    "weight_decay": 0.2, "clip": 2.0, "grad_accum": 2, "ignore_index": -1, "loss_mean": "micro-batches",
    "masters_from": "original", "attention": "fused", "loss_scale": "megatron", "init_scale": 8.0, "growth_interval": 3,
    "hysteresis": 2, "growth_factor": 4.0, "backoff_factor": 0.25, "scale_floor": 1.0, "seed": 1, "mistake": "decay-all",
    "eval_every": 1, "eval_batches": 2, "log_every": 1, "sample_bytes": 5, "zero": 0, "checkpointing": "full",
    "tokenizer": "tokenizer.json", "keep": "best,2", "log": "none",
}  # fmt: skip
"""Another value for each setting."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and in it the folder of a run on that text."""
    place = tmp_path_factory.mktemp("place")
    (place / "text").write_text("to be or not to be, that is the question; " * 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert train(GIVEN, Path("run"), False, False, None) == 0
    return place


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder; return that of the run."""
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("refimpl.training.run_report.plot_run", lambda *_: None)
    return Path("run")


def test_config_json_has_the_fields_that_it_always_had(run: Path) -> None:
    text = (run / "config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    assert settings_in(run) == {**json.loads(WRITTEN), **ADDED}


def test_a_checkpoint_holds_the_settings_that_it_always_held(run: Path) -> None:
    """All that must not change, but the path of the data: their contents are described instead."""
    header = checkpoint.load(run)[1]
    free = {"backend", "data", "steps", "eval_every", "eval_batches", "log_every", "sample_bytes", "zero"}
    assert header["config"] == {name: value for name, value in json.loads(WRITTEN).items() if name not in free}
    assert header["corpus"]["name"] == "text" and str(Path.cwd()) not in json.dumps(header)


def test_a_folder_of_an_earlier_run_is_resumed(run: Path) -> None:
    (run / "config.json").write_text(json.dumps({k: v for k, v in json.loads(WRITTEN).items() if k not in LATER}))
    assert train({"steps": 6}, run, True, False, None) == 0
    assert settings_in(run) == {**json.loads(WRITTEN), **ADDED, "steps": 6}
    assert checkpoint.load(run)[1]["progress"]["step"] == 6


def test_each_setting_may_change_or_must_not() -> None:
    assert {*MAY_CHANGE, *FIXED} == {f.name for f in fields(Config)} == OTHER.keys() and not {*MAY_CHANGE} & {*FIXED}
    assert {*FIXED} - {*IN_CHECKPOINT} == {"data"}


@pytest.mark.parametrize("name", FIXED)
def test_a_flag_that_determines_the_numbers_is_refused(name: str, run: Path) -> None:
    saved = json.loads(WRITTEN)[name]
    refusal = f"the run in --out has {name.replace('_', '-')} {saved}, not {OTHER[name]}: it cannot be resumed"
    with pytest.raises(UsageError, match=refusal):
        train({name: OTHER[name]}, run, True, False, None)
    train({name: saved}, run, True, False, None)  # said again, it is no change


@pytest.mark.parametrize("name", [name for name in MAY_CHANGE if name not in ("backend", "checkpointing", "tokenizer")])
def test_another_flag_is_not(name: str, run: Path) -> None:
    assert train({"steps": 6, name: OTHER[name]}, run, True, False, None) == 0
    assert settings_in(run) == {**json.loads(WRITTEN), **ADDED, "steps": 6, name: OTHER[name]}


@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_the_checkpoint_of_another_run_is_refused(name: str, run: Path) -> None:
    path = run / "checkpoint.safetensors"
    arrays, header = checkpoint.load(path)
    checkpoint.save(path, arrays, {**header, "config": {**header["config"], name: OTHER[name]}})
    with pytest.raises(UsageError, match=f"is another run: --{name.replace('_', '-')} {OTHER[name]} there, .* here"):
        Trainer(Config.of(GIVEN), run).load_checkpoint()


def test_fewer_steps_than_were_made_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match=r"checkpoint\.safetensors is at step 4 already, --steps is 3"):
        train({"steps": 3}, run, True, False, None)
    assert train({"steps": 4}, run, True, False, None) == 0
