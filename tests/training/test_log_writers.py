"""--log: TensorBoard and W&B read back what the log of a run has, also of a run that was killed and resumed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb_files
from paths import SCRIPTS

from refimpl.errors import UsageError
from refimpl.training.config import Config
from refimpl.training.log_writers import EVENTS, chosen, open_writers
from refimpl.training.metrics import MetricsLog, as_table, read_metrics
from refimpl.training.run import train
from refimpl.training.run_folder import CONFIG

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """The settings of a run on a small text, whose first steps are skipped: their norms are Inf."""
    (tmp_path / "text").write_text("to be or not to be, that is the question; " * 50)
    return {
        "model": "mlp", "n_layer": 1, "n_embd": 4, "block_size": 4, "batch_size": 3, "steps": 10, "warmup": 1, "eval_every": 4,
        "eval_batches": 1, "log_every": 2, "sample_bytes": 0, "init_scale": 2.0**100, "data": str(tmp_path / "text"),
    }  # fmt: skip


def in_log(folder: Path) -> dict[str, dict[int, float]]:
    """The numbers of a run's own log: name -> step -> number, NaN for null."""
    found: dict[str, dict[int, float]] = {}
    for row in as_table(read_metrics(folder)):
        for name, value in row.items():
            if name not in ("run", "step"):
                found.setdefault(name, {})[row["step"]] = math.nan if value is None else float(value)
    return found


def in_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """The same as TensorBoard's reader finds it. No step may have two numbers."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads TensorBoard's files")
    pytest.importorskip("tensorboardX", reason="writes TensorBoard's files")
    reader = events.EventAccumulator(str(folder / EVENTS.parent), size_guidance={"scalars": 0})
    reader.Reload()
    found = {}
    for name in reader.Tags()["scalars"]:
        scalars = reader.Scalars(name)
        found[name] = {scalar.step: scalar.value for scalar in scalars}
        assert list(found[name]) == [scalar.step for scalar in scalars] == sorted(found[name])
    return found


def same(found: dict[str, dict[int, float]], log: dict[str, dict[int, float]]) -> None:
    """All names, steps and numbers are those of the log. Inf is null there, and TensorBoard's numbers are FP32."""
    assert found.keys() == log.keys()
    for name, numbers in log.items():
        assert list(found[name]) == list(numbers), name
        for step, number in numbers.items():
            other = found[name][step]
            assert other == np.float32(number) if math.isfinite(number) else not math.isfinite(other), (name, step)


class Killed(BaseException):
    """Nothing after it runs."""


def killed_at(step: int, given: dict[str, Any], folder: Path) -> None:
    """Run until rows of a step have been handed to other logs, and not yet to the run's own."""
    append = MetricsLog._append

    def dying(log: MetricsLog, name: str, rows: list[dict[str, Any]]) -> None:
        if rows[-1]["step"] >= step:
            for writer in log.others:
                writer.write(rows)
            raise Killed
        append(log, name, rows)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "_append", dying)
        train(given, folder, False, False, None)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_tensorboard_reads_each_step_once(step: int, given: dict[str, Any], tmp_path: Path) -> None:
    """Killed in the first rows, in those before a checkpoint, and after one; then resumed, and resumed with more steps."""
    pytest.importorskip("tensorboardX", reason="writes TensorBoard's files")
    folder = tmp_path / "r"
    killed_at(step, {**given, "log": "tensorboard"}, folder)
    assert train({}, folder, True, False, None) == 0
    same(in_tensorboard(folder), in_log(folder))
    assert train({"steps": 12}, folder, True, False, None) == 0
    log = in_log(folder)
    same(in_tensorboard(folder), log)
    assert list(log["loss"]) == list(range(1, 13)) and list(log["val_loss"]) == [4, 8, 10, 12]
    assert not math.isfinite(log["grad_norm"][1]) and log["skipped"][1] == 1
    assert json.loads((folder / CONFIG).read_text())["log"] == "tensorboard"


def test_tensorboard_begins_with_the_log_so_far_and_ends_when_asked(given: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="writes TensorBoard's files")
    folder = tmp_path / "r"
    assert train(given, folder, False, False, None) == 0 and not list(folder.glob(str(EVENTS)))
    assert train({"steps": 12, "log": "tensorboard"}, folder, True, False, None) == 0
    log = in_log(folder)
    same(in_tensorboard(folder), log)
    assert train({"steps": 14, "log": "none"}, folder, True, False, None) == 0
    same(in_tensorboard(folder), log)
    assert train({**given, "log": "tensorboard"}, folder, False, True, None) == 0  # --overwrite
    same(in_tensorboard(folder), in_log(folder))


@pytest.mark.slow
def test_wandb_reads_each_step(given: dict[str, Any], tmp_path: Path) -> None:
    """Offline, in processes of their own; the file of the second has the whole run, whatever a kill had lost of the first."""
    pytest.importorskip("wandb", reason="writes W&B's files", exc_type=ImportError)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    environment = {"PATH": "", "PYTHONPATH": str(SCRIPTS.parent), "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    for words in ([*flags, "--log=wandb", "--out=r"], ["--resume", "--out=r", "--steps=12"]):
        command = [sys.executable, str(SCRIPTS / "train.py"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "r").glob("wandb/offline-run-*/run-*.wandb"))
    names, parts, codes = zip(*(wandb_files.read(path) for path in files), strict=True)
    assert set(names) == {json.loads((tmp_path / "r" / CONFIG).read_text())["run"]} and codes == (0, 0)
    assert [list(part) for part in parts] == [list(range(1, 11)), list(range(1, 13))]
    found: dict[str, dict[int, float]] = {}
    for step, row in parts[1].items():
        for name, value in row.items():
            found.setdefault(name, {})[step] = float(value)
    log = in_log(tmp_path / "r")
    assert found.keys() == log.keys()
    for name, numbers in log.items():
        theirs, ours = ({n: x for n, x in of.items() if math.isfinite(x)} for of in (found[name], numbers))
        assert theirs == ours, name


@pytest.mark.parametrize(
    ("text", "names"),
    [("none", []), ("wandb", ["wandb"]), ("wandb, tensorboard", ["tensorboard", "wandb"])],
)
def test_what_the_flag_says(text: str, names: list[str]) -> None:
    assert chosen(text) == names and Config.of({"log": text}).log == text


def test_wandb_is_given_the_rows_that_a_kill_has_lost_on_their_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place of the package a run that has the rows before step 3."""
    logged: list[int] = []
    run = SimpleNamespace(step=3, log=lambda row, step: logged.append(step), finish=lambda exit_code: logged.append(-exit_code))
    wandb = SimpleNamespace(init=lambda **_: run, Settings=lambda **_: None, Error=Exception)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with open_writers(["wandb"], tmp_path, "name", [{"step": n, "loss": 1.0} for n in range(1, 6)], {}) as [writer]:
        writer.write([{"step": 6, "loss": 1.0}])
    assert logged == [3, 4, 5, 6, 0]


@pytest.mark.parametrize("text", ["tensorbord", "", "wandb,tensorbord", "wandb;tensorboard"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--log: unknown log .*: choose one of none, tensorboard, wandb"):
        Config.of({"log": text})


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_said_before_anything_is_written(
    name: str, package: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"--log {name} needs {package}: pip install {package}"):
        train({**given, "log": name}, tmp_path / "r", False, False, None)
    assert not (tmp_path / "r").exists()
