"""Hugging Face folders that are not what a command takes them for: each is refused in one line, and no file changes.

What would turn this red: a run that writes into a model's folder; a traceback for a file that cannot be read; a message that
blames something else than what is wrong.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import GPT2, LLAMA, tensors_of, write

from refimpl.distributed.collectives import Serial
from refimpl.errors import UsageError
from refimpl.tools.commands import convert
from refimpl.training.checkpoint_states import load_for_inference, read_weights
from refimpl.training.config import Config
from refimpl.training.huggingface.config_json import read_config as read_sizes
from refimpl.training.huggingface.config_json import read_table
from refimpl.training.huggingface.export import export_folder
from refimpl.training.init_from import settings_from
from refimpl.training.run import train
from refimpl.training.run_folder import own_folder, prepare_folder, read_config

WIDE: dict[str, Any] = {**LLAMA, "vocab_size": 256}
TINY: dict[str, Any] = {"batch_size": 2, "steps": 2, "eval_every": 2, "eval_batches": 1, "sample_bytes": 0, "block_size": 8}
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of 256 ids, whose tokens are bytes."""
    return write(tmp_path / "model", WIDE, tensors_of(WIDE))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    return str(tmp_path / "text.txt")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- a run never writes into a model's folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["new", "overwrite", "resume", "init-from", "init-from and overwrite"])
@pytest.mark.parametrize("kind", ["config.json", "model_type only", "cut-off config.json", "no config.json", "adapter", "link"])
def test_no_run_replaces_files_of_a_model(way: str, kind: str, folder: Path, text: str, tmp_path: Path) -> None:
    out = folder if way.startswith("init") and kind in ("config.json", "link") else shutil.copytree(folder, tmp_path / "other")
    if kind == "model_type only":
        (out / "config.json").write_text('{"model_type": "mamba"}')
        (out / "model.safetensors").unlink()
    elif kind == "cut-off config.json":
        (out / "config.json").write_text('{"model_ty')
    elif kind in ("no config.json", "adapter"):
        (out / "config.json").unlink()
    if kind == "adapter":
        (out / "model.safetensors").rename(out / "adapter_model.safetensors")
        (out / "adapter_config.json").write_text("{}")
    elif kind == "link":
        (tmp_path / "link").symlink_to(out)
        out = tmp_path / "link"
    before, tokenizer = files(out), {"tokenizer": "bytes"} if way.startswith("init") else {}
    given = {} if way == "resume" else {**TINY, "data": text, **tokenizer}
    with pytest.raises(UsageError, match=r"has a Hugging Face model \(.*\).*name a new folder") as refused:
        train(given, out, way == "resume", "overwrite" in way, folder if way.startswith("init") else None)
    assert "\n" not in str(refused.value) and files(out) == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_model_that_came_after_the_first_look_is_not_replaced(overwrite: bool, tmp_path: Path, text: str) -> None:
    config, out = prepare_folder({**TINY, "data": text}, tmp_path / "out", False, overwrite)
    assert isinstance(config, Config)
    before = files(write(out, GPT2, tensors_of(GPT2)))
    refused = pytest.raises(UsageError, match="has a Hugging Face model")
    with refused, own_folder(config, out, Serial(), False, overwrite):
        raise AssertionError
    assert files(out) == before


