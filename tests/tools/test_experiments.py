"""The toy experiments: the figures that each is known for, the sentence that says them, and the picture."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SCRIPTS
from script_loader import run_here

from refimpl.errors import UsageError
from refimpl.precision.recipes import RECIPES
from refimpl.tools.experiments import toy_runs as training
from refimpl.tools.experiments.experiment import Result
from refimpl.tools.experiments.registry import EXPERIMENTS, draw, show_experiments
from refimpl.tools.experiments.updates import RATES, WEIGHTS, predicted_share
from refimpl.tools.experiments.values import PRODUCTS, TRIALS

SCRIPT = SCRIPTS / "experiments.py"
_results: dict[str, Result] = {}


TINY: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "warmup": 3}
SHORT: dict[str, Callable[[], Result]] = {
    "masters": lambda: training.run_masters(0, lambda: None, 30, 30, TINY),
    "recipes": lambda: training.run_recipes(0, lambda: None, 30, TINY),
}
"""The two that take a minute, in a second each; `-m slow` runs them whole."""
BOTH_LENGTHS = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "whole"])


def result(name: str, whole: bool = False) -> Result:
    """Each experiment is run once for all tests."""
    key = f"{name}, whole" if whole else name
    if key not in _results:
        _results[key] = EXPERIMENTS[name].run(0) if whole or name not in SHORT else SHORT[name]()
    return _results[key]


def test_values_at_and_below_half_of_the_smallest_vanish() -> None:
    data = result("flush").data
    assert data["fp16"]["at_half"] == 0 and data["fp16"]["above"] == 2.0**-24
    assert [data[fmt]["above"] for fmt in ("bf16", "e5m2", "e4m3")] == [2.0**-133, 2.0**-16, 2.0**-9]
    stairs = data["fp16"]
    assert set(stairs["y"]) == {0, 1, 2, 3} and all(stairs["y"][stairs["x"] <= 0.5] == 0)
    assert "numbers up to 2^-25 = 2.98e-08 become 0" in result("flush").conclusion


def test_updates_are_lost_from_2048_and_256() -> None:
    data = result("lost-update").data
    assert (data["fp16"]["first"], data["fp16"]["all"]) == (2048, 4096)
    assert (data["bf16"]["first"], data["bf16"]["all"]) == (256, 512)
    assert data["tie"] == {"1 + 2^-11": 1.0, "1 + 1.01 * 2^-11": 1 + 2.0**-10}
    assert "2048 in FP16 or 256 in BF16" in result("lost-update").conclusion


def test_a_hundred_updates() -> None:
    curves = result("hundred-updates").data["curves"]
    assert f"{curves['fp32'][-1]:.7f}" == "0.9400020"
    assert set(curves["bf16"]) == {1.0}
    assert abs(curves["bf16 with masters"][-1] - 0.94) <= 2.0**-9  # half an ulp of [0.5, 1)
    assert abs(curves["fp16 with masters"][-1] - 0.94) <= 2.0**-12
    assert abs(curves["fp16"][-1] - 0.94) > 10 * abs(curves["fp16 with masters"][-1] - 0.94)
    assert "0.9400020" in result("hundred-updates").conclusion and "still 1 in BF16," in result("hundred-updates").conclusion


def test_a_hundred_updates_without_a_master() -> None:
    curves, exact = result("hundred-updates").data["curves"], 0.94
    # each of 100 roundings moves by 2^-8 with probability p = 6e-4 2^8 or not at all: sd sqrt(100 p (1 - p)) 2^-8, over 4096
    p = 6e-4 * 2**8
    standard_error = math.sqrt(100 * p * (1 - p) / 4096) / 2**8
    assert abs(curves["bf16, stochastic rounding"][-1] - exact) < 4 * standard_error
    # w + c misses the sum by what c itself loses: half an ulp of a c that stays below half an ulp of w, 2^-9, an update
    assert abs(curves["bf16, Kahan"][-1] - exact) < 100 * 2.0**-19 and f"{curves['bf16, Kahan'][-1]:.5f}" == "0.93992"


def test_mx_scales() -> None:
    """Significands are uniform: what lies above 1.75 (e4m3, e5m2) or 1.5 (e2m1) saturates; the rest follows by integration."""
    data = result("mx-scales").data
    for fmt, share in (("e4m3", 1 / 4), ("e5m2", 1 / 4), ("e2m1", 1 / 2)):
        assert abs(data[f"{fmt} floor"]["saturated"] - share) < 4 * math.sqrt(share * (1 - share) / 2**14)
        assert data[f"{fmt} ceil"]["saturated"] == data[f"{fmt} rceil"]["saturated"] == 0
        assert data[f"{fmt} even"]["saturated"] < data[f"{fmt} floor"]["saturated"]
    # mean of log2(1.75 / s): s uniform in [1, 1.75) under the floor, and another whole bit where s is above it under rceil
    mean = math.log2(1.75) - (2 - 1 / math.log(2))
    assert abs(data["e4m3 rceil"]["unused"] - (mean + 1 / 4)) < 0.01
    assert abs(data["e4m3 ceil"]["unused"] - (mean + 1)) < 0.01
    assert "25% of the blocks saturate in e4m3 and 50% in e2m1; with rceil 0%" in result("mx-scales").conclusion


def test_accumulators_of_fewer_bits() -> None:
    """A cut loses K 2^-f / 6 of a sum of one sign (accumulate.py); e4m3 products end early, so it may be somewhat less."""
    data = result("accumulators").data
    for acc, f in (("e8m13", 13), ("e8m14", 14), ("e8m15", 15)):
        predicted = 4096 * 2.0**-f / 6
        assert 0.85 * predicted < data[acc][-1] < 1.05 * predicted
    assert data["e8m14/128"][-1] < 0.003 < 0.02 < data["e8m14"][-1] < 0.045
    assert data["fp32"][-1] < 1e-6
    assert "4.2%" in result("accumulators").conclusion


def test_masks_that_overflow() -> None:
    data = result("masks").data
    assert {way for way, found in data.items() if np.isnan(found["whole"]).any()} == {
        "score replaced by -Inf", "-65504 added twice (causal and padding)",
    }  # fmt: skip
    assert data["-65504 added"]["infinite"] >= 1  # -65504 - 16 = -65520 is a tie, which goes to infinity
    assert data["score replaced by -65504"]["infinite"] == 0
    assert np.array_equal(data["score replaced by -65504"]["whole"], np.full(8, 1 / 8))
    assert all(found["leaked"] == 0 for found in data.values())


def test_epsilon_is_nothing_in_fp16() -> None:
    data = result("epsilon").data
    for exponent in data["exponents"]:
        assert abs(data[exponent]["fp32"] - 1) < 0.011  # eps / |g| at most, 2^20 1e-8
        flushed = 0.05 * 4.0**exponent <= 2.0**-25
        assert (data[exponent]["v in fp16"] > 2) == flushed == math.isinf(data[exponent]["all in fp16"])
        if flushed:
            assert data[exponent]["v in fp16"] == pytest.approx(2.0**exponent / 1e-8)
    assert data[-12]["v in fp16"] > 10_000 and "epsilon, 1e-08, is 0 in FP16" in result("epsilon").conclusion


@pytest.mark.parametrize(("fmt", "known"), [("bf16", (0.882, 0.303, 0.154, 0.019)), ("fp16", (1, 0.998, 0.882, 0.154))])
def test_the_share_of_weights_moved(fmt: str, known: tuple[float, ...]) -> None:
    """Known shares at 1e-4, 3e-5, 1e-5, 1e-6; four standard errors of a share, and what the prediction leaves out."""
    moved = dict(zip(RATES, result("moved-weights").data[fmt]["moved"], strict=True))
    for lr, share in zip((1e-4, 3e-5, 1e-5, 1e-6), known, strict=True):
        error = 4 * math.sqrt(share * (1 - share) / WEIGHTS) + 5e-4  # the known shares have three digits
        assert abs(moved[lr] - share) <= error, (fmt, lr, moved[lr])
        assert abs(moved[lr] - predicted_share(fmt, lr)) <= error + 1e-3
    assert "3e-5 30%" in result("moved-weights").conclusion


def test_long_sums() -> None:
    """The error of FP32 is below the worst case n u; FP16's is 2^13 times as large a unit, and in BF16 10,000 stick at 256."""
    data = result("accumulate").data
    assert data["bf16"]["uniforms"] == 256 and data["fp16"]["uniforms"] == 2048
    assert abs(data["fp32"]["uniforms"] - data["uniforms"]) < 10_000 * 8192 * 2.0**-25  # each addition rounds a sum below 8192
    assert data["fp32"]["last"] < PRODUCTS * 2.0**-24 < data["fp16"]["last"] < data["bf16"]["last"]
    spread = 4 / math.sqrt(2 * TRIALS)  # of a ratio of two rms values over as many trials
    assert abs(math.log2(data["fp16"]["last"] / data["fp32"]["last"]) - 13) < math.log2(1 + 2 * spread)
    assert abs(math.log2(data["bf16"]["last"] / data["fp16"]["last"]) - 3) < math.log2(1 + 2 * spread)
    assert "is 256 in BF16" in result("accumulate").conclusion


