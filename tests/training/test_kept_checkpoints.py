"""--keep: the best checkpoint and the last ones, through stops and kills; and the space that checkpoints need on a disk."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from progress_bars import NoBar
from script_loader import run_here

from refimpl.errors import UsageError
from refimpl.training.checkpoint import load
from refimpl.training.checkpoint_states import saved_bytes
from refimpl.training.config import Config
from refimpl.training.evaluate import TextLoss
from refimpl.training.kept_checkpoints import BEST, Keep, kept_in
from refimpl.training.metrics import MetricsLog, read_metrics
from refimpl.training.run import train
from refimpl.training.run_folder import CHECKPOINT, CONFIG, open_folder
from refimpl.training.trainer import Trainer

LOSSES = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: float("nan"), 10: 2.0, 12: 1.5}
"""The losses of evaluations: the best is that of step 4, until step 12. Before the first step there is no checkpoint."""
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a run on a small text, in which evaluations have the LOSSES."""
    (tmp_path / "text").write_text("to be or not to be, that is the question; " * 50)
    monkeypatch.setattr(Trainer, "_loss_on", lambda self, *_: TextLoss(LOSSES[self.progress.step], 1.0))
    monkeypatch.setattr("refimpl.training.trainer.reads_whole_text", lambda *_: False)
    return {
        "model": "mlp", "n_layer": 1, "n_embd": 4, "block_size": 4, "batch_size": 3, "steps": 10, "warmup": 1, "eval_every": 2,
        "log_every": 1, "sample_bytes": 0, "data": str(tmp_path / "text"), "keep": "best,last,3",
    }  # fmt: skip


def steps_in(folder: Path) -> dict[str, int]:
    return {path.name: load(path)[1]["progress"]["step"] for path in kept_in(folder)}


