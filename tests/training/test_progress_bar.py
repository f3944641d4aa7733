"""Progress on a terminal of any width, in a file, and with --quiet."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from progress_bars import Terminal
from script_loader import run_here

from refimpl.parity import mistake_table
from refimpl.training import progress_bar
from refimpl.training.progress_bar import ProgressBar, fitted

FIELDS = "loss 3.213, scale 65536, skipped 0, 12,345 tok/s"
SHOWN: dict[str, Any] = {
    "n": 180, "total": 400, "elapsed": 111.0, "prefix": "", "ascii": True, "unit": "step", "unit_scale": False, "rate": 3.59,
    "bar_format": None, "unit_divisor": 1000, "initial": 0, "colour": None,
}  # fmt: skip


@pytest.mark.parametrize("width", range(24, 140))
def test_no_number_is_cut(width: int) -> None:
    for postfix in (FIELDS, None, ""):
        line = fitted(**SHOWN, ncols=width, postfix=postfix)
        assert len(line) <= width and line.endswith("]") and "180/400 [01:51<01:01" in line
        fields = [field for field in FIELDS.split(", ") if field in line]
        assert fields == FIELDS.split(", ")[: len(fields)] and (postfix or not fields)
        rest = line.split("[", 1)[1].replace(", ".join(fields), "")
        assert rest in ("01:51<01:01]", "01:51<01:01, ]", "01:51<01:01,  3.59step/s]")
    assert ("skipped 0" in fitted(**SHOWN, ncols=width, postfix=FIELDS)) == (width >= 70)


def shown_by(monkeypatch: pytest.MonkeyPatch, out: io.StringIO, err: io.StringIO, quiet: bool = False) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with ProgressBar(4, "step", delay=1e-9, quiet=quiet) as bar:
        bar.update(2)
        bar.show("loss 2.5")
        bar.write("halfway")
        bar.update(2)
    return out.getvalue(), err.getvalue()


def test_a_file_has_a_line_each_time_and_a_terminal_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_by(monkeypatch, io.StringIO(), io.StringIO()) == ("step 2 of 4: loss 2.5\nhalfway\n", "")
    assert shown_by(monkeypatch, Terminal(), io.StringIO()) == ("step 2 of 4: loss 2.5\nhalfway\n", "")
    out, err = shown_by(monkeypatch, io.StringIO(), Terminal())
    assert out == "step 2 of 4: loss 2.5\nhalfway\n" and "4/4" in err
    out, err = shown_by(monkeypatch, Terminal(), Terminal())
    assert out == "halfway\n" and "loss 2.5" in err


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_quiet_shows_nothing_but_what_is_written(monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]) -> None:
    assert shown_by(monkeypatch, kind(), kind(), quiet=True) == ("halfway\n", "")


def test_long_work_without_a_terminal_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 4.0, 11.0, 11.0, 12.0, 30.0, 30.0])
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(times))
    with ProgressBar(4, "batch", "evaluation") as bar:
        for _ in range(4):
            bar.update()
    assert capsys.readouterr() == ("", "evaluation: batch 2 of 4, 11 s\nevaluation: batch 4 of 4, 30 s\n")


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        "bench --smoke --recipes bf16,fp16",
        "bench --profile --models smoke --rounds 2",
        "memory --measure --n-layer 1 --n-head 2 --n-embd 16 --block-size 8",
        "mistakes --table ignore-inf",
        "trace record --recipe fp16 --steps 3 --mistake unscale-after-clip --out new.safetensors",
        "trace diff ours.safetensors theirs.safetensors",
    ],
)
def test_bars_of_commands_end_where_they_say(
    command: str, quiet: bool, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[ProgressBar] = []
    monkeypatch.setattr(ProgressBar, "__enter__", lambda bar: bars.append(bar) or bar)
    monkeypatch.setattr(mistake_table, "outcomes", lambda name, more: ["named"] * 3)
    name, *words = command.split()
    folder = traces if "diff" in words else tmp_path
    ended = run_here(name, *words, *["--quiet"] * quiet, folder=folder)
    assert ended.returncode in (0, 1) and ended.stdout and not ended.stderr
    assert [bar.done for bar in bars] == [bar.total for bar in bars] and min(bar.total for bar in bars) > 1
    assert [bar.quiet for bar in bars] == [quiet] * (2 if "diff" in command else 1)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    for more in ("--out ours.safetensors", "--mistake unscale-after-clip --out theirs.safetensors"):
        assert run_here("trace", *f"record --recipe fp16 --steps 2 {more}".split(), folder=folder).returncode == 0
    return folder