def test_a_tiny_loss() -> None:
    data = result("tiny-loss").data
    assert data["zero"][0] == 1.0 and data["zero"] == sorted(data["zero"], reverse=True)
    assert data["zero"][data["best"]] == data["infinite"][data["best"]] == 0  # some S loses nothing at either end
    assert data["infinite"][0] == 0 and data["infinite"][-1] > 0
    assert "leaves 100% of its gradients zero" in result("tiny-loss").conclusion


def test_rare_rows() -> None:
    """Adam moves a weight by lr / sqrt(1 - beta2) < 5 lr at most where v is what it should be, so by 0.1 in 20 steps."""
    data = result("rare-rows").data
    ends, lost = data["ends"], data["lost"]
    assert max(ends[name] for name in ("fp32", "bf16-moments", "adam-8bit-fp32-embeddings")) < 0.1
    assert ends["adam-8bit-fp32-embeddings"] == ends["fp32"]  # a table of embeddings and nothing else: the same arithmetic
    assert min(ends["adam-8bit"], ends["adam-fp8"]) > 100 * ends["fp32"]
    assert lost["fp32"] == lost["bf16-moments"] == lost["adam-8bit-fp32-embeddings"] == 0
    assert min(lost["adam-8bit"], lost["adam-fp8"]) > 0.05
    assert "v becomes 0 while m does not" in result("rare-rows").conclusion


