"""What an evening's reading costs, within stated limits: scripts/reading_cost.py, whose table is in docs/architecture.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import DOCS, ROOT
from script_loader import load_script

cost = load_script("reading_cost")
FOUND = cost.counts()


@pytest.mark.parametrize("count", FOUND, ids=lambda count: count.what)
def test_the_reading_is_within_its_limits(count: object) -> None:
    assert count.number <= count.limit  # type: ignore[attr-defined]


def test_the_limits_are_those_that_were_set() -> None:
    assert [count.limit for count in FOUND] == [1800, 16, 30, 15, 5, 9, 0, 30]


def test_the_table_in_the_docs_is_of_today() -> None:
    page = (DOCS / "architecture.md").read_text()
    assert cost.table(FOUND) in page, "run python scripts/reading_cost.py --update"
    assert cost.with_table(page, cost.table(FOUND)) == page


def test_what_is_counted_is_there() -> None:
    files = cost.evening()
    assert {"step.py", "nn/linear.py", "optim/adamw.py"} <= {*files}
    assert all((ROOT / "refimpl" / file).exists() for file in files)
    assert {"optim/state.py", "nn/linear.py"} <= {*cost.way_of_a_weight()}
    calls = cost.one_linear_layer()
    assert ("numerics/casts.py", "cast") in calls and calls[0] == ("nn/linear.py", "linear_forward")
    stack = cost.down_to_a_rounding()
    assert stack[0] == ("step.py", "train_step") and stack[-1] == ("numerics/casts.py", "cast")
    assert ("nn/linear.py", "linear_forward") in stack


def test_a_clone_behind_a_symbolic_link_counts_the_same(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    program = "import sys; sys.path[0] = 'scripts'; import reading_cost; print(len(reading_cost.one_linear_layer()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "link", env={**os.environ, "PYTHONPATH": str(tmp_path / "link")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == len(cost.one_linear_layer()) > 0


def test_only_calls_of_refimpl_count() -> None:
    assert cost.calls_of(lambda: load_script("reading_cost")) == []
