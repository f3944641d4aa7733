"""PyTorch loops of other people, as far as one file can have them: correct ones agree, and a slip is found and named."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the loops are PyTorch's: torch==2.13.0")
from torch_loop import Loop

from refimpl.parity.diff import diff_traces
from refimpl.parity.trace import Trace, record
from refimpl.training.config import Config

TINY: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "lr": 1e-3, "steps": 3, "warmup": 1,
    "recipe": "amp-fp16-cpu",
}  # fmt: skip
OVERFLOWS: dict[str, Any] = {"init_scale": 2.0**22, "growth_interval": 2, "steps": 6}
TORCH_BETAS = (0.9, 0.999)


def ours(**more: Any) -> Trace:
    return record(Config.of({**TINY, **more}))


def verdict(mine: Trace, **slip: Any) -> dict[str, Any]:
    return diff_traces(mine, Loop(mine, **slip).run())


def agrees(mine: Trace, **slip: Any) -> bool:
    result = verdict(mine, **slip)
    return (result["verdict"], result["explained_by"]) == ("AGREES", [])


def named(mine: Trace, **slip: Any) -> tuple[str, list[str]]:
    result = verdict(mine, **slip)
    assert result["verdict"] == "DEPARTS"
    return result["first_departure"]["point"], result["explained_by"]


@pytest.mark.parametrize("recipe", ["amp-fp16-cpu", "amp-bf16-cpu"])
@pytest.mark.parametrize("grad_accum", [1, 3])
def test_a_correct_loop_agrees(recipe: str, grad_accum: int) -> None:
    assert agrees(ours(recipe=recipe, grad_accum=grad_accum))


def test_settings_of_its_own_agree_once_they_are_stated() -> None:
    """By the flags of the reference, or by the trace itself; unstated they depart where they act."""
    slip: dict[str, Any] = {"betas": TORCH_BETAS, "eps": 1e-6}
    assert agrees(ours(beta2=0.999, eps=1e-6), **slip)
    assert agrees(ours(), **slip, settings={"beta2": 0.999, "eps": 1e-6})
    assert named(ours(), betas=TORCH_BETAS) == ("4.v", [])
    assert named(ours(), eps=1e-4)[0] == "4.master"


def test_rates_of_its_own_agree_once_they_are_stated() -> None:
    def constant(step: int, updates: int) -> float:
        return 1e-3

    def linear(step: int, updates: int) -> float:
        return 1e-3 * (1 - step / 10)

    for lr in (constant, linear):
        assert agrees(ours(), lr=lr, settings={"schedule": "trace"})
        result = verdict(ours(), lr=lr)
        assert result["first_departure"]["point"] == "4.lr"
    assert agrees(ours(schedule="constant", warmup=0), lr=constant)


def test_a_schedule_that_counts_updates_agrees_and_one_that_counts_steps_is_named() -> None:
    mine = ours(**OVERFLOWS)
    schedule = Config.of(mine.config).make_schedule()
    assert sum(float(mine.tensors[f"{step}/3.found_inf"]) for step in mine.steps) >= 2
    assert agrees(mine, lr=lambda step, updates: schedule(updates))
    assert named(mine, lr=lambda step, updates: schedule(step)) == ("4.lr", ["scheduler-steps-on-skip"])


@pytest.mark.parametrize("betas", [(0.9, 0.95), TORCH_BETAS])
def test_clipping_before_unscaling_is_named_whatever_the_betas(betas: tuple[float, float]) -> None:
    assert named(ours(), late=True, betas=betas) == ("3.unscaled", ["unscale-after-clip"])


@pytest.mark.parametrize("grad_accum", [2, 3])
def test_a_loss_that_is_not_divided_by_the_micro_batches_is_named(grad_accum: int) -> None:
    assert named(ours(grad_accum=grad_accum), summed=True) == ("2.activation_grads", ["loss-not-averaged"])


@pytest.mark.parametrize("recipe", ["amp-fp16-cpu", "amp-bf16-cpu"])
def test_gradients_that_are_not_zeroed_are_named(recipe: str) -> None:
    assert named(ours(recipe=recipe), keep_grads=True) == ("2.grads", ["gradients-not-zeroed"])


def test_decay_of_everything_is_named() -> None:
    assert named(ours(), decay_all=True) == ("4.master", ["decay-all"])


@pytest.mark.parametrize("recipe", ["amp-fp16-cpu", "amp-bf16-cpu"])
def test_fused_attention_agrees_once_it_is_stated_and_is_named_if_not(recipe: str) -> None:
    assert agrees(ours(recipe=recipe, attention="fused"), sdpa=True)
    sizes = {"n_embd": 64, "block_size": 32, "batch_size": 8, "steps": 1}  # where it differs by more than a few free ulps
    assert named(ours(recipe=recipe, **sizes), sdpa=True) == ("2.activations", ["--attention fused"])


def test_without_activations_nothing_departs_and_what_could_not_be_judged_is_said() -> None:
    for attention in ("unfused", "fused"):  # by the weaker bound, which cannot tell the two
        result = verdict(ours(attention=attention), sdpa=True, activations=False)
        assert (result["verdict"], result["first_departure"]) == ("PARTLY JUDGED", None)
