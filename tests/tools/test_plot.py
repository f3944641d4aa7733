"""scripts/plot.py: the logs of runs as a picture and as a table, also of a run that was killed."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from script_loader import run_here

from refimpl.errors import UsageError
from refimpl.tools.commands.plot import table
from refimpl.training.config import Config
from refimpl.training.metrics import Metrics, read_metrics
from refimpl.training.palette import BLUE, ORANGE
from refimpl.training.plots import draw_runs, plot_run
from refimpl.training.run_folder import CONFIG, METRICS, VALIDATION, open_folder

SKIPPED = 3


def step(n: int, **others: Any) -> dict[str, Any]:
    numbers = {"loss": 5.0 / n, "lr": 1e-3, "loss_scale": 2.0**16, "grad_norm": 1.0 + n, "skipped": False, "tokens_per_s": 9.0}
    return {"run": "abc", "step": n, "seconds": n / 4, "tokens": 8 * n, **numbers, **others}


def evaluation(n: int, **others: Any) -> dict[str, Any]:
    return {"run": "abc", "step": n, "seconds": n / 4, "tokens": 8 * n, "val_loss": 4.0 / (n + 1), **others}


STEPS = [step(n, grad_norm=None, loss=None, skipped=True) if n == SKIPPED else step(n) for n in range(1, 7)]
LOG = Metrics(STEPS, [evaluation(0), evaluation(4)])


def write(folder: Path, log: Metrics = LOG, **settings: Any) -> Path:
    """The folder of a run that was killed while it wrote its log: without a checkpoint or a picture."""
    open_folder(Config.of({"steps": 9, **settings}), folder)
    for name, rows in ((METRICS, log.steps), (VALIDATION, log.evaluations)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "lo')
    return folder


def test_a_table_has_a_row_per_step_with_the_evaluation_after_it() -> None:
    rows = list(csv.DictReader(io.StringIO(table({"a": LOG, "b": Metrics(STEPS[:2], [])}))))
    assert [(row["folder"], row["step"]) for row in rows] == [*(("a", str(n)) for n in range(7)), ("b", "1"), ("b", "2")]
    assert list(rows[0]) == ["folder", *STEPS[0], "val_loss"]
    assert {row["step"]: row["val_loss"] for row in rows if row["val_loss"]} == {"0": "4.0", "4": "0.8"}
    assert (rows[0]["loss"], rows[SKIPPED]["loss"], rows[SKIPPED]["skipped"]) == ("", "", "True")
    assert [float(row["loss"]) for row in rows[1:3]] == [5.0, 2.5] and rows[2]["seconds"] == "0.5"


def test_the_command_writes_new_files_and_replaces_none(tmp_path: Path) -> None:
    write(tmp_path / "r")
    assert run_here("plot", "r", "--csv", "log.csv", folder=tmp_path).stdout == "written: log.csv\n"
    assert (tmp_path / "log.csv").read_text() == table({"r": LOG})
    again = run_here("plot", "r", "--csv", "log.csv", folder=tmp_path)
    assert again.returncode == 2 and "--csv log.csv exists" in again.stderr
    for words, message in (
        (["nowhere", "--csv", "x.csv"], "nowhere has no log of a run"),
        (["r", "--csv", "x.csv", "--out", "x.png"], "not allowed with"),
        (["r", "--x", "time"], "invalid choice"),
    ):
        refused = run_here("plot", *words, folder=tmp_path)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "x.csv").exists()


def test_a_folder_that_is_named_twice_is_drawn_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    write(tmp_path / "r")
    for twice in (["r", "r"], ["r", "./r/"], [tmp_path / "r", "r"]):
        done = run_here("plot", *twice, "--out", "r.png", "--overwrite", folder=tmp_path)
        assert (done.stdout, done.stderr) == ("written: r.png\n", "")
    assert run_here("plot", tmp_path / "r", "r", "--csv", "r.csv", folder=tmp_path).stdout == "written: r.csv\n"
    assert (tmp_path / "r.csv").read_text() == table({"r": LOG})


def test_a_killed_run_and_several_get_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    write(tmp_path / "a"), write(tmp_path / "b", recipe="bf16")
    one, several = (run_here("plot", *folders, folder=tmp_path) for folders in (["a"], ["a", "b", "--x", "tokens"]))
    assert (one.stdout, several.stdout) == ("written: runs/plot.png\n", "written: runs/plot-2.png\n"), one.stderr
    assert all((tmp_path / f"runs/plot{n}.png").read_bytes().startswith(b"\x89PNG") for n in ("", "-2"))
    assert not one.stderr + several.stderr
    assert "must end in .png" in run_here("plot", "a", "--out", "a.jpg", folder=tmp_path).stderr
    path = plot_run(tmp_path / "a", {1: 3.0}, "title")
    assert path == tmp_path / "a" / "loss.png" and path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("names", "axis"), [("a", "step"), ("ab", "tokens"), ("ab", "seconds")])
def test_what_is_drawn_is_what_the_logs_have(names: str, axis: str) -> None:
    """Nulls are gaps; each skipped step has a cross; the lines of a run have its colour where there are several."""
    figure = pytest.importorskip("matplotlib.figure", reason="draws").Figure()
    top = draw_runs(figure, dict.fromkeys(names, LOG), axis, "byte")
    losses, norms, scales = figure.axes
    assert top is losses and losses.get_ylabel() == "nats per byte" and scales.get_xlabel() == axis
    for i in range(len(names)):
        training, validation = losses.lines[2 * i : 2 * i + 2]
        assert list(training.get_xdata()) == [row[axis] for row in STEPS]
        drawn = dict(zip(range(1, 7), training.get_ydata(), strict=True))
        assert drawn.pop(SKIPPED) != drawn.get(SKIPPED) and drawn == {n: 5.0 / n for n in drawn}
        assert list(validation.get_xdata()) == [row[axis] for row in LOG.evaluations]
        assert list(validation.get_ydata()) == [4.0, 0.8]
        assert list(norms.lines[i].get_ydata())[:2] == [2.0, 3.0]
        scale, crosses = scales.lines[2 * i : 2 * i + 2]
        assert list(scale.get_ydata()) == [2.0**16] * 6 and list(crosses.get_xdata()) == [STEPS[SKIPPED - 1][axis]]
    colors = [line.get_color() for line in losses.lines]
    assert colors == ([BLUE, ORANGE] if len(names) == 1 else [BLUE, BLUE, ORANGE, ORANGE])


def test_each_baseline_has_a_line_that_the_legend_names_and_no_text_covers_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("refimpl.training.plots.save", lambda figure, path: (figures.append(figure), path.touch()))
    plot_run(write(tmp_path / "r"), {1: 3.0, 2: 2.5, 3: 1.999}, "title")
    top = figures[0].axes[0]
    said = [text.get_text() for text in top.get_legend().get_texts()]
    assert said[2:] == ["unigrams: 3.00", "bigrams: 2.50", "trigrams: 2.00"]
    assert len({line.get_linestyle() for line in top.lines[-3:]}) == 3 and len(top.texts) == 0
    figures[0].draw_without_rendering()
    assert top.get_legend().get_window_extent().x0 >= top.get_window_extent().x1


def test_losses_of_several_tokenizers_are_said_not_to_compare(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    write(tmp_path / "a")
    config = json.loads((write(tmp_path / "b") / CONFIG).read_text())
    (tmp_path / "b" / CONFIG).write_text(json.dumps({**config, "tokenizer": "t.json"}))
    assert "different tokenizers do not compare" in run_here("plot", "a", "b", folder=tmp_path).stderr


def test_a_log_of_an_earlier_version_is_drawn_by_step(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="draws").Figure()
    write(tmp_path, Metrics([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}], [{"step": 2, "val_loss": 2.5}]))
    log = read_metrics(tmp_path)
    with pytest.raises(UsageError, match=r"the log of a has no seconds: .* draw it by step"):
        draw_runs(figure, {"a": log}, "seconds", "byte")
    assert not figure.axes
    assert list(draw_runs(figure, {"a": log}, "step", "byte").lines[0].get_ydata()) == [3.0, 2.0]


def test_without_matplotlib_the_table_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    write(tmp_path / "r")
    told = run_here("plot", "r", folder=tmp_path).stderr
    assert told == "error: the picture needs matplotlib: pip install matplotlib\n"
    assert run_here("plot", "r", "--csv", "log.csv", folder=tmp_path).returncode == 0
