"""refimpl.training.config: what a run may be made of, what is refused, and what a resumed run may change."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import UsageError
from refimpl.optim.adamw import AdamW
from refimpl.optim.schedule import Schedule
from refimpl.optim.sgd import SGD
from refimpl.training import checkpoint
from refimpl.training.config import Config
from refimpl.training.run import train
from refimpl.training.trainer import Trainer

TINY: dict[str, Any] = {
    "model": "mlp", "n_layer": 1, "n_embd": 4, "block_size": 4, "batch_size": 2, "steps": 4, "warmup": 1, "lr": 1e-2,
    "eval_batches": 1, "sample_bytes": 0,
}  # fmt: skip
OPTIMIZER: dict[str, Any] = {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "min_lr": 2e-3, "schedule": "linear"}


def test_optimizer_settings_reach_the_rule_and_the_schedule() -> None:
    config = Config.of({**TINY, **OPTIMIZER, "weight_decay": 0.2})
    assert config.make_rule() == AdamW((0.8, 0.99), 1e-6, 0.2)
    assert config.make_schedule() == Schedule(1e-2, 2e-3, 1, 4, "linear")
    assert Config.of(TINY).make_rule() == AdamW((0.9, 0.95), 1e-8, 0.1)
    assert Config.of({**TINY, "optimizer": "sgd", "momentum": 0.5}).make_rule() == SGD(0.5, 0.0)


@pytest.mark.parametrize(("schedule", "min_lr"), [("cosine", 1e-3), ("linear", 1e-3), ("constant", 1e-2)])
def test_the_least_rate_that_each_schedule_takes_by_default(schedule: str, min_lr: float) -> None:
    config = Config.of({**TINY, "schedule": schedule})
    assert config.min_lr == pytest.approx(min_lr, rel=1e-15)
    assert Config.of(vars(config)) == config  # as a trace or config.json is read back


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta1": 1.0}, "--beta1 is 1.0: it must be 0 or more and below 1"),
        ({"beta1": -0.1}, "--beta1 is -0.1: it must be"),
        ({"beta2": 1.5}, "--beta2 is 1.5: it must be"),
        ({"beta2": math.nan}, "--beta2 is nan: it must be"),
        ({"momentum": 1.0, "optimizer": "sgd"}, "--momentum is 1.0: it must be"),
        ({"eps": 0.0}, "--eps is 0.0: it must be a normal number of FP32.* would be 0/0"),
        ({"eps": 1e-40}, "--eps is 1e-40: it must be"),
        ({"eps": -1e-8}, "--eps is -1e-08: it must be"),
        ({"eps": 1e39}, r"--eps is 1e\+39: it must be"),
        ({"eps": math.nan}, "--eps is nan: it must be"),
        ({"schedule": "step"}, "unknown schedule 'step': choose one of cosine, linear, constant"),
        ({"schedule": "constant", "min_lr": 1e-3}, "leave it out, since --schedule constant stays at --lr, 0.01"),
        ({"min_lr": 1.0}, "--min-lr is 1.0: it must be at most --lr, 0.01"),
        ({"schedule": "linear", "lr": 1e-3, "min_lr": 2e-3}, "--min-lr is 0.002: it must be at most --lr, 0.001"),
        ({"optimizer": "sgd", "beta1": 0.8}, "--beta1 is 0.8: --optimizer sgd has none"),
        ({"optimizer": "sgd", "eps": 1e-6}, "--eps is 1e-06: --optimizer sgd has none"),
        ({"momentum": 0.5}, "--momentum is 0.5: --optimizer adamw has none"),
    ],
)
def test_optimizer_settings_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Config.of({**TINY, **given})
    assert "\n" not in str(error.value)


def test_the_ends_of_the_ranges_are_taken() -> None:
    Config.of({**TINY, "beta1": 0.0, "beta2": 0.0, "eps": 1.2e-38, "lr": 1e-3, "min_lr": 1e-3})
    Config.of({**TINY, "beta1": math.nextafter(1, 0), "beta2": math.nextafter(1, 0), "eps": 1.0})


def test_none_is_not_given_where_the_default_depends_on_others_or_has_a_meaning() -> None:
    some = dict.fromkeys(("lr", "min_lr", "n_head", "loss_scale", "masters_from", "zero", "hysteresis"))
    assert Config.of({**TINY, **some}) == Config.of({name: value for name, value in TINY.items() if name != "lr"})
    for name, kind in (("seed", "an integer"), ("clip", "a number"), ("recipe", "a text"), ("bias", "true or false")):
        with pytest.raises(UsageError, match=f"--{name} is None: it must be {kind}"):
            Config.of({**TINY, name: None})


# ------------------------------------------------------------------------------------------------------------ resumed runs


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the checkpoint of a folder anew with another header."""
    path = folder / "checkpoint.safetensors"
    arrays, header = checkpoint.load(path)
    change(header["config"])
    checkpoint.save(path, arrays, header)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run at the defaults, and its flags."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_text("to be or not to be, that is the question; " * 50)
    given = {**TINY, "data": str(folder / "text")}
    assert train(given, folder / "run", False, False, None) == 0
    return folder / "run", given


