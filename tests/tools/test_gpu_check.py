"""scripts/gpu_check.py without a GPU: it says so in one line. What it measures is tested with CuPy, in test_cupy_backend.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paths import ROOT, TESTS
from script_loader import load_script

from refimpl.backends.numpy.backend import NumPyBackend
from refimpl.errors import UsageError
from refimpl.numerics.casts import widen
from refimpl.parity.findings import Finding
from refimpl.parity.pytorch import TRAJECTORY
from refimpl.parity.trace import Trace, record
from refimpl.tools.bench.gpu_check import SIZES, Trained, check, drift, loss_difference
from refimpl.training.config import Config
from refimpl.training.progress_bar import ProgressBar

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

    monkeypatch.setattr("refimpl.tools.bench.gpu_check.get_backend", refuse)
    monkeypatch.setattr("refimpl.tools.bench.gpu_check.kernel_tests", lambda tests: pytest.fail("ran without a device"))
    with pytest.raises(UsageError, match="no device"):
        check(TESTS, ["fp32"], 1, ["smoke"], 1)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_check_shows_how_far_it_is(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, bars = "refimpl.tools.bench.gpu_check", list[ProgressBar]()
    monkeypatch.setattr(ProgressBar, "__enter__", lambda bar: bars.append(bar) or bar)
    monkeypatch.setattr(f"{module}.get_backend", lambda name: SimpleNamespace(xp=None))
    monkeypatch.setattr(f"{module}.device", lambda cupy: "a GPU")
    monkeypatch.setattr(f"{module}.kernel_tests", lambda tests: (True, "9 passed"))
    monkeypatch.setattr(f"{module}.train_both", lambda recipe, steps: Trained(recipe, [FINDING], 0.0, 0.0, True))
    monkeypatch.setattr(f"{module}.speed", lambda model, recipe, rounds: [model, recipe, "1.0", "-", "-", "2.0", "steady"])
    script = load_script("gpu_check")
    monkeypatch.setattr(script, "TESTS", TESTS)  # beside the package only in a clone
    words = ["--recipes", "bf16,fp16", "--models", "smoke,small", *["--quiet"] * quiet]
    assert script.run(vars(script.parser().parse_args(words))) == 0
    out = capsys.readouterr().out
    assert "9 passed" in out and out.count("agrees") == 2 and out.count("steady") == 4 and out.endswith("PASSED\n")
    assert [(bar.done, bar.total, bar.quiet) for bar in bars] == [(7, 7, quiet)]


def test_the_verdict_on_a_recipe() -> None:
    good = Trained("bf16", [FINDING], 5e-4, 1e-2, True)
    assert good.agrees and good.row()[-1] == "agrees" and "step 3, 2.grads of w" in good.row()[1]
    for worse in (
        replace(good, findings=[FINDING, replace(FINDING, error=1.5)]),
        replace(good, loss_difference=2e-3),
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
    assert loss_difference(ours, theirs) == 0.25  # the median of 0 and 0.5, of the steps that are finite in both
    assert drift(ours, theirs) == pytest.approx(0.5 / 4.0)


def test_its_model_makes_the_predictions_that_the_bars_are_for() -> None:
    from refimpl.parity.pytorch import TRAJECTORY_ROWS

    assert SIZES["batch_size"] * SIZES["block_size"] == TRAJECTORY_ROWS


@dataclass(frozen=True)
class Reversed(NumPyBackend):
    """The host, with the products of each sum of a GEMM added last to first."""

    @property
    def ops(self) -> Mapping[str, Any]:
        return {}

    def matmul(self, a: np.ndarray, b: np.ndarray, acc: str) -> np.ndarray:
        a, b = (np.ascontiguousarray(x) for x in (widen(a, acc)[..., ::-1], widen(b, acc)[..., ::-1, :]))
        product: np.ndarray = np.matmul(a, b)
        return product

    def matmul_then(self, a: Any, b: Any, acc: str, finish: Callable[[Any], Any], fmt: str) -> Any:
        return finish(self.matmul(a, b, acc))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16"])
def test_runs_that_add_in_another_order_part_by_less_than_the_bars(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two correct runs show: medians far below the bars, and in BF16 single steps far above the median's."""
    backend, largest = Config.make_backend, 0.0
    for seed in (*range(6), 25, 27):
        config = Config.of({**SIZES, "recipe": recipe, "steps": 50, "seed": seed})
        ours = record(config)
        with monkeypatch.context() as patch:
            patch.setattr(Config, "make_backend", lambda self: Reversed("reversed", np))
            theirs = record(config)
        assert Config.make_backend is backend
        apart = Trained(recipe, [FINDING], loss_difference(ours, theirs), drift(ours, theirs), True)
        assert apart.agrees, (seed, apart)
        assert (apart.drift > 0) and loss_difference(ours, ours) == 0
        losses = [[float(trace.tensors[f"{step}/2.loss"]) for step in trace.steps] for trace in (ours, theirs)]
        largest = max(largest, float(np.abs(np.subtract(*losses)).max()))
    print(f"{recipe}: the largest difference of a step's loss is {largest:.1e}")
    assert recipe != "bf16" or largest > TRAJECTORY["16 bits"][0]
