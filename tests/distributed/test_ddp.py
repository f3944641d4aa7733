"""Two ranks here, and two processes of PyTorch's DistributedDataParallel (gloo), on the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT
from rank_runs import on_ranks

from refimpl.nn.models.model import Model
from refimpl.parity.pytorch import TRAJECTORY
from refimpl.training.config import Config
from refimpl.training.setup import INIT, generator

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
SIZES: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "batch_size": 8, "lr": 1e-3, "warmup": 10, "steps": 50,
    "init_scale": 2.0**12,
}  # fmt: skip
"""A loss scale at which nothing overflows: DDP divides gradients by N when they are summed, so that its shares overflow where
ours, of a loss that is divided before, do not."""


def in_pytorch(given: dict[str, Any], ranks: int, folder: Path) -> list[dict[str, np.ndarray]]:
    """What each process wrote."""
    (folder / "config.json").write_text(json.dumps(given))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OPENBLAS_NUM_THREADS": "1"}
    outs = [folder / f"{rank}.npz" for rank in range(ranks)]
    words = [sys.executable, str(ROOT / "tests/support/ddp_program.py"), str(folder / "config.json")]
    more = [[str(rank), str(ranks), str(folder / "place"), str(out)] for rank, out in enumerate(outs)]
    processes = [subprocess.Popen([*words, *last], env=environment, stderr=subprocess.PIPE) for last in more]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()[-3000:]
    return [dict(np.load(out)) for out in outs]


def flat(model: Model, arrays: dict[str, np.ndarray], kind: str) -> np.ndarray:
    return np.concatenate([arrays[f"{kind}.{name}"].astype(np.float64).reshape(-1) for name in model.parameters])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo is told to use Linux's loopback device")
@pytest.mark.parametrize(("recipe", "stage"), [("fp32", 3), ("amp-bf16-cpu", 1), ("bf16", 2), ("fp16", 0)])
def test_two_ranks_train_as_ddp_does(recipe: str, stage: int, tmp_path: Path) -> None:
    """Fifty steps within the bars that one process is held to: `compare_pytorch.TRAJECTORY`, for batches of 256 predictions."""
    given = {**SIZES, "recipe": recipe, "zero": stage}
    config = Config.of(given)
    theirs = in_pytorch(given, 2, tmp_path)
    ours = on_ranks(config, 2)[0]
    losses = np.mean([one["loss"] for one in theirs], axis=0)
    apart = float(np.median(np.abs(losses - [step[0] for step in ours.steps])))
    kind = "master" if any(name.startswith("master.") for name in ours.arrays) else "weights"
    model = config.make_model()
    start = model.initial_weights(generator(config.seed, INIT))
    first = flat(model, {f"{kind}.{name}": w for name, w in start.items()}, kind)
    mine, other = flat(model, ours.arrays, kind), flat(model, theirs[0], "weights")
    drift = float(np.linalg.norm(mine - other) / np.linalg.norm(mine - first))
    print(f"{recipe}, stage {stage}: median loss difference {apart:.1e}, drift {drift:.1e}")
    loss_bar, drift_bar = TRAJECTORY["fp32" if recipe == "fp32" else "16 bits"]
    assert apart <= loss_bar and drift <= drift_bar
    assert theirs[0]["skipped"].tolist() == [step[2] for step in ours.steps]
    assert (other == flat(model, theirs[1], "weights")).all() and losses[-1] < losses[0] - 1
