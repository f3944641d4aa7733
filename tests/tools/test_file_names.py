"""Names of files that no command can use: one line, exit code 2, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from script_loader import run_here

LONG = 300 * "n"
"""A name that no file system takes."""
NAMED = (
    "train --out NAME", "train --config NAME", "train --init-from NAME", "train --resume --out NAME",
    "train --data NAME", "train --tokenizer NAME", "generate NAME", "convert import NAME x", "convert export NAME x",
    "plot NAME", "plot x --out NAME.png", "plot x --csv NAME", "compare_recipes --out NAME",
    "inspect_precision --out NAME", "inspect_precision --json NAME", "trace diff NAME x", "trace diff x x --json NAME",
    "trace record --steps 1 --out NAME", "trace record --like NAME --out x", "formats --plot NAME.png",
    "loss_scale torch --plot NAME.png", "memory --hf NAME",
)  # fmt: skip
"""Command lines with the name of a file in every flag that takes one."""


def refused(line: str, name: str, folder: Path) -> str:
    """The one line with which a command line is refused."""
    command, *words = line.split()
    done = run_here(command, *(word.replace("NAME", name) for word in words), folder=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not [path for path in folder.rglob("*") if path.is_file()]
    return done.stderr


@pytest.mark.parametrize("line", NAMED)
def test_a_name_that_is_too_long(line: str, tmp_path: Path) -> None:
    if any(word in line for word in ("plot", "compare_recipes", "inspect_precision")):
        pytest.importorskip("matplotlib", reason="draws")
    assert LONG in refused(line, LONG, tmp_path)


@pytest.mark.parametrize("line", [line for line in NAMED if ".png" not in line])
def test_an_empty_name_is_not_the_current_folder(line: str, tmp_path: Path) -> None:
    assert "is empty" in refused(line, "", tmp_path)


@pytest.mark.parametrize(
    ("line", "name"),
    [("audit NAME", LONG), ("audit --replay NAME", LONG), ("audit --out NAME x.py", ""), ("audit NAME", "")],
)
def test_names_that_the_audit_cannot_use(line: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert (name or "is empty") in refused(line, name, tmp_path)