@pytest.fixture
def finished(original: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of it."""
    return shutil.copytree(original[0], tmp_path / "run"), original[1]


BOUND: dict[str, Any] = {**OPTIMIZER, "growth_factor": 4.0, "backoff_factor": 0.25}


def test_a_resumed_run_keeps_its_settings(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, given = finished
    assert json.loads((folder / "config.json").read_text()).keys() >= BOUND.keys()
    for name, value in BOUND.items():
        with pytest.raises(UsageError, match=f"another run: --{name.replace('_', '-')} .* there, {value} here"):
            Trainer(Config.of({**given, name: value}), folder).load_checkpoint()


def test_a_checkpoint_from_before_a_flag_stood_at_its_default(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, given = finished
    edit_header(folder, lambda config: [config.pop(name) for name in BOUND if name != "min_lr"])
    Trainer(Config.of(given), folder).load_checkpoint()
    for name, value in BOUND.items():
        with pytest.raises(UsageError, match=f"another run: --{name.replace('_', '-')} .* there, {value} here"):
            Trainer(Config.of({**given, name: value}), folder).load_checkpoint()


def test_resume_reads_a_folder_from_before_a_flag(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k == "min_lr" or k not in BOUND}))
    edit_header(folder, lambda config: [config.pop(name) for name in BOUND if name != "min_lr"])
    with pytest.raises(UsageError, match=r"has beta2 0\.95, not 0\.9: it cannot be resumed"):
        train({"beta2": 0.9}, folder, True, False, None)
    assert train({"beta2": 0.95, "steps": 5}, folder, True, False, None) == 0


# ---------------------------------------------------------------------------------------------------------------- llama


def test_the_sizes_of_a_llama_follow_from_its_width() -> None:
    config = Config.of({"model": "llama", "n_embd": 96, "n_head": 6})
    assert (config.n_kv_head, config.head_dim, config.ffn_dim) == (3, 16, 256)
    assert Config.of({"model": "llama", "n_embd": 96, "n_head": 3}).n_kv_head == 3
    sizes = Config.of({"model": "llama", "n_positions": 100}).make_model().config
    assert sizes["block_size"] == 100 and sizes["tied"] is True


@pytest.mark.parametrize(("flags", "says"), [
    ({"model": "llama", "n_embd": 34}, "n_embd 34 is not a multiple of n_head 4: give --head-dim"),
    ({"model": "llama", "n_embd": 36}, "head_dim is 9: it must be even"),
    ({"model": "llama", "n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
    ({"model": "llama", "norm_eps": 0.0}, "norm_eps is 0.0: it must be positive and finite"),
    ({"model": "llama", "rope_scaling": "ntk"}, "unknown rope scaling 'ntk'"),
    ({"model": "llama", "bias": False}, "--no-bias is for --model gpt: llama has --qkv-bias, --o-bias and --mlp-bias"),
    ({"model": "llama", "n_positions": 8}, "--n-positions 8 is less than --block-size 64"),
    ({"n_kv_head": 2}, "--n-kv-head is for --model llama"),
    ({"model": "mlp", "tied": False}, "--tied is for --model llama"),
    ({"model": "mlp", "n_positions": 99}, "--n-positions 99 is for --model gpt or llama"),
])  # fmt: skip
def test_a_wrong_size_of_a_llama_is_refused(flags: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as error:
        Config.of(flags)
    assert str(error.value).startswith(says)
