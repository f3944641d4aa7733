"""The log of a run: what its rows hold, that it goes on where a run was stopped or killed, and logs of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from progress_bars import NoBar

from refimpl.errors import UsageError
from refimpl.training.config import Config
from refimpl.training.metrics import WHOLE, WHOLE_BITS, MetricsLog, read_metrics
from refimpl.training.run import train
from refimpl.training.run_folder import CONFIG, METRICS, VALIDATION, open_folder
from refimpl.training.trainer import Trainer

TINY: dict[str, Any] = {
    "model": "mlp", "n_layer": 1, "n_embd": 4, "block_size": 4, "batch_size": 3, "grad_accum": 2, "steps": 7, "warmup": 1,
    "eval_every": 3, "eval_batches": 1, "log_every": 2, "sample_bytes": 0,
}  # fmt: skip
STEP = ["run", "step", "seconds", "tokens", "loss", "lr", "loss_scale", "grad_norm", "skipped", "tokens_per_s"]
EVALUATION = ["run", "step", "seconds", "tokens", "val_loss", "val_bits_per_byte"]
pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """The settings of a run on a small text."""
    (tmp_path / "text").write_text("to be or not to be, that is the question; " * 50)
    return {**TINY, "data": str(tmp_path / "text")}


def test_all_rows_of_a_file_have_the_same_keys(given: dict[str, Any], tmp_path: Path) -> None:
    """So that each file is a table without holes; the last evaluation alone has more."""
    assert train(given, tmp_path / "r", False, False, None) == 0
    steps, evaluations = ([json.loads(line) for line in (tmp_path / "r" / name).read_text().splitlines()]
                          for name in (METRICS, VALIDATION))  # fmt: skip
    assert [list(row) for row in steps] == [STEP] * 7
    assert [list(row) for row in evaluations] == [EVALUATION] * 2 + [[*EVALUATION, WHOLE, WHOLE_BITS]]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6, 7] and [row["step"] for row in evaluations] == [3, 6, 7]
    assert all(row["tokens"] == row["step"] * 4 * 3 * 2 for row in steps + evaluations)
    run = json.loads((tmp_path / "r" / CONFIG).read_text())["run"]
    assert {row["run"] for row in steps + evaluations} == {run} and len(run) == 8
    both = sorted(steps + evaluations, key=lambda row: (row["step"], "val_loss" in row))
    assert [row["seconds"] for row in both] == sorted(row["seconds"] for row in both) and both[0]["seconds"] >= 0


def test_pandas_reads_both_files_without_holes(given: dict[str, Any], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="reads the log with pandas")
    assert train(given, tmp_path / "r", False, False, None) == 0
    steps, evaluations = (pandas.read_json(tmp_path / "r" / name, lines=True) for name in (METRICS, VALIDATION))
    assert not steps.isna().any(axis=None) and not evaluations[EVALUATION].isna().any(axis=None)


def test_names_and_time_go_on_when_a_run_is_resumed(given: dict[str, Any], tmp_path: Path) -> None:
    """Also after a kill: rows that the checkpoint has not come to are written again, with what they began with."""
    folder, config = tmp_path / "r", Config.of(given)
    open_folder(config, folder)
    assert not Trainer(config, folder).train(NoBar(stop_at=4))
    kept = read_metrics(folder).steps
    last = json.dumps({**kept[-1], "seconds": 1000.0}) + "\n"
    beyond = json.dumps({**kept[-1], "step": 5, "seconds": 5000.0}) + '\n{"step": 6, "los'
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in kept[:-1]) + last + beyond)
    assert train({}, folder, True, False, None) == 0
    steps, evaluations = read_metrics(folder)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6, 7] and [row["step"] for row in evaluations] == [3, 6, 7]
    assert len({row["run"] for row in steps + evaluations}) == 1
    assert all(1000 < row["seconds"] < 1100 for row in steps[4:] + evaluations[1:])
    assert train({**given, "seed": 1}, folder, False, True, None) == 0
    assert read_metrics(folder).steps[0]["run"] != steps[0]["run"]


def test_a_log_that_cannot_be_written_says_which_checkpoint_there_is(given: dict[str, Any], tmp_path: Path) -> None:
    """A folder in place of the file stands for a full disk."""
    folder, config = tmp_path / "r", Config.of(given)
    open_folder(config, folder)
    (folder / METRICS).mkdir()
    with pytest.raises(UsageError, match=r"metrics\.jsonl: .*; no checkpoint has been written$"):
        Trainer(config, folder).train(NoBar())
    (folder / METRICS).rmdir()
    trainer = Trainer(config, folder)
    assert not trainer.train(NoBar(stop_at=4))
    (folder / METRICS).rename(folder / "log")
    (folder / METRICS).mkdir()
    with pytest.raises(UsageError, match=r"metrics\.jsonl: .*; the checkpoint of step 4 is complete$"):
        trainer.log.write_steps([{"step": 5}])


def test_a_log_of_an_earlier_version_is_read_and_split_when_its_run_is_resumed(given: dict[str, Any], tmp_path: Path) -> None:
    """It had evaluations among the steps, and neither names nor times."""
    folder = tmp_path / "r"
    assert train(given, folder, False, False, None) == 0
    new = ("run", "seconds", "tokens")
    steps, evaluations = ([{k: v for k, v in row.items() if k not in new} for row in rows] for rows in read_metrics(folder))
    both = sorted(steps + evaluations, key=lambda row: (row["step"], "val_loss" in row))
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in both))
    (folder / VALIDATION).unlink()
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in json.loads((folder / CONFIG).read_text()).items() if k != "run"}))
    assert read_metrics(folder) == (steps, evaluations)
    assert train({"steps": 8}, folder, True, False, None) == 0
    after = read_metrics(folder)
    assert (after.steps[:-1], after.evaluations[:-1]) == (steps, evaluations)
    assert [row["step"] for row in after.steps] == list(range(1, 9)) and "val_loss" not in (folder / METRICS).read_text()
    assert after.steps[-1]["run"] == json.loads((folder / CONFIG).read_text())["run"]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in both))  # killed between the two files
    assert [row["step"] for row in read_metrics(folder).evaluations] == [3, 6, 7, 8]


def test_null_is_written_for_nan_and_a_torn_line_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, "r")
    log.write_steps([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": float("inf")}])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path).steps] == [(1, None), (2, 1.5), (3, None)]
    kept = log.keep_up_to(2)
    assert kept == read_metrics(tmp_path) and [row["step"] for row in kept.steps] == [1, 2] and not kept.evaluations
    assert not (tmp_path / VALIDATION).exists()
