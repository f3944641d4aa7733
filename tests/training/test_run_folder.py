"""Whose a folder is: two runs never share one, a dead one lets go of it, and each can be resumed or replaced."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SCRIPTS

from refimpl.distributed.collectives import Serial
from refimpl.errors import UsageError
from refimpl.training import folder_lock
from refimpl.training.checkpoint import load, save
from refimpl.training.config import Config
from refimpl.training.folder_lock import locked
from refimpl.training.metrics import read_metrics
from refimpl.training.run import train
from refimpl.training.run_folder import CHECKPOINT, CONFIG, METRICS, open_folder, own_folder, prepare_folder, run_name

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 4, "warmup": 2, "eval_every": 3,
    "eval_batches": 2, "log_every": 2, "sample_bytes": 0,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("without_pictures", "data")
TRAIN = SCRIPTS / "train.py"


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small text for all runs: counting the n-grams of the usual one takes longer than a run of a test."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    monkeypatch.setitem(TINY, "data", str(path))


# ------------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "gpt-fp16"),
        ({"recipe": "bf16", "seed": 1}, "gpt-bf16-seed1"),
        ({"model": "mlp", "optimizer": "sgd"}, "mlp-fp16-sgd"),
        ({"mistake": "scale-never-backs-off"}, "gpt-fp16-scale-never-backs-off"),
        ({"loss_scale": "1024"}, "gpt-fp16-scale-1024"),
        ({"loss_scale": "torch"}, "gpt-fp16"),  # the recipe's own
        ({"recipe": "bf16", "loss_scale": "none"}, "gpt-bf16"),
        ({"masters_from": "rounded", "steps": 3, "n_layer": 2, "data": "/a/b c"}, "gpt-fp16-rounded"),
    ],
)
def test_a_name_carries_what_was_chosen(given: dict[str, Any], name: str) -> None:
    assert run_name(Config.of(given)) == name


# ---------------------------------------------------------------------------------------------------------- one run at a time


@pytest.fixture(params=["flock", "no fcntl", "flock not on this file system"])
def kind_of_lock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's locks, and on systems and file systems that have none."""
    if request.param == "no fcntl":
        monkeypatch.setattr(folder_lock, "fcntl", None)
    elif request.param != "flock":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    return str(request.param)