EXPECTED = {f"checkpoint-{n}.safetensors": n for n in (6, 8, 10)} | {BEST: 4, CHECKPOINT: 10}


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("last", Keep()), ("best", Keep(True)), ("5", Keep(False, 5)), ("last,1", Keep(False, 1)),
        ("best,last,3", Keep(True, 3)), ("3, best", Keep(True, 3)),
    ],
)  # fmt: skip
def test_what_the_flag_says(text: str, keep: Keep) -> None:
    assert Keep.of(text) == keep and Config.of({"keep": text}).keep == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bset", "has 'bset': give best, last or a number, as in best,last,3; did you mean best"), ("", "has '': give"),
        ("best;last", "has"), ("0", "has"), ("-1", "has"), ("1.5", "has"), ("9" * 5000, "has '9{59}: give"),
        ("2,3", "is '2,3': give one number"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--keep {message}"):
        Config.of({"keep": text})


def test_best_and_last_ones_are_kept(given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are whole checkpoints, which are those of a run that ended there; NaN and an equal loss are no better."""
    assert train(given, tmp_path / "r", False, False, None) == 0
    assert steps_in(tmp_path / "r") == EXPECTED
    assert ", ".join(sorted(EXPECTED)) in capsys.readouterr().out
    assert train({**given, "keep": "last"}, tmp_path / "plain", False, False, None) == 0
    assert (tmp_path / "plain" / CHECKPOINT).read_bytes() == (tmp_path / "r" / CHECKPOINT).read_bytes()
    assert steps_in(tmp_path / "plain") == {CHECKPOINT: 10}
    shutil.copytree(tmp_path / "r", tmp_path / "back")
    shutil.copyfile(tmp_path / "r" / BEST, tmp_path / "back" / CHECKPOINT)  # how to go back to an earlier one
    assert train({}, tmp_path / "back", True, False, None) == 0
    assert steps_in(tmp_path / "back") == EXPECTED
    assert all((tmp_path / "back" / name).read_bytes() == (tmp_path / "r" / name).read_bytes() for name in EXPECTED)


def test_where_a_run_goes_back_those_of_later_steps_go(tmp_path: Path) -> None:
    for name in (CHECKPOINT, "checkpoint-4.safetensors", "checkpoint-8.safetensors", "checkpoint-10.safetensors"):
        (tmp_path / name).write_bytes(b"")
    Keep(numbered=3).number(tmp_path, 6)
    assert {path.name for path in kept_in(tmp_path)} == {CHECKPOINT, *(f"checkpoint-{n}.safetensors" for n in (4, 6))}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_run_that_is_stopped_and_resumed_keeps_the_same(
    links: bool, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any file system; more steps find a better one, which is found by the log of the first part."""

    def refuse(*_: object) -> None:
        raise OSError("Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    folder, config = tmp_path / "r", Config.of(given)
    open_folder(config, folder)
    assert not Trainer(config, folder).train(NoBar(stop_at=5))
    assert steps_in(folder) == {f"checkpoint-{n}.safetensors": n for n in (2, 4, 5)} | {BEST: 4, CHECKPOINT: 5}
    assert train({}, folder, True, False, None) == 0
    assert steps_in(folder) == EXPECTED
    assert os.stat(folder / CHECKPOINT).st_nlink == (2 if links else 1)
    assert train({"steps": 12, "keep": "best,2"}, folder, True, False, None) == 0
    assert steps_in(folder) == {f"checkpoint-{n}.safetensors": n for n in (10, 12)} | {BEST: 12, CHECKPOINT: 12}
    assert json.loads((folder / CONFIG).read_text())["keep"] == "best,2"
    assert train({**given, "keep": "last"}, folder, False, True, None) == 0  # --overwrite replaces all of them
    assert steps_in(folder) == {CHECKPOINT: 10} and not list(folder.glob(".*"))


@pytest.mark.parametrize("where", ["before the link", "between link and row", "after the row"])
def test_a_kill_beside_the_best_checkpoint_loses_neither_it_nor_its_row(
    where: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing after it runs."""

    folder, config = tmp_path / "r", Config.of(given)
    open_folder(config, folder)
    write = MetricsLog.write_evaluation

    def dying(log: MetricsLog, row: dict[str, Any]) -> None:
        if where == "after the row":
            write(log, row)
        if row["step"] == 4:
            raise Killed
        if where != "after the row":
            write(log, row)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "before the link":
            patch.setitem(LOSSES, 4, 2.0)
            patch.setattr(Trainer, "_keep_if_best", lambda self, _: None)
        patch.setattr(MetricsLog, "write_evaluation", dying)
        Trainer(config, folder).train(NoBar())
    assert train({}, folder, True, False, None) == 0
    assert steps_in(folder) == EXPECTED
    steps, evaluations = read_metrics(folder)
    assert [row["step"] for row in steps] == list(range(1, 11)) and [row["step"] for row in evaluations] == [2, 4, 6, 8, 10]


def test_generate_and_init_from_take_them(given: dict[str, Any], tmp_path: Path) -> None:
    assert train(given, tmp_path / "r", False, False, None) == 0
    for name in (BEST, "checkpoint-6.safetensors"):
        done = run_here("generate", f"r/{name}", "--tokens", 3, "--prompt", "abcdefgh", folder=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("abcdefgh"), done.stderr
        still = {**given, "steps": 2, "lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "recipe": "fp32"}
        assert train(still, tmp_path / f"from {name}", False, False, tmp_path / "r" / name) == 0
        before, after = load(tmp_path / "r" / name)[0], load(tmp_path / f"from {name}")[0]
        parameter = next(iter(after)).partition(".")[2]
        np.testing.assert_array_equal(before[f"master.{parameter}"], after[f"weights.{parameter}"])


# -------------------------------------------------------------------------------------------------------------- the disk

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("settings", "files"),
    [({"eval_every": 10, "keep": "last"}, 1), ({"keep": "last"}, 2), ({"keep": "best,last"}, 3), ({}, 5), ({"keep": "9"}, 5)],
)
def test_a_disk_that_is_too_small_is_refused_before_training(
    settings: dict[str, Any], files: int, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the byte: with the space of all files of arrays, a run begins; with one byte less it leaves nothing behind."""
    config = Config.of({**given, **settings})
    size = saved_bytes(Trainer(config, tmp_path).state)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, files * size - 1))
    with pytest.raises(UsageError, match=f"has {files * size - 1:,} bytes free, but .* this run need {files * size:,}"):
        train({**given, **settings}, tmp_path / "r", False, False, None)
    assert not (tmp_path / "r").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, files * size))
    assert train({**given, **settings}, tmp_path / "r", False, False, None) == 0
    written = load(tmp_path / "r")[0]
    assert sum(array.nbytes for array in written.values()) == size


def test_a_resumed_run_needs_what_it_has_not_yet(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(given, tmp_path / "r", False, False, None) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    size = saved_bytes(Trainer(Config.of(given), tmp_path).state)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, size - 1))
    with pytest.raises(UsageError, match=f"bytes free, but the checkpoints of this run need {size:,}"):
        train({"steps": 12}, tmp_path / "r", True, False, None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, size))
    assert train({"steps": 12}, tmp_path / "r", True, False, None) == 0
