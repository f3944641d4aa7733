"""scripts/minimal_fp16.py: short, without files, and what it shows: a scale that is found, and a model that learns."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from paths import ROOT, SCRIPTS
from script_loader import load_script

SCRIPT = SCRIPTS / "minimal_fp16.py"


def test_it_is_short_and_has_no_config() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 60
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names}
    assert modules == {"typing", "numpy", "refimpl", "refimpl.training.arguments"} and "Config.of" not in text
    assert 'get_backend("reference")' in text  # what is read is what runs


def test_the_debugger_stops_where_the_script_says(tmp_path: Path) -> None:
    """In `forward_backward` of the algorithm and not in a wrapper, with `train_step` one call up."""
    command = re.search(r"^    python (-m pdb .*)$", SCRIPT.read_text(), re.MULTILINE)
    assert command is not None
    words = [str(ROOT / word) if word.startswith("scripts/") else word for word in shlex.split(command[1])]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, input="up\np float(S)\nq\n", capture_output=True, text=True, timeout=120
    )
    stops = re.findall(r"^.*> \S+refimpl/step\.py\(\d+\)(\w+)\(\)$", done.stdout, re.MULTILINE)
    assert stops == ["forward_backward", "train_step"], done.stdout + done.stderr
    assert "(Pdb) 1048576.0" in done.stdout


@pytest.mark.parametrize("script", ["minimal_fp16.py", "by_hand.py"])
@pytest.mark.parametrize("arguments", [["--backend", "reference"], ["--foo"], ["x"], ["x", "--foo"]], ids=" ".join)
def test_arguments_are_refused_and_not_ignored(script: str, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert arguments[0] in done.stderr or arguments[1] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["minimal_fp16.py", "by_hand.py"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_the_script_does(script: str, flag: str) -> None:
    done = subprocess.run([sys.executable, SCRIPTS / script, flag], capture_output=True, text=True, timeout=60)
    about = ast.get_docstring(ast.parse((SCRIPTS / script).read_text(encoding="utf-8")))
    assert about and about.split(":")[0] in " ".join(done.stdout.split())
    assert (done.returncode, done.stderr) == (0, "")


def test_the_first_steps_are_skipped_and_the_loss_falls(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    line = re.compile(r" *(\d+) +(\S+) 2\^(\d+) +(\d+)(  an overflow: skipped)?")
    rows = [line.fullmatch(text) for text in done.stdout.splitlines()[1:]]
    assert all(rows) and [int(row[1]) for row in rows if row] == list(range(1, 31))
    losses, exponents, skips = ([float(row[i]) for row in rows if row] for i in (2, 3, 4))
    skipped = [bool(row[5]) for row in rows if row]
    # An untrained model gives each of 256 bytes the same probability: log 256 = 5.5. Nothing changes before the first update.
    assert exponents[0] == 20 and skipped[0] and skipped[1] and not all(skipped[:5])
    assert all(5.4 < x < 5.7 for x in losses[: skipped.index(False) + 1]) and losses[-1] < 3.5
    assert skips == [sum(skipped[:i]) for i in range(1, 31)]
    for before, after, was_skipped in zip(exponents, exponents[1:], skipped, strict=False):
        assert after - before == -1 if was_skipped else after - before in (0, 1)
    assert max(after - before for before, after in pairwise(exponents)) == 1  # it grows back once


def test_batches_are_pieces_of_the_text_and_the_bytes_after_them() -> None:
    import numpy as np

    script = load_script("minimal_fp16")
    tokens, targets = script.draw_batch(np.random.default_rng(0))
    assert tokens.shape == targets.shape == (script.BATCH, script.BLOCK)
    for piece, following in zip(tokens, targets, strict=True):
        assert bytes([*piece, following[-1]]) in script.TEXT and np.array_equal(piece[1:], following[:-1])
