"""scripts/loss_scale.py: one line per scaler, a picture, bad input in one line, and the table of docs/loss_scaling.md."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import DOCS, SCRIPTS
from scaler_traces import FP32_MAX, GOLDEN, PATIENT, TINY, TOP, A, B
from script_loader import load_script, run_here

from refimpl.errors import UsageError
from refimpl.optim.loss_scalers import SCALER_RULES, ScalerRule
from refimpl.tools.loss_scale import number_text, show_loss_scale, trace

SCRIPT = str(SCRIPTS / "loss_scale.py")


def printed(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What the script prints for these arguments, in this process."""
    show_loss_scale(**vars(load_script("loss_scale").parser().parse_args(line.split())))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SCALER_RULES)
def test_one_line_of_scales(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for hysteresis in {h for n, h in GOLDEN if n == name}:
        for pattern, expected in GOLDEN[name, hysteresis].items():
            more = f" --hysteresis {hysteresis}" if hysteresis else ""
            out = printed(capsys, f"{name} --overflows {pattern} --init-scale 1024 --interval 3{more}")
            assert out.count("\n") == 1
            assert " ".join(number_text(round(float(x), 4)) for x in out.split()) == expected
            assert "." not in out or name == "chainer"


def test_numbers() -> None:
    assert [number_text(x) for x in (1024.0, 0.0, 2.0**40)] == ["1024", "0", "1099511627776"]
    assert [number_text(x) for x in (0.5, 645.0795775461751, math.inf)] == ["0.5", "645.0795775461751", "inf"]
    assert trace("megatron", "000", TOP, 3).scales[-1] == math.inf


def test_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    header, _, *rows = printed(capsys, f"--compare --overflows {B} --hysteresis 2").splitlines()
    assert header.split() == ["overflow", *B] and [row.split()[0] for row in rows] == list(SCALER_RULES)
    for row in rows:
        name, *scales = row.split()
        assert " ".join(scales) == GOLDEN[name, 2 if name in PATIENT else None][B]


def test_the_end_of_a_run_is_told_beside_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    show_loss_scale("deepspeed", "11111", 4.0, 3)
    out, err = capsys.readouterr()
    assert out == "4 2 1 1 1\n" and err == "deepspeed ends the run at step 4: an overflow at its floor\n"


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "scales.png"
    for line in ("torch --init-scale 1e-44 --overflows 1111", "--compare"):
        printed(capsys, f"{line} --plot {path}")
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("torch --overflows 012", "--overflows '012'"),
        ("torch --overflows=", "--overflows ''"),
        ("adam", "unknown scaler 'adam': choose one of torch, "),
        ("", "give one scaler (torch, "),
        ("torch --compare", "or --compare for all"),
        ("torch --hysteresis 2", "hysteresis 2 with torch"),
        ("torch --init-scale 0", "init scale 0.0"),
        ("torch --interval 0", "growth interval 0"),
        ("torch --plot a.svg", "end in .png"),
        ("torch --plot /dev/null/a.png", "its folder cannot be created"),
    ],
)
def test_wrong_input_is_refused(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "/dev/null" in line:
        pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=re.escape(says)) as error:
        printed(capsys, line)
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match="needs matplotlib"):
        show_loss_scale("torch", A, 8.0, 3, plot=tmp_path / "a.png")


def test_as_a_process() -> None:
    words = ["megatron", "--overflows", B, "--init-scale", "1024", "--interval", "3", "--hysteresis", "2"]
    good = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout, good.stderr) == (0, GOLDEN["megatron", 2][B] + "\n", "")
    bad = run_here("loss_scale", "--overflows", "2")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- the page


def facts(scaler: ScalerRule) -> list[str]:
    """The line of a scaler in the table of docs/loss_scaling.md."""
    good_steps = {"": f"{scaler.growth_interval}", "always": f"{scaler.growth_interval + 1}",
                  "first": f"{scaler.growth_interval + 1}, then {scaler.growth_interval}"}[scaler.late]  # fmt: skip
    floor = {0.0: "none", 1.0: "1", TINY: "2^-126", 1e-4: "10^-4"}[scaler.floor]
    floor += {"": "", "at the floor": ", stops", "to the floor": ", stops above"}[scaler.stops]
    ceilings = {FP32_MAX: "FP32", 2.0**24: "2^24", 65504.0: "65504", math.inf: "none" if scaler.unbounded else "FP32"}
    return [
        f"`{scaler.name}`",
        "1" if scaler.init_scale == 1 else f"2^{math.log2(scaler.init_scale):g}",
        "gradually, " * scaler.gradual + good_steps,
        {1: "1st", 2: "2nd"}[scaler.hysteresis] + f" at {scaler.tolerance:.0%}" * bool(scaler.tolerance),
        "" if scaler.hysteresis == 1 else {"growth": "growth", "good step": "any good step"}[scaler.refill],
        floor,
        ceilings[scaler.ceiling],
    ]


def test_the_page_has_the_facts() -> None:
    lines = (DOCS / "loss_scaling.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert table == [facts(scaler) for scaler in SCALER_RULES.values()]
