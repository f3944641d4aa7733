"""--config: a run is repeated from its config.json, flags override it, and a file that is none is refused in one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from script_loader import run_here

from refimpl.errors import UsageError
from refimpl.training.config import Config
from refimpl.training.config_file import overridden, read_settings
from refimpl.training.run_folder import CHECKPOINT, CONFIG

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 3, "warmup": 1, "sample_bytes": 0}
FLAGS = ["--eval-batches=1", *(f"--{name.replace('_', '-')}={value}" for name, value in TINY.items())]
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text."""
    (tmp_path / "text").write_text("to be or not to be, that is the question; " * 50)
    return tmp_path


@pytest.mark.parametrize("what", ["a/config.json", pytest.param("a", marks=pytest.mark.slow)])
def test_a_run_is_repeated_from_what_it_wrote(what: str, folder: Path) -> None:
    settings = ["--data=text", "--lr=3e-3", "--recipe=bf16", "--seed=2", "--schedule=linear", "--keep=best,2", "--no-bias"]
    assert run_here("train", *FLAGS, *settings, "--out=a", folder=folder).returncode == 0
    again = run_here("train", "--config", what, "--out=b", folder=folder)
    assert again.returncode == 0, again.stderr
    a, b = ({**json.loads((folder / name / CONFIG).read_text())} for name in "ab")
    assert a.pop("run") != b.pop("run") and a == b
    assert (folder / "a" / CHECKPOINT).read_bytes() == (folder / "b" / CHECKPOINT).read_bytes()
    assert run_here("train", "--config", what, "--out=c", "--steps=2", folder=folder).returncode == 0
    c = json.loads((folder / "c" / CONFIG).read_text())
    assert c.pop("run") and c == {**b, "steps": 2}


def test_first_weights_are_those_that_the_file_names(folder: Path) -> None:
    assert run_here("train", *FLAGS, "--data=text", "--out=a", folder=folder).returncode == 0
    flags = ["--init-from=a", FLAGS[0], FLAGS[-1], "--data=text", "--steps=2"]
    assert run_here("train", *flags, "--out=b", folder=folder).returncode == 0
    again = run_here("train", "--config=b", "--out=c", folder=folder)
    assert again.returncode == 0 and "reading a: " in again.stderr
    assert (folder / "b" / CHECKPOINT).read_bytes() == (folder / "c" / CHECKPOINT).read_bytes()


GIVEN: list[dict[str, Any]] = [
    {}, {"lr": 1e-3}, {"recipe": "bf16"}, {"optimizer": "sgd"}, {"schedule": "constant"}, {"model": "llama", "n_embd": 96},
    {"loss_scale": "megatron"}, {"min_lr": 1e-5}, {"model": "mlp", "steps": 7}, {"model": "llama", "n_embd": 30, "head_dim": 8},
    {"loss_scale": "deepspeed", "init_scale": 8.0}, {"growth_interval": 5}, {"vocab_size": 300},
]  # fmt: skip
OVERRIDES: list[dict[str, Any]] = [
    {}, {"lr": 5e-4}, {"recipe": "bf16"}, {"recipe": "fp16", "seed": 3}, {"optimizer": "sgd"}, {"schedule": "constant"},
    {"n_embd": 64}, {"n_head": 2}, {"loss_scale": "dynamic"}, {"loss_scale": "apex"}, {"model": "mlp"}, {"model": "llama"},
    {"model": "gpt"}, {"weight_decay": 0.5},
]  # fmt: skip


def of(given: dict[str, Any]) -> Config | str:
    try:
        return Config.of(given)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_flags_override_as_if_all_had_been_given(given: dict[str, Any], tmp_path: Path) -> None:
    """A file with all settings, those that follow from others too, does not hold these where a flag changes the others."""
    path = tmp_path / CONFIG
    path.write_text(json.dumps(asdict(Config.of(given))))
    settings, first_weights = read_settings(path)
    assert first_weights is None and Config.of(settings) == Config.of(given)
    compared = 0
    for flags in OVERRIDES:
        expected = of({**given, **flags})
        if isinstance(expected, Config):
            compared += 1
            assert of(overridden(settings, flags)) == expected, flags
    assert compared > 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"recpie": "bf16"}', "unknown setting 'recpie': .* did you mean recipe"),
        ('{"lr": "fast"}', "--lr is 'fast': it must be a number"), ('{"steps": 1.5}', "--steps is 1.5: it must be an integer"),
        ("[]", "it is a list of 0, not a table"), ("{", "cannot be read"), ("\udcff", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"run": 3}', "run is 3, not a text"), ('{"init_from": ["a"]}', "init_from is a list"),
        ('{"model": "gtp"}', "unknown model 'gtp'"), ('{"keep": "bset"}', "--keep has 'bset'.* did you mean best"),
        ('{"architectures": ["LlamaForCausalLM"]}', "unknown setting 'architectures'"),
    ],
)  # fmt: skip
def test_other_files_are_refused(text: str, message: str, folder: Path) -> None:
    (folder / "c.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=message):
        settings, _ = read_settings(folder / "c.json")
        Config.of(overridden(settings, {"lr": 1e-3}))
    refused = run_here("train", "--config=c.json", "--out=r", folder=folder)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not (folder / "r").exists()


def test_other_uses_are_refused(folder: Path) -> None:
    (folder / "c.json").write_text('{"recipe": "fp16", "init_scale": 8.0, "min_lr": null}')
    for words, message in (
        (["--config=c.json", "--resume", "--out=a"], "--resume and --config contradict each other"),
        (["--config=nowhere"], "--config nowhere cannot be read"),
        (["--config=c.json", "--recipe=bf16", "--growth-interval=3"], "--growth-interval 3 with loss scale none"),
    ):
        refused = run_here("train", *words, folder=folder)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    unused = run_here("train", "--config=c.json", "--recipe=bf16", *FLAGS, "--data=text", "--out=a", folder=folder)
    assert unused.returncode == 0, unused.stderr  # the file's init_scale is for recipes that have a loss scale
