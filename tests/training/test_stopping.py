"""refimpl.training.stopping: which rows of a log end a run, and which do not. Its advice: test_non_finite.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import TrainingStopped
from refimpl.training.config import Config
from refimpl.training.setup import start
from refimpl.training.stopping import SKIPS_BEFORE_STOP, SMALLEST_SCALE, StopRules

TINY: dict[str, Any] = {"model": "mlp", "n_layer": 1, "n_embd": 4, "block_size": 4, "batch_size": 2, "steps": 4, "warmup": 1}
BATCH = np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64)
GOOD: dict[str, Any] = {"step": 1, "loss": 2.0, "loss_scale": 1024.0, "skipped": False}
SKIPPED = {**GOOD, "skipped": True}
NAN = {**SKIPPED, "loss": math.nan}


def rules(**more: Any) -> StopRules:
    config = Config.of({**TINY, **more})
    return StopRules(config, start(config))


def steps_until_stopped(kept: StopRules, row: dict[str, Any], skipped_before: int = 0) -> int:
    """The number of steps like `row` after which the run is stopped; 0 if it goes on for twice SKIPS_BEFORE_STOP of them."""
    for n in range(1, 2 * SKIPS_BEFORE_STOP + 1):
        try:
            kept.check_step({**row, "step": n}, [BATCH], (skipped_before + n) * row["skipped"])
        except TrainingStopped:
            return n
    return 0


@pytest.mark.parametrize(
    ("row", "more", "steps"),
    [
        (GOOD, {}, 0),
        (SKIPPED, {}, 0),  # the loss scale comes down
        ({**SKIPPED, "loss_scale": SMALLEST_SCALE}, {}, 0),
        ({**SKIPPED, "loss_scale": SMALLEST_SCALE / 2}, {}, SKIPS_BEFORE_STOP),
        ({**SKIPPED, "loss_scale": math.inf}, {}, SKIPS_BEFORE_STOP),
        (SKIPPED, {"loss_scale": "1024"}, SKIPS_BEFORE_STOP),
        (SKIPPED, {"loss_scale": "megatron", "scale_floor": 512.0}, 0),
        (SKIPPED, {"loss_scale": "megatron", "scale_floor": 1024.0}, SKIPS_BEFORE_STOP),
        (NAN, {}, SKIPS_BEFORE_STOP),
        ({**NAN, "skipped": False}, {}, 0),  # a weight may still be what it was
        (SKIPPED, {"recipe": "bf16"}, 1),  # without a loss scale, nothing changes by the next step
    ],
    ids=str,
)
def test_a_run_stops_after_as_many_steps(row: dict[str, Any], more: dict[str, Any], steps: int) -> None:
    assert steps_until_stopped(rules(**more), row) == steps


def test_skips_before_a_resume_count_where_the_scale_has_collapsed() -> None:
    collapsed = {**SKIPPED, "loss_scale": SMALLEST_SCALE / 2}
    assert steps_until_stopped(rules(), collapsed, skipped_before=20) == SKIPS_BEFORE_STOP - 20
    assert steps_until_stopped(rules(), NAN, skipped_before=20) == SKIPS_BEFORE_STOP


def test_a_loss_that_is_not_finite_is_reported_once_until_it_has_been_finite() -> None:
    kept = rules()
    said = [kept.check_step(row, [BATCH], 0) for row in (GOOD, NAN, NAN, GOOD, NAN)]
    assert [bool(text) for text in said] == [False, True, False, False, True]
    assert said[1] is not None and said[1].startswith("step 1: the loss is nan: with the present weights every result")


def test_a_weight_that_is_not_finite_stops_the_run_at_once() -> None:
    kept = rules()
    kept.training.state.master[0] = math.nan
    with pytest.raises(TrainingStopped, match=r"step 1: the loss is nan: .* has 1 NaN since before the first step"):
        kept.check_step({**NAN, "skipped": False}, [BATCH], 0)


def test_a_loss_scale_that_cannot_be_divided_by_stops_the_run(tmp_path: Path) -> None:
    for scale, stops in ((1.0, False), (2.0**-126, False), (2.0**-127, True), (0.0, True)):
        kept, saved = rules(loss_scale="1"), list[Path]()

        def save(saved: list[Path] = saved) -> Path:
            saved.append(tmp_path)
            return tmp_path

        loss_scale: Any = kept.training.loss_scale
        loss_scale.scale = np.asarray(np.float32(scale))
        if not stops:
            kept.check_scale(GOOD, [BATCH], 7, save)
            continue
        with pytest.raises(TrainingStopped, match=f"by step 7: the loss scale is {scale:g}, and gradients cannot be divided"):
            kept.check_scale(GOOD, [BATCH], 7, save)
        assert not saved


def test_an_exhausted_loss_scale_stops_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    kept, saved = rules(loss_scale="deepspeed", hysteresis=1, init_scale=2.0), list[Path]()

    def save() -> Path:
        saved.append(tmp_path / "checkpoint")
        return saved[-1]

    for _ in range(2):
        kept.check_scale(SKIPPED, [BATCH], 7, save)
        kept.training.loss_scale.update(np.bool_(True))
    with pytest.raises(TrainingStopped, match=rf"below which deepspeed does not go: .* --init-from {tmp_path}/checkpoint"):
        kept.check_scale(SKIPPED, [BATCH], 7, save)
    assert saved == [tmp_path / "checkpoint"]