def test_a_model_is_no_damaged_run(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no run in .*: it has a Hugging Face model"):
        read_config(folder)
    (folder / "config.json").write_text(json.dumps({"recipe": "fp16"}))
    with pytest.raises(UsageError, match="the number of steps is missing"):
        read_config(folder)


# -- what cannot be read, or is something else ---------------------------------------------------------------------------------


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def refused_alike(path: Path, target: Path) -> str:
    """The message of every way that reads weights; none leaves anything behind."""
    ways = (
        lambda: settings_from(path, {}), lambda: load_for_inference(path), lambda: export_folder(path, target / "new"),
        lambda: train({}, target / "run", False, False, path),
    )  # fmt: skip
    said = {one_line(way) for way in ways}
    assert len(said) == 1 and not list(target.iterdir())
    return said.pop()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


@pytest.mark.parametrize("shards", [1, 2])
def test_every_file_that_cannot_be_read_is_named(
    shards: int, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a folder in turn, as another user would find it: root, who may run the tests, reads all files."""
    folder = write(tmp_path / "m", WIDE, tensors_of(WIDE), shards)
    locked: list[Path] = []
    open_file, open_map = io.open, np.memmap

    def refuse(path: Any) -> None:
        if isinstance(path, (str, Path)) and Path(path) in locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def open_(path: Any, *args: Any, **settings: Any) -> Any:
        refuse(path)
        return open_file(path, *args, **settings)

    def memmap(path: Any, *args: Any, **settings: Any) -> Any:
        refuse(path)
        return open_map(path, *args, **settings)

    monkeypatch.setattr(io, "open", open_)  # which pathlib calls
    monkeypatch.setattr(np, "memmap", memmap)
    names = sorted(folder.iterdir())
    assert len(names) == (2 if shards == 1 else 4)
    for path in names:
        locked[:] = [path]
        assert refused_alike(folder, target) == f"{path} cannot be read: Permission denied"
    locked[:] = [shutil.copy(folder / "config.json", tmp_path / "weights")]
    assert refused_alike(tmp_path / "weights", target) == f"{tmp_path / 'weights'} cannot be read: Permission denied"


def test_a_folder_that_cannot_be_listed(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)  # its own folder cannot be searched
    with pytest.raises(UsageError, match=r"model\.safetensors cannot be read: Permission denied"):
        read_weights(folder / "model.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UsageError, match=r"model cannot be read: Permission denied"):
        read_weights(folder)


@pytest.mark.parametrize(("contents", "message"), [
    ("", "cannot be read: invalid JSON"), ('{"model_type": "lla', "cannot be read: invalid JSON"),
    ("[" * 100_000, "cannot be read: invalid JSON"), ("\xff", "cannot be read: it is not UTF-8"),
    ("[1, 2]", "holds list '[1, 2]', not the table of a model's settings"), ("3", "holds int '3', not the table"),
])  # fmt: skip
def test_a_damaged_config_is_blamed_for_what_it_is(contents: str, message: str, folder: Path, target: Path) -> None:
    path = folder / "config.json"
    path.write_text(contents, encoding="latin-1")
    said = refused_alike(folder, target)
    assert said.startswith(f"{path} {message}")
    assert one_line(lambda: read_sizes(folder)) == one_line(lambda: read_table(path)) == said  # memory.py --hf


def test_what_is_taken_for_a_checkpoint_is_named(
    folder: Path, text: str, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter, lone = tmp_path / "adapter", tmp_path / "lone"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "an adapter without its model: merge it" in refused_alike(adapter, target)
    lone.mkdir()
    shutil.copy(folder / "model.safetensors", lone)
    assert "but not the config.json that belongs to them" in refused_alike(lone, target)
    assert "but a text, no checkpoint: give a checkpoint.safetensors" in refused_alike(Path(text), target)
    assert refused_alike(folder / "config.json", target).endswith(f"no checkpoint: give its folder, {folder}")
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is a Git LFS pointer" in refused_alike(pointer, target)
    for name in ("HuggingFaceTB/SmolLM2-135M", "gpt2"):
        assert f"nothing is downloaded here; `hf download {name} --local-dir DIR`" in refused_alike(Path(name), target)
    for name in ("start.safetensors", "model/start", str(tmp_path / "nothing")):
        assert refused_alike(Path(name), target) == f"no checkpoint at {name}"


def test_a_tokenizer_of_another_model_blames_no_flag_that_was_not_given(tmp_path: Path) -> None:
    small = write(tmp_path / "m", LLAMA, tensors_of(LLAMA))
    said = one_line(lambda: settings_from(small, {"tokenizer": "bytes"}))
    assert said.startswith(f"the vocabulary of {small} is 64, but text is read and written as bytes")
    assert "give the tokenizer.json of the model by --tokenizer, or" in said


# -- NaN and Inf ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [WIDE, {**GPT2, "vocab_size": 256}])
@pytest.mark.parametrize(("bad", "message"), [
    ((np.nan,), "has 1 NaN and 0 Inf"), ((np.inf, -np.inf), "has 0 NaN and 2 Inf"), ((-np.nan, np.inf), "has 1 NaN and 1 Inf"),
])  # fmt: skip
def test_weights_that_are_not_finite_are_refused_by_name(
    table: dict[str, Any], bad: tuple[float, ...], message: str, text: str, tmp_path: Path, target: Path
) -> None:
    tensors = tensors_of(table)
    name = sorted(tensors)[-1]
    tensors[name].reshape(-1)[: len(bad)] = bad
    folder = write(tmp_path / "m", table, tensors)
    ways = (
        lambda: load_for_inference(folder), lambda: export_folder(folder, target / "new", "bf16"),
        lambda: train({**TINY, "data": text}, target / "run", False, False, folder),
    )  # fmt: skip
    for way in ways:
        said = one_line(way)
        assert said.startswith(f"{folder}: {name} {message} among its {tensors[name].size:,} values")
    assert not list(target.iterdir())


# -- convert.py ----------------------------------------------------------------------------------------------------------------


def converted(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    return one_line(convert.run)


def test_what_is_no_gguf_file_is_said_before_the_package_is_asked_for(
    folder: Path, text: str, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    new = target / "new"
    assert converted(monkeypatch, "gguf", "nope.gguf", new) == "there is no nope.gguf"
    assert f"{folder} is a folder: give the GGUF file itself" in converted(monkeypatch, "gguf", folder, new)
    assert "does not begin with GGUF" in converted(monkeypatch, "gguf", text, new)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(8))
    assert "pip install gguf" in converted(monkeypatch, "gguf", tmp_path / "x.gguf", new)
    assert not list(target.iterdir())


def test_an_export_that_fails_leaves_nothing(folder: Path, text: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{text} is a file: name a new folder" in converted(monkeypatch, "export", folder, text)

    assert "is a Hugging Face folder" in converted(monkeypatch, "export", folder, target / "x.safetensors")
    assert "but a text, no checkpoint" in converted(monkeypatch, "export", text, target / "x.safetensors")

    def refuse(path: Path, *_: object) -> None:
        path.write_text("half", encoding="utf-8")
        raise UsageError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("refimpl.training.huggingface.export.write_text_atomically", refuse)
    assert "No space left" in converted(monkeypatch, "export", folder, target / "new")
    assert not list(target.iterdir())
    (target / "empty").mkdir()
    assert "No space left" in converted(monkeypatch, "export", folder, target / "empty")
    assert [path.name for path in target.rglob("*")] == ["empty"]
