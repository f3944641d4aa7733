"""Scaling over ranks: the measured table where MPI is installed, and the prediction against its formulas."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from paths import DOCS
from script_loader import load_script

from refimpl.errors import UsageError
from refimpl.tools.bench.ranks import CLUSTER, RANKS, STAGES, Cluster, plan, prediction, scaled, weak_scaling

MPIEXEC = Path(sys.executable).parent / "mpiexec"


def test_the_prediction_is_its_formulas() -> None:
    """7B in bf16: 16 bytes per parameter, 4 + 12/N, 2 + 14/N, 16/N; 2, 2, 2, 3 elements of 2 bytes."""
    P = CLUSTER.n_params
    for stage, states in zip(STAGES, (lambda n: 16, lambda n: 4 + 12 / n, lambda n: 2 + 14 / n, lambda n: 16 / n), strict=True):
        for ranks in RANKS:
            s = scaled(stage, ranks)
            assert s.nbytes == pytest.approx(states(ranks) * P, rel=1e-6)
            assert s.computing == pytest.approx(6 * P * 8192 / (989e12 * 0.4))
            bandwidth = 450e9 if ranks <= 8 else 50e9
            elements = 3 if stage == 3 else 2
            assert s.exchanging == pytest.approx(2 * elements * P * (ranks - 1) / ranks / bandwidth)
            least, most = s.efficiency
            assert 0 < least <= most <= 1


def test_a_slow_network_decides_the_step() -> None:
    slow = scaled(1, 64, c=Cluster(outside=5e9))
    assert slow.exchanging > slow.computing and slow.efficiency[1] == slow.computing / slow.exchanging < 1


def test_the_prediction_says_what_it_is() -> None:
    text = prediction()
    assert text.startswith("A PREDICTION: nothing was run.")
    assert "112.0         does not fit" in text and text.splitlines()[-1].startswith("1024  3      0.1")


def test_the_page_shows_the_prediction() -> None:
    page = (DOCS / "ranks.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in prediction().splitlines() if line and f"    {line}" not in page] == []


def test_what_cannot_be_compared_is_refused_before_anything_starts() -> None:
    script = load_script("bench")
    for words, message in (
        (["--ranks", "1"], "--ranks is 1: it must be at least 2"),
        (["--ranks", "2", "--models", "nope"], "unknown model 'nope'"),
        (["--ranks", "2", "--recipes", "nope"], "unknown recipe 'nope'"),
    ):
        with pytest.raises(UsageError, match=message):
            script.run(vars(script.parser().parse_args(words)))


@pytest.mark.skipif(MPIEXEC.exists(), reason="MPI is installed")
def test_without_mpi_it_says_what_to_install() -> None:
    with pytest.raises(UsageError, match="pip install mpi4py mpich"):
        weak_scaling("smoke", "bf16", 2, 1)


@pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python: pip install -e '.[mpi]'")
def test_weak_scaling_on_two_processes() -> None:
    ticks: list[None] = []
    rows = weak_scaling("smoke", "fp16", 2, 2, lambda: ticks.append(None))
    assert len(ticks) == len(rows) == len(plan(2))
    assert [(row["ranks"], row["stage"]) for row in rows] == [(1, 0), *((2, stage) for stage in STAGES)]
    for row in rows:
        assert row["step_ms"] > 0 and math.isclose(row["efficiency"], rows[0]["step_ms"] / row["step_ms"])
        assert math.isclose(row["tokens_per_s"], row["ranks"] * 2 * 8 / row["step_ms"] * 1e3)