def test_a_folder_is_locked_once(kind_of_lock: str, tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(UsageError, match=f"a run of process {os.getpid()} is using") as refused, locked(tmp_path):
            raise AssertionError
        assert "\n" not in str(refused.value) and ("remove" in str(refused.value)) == (kind_of_lock != "flock")
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_of_many_that_want_it_at_the_same_moment_one_has_it(tmp_path: Path) -> None:
    """Each thread opens the lock file for itself, as each process would. What is counted are those inside at once."""
    inside, most, refused = [0], [0], [0]

    def use() -> None:
        for _ in range(20):
            try:
                with locked(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.0005)
                    inside[0] -= 1
            except UsageError:
                refused[0] += 1

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and refused[0] > 0


@pytest.mark.parametrize(
    ("owner", "taken"),
    [
        ("{dead} {here}\n", True),
        ("{dead} elsewhere\n", False),  # nobody here can tell whether it lives
        ("{alive} {here}\n", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_a_marker_of_a_dead_process_is_taken_over(
    owner: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "fcntl", None)
    dead = subprocess.Popen(["true"])
    dead.wait()
    text = owner.format(dead=dead.pid, alive=os.getppid(), here=folder_lock.socket.gethostname())
    (tmp_path / folder_lock.MARKER).write_text(text)
    if taken:
        with locked(tmp_path):
            assert (tmp_path / folder_lock.MARKER).read_text().split()[0] == str(os.getpid())
        assert not list(tmp_path.iterdir())
        return
    with pytest.raises(UsageError, match=r"is using this folder.*remove"), locked(tmp_path):
        raise AssertionError
    assert (tmp_path / folder_lock.MARKER).read_text() == text


def test_two_runs_without_a_name_take_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked before either has made its folder: they were told the same name."""
    monkeypatch.chdir(tmp_path)
    config, first = prepare_folder(TINY, None, False, False)
    _, second = prepare_folder(TINY, None, False, False)
    assert first == second == Path("runs/gpt-fp16")
    with own_folder(config, None, Serial(), False, False) as a, own_folder(config, None, Serial(), False, False) as b:
        assert (a, b) == (Path("runs/gpt-fp16"), Path("runs/gpt-fp16-2"))
        open_folder(config, a)
    assert a.exists() and not b.exists()  # no run has begun in the second


@pytest.mark.parametrize(("resume", "overwrite"), [(False, True), (True, False), (False, False)])
def test_the_folder_of_a_live_run_is_refused(resume: bool, overwrite: bool, tmp_path: Path) -> None:
    """`train.py --overwrite` beside a run, `--resume` beside it, and one that is started the same way at the same moment."""
    config, folder = prepare_folder(TINY, tmp_path / "r", False, False)
    with own_folder(config, folder, Serial(), False, False):
        open_folder(config, folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UsageError, match="is using this folder"):
            train({} if resume else TINY, folder, resume, overwrite, None)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_was_finished_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Two runs with the same --out: the second one looked when the folder was empty, and came when the first had ended."""
    config, folder = prepare_folder(TINY, tmp_path / "r", False, False)
    assert train(TINY, folder, False, False, None) == 0
    with pytest.raises(UsageError, match="has a run"), own_folder(config, folder, Serial(), False, False):
        raise AssertionError


def test_what_fails_before_a_run_begins_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (None, Path("a/b/c")):
        with pytest.raises(UsageError, match="no such file"):
            train({**TINY, "data": "nothing"}, out, False, False, None)
    assert not list(tmp_path.iterdir())
    Path("a").mkdir()
    with pytest.raises(UsageError, match="no such file"):
        train({**TINY, "data": "nothing"}, Path("a/b"), False, False, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and not list(Path("a").iterdir())


def start(*flags: str, cwd: Path) -> subprocess.Popen[bytes]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, str(TRAIN), *given, *flags]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize("pairs", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_pairs_of_runs_that_start_at_the_same_moment(pairs: int, tmp_path: Path) -> None:
    for _ in range(pairs):
        both = [start(cwd=tmp_path) for _ in range(2)]
        assert [run.wait() for run in both] == [0, 0], both[0].stderr
        for run in both:
            run.stderr.close()  # type: ignore[union-attr]
    folders = sorted(tmp_path.glob("runs/*"))
    assert len(folders) == 2 * pairs
    for folder in folders:
        assert [row["step"] for row in read_metrics(folder).steps] == [1, 2, 3, 4]
        assert load(folder / CHECKPOINT)[1]["progress"]["step"] == 4 and not list(folder.glob(".*"))


@pytest.mark.parametrize("tries", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_a_folder_that_can_be_resumed(tries: int, tmp_path: Path) -> None:
    """Killed at a moment by chance, with a checkpoint or without; its lock dies with it, and its half-written files go."""
    moments = np.random.default_rng(tries)
    for i in range(tries):
        folder = tmp_path / str(i)
        run = start("--steps=20000", "--eval-every=1", f"--out={folder}", cwd=tmp_path)
        while not (folder / CONFIG).exists():
            time.sleep(0.005)
        with pytest.raises(UsageError, match=f"a run of process {run.pid} is using this folder"):
            train({}, folder, True, False, None)
        time.sleep(moments.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        reached = load(folder / CHECKPOINT)[1]["progress"]["step"] if (folder / CHECKPOINT).exists() else 0
        assert train({"steps": reached + 2, "eval_every": 2}, folder, True, False, None) == 0
        steps = [row["step"] for row in read_metrics(folder).steps]
        assert steps == list(range(1, reached + 3)) and not list(folder.glob(".*"))


# -------------------------------------------------------------------------------------------------- what a folder may hold


def test_a_folder_without_a_checkpoint_can_be_started_afresh_or_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert train(TINY, whole, False, False, None) == 0
    for resume in (False, True):
        folder = tmp_path / f"resumed {resume}"
        open_folder(Config.of(TINY), folder)
        (folder / METRICS).write_text('{"step": 1, "loss": 5.0, "skipped": false}\n{"step": 2, "lo')
        capsys.readouterr()
        assert train({} if resume else TINY, folder, resume, False, None) == 0
        assert ("starting at step 1 of 4" in capsys.readouterr().out) == resume
        assert (folder / CHECKPOINT).read_bytes() == (whole / CHECKPOINT).read_bytes()
        assert [len(rows) for rows in read_metrics(folder)] == [len(rows) for rows in read_metrics(whole)]


def test_a_run_that_took_its_weights_from_a_file_is_not_begun_without_it(tmp_path: Path) -> None:
    source = tmp_path / "a" / CHECKPOINT
    assert train(TINY, tmp_path / "a", False, False, None) == 0
    assert train(TINY, tmp_path / "b", False, False, source) == 0
    (tmp_path / "b" / CHECKPOINT).unlink()
    with pytest.raises(UsageError, match=f"start the run again with --init-from {source}"):
        train({}, tmp_path / "b", True, False, None)
    with pytest.raises(UsageError, match="contradict"):
        train({}, tmp_path / "b", True, False, source)
    assert train(TINY, tmp_path / "b", False, False, source) == 0


def test_files_that_are_no_runs_are_kept(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("mine")
    with pytest.raises(UsageError, match=r"has a metrics\.jsonl that belongs to no run"):
        train(TINY, tmp_path, False, False, None)
    assert (tmp_path / METRICS).read_text() == "mine"
    assert train(TINY, tmp_path, False, True, None) == 0


def test_at_no_moment_of_an_overwrite_are_both_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any of its removals, the folder can be resumed or started afresh."""
    assert train(TINY, tmp_path, False, False, None) == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    unlink, left = Path.unlink, [0]

    def dying(self: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    for n in range(3):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        left[0] = n
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dying)
            open_folder(Config.of(TINY), tmp_path)
        prepare_folder({}, tmp_path, True, False)
        if n:
            prepare_folder(TINY, tmp_path, False, False)


# ------------------------------------------------------------------------------------------------------------------ resuming


def test_more_steps_are_remembered_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(TINY, tmp_path, False, False, None) == 0
    capsys.readouterr()
    assert train({"steps": 8}, tmp_path, True, False, None) == 0
    lrs = [row["lr"] for row in read_metrics(tmp_path).steps]
    told = capsys.readouterr().out
    assert "resumed after step 4 of 8; the schedule is replanned for 8 steps instead of 4" in told
    assert f"the learning rate goes from {lrs[3]:.3g} to {lrs[4]:.3g}" in told
    assert json.loads((tmp_path / CONFIG).read_text())["steps"] == 8
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for given in ({}, {"steps": 8}):
        assert train(given, tmp_path, True, False, None) == 0
        assert capsys.readouterr().out == "already at step 8 of 8; give --steps N for more\n"
    with pytest.raises(UsageError, match="is at step 8 already"):
        train({"steps": 7}, tmp_path, True, False, None)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("first", "second"), [("numpy", "reference"), ("reference", "numpy")])
def test_another_backend_is_told(first: str, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train({**TINY, "backend": first}, tmp_path, False, False, None) == 0
    capsys.readouterr()
    assert train({"steps": 5, "backend": second}, tmp_path, True, False, None) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed after step 4 of 5")]
    end = f"; with --backend {second} instead of {first}: last bits may differ from those of one backend"
    assert note.endswith(end) and json.loads((tmp_path / CONFIG).read_text())["backend"] == second
    assert train({"steps": 6}, tmp_path, True, False, None) == 0
    assert "--backend" not in capsys.readouterr().out  # it goes on as it was


def test_a_run_that_goes_on_as_planned_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(TINY, tmp_path, False, False, None) == 0
    arrays, header = load(tmp_path / CHECKPOINT)
    del header["version"]
    header["progress"]["step"] = header["t"] = 3
    save(tmp_path / CHECKPOINT, arrays, header)
    capsys.readouterr()
    assert train({"log_every": 1}, tmp_path, True, False, None) == 0
    told = capsys.readouterr().out
    assert "resumed after step 3 of 4\n" in told and json.loads((tmp_path / CONFIG).read_text())["log_every"] == 1
