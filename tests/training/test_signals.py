"""Ctrl-C, SIGTERM and SIGHUP at any moment: a line, a checkpoint where there was a step, no traceback."""

from __future__ import annotations

from refimpl.training.cli import main

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from progress_bars import NoBar
from samples import sample

import refimpl.training.trainer as trainer_module
from refimpl.training import data, evaluate
from refimpl.training.checkpoint import load
from refimpl.training.config import Config
from refimpl.training.metrics import read_metrics
from refimpl.training.run_folder import open_folder
from refimpl.training.signals import Interrupted, Stop
from refimpl.training.trainer import Trainer

terminal_runs = pytest.importorskip("terminal_runs", reason="there are no pseudo-terminals here", exc_type=ImportError)

TINY = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=4", "--warmup=2", "--log-every=1"]
ENDLESS = "--steps=20000"
# What the script spends its time with, and what the terminal shows when that has begun.
PHASES: dict[str, tuple[list[str], str]] = {
    "start": ([ENDLESS, "--eval-every=20000"], ""),
    "training": ([ENDLESS, "--eval-every=20000"], "tok/s"),
    "evaluation": ([ENDLESS, "--eval-every=1", "--eval-batches=1000000"], "tok/s"),
    "sampling": (["--steps=2", "--eval-every=100", "--sample-bytes=100000000"], "written to"),
    "saving": ([ENDLESS, "--eval-every=1", "--eval-batches=1", "--n-layer=4", "--n-embd=128"], "validation loss"),
}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def stopped(phase: str, name: str, delay: float, folder: Path) -> str:
    """Send one signal so long after the phase has begun; all must be well. -> what the terminal showed after the signal."""
    flags, begun = PHASES[phase]
    run = terminal_runs.TerminalRun("train", *TINY, *flags, "--out=r", cwd=folder)
    run.wait_for(begun) if begun else run.wait_until_it_listens()
    run.read(delay)
    before, sent = run.seen, time.monotonic()
    run.send(name)
    code = run.end()
    answer = run.seen[len(before) :]
    where = f"{phase}, {name} after {delay:.3f} s: {answer!r}"
    assert code == 130 and "Traceback" not in run.seen and "Exception ignored" not in run.seen, where
    assert "stopping" in answer or "ended by" in answer, where
    assert time.monotonic() - sent < 30, where
    steps = read_metrics(folder / "r").steps
    checkpoint = folder / "r" / "checkpoint.safetensors"
    if steps:
        assert load(checkpoint)[1]["progress"]["step"] == steps[-1]["step"], where
    if phase in ("training", "evaluation", "sampling", "saving"):
        assert steps, where
    assert not list(folder.glob("r/.*")), where  # no lock, no half-written file
    return answer


@pytest.mark.parametrize(("phase", "name"), [("start", "SIGTERM"), ("evaluation", "SIGINT"), ("sampling", "SIGHUP")])
def test_a_signal_is_answered(phase: str, name: str, tmp_path: Path) -> None:
    stopped(phase, name, 0.05, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_each_signal_at_ten_moments_of_each_phase(phase: str, name: str, tmp_path: Path) -> None:
    moments = random.Random(f"{phase} {name}")
    for i in range(10):
        folder = tmp_path / str(i)
        folder.mkdir()
        stopped(phase, name, moments.uniform(0, 0.6), folder)


@pytest.mark.slow
def test_the_terminal_is_closed(tmp_path: Path) -> None:
    """SIGHUP from the system, and nowhere left to print to."""
    run = terminal_runs.TerminalRun("train", *TINY, ENDLESS, "--eval-every=20000", "--out=r", cwd=tmp_path)
    run.wait_for("tok/s")
    os.close(run.master)
    assert run.process.wait(30) == 130
    assert load(tmp_path / "r" / "checkpoint.safetensors")[1]["progress"]["step"] > 0
    assert (tmp_path / "r" / "loss.png").exists() and not list(tmp_path.glob("r/.*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("compare_recipes", ["--recipes=bf16", ENDLESS, "--no-page", *TINY[:-1]]),
        ("inspect_precision", [ENDLESS, *TINY[:-1], "--no-page"]),
        ("bench", ["--models=small", "--recipes=fp32", "--rounds=100000"]),
        ("experiments", ["masters"]),
        ("memory", ["--measure"]),
        ("compare_pytorch", [ENDLESS]),
    ],
)
def test_every_script_that_takes_time_ends_with_a_line(script: str, flags: list[str], tmp_path: Path) -> None:
    if script == "compare_pytorch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    moments = random.Random(script)
    for name in SIGNALS:
        run = terminal_runs.TerminalRun(script, *flags, cwd=tmp_path)
        run.wait_until_it_listens()
        run.read(moments.uniform(0, 3))
        if run.process.poll() is not None:
            continue  # it was done before
        before = run.seen
        run.send(name)
        code, answer = run.end(), run.seen[len(before) :]
        assert "Traceback" not in run.seen and "Exception ignored" not in run.seen, run.seen
        assert code in (0, 130) and answer.strip(" ^C\r\n"), run.seen


# ------------------------------------------------------------------------------------------------- inside one process


def trainer(tmp_path: Path, **flags: Any) -> Trainer:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 4, "warmup": 2, "log_every": 1}
    config = Config.of({**sizes, "eval_batches": 3, "sample_bytes": 5, **flags})
    open_folder(config, tmp_path)
    return Trainer(config, tmp_path)


def test_in_an_evaluation_the_next_batch_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [0], data.sample_batch

    def sample_batch(*arguments: Any) -> Any:
        drawn[0] += 1
        if drawn[0] == 2 + 2:  # two steps, and the second batch of an evaluation
            signal.raise_signal(signal.SIGTERM)
        return draw(*arguments)

    for module in (trainer_module, evaluate):
        monkeypatch.setattr(module, "sample_batch", sample_batch)
    run, bar = trainer(tmp_path, eval_every=2), NoBar()
    assert not run.train(bar)
    assert drawn[0] == 4 and not bar.written and run.progress.step == 2
    assert load(tmp_path / "checkpoint.safetensors")[1]["progress"]["step"] == 2
    assert not read_metrics(tmp_path).evaluations


def test_a_sample_ends_when_asked(tmp_path: Path) -> None:
    run, asked = trainer(tmp_path), iter([False, False, True])
    run.state.weights_down()
    assert len(sample(run.model, run.state, run.run, 100, stopping=lambda: next(asked))) == 2


def test_the_second_signal_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    stop = Stop("stopping soon")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="ended by Ctrl-C"), stop:
        with stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked and capfd.readouterr().err == "\nstopping soon\n"
        signal.raise_signal(signal.SIGINT)  # it listens until the outermost `with` ends
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", SIGNALS)
def test_a_script_without_safe_points_ends_with_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(lambda: signal.raise_signal(getattr(signal, name)))
    shown = "Ctrl-C" if name == "SIGINT" else name
    assert ended.value.code == 130 and capsys.readouterr().err == f"ended by {shown}\n"


def test_what_is_ignored_stays_ignored() -> None:
    """nohup: the process was started to outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop("") as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
