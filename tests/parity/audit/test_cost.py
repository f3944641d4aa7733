"""What the audit costs: scripts/audit_cost.py holds its limits, and says so where one is exceeded."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from paths import SCRIPTS
from script_loader import load_script

from refimpl.training.progress_bar import ProgressBar

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
pytest.importorskip("transformers", reason="the model is a Llama of transformers==5.24.0")


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("audit_cost", SCRIPTS / "audit_cost.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def found(**ratios: float) -> dict[str, dict[str, float]]:
    return {"ratios": {"time": 11.0, "memory": 2.0, "unaudited": 1.0, "call": 1.0, **ratios}, "errors": {"unaudited": 0.004}}


def test_a_cost_over_its_limit_is_named(script: Any) -> None:
    assert script.LIMITS == {"time": 12.0, "memory": 3.0, "unaudited": 1.01, "call": 1.01}
    assert script.over(found()) == script.over(found(unaudited=1.017)) == []
    assert script.over(found(time=12.1)) == ["time"] and script.over(found(memory=3.1, call=1.02)) == ["memory", "call"]
    assert script.over(found(unaudited=1.019)) == ["unaudited"]


def test_unaudited_steps_are_compared_with_the_plain_ones_of_their_round(script: Any) -> None:
    """A machine that is half as fast in some rounds changes no ratio."""
    plain = [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 3.0, 3.0]
    ratio, error = script.paired({"plain": plain, "unaudited": [1.02 * x for x in plain]})
    assert ratio == pytest.approx(1.02) and error == pytest.approx(0, abs=1e-12)
    ratio, error = script.paired({"plain": [1.0] * 8, "unaudited": [0.9, 0.9, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2]})
    assert ratio == pytest.approx(1.05) and error == pytest.approx(1.2533 * 0.15 / 1.349 / 2)


@pytest.mark.slow
def test_the_audit_stays_within_its_limits() -> None:
    """FP32 and autocast BF16: time, memory, and unaudited steps of a Llama of 10 M parameters."""
    done = subprocess.run([sys.executable, SCRIPTS / "audit_cost.py", "--rounds=4"], capture_output=True, text=True)
    assert done.returncode == 0 and "all within their limits" in done.stdout, done.stdout + done.stderr
    for what in ("audited step", "unaudited step", "its audit.step()", "peak memory"):
        lines = [f"^{precision} +{re.escape(what)}" for precision in ("fp32", "amp-bf16")]
        assert all(re.search(line, done.stdout, re.MULTILINE) for line in lines)


@pytest.mark.parametrize("quiet", [False, True])
def test_both_scripts_show_how_far_they_are(
    quiet: bool, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="some loops train LoRA's parts: peft>=0.17")
    bars: list[ProgressBar] = []
    monkeypatch.setattr(ProgressBar, "__enter__", lambda bar: bars.append(bar) or bar)
    for name, result in {"training": None, "seconds": 1.0, "call_seconds": 1e-6, "memory_apart": 1}.items():
        monkeypatch.setattr(script, name, lambda *arguments, result=result: result)
    monkeypatch.setattr("sys.argv", ["audit_cost.py", "--rounds", "3", *["--quiet"] * quiet])
    assert script.run() == 0 and "all within their limits" in capsys.readouterr().out
    coverage, judge = load_script("audit_coverage"), SimpleNamespace(judged=1, unjudged=Counter[str]())
    clean = SimpleNamespace(findings={}, failures={}, judge=judge, table=SimpleNamespace(rows={}))
    monkeypatch.setattr(coverage, "audited", lambda loop: clean)
    monkeypatch.setattr("sys.argv", ["audit_coverage.py", "lstm", *["--quiet"] * quiet])
    assert coverage.run() == 0
    loops = capsys.readouterr().out.count("100.00%")
    assert [(bar.done, bar.total, bar.quiet) for bar in bars] == [(8, 8, quiet), (loops, loops, quiet)] and loops > 1
