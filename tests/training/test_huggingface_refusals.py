"""Folders of Hugging Face that are not what a command takes them for: each is refused in one line, and no file changes.

What would turn this red: a run that writes into a model's folder; a traceback for a file that cannot be read; a message that
blames something else than what is wrong.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hf_folders import GPT2, LLAMA, tensors_of, write

from refimpl.distributed.collectives import Serial
from refimpl.errors import UsageError
from refimpl.training.config import Config
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
    with pytest.raises(UsageError, match=r"has a model of Hugging Face \(.*\).*name a new folder") as refused:
        train(given, out, way == "resume", "overwrite" in way, folder if way.startswith("init") else None)
    assert "\n" not in str(refused.value) and files(out) == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_model_that_came_after_the_first_look_is_not_replaced(overwrite: bool, tmp_path: Path, text: str) -> None:
    config, out = prepare_folder({**TINY, "data": text}, tmp_path / "out", False, overwrite)
    assert isinstance(config, Config)
    before = files(write(out, GPT2, tensors_of(GPT2)))
    refused = pytest.raises(UsageError, match="has a model of Hugging Face")
    with refused, own_folder(config, out, Serial(), False, overwrite):
        raise AssertionError
    assert files(out) == before


def test_a_model_is_no_damaged_run(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no run in .*: it has a model of Hugging Face"):
        read_config(folder)
    (folder / "config.json").write_text(json.dumps({"recipe": "fp16"}))
    with pytest.raises(UsageError, match="the number of steps is missing"):
        read_config(folder)
