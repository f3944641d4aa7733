"""docs/library.md: its code runs, its ten lines are ten, and the errors that it shows are those that are raised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT

import refimpl as rf

PAGE = (ROOT / "docs" / "library.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


def run(*arguments: str, cwd: Path) -> str:
    """The output of Python in another folder, where warnings are errors, and with no window for figures."""
    environment = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_ten_lines_are_ten() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 10 and "these ten lines" in PAGE


def test_what_the_table_names_exists() -> None:
    model = rf.gpt_model(rf.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8))
    training = rf.make_training(model, "fp16", rf.Schedule(lr=1e-3, min_lr=1e-4, warmup=1, steps=2))
    rows = re.findall(r"^\| (`training\..*?) \| (.*) \|$", PAGE, re.M)
    assert len(rows) == 4
    objects = {name: eval(name, {"training": training}) for names, _ in rows for name in re.findall("`([^`]+)`", names)}
    assert objects["training.run.policy.rows"]["*"].inputs == "fp16"
    for names, text in rows:  # a claim about print is checked: a table has several lines
        assert "`print`" not in text or all(str(objects[name]).count("\n") > 2 for name in re.findall("`([^`]+)`", names))


@pytest.mark.slow
def test_the_code_of_the_page_runs_in_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shutil.copy(ROOT / "README.md", tmp_path / "text.txt")
    checks = (
        "losses = [float(r.loss) for r in results]\n"
        "assert len(losses) == 200 and 5.3 < losses[0] < 5.8 and max(losses[-20:]) < 3.5\n"
        "assert [len(axes.lines[0].get_xdata()) for axes in (top, bottom)] == [200, 200]\n"
        "figure.savefig('run.png')\n"
    )
    rows = run("-W", "error", "-c", "\n".join([BLOCKS[0], checks, *BLOCKS[1:]]), cwd=tmp_path).splitlines()
    assert rows[0].startswith("[('transformer.") and float(rows[1].removesuffix(" nats per byte")) < 3.5
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "run.png", "weights.npz"}


@pytest.mark.slow
def test_mypy_finds_the_types_of_the_ten_lines_from_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    pytest.importorskip("matplotlib")
    wrong = 'rf.make_training(model, 16, rf.Schedule("3e-3", 3e-4, 10, 200)).stop()\n'  # a file without types would pass
    (tmp_path / "lines.py").write_text(BLOCKS[0])
    (tmp_path / "wrong.py").write_text(BLOCKS[0] + wrong)
    command = [sys.executable, "-m", "mypy", "--strict", "lines.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert all(line.startswith("wrong.py:") for line in errors), done.stdout
    kinds = re.findall(r"\[([a-z-]+)\]$", "\n".join(errors), re.M)
    assert sorted(kinds) == ["arg-type", "arg-type", "attr-defined"], done.stdout


MODEL = rf.gpt_model(rf.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
x = np.zeros((16, 32), np.int64)
at_3 = np.where(np.arange(32) == 3, 999, x)
WRONG: list[Any] = [
    [(at_3, x)],
    [(np.zeros((16, 33), int),) * 2],
    [(x, x[:, 1:])],
    [(x[0], x[0])],
    [(x.astype(np.float32), x)],
    (x, x),
    [],
]  # in the order of the page


def test_the_errors_of_the_page_are_those_that_are_raised() -> None:
    told = re.findall(r"^\| .+ \| (.+) \|$", PAGE.partition("## Errors")[2], re.M)[1:]
    training = rf.make_training(MODEL, "fp32", rf.Schedule(1e-3, 1e-4, 0, 200))
    raised = []
    for batches in WRONG:
        with pytest.raises(rf.UsageError) as error:
            training.step(batches)
        raised.append(str(error.value))
    training.state.t = training.state.t + 200
    with pytest.raises(rf.UsageError) as error:
        training.step([(x, x)])
    assert told[1:] == [*raised, str(error.value)]