@BOTH_LENGTHS
def test_masters_and_loss_scaling(whole: bool) -> None:
    """What is missing costs a third at least of what both together learn.

    The runs see the same batches from the same weights, so nothing but the roundings sets them apart. Of N(0, 0.02^2) FP16
    weights a step of 5e-6 moves about a half (`predicted_share`): the other updates are lost without masters.
    """
    gain = result("masters", whole).data["gain"]
    both, no_scaling, no_masters, neither = gain.values()
    assert both > 0 and max(no_masters, no_scaling, neither) < both * 2 / 3
    assert f"lower the loss by {both:.4f} with masters" in result("masters", whole).conclusion


def test_masters_differ_in_nothing_else() -> None:
    """All four start at the same loss: the 16-bit weights are the same."""
    first = [curve[0] for curve in result("masters").data["curves"].values()]
    assert len(set(first)) == 1


@BOTH_LENGTHS
def test_all_recipes(whole: bool) -> None:
    data = result("recipes", whole).data
    ends = data["ends"]
    # fp64 parts from fp32 only by FP32's rounding, 2^-13 of FP16's: less than any recipe that rounds to 16 bits.
    assert data["apart"]["fp64"] < min(data["apart"][name] for name in ends if name not in ("fp64", "fp32"))
    # What 16 bits change is small beside what is learned, but for pure-fp16: Adam's second moments vanish there.
    learned = data["curves"]["fp32"][0] - ends["fp32"]
    assert all(abs(ends[name] - ends["fp32"]) < 0.05 * learned for name in ends if name != "pure-fp16")
    assert not abs(ends["pure-fp16"] - ends["fp32"]) < learned
    assert len({curve[0] for name, curve in data["curves"].items() if name.startswith("amp-fp16")}) == 1
    assert "pure-fp16 at" in result("recipes", whole).conclusion
    # 'each of these recipes with FP32 weights or masters' is each that is not pure
    for name in (name for name in ends if not name.startswith("pure")):
        assert (RECIPES[name].state["master"] or RECIPES[name].state["weights"]) in ("fp32", "fp64")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_table_and_a_picture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = result(name)
    assert found.rows and all(len(row) == len(found.header) for row in found.rows)
    assert "\n" not in found.conclusion
    path = draw(EXPERIMENTS[name], found, tmp_path)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert draw(EXPERIMENTS["flush"], result("flush"), tmp_path) is None


def test_the_same_seed_gives_the_same_numbers() -> None:
    a, b = (EXPERIMENTS["accumulate"].run(3).data["fp16"]["last"] for _ in range(2))
    assert a == b != result("accumulate").data["fp16"]["last"]


def test_smoothing_is_the_mean_of_the_last() -> None:
    assert np.allclose(training._smooth([1.0, 2.0, 3.0, 6.0], 2), [1.5, 2.5, 4.5])


def test_the_list_and_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_experiments([], tmp_path, 0)
    text = capsys.readouterr().out
    assert all(e.name in text and e.question in text for e in EXPERIMENTS.values())
    show_experiments(["flush", "hundred-updates", "flush"], tmp_path / "new", 0)
    text = capsys.readouterr().out
    assert text.count("Conclusion: ") == 2 and "0.9400020" in text


@pytest.mark.parametrize(("arguments", "message"), [((["x"], 0), "unknown experiment 'x'"), ((["flush"], -1), "--seed is -1")])
def test_bad_arguments(arguments: tuple[list[str], int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        show_experiments(arguments[0], tmp_path, arguments[1])


def test_the_script_itself(tmp_path: Path) -> None:
    listed = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert "hundred-updates" in listed.stdout
    bad = run_here("experiments", "flush", "nothing", folder=tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("error: unknown experiment 'nothing'") and bad.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    pytest.importorskip("matplotlib")
    assert run_here("experiments", "flush", "--out", "file/x", folder=tmp_path).returncode == 2
