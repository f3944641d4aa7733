"""scripts/gpu_check.py without a GPU: it says so in one line. What it measures is tested with CuPy, in test_cupy_backend.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from script_loader import load_script

from refimpl.errors import UsageError
from refimpl.gpu_check import SIZES, Trained, check, drift, loss_difference
from refimpl.judge import Finding
from refimpl.trace import Trace

ROOT = Path(__file__).resolve().parents[1]
FINDING = Finding(3, "2.grads", "w", 0.9, 0.5, 1.0, 10)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_it_says_what_to_install_in_one_line() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/gpu_check.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "cuda13" in done.stderr


@pytest.mark.parametrize("recipe", ["fp8", "bf16-sr", "nope"])
def test_recipes_that_cannot_be_checked_are_refused_before_anything_runs(recipe: str) -> None:
    script = load_script("gpu_check")
    with pytest.raises(UsageError, match=f"recipe {recipe} cannot be checked, only fp64, .*apex-o2"):
        script.run(vars(script.parser().parse_args(["--recipes", f"fp32,{recipe}"])))


def test_check_asks_for_the_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise UsageError(f"backend {name}: no device")

    monkeypatch.setattr("refimpl.gpu_check.get_backend", refuse)
    monkeypatch.setattr("refimpl.gpu_check.kernel_tests", lambda tests: pytest.fail("ran without a device"))
    with pytest.raises(UsageError, match="no device"):
        check(ROOT / "tests", ["fp32"], 1, ["smoke"], 1)


def test_the_verdict_on_a_recipe() -> None:
    good = Trained("bf16", [FINDING], 1e-3, 1e-2, True)
    assert good.agrees and good.row()[-1] == "agrees" and "step 3, 2.grads of w" in good.row()[1]
    for worse in (
        replace(good, findings=[FINDING, replace(FINDING, error=1.5)]),
        replace(good, loss_difference=6e-3),
        replace(good, drift=6e-2),
        replace(good, same_scales=False),
        replace(good, recipe="fp32"),
        replace(good, findings=[replace(FINDING, error=np.nan)]),
    ):
        assert not worse.agrees and worse.row()[-1] == "DEPARTS"


def test_how_far_two_runs_are_apart() -> None:
    ours, theirs = Trace(), Trace()
    for trace, losses, last in ((ours, (3.0, 2.0, np.inf), 5.0), (theirs, (3.0, 2.5, 1.0), 5.5)):
        trace.put(0, "4.master", "w", np.array([1.0, 1.0]))
        for step, loss in enumerate(losses, 1):
            trace.put(step, "2.loss", "", np.float32(loss))
            trace.put(step, "4.master", "w", np.array([last, 1.0]))
    assert loss_difference(ours, theirs) == 0.5  # of the steps that are finite in both
    assert drift(ours, theirs) == pytest.approx(0.5 / 4.0)


def test_its_model_makes_the_predictions_that_the_bars_are_for() -> None:
    from refimpl.compare_pytorch import TRAJECTORY_ROWS

    assert SIZES["batch_size"] * SIZES["block_size"] == TRAJECTORY_ROWS
