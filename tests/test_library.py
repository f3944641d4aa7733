"""`import refimpl`: its names, and the example of its docstring."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise

import pytest

import refimpl
from refimpl import _library


def example() -> str:
    """The indented lines of the docstring from the first import to the end of the loop."""
    lines = re.search(r"^    import numpy.*?(?=^\S)", refimpl.__doc__ or "", re.S | re.M)
    assert lines is not None
    return re.sub(r"^    ", "", lines[0], flags=re.M)


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    exec(example(), {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(row[1]) for row in rows]
    assert len(rows) == 20 and len(example().strip().splitlines()) <= 18
    # An untrained model gives each of 256 bytes the same probability: log 256 = 5.5. The first scale overflows and halves.
    assert 5.3 < losses[0] < 5.8 and losses[-1] < 3.5
    skipped = [row[3] == "True" for row in rows]
    assert skipped[0] and sum(skipped) < 4
    for i, (now, after) in enumerate(pairwise(rows)):
        assert float(after[2]) == float(now[2]) * (0.5 if skipped[i] else 1)


def test_every_name_is_there_and_told_of() -> None:
    for name in _library.__all__:
        assert getattr(refimpl, name) is getattr(_library, name)
        assert re.search(rf"\b{name}\b", refimpl.__doc__ or ""), name
    assert {*_library.__all__, "__version__"} <= set(dir(refimpl))
    assert refimpl.State.__module__ == "refimpl.optim.state"


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'refimpl' has no attribute 'Stat'"):
        refimpl.Stat  # noqa: B018
    with pytest.raises(ImportError):
        from refimpl import np  # noqa: F401


def test_modules_are_imported_as_before() -> None:
    program = "import refimpl; from refimpl import step; import refimpl.nn.linear; assert step.train_step is refimpl.train_step"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
