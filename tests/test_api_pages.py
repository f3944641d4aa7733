"""The pages that pdoc makes of the docstrings, by the command of docs/library.md: no warning, and every name of the library."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import DOCS, ROOT

from refimpl import _library

COMMAND = re.search(r"^    (pdoc .*)$", (DOCS / "library.md").read_text(), re.M)


def modules_of(command: str) -> list[str]:
    return [word for word in shlex.split(command) if word.startswith("refimpl")]


def test_the_command_names_modules_that_there_are() -> None:
    assert COMMAND is not None and "refimpl" in modules_of(COMMAND[1])
    assert all(importlib.util.find_spec(name) for name in modules_of(COMMAND[1]))
    homes = {getattr(getattr(_library, name), "__module__", "refimpl.precision.recipes") for name in _library.__all__}
    shown = ("refimpl.backends", *(name for name in modules_of(COMMAND[1]) if name != "refimpl"))
    assert all(home.startswith(shown) for home in homes), homes  # a name of the library has a page of its module too


@pytest.mark.slow
def test_the_pages_are_made_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    assert COMMAND is not None
    words = [str(tmp_path) if word == "site" else word for word in shlex.split(COMMAND[1])]
    done = subprocess.run([sys.executable, "-W", "error", "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "refimpl.html").read_text()
    missing = [name for name in _library.__all__ if f'<section id="{name}">' not in page]
    assert not missing
    for name in modules_of(COMMAND[1]):
        assert (tmp_path / f"{name.replace('.', '/')}.html").exists(), name
    assert re.search("white-space: ?pre-wrap", page)  # of docs/api/custom.css: the columns of a docstring stay columns
