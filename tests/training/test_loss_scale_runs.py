"""Trainings under each project's loss scale: resumed bit for bit, and ended where the project ends them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overflow import overflow_always
from progress_bars import NoBar

from refimpl.errors import TrainingStopped, UsageError
from refimpl.training.checkpoint import load, save
from refimpl.training.run_folder import open_folder, prepare_folder
from refimpl.training.trainer import Trainer

TINY_RUN: dict[str, Any] = {
    "model": "mlp", "n_layer": 1, "n_embd": 8, "block_size": 4, "batch_size": 4, "steps": 16, "warmup": 2, "eval_every": 8,
    "eval_batches": 1, "log_every": 4, "lr": 1e-2, "growth_interval": 2,
}  # fmt: skip


def trainer(folder: Path, resume: bool = False, **flags: Any) -> Trainer:
    text = folder.parent / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 20)
    config, folder = prepare_folder({} if resume else {**TINY_RUN, "data": str(text), **flags}, folder, resume, False)
    result = Trainer(config, folder)
    if resume:
        result.restore()
    else:
        open_folder(config, folder)
    return result


@pytest.mark.parametrize(
    ("name", "init"), [("deepspeed", 2.0**30), ("apex-kernel", 2.0**30), ("flax", 2.0**30), ("chainer", 1.0)]
)
def test_training_resumes_bit_for_bit(name: str, init: float, tmp_path: Path) -> None:
    flags = {"loss_scale": name, "init_scale": init}
    assert trainer(tmp_path / "whole", **flags).train(NoBar())
    first = trainer(tmp_path / "parts", **flags)
    for step in range(1, 6):
        batches = first.next_batches()
        first._pending.append((step, first._one_step(batches), batches))
        first.progress.step = step
    first._write_steps(NoBar())
    first.save()
    assert trainer(tmp_path / "parts", resume=True).train(NoBar())
    whole, parts = (tmp_path / folder / "checkpoint.safetensors" for folder in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    scales = [json.loads(line).get("loss_scale") for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(set(scales)) > 4


def test_a_run_ends_at_the_floor_of_deepspeed_with_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path / "r", loss_scale="deepspeed", init_scale=4.0)
    overflow_always(run.training)
    with pytest.raises(TrainingStopped, match=r"by step 4: the loss scale is 1, below which deepspeed does not go: .*Inf") as e:
        run.train(NoBar())
    assert "\n" not in str(e.value) and f"--init-from {tmp_path}" in str(e.value)
    _, header = load(tmp_path / "r" / "checkpoint.safetensors")
    assert header["loss_scale"]["exhausted"] == 1 and header["loss_scale"]["scale"] == 1.0
    assert header["progress"] == {"step": 4, "skipped": 4, "skipped_in_a_row": 4}
    with pytest.raises(TrainingStopped, match=r"by step 8: .*below which deepspeed"):  # over is over
        trainer(tmp_path / "r", resume=True).train(NoBar())


@pytest.mark.parametrize("name", ["megatron", "jmp", "chainer", "apex-fp16"])
def test_a_scale_that_stays_at_its_floor_stops_the_run_too(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path / "r", loss_scale=name, init_scale=1.0, steps=100, eval_every=100)
    overflow_always(run.training)
    with pytest.raises(TrainingStopped, match="50 steps in a row were skipped and the loss scale is 1"):
        run.train(NoBar())


def test_a_run_ends_at_fairseqs_least_scale(tmp_path: Path) -> None:
    run = trainer(tmp_path / "r", loss_scale="fairseq", init_scale=4.0, scale_floor=0.5)
    overflow_always(run.training)
    with pytest.raises(TrainingStopped, match=r"the loss scale is 1, below which fairseq does not go"):
        run.train(NoBar())


def test_a_scale_of_zero_ends_the_run_at_once(tmp_path: Path) -> None:
    run = trainer(tmp_path / "r", init_scale=2.0**-120, backoff_factor=0.01)
    overflow_always(run.training)
    with pytest.raises(TrainingStopped, match=r"by step 4: the loss scale is \S+, and gradients cannot be divided by it") as e:
        run.train(NoBar())
    assert "\n" not in str(e.value) and not (tmp_path / "r" / "checkpoint.safetensors").exists()


def test_megatrons_infinite_scale_ends_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path / "r", loss_scale="megatron", init_scale=2.0**127, steps=100, eval_every=100)
    run.loss_scale._scale = np.asarray(np.float32(math.inf))
    with pytest.raises(TrainingStopped, match="50 steps in a row were skipped and the loss scale is inf"):
        run.train(NoBar())


def test_a_checkpoint_with_an_impossible_scale_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "r", steps=8).train(NoBar())
    path = tmp_path / "r" / "checkpoint.safetensors"
    arrays, header = load(path)
    save(path, arrays, {**header, "loss_scale": {**header["loss_scale"], "scale": 0.0}})
    with pytest.raises(UsageError, match=r"checkpoint.safetensors has a damaged loss scale: .*has scale 0.0: it must be"):
        trainer(tmp_path / "r", resume=True)
