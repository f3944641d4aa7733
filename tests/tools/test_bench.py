"""The benchmark runs, and what it prints is what it should be about; its times are not judged. And memory is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from paths import SCRIPTS
from script_loader import run_here

from refimpl.backends.numpy.malloc import keep_freed_memory
from refimpl.errors import UsageError
from refimpl.tools.bench.steps import MODELS, Ours, alternating, alternating_with_rests, bench, gemm_floor, machine, profile

SCRIPT = SCRIPTS / "bench.py"

FAULTS = """
import resource, sys
import numpy as np
from refimpl.backends.choose import get_backend
if sys.argv[1] == "kept":
    get_backend("numpy")
def large():
    for _ in range(3):
        np.ones(1 << 25, np.uint8) + np.ones(1 << 25, np.uint8)  # 32 MiB: from there on glibc never keeps an array by itself
large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
large()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not keep_freed_memory(), reason="the C library is not glibc")
def test_memory_that_was_freed_is_found_mapped_again() -> None:
    """Nine arrays of 32 MiB cost nine times 8192 faults, or nine times 16 where pages are huge; kept ones cost none of them."""

    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept, given_back = faults("kept"), faults("given back")
    assert given_back >= 9 * 16 > kept, (given_back, kept)  # the interpreter itself may fault here and there


def test_a_step_of_the_benchmark_is_a_training_step() -> None:
    ours = Ours(MODELS["smoke"], "fp16")
    losses = [ours.step() for _ in range(30)]
    assert losses[-1] < losses[0] and int(ours.training.state.t) == 30


def test_medians_are_taken_in_turn() -> None:
    calls: list[int] = []
    times = alternating([lambda: calls.append(1), lambda: calls.append(2)], 5)
    assert len(times) == 2 and calls[-4:] == [1, 2, 1, 2] and all(t >= 0 for t in times)


def test_each_side_is_woken_up_before_it_is_timed_if_that_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refimpl.tools.bench.steps.REST", 0.005)
    calls: list[int] = []

    def long() -> None:
        calls.append(2)
        time.sleep(0.06)

    short_time, long_time = alternating_with_rests([lambda: calls.append(1), long], 3)
    assert calls == [1, 1, 2, 2] + 3 * [1, 1, 2] and short_time < 0.06 <= long_time


def test_the_floor_is_positive_and_the_machine_is_named() -> None:
    assert gemm_floor(MODELS["smoke"], 2) > 0
    assert "NumPy" in machine() and "cores" in machine()


def test_the_profile_adds_up() -> None:
    rows = profile("smoke", "fp16", 3)
    assert abs(sum(row["share"] for row in rows) - 1) < 1e-9
    assert {"linear forward", "attention backward", "update", "everything else"} <= {row["what"] for row in rows}


def test_a_recipe_that_torch_has_not_is_not_timed_as_another() -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match="recipe pure-fp16 is not timed in PyTorch"):
        bench("torch", models="smoke", recipes="pure-fp16", rounds=1)


def test_beside_torch(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    bench("torch", models="smoke", recipes="fp32,bf16,fp16", rounds=2, as_json=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["recipe"] for row in rows] == ["fp32", "bf16", "fp16"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["torch_ms"] / row["ours_ms"])
        assert 20 < row["ours_peak_mib"] < row["torch_peak_mib"]  # each of its own process: PyTorch alone is larger than ours


@pytest.mark.parametrize(
    ("arguments", "message"), [({"models": "huge"}, "unknown model 'huge'"), ({"rounds": 0}, "--rounds is 0"),
                               ({"recipes": "fp7"}, "unknown recipe 'fp7'")],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(**arguments)  # type: ignore[arg-type]


def test_the_script_itself() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--smoke"], capture_output=True, text=True)
    assert done.returncode == 0 and "over_floor" in done.stdout, done.stderr
    assert run_here("bench", "--models", "huge").returncode == 2
