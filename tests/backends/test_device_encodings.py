"""Stochastic rounding, Kahan's sum and the 16-bit remainder where arrays are not NumPy's: the same bits, and nobody waits.

On the strict stand-in for CuPy; test_cupy_backend.py has the same on the real one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoding_cases
import numpy as np
import pytest
from encoding_cases import CASES, RECIPES, WEIGHTS, differences, kept, resumed, trained, training_of
from recipe_lists import others_slow
from strict_backend import PLAIN, STRICT, on_host
from strict_cupy import WaitError, counter, xp

import refimpl.optim.layout
import refimpl.precision.state_encodings
from refimpl.numerics.bits import from_bits
from refimpl.numerics.compensated import merge, split
from refimpl.numerics.philox import random_bits
from refimpl.numerics.stochastic_rounding import stochastic_round
from refimpl.precision.state_encodings import MAIN, Kahan, RandomKey, Remainder, Stochastic, replace_unless
from refimpl.training.config import Config

Array = Any

OF_EACH_KIND = [
    *((weights, "fp32", "adamw") for weights in WEIGHTS), (WEIGHTS[0], "fp32", "sgd"), (WEIGHTS[1], "bf16", "adamw"),
]  # fmt: skip
"""Of CASES: each way to keep weights; the other rule and moments of 16 bits with one of them, which they do not depend on."""

# ------------------------------------------------------------------------------------------------------------------ bits

DRAWS = [
    (0, 0, 0, 10, 0), (7, 3, 5, 1000, 0), ((1 << 40) + 7, 5, 1_234_567, 70_000, 3),
    (1, 1 << 31, (1 << 50) + 3, 9, (1 << 32) - 1),
    ((1 << 64) - 1, (1 << 32) - 1, (1 << 63) - 9, 8, 1), (5, 5, 7, 1, 1), (5, 5, 7, 0, 1),
]  # fmt: skip
"""seed, step, start, n, stream"""


def drawn_there(seed: int, step: int, start: int, n: int, stream: int) -> np.ndarray:
    t = xp.asarray(np.int64(step))
    with counter.no_sync():
        bits = random_bits(seed, t, start, n, stream, xp)
    return on_host(bits)


@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_random_bits_are_the_hosts(draw: tuple[int, int, int, int, int]) -> None:
    there, here = drawn_there(*draw), random_bits(*draw)
    assert there.dtype == here.dtype == np.uint32 and np.array_equal(there, here)


def test_random_bits_of_blocks_are_those_of_the_whole() -> None:
    whole, cuts = random_bits(7, 3, 0, 1000), [0, 1, 3, 4, 5, 130, 131, 512, 999, 1000]
    parts = [drawn_there(7, 3, start, stop - start, 0) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("other", [(8, 3, 0), (7, 4, 0), (7, 3, 1)], ids=["seed", "step", "start"])
def test_control_other_draws_have_other_bits(other: tuple[int, int, int]) -> None:
    assert (drawn_there(*other, 1000, 0) != random_bits(7, 3, 0, 1000)).mean() > 0.99


def patterns() -> np.ndarray:
    """All upper halves of FP32 with lower ones around the ends and the middle: NaN, infinities and subnormals among them."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | lower).reshape(-1)


def test_stochastic_rounding_has_the_hosts_bits() -> None:
    """Of all values, NaN too: the stand-in rounds NaN as the host does."""
    x = from_bits(patterns(), "fp32")
    draw = random_bits(1, 2, 3, x.size)
    there = stochastic_round(xp.asarray(x), "bf16", xp.asarray(draw))
    assert on_host(there).tobytes() == stochastic_round(x, "bf16", draw).tobytes()


def test_the_two_halves_have_the_hosts_bits() -> None:
    x = from_bits(patterns(), "fp32")
    with counter.no_sync():
        w, r = split(xp.asarray(x))
        back = merge(w, r)
    for there, here in zip((w, r), split(x), strict=True):
        assert there.dtype == here.dtype and on_host(there).tobytes() == here.tobytes()
    assert on_host(back).tobytes() == x.tobytes()


# ------------------------------------------------------------------------------------------------------------------ trainings


@pytest.mark.parametrize(("weights", "moments", "rule"), others_slow(CASES, plain=OF_EACH_KIND))
def test_a_training_with_skips_keeps_what_the_host_keeps(weights: str, moments: str, rule: str) -> None:
    """Eight steps, three of them skipped: every part to the bit, from the same gradients; a skip leaves every part."""
    assert differences(STRICT, weights, moments, rule) == []


Inject = Callable[[pytest.MonkeyPatch], None]


def on_devices(encoding: type, name: str, wrong: Callable[..., None]) -> Inject:
    """A method of an encoding that is `wrong` for device arrays; the host has the right one."""
    right = getattr(encoding, name)

    def method(self: Any, parts: Any, *args: Any) -> None:
        (right if isinstance(parts[MAIN], np.ndarray) else wrong)(self, parts, *args)

    return lambda patch: patch.setattr(encoding, name, method)


def replacing(wrong: Callable[..., None]) -> Inject:
    """Another way to replace what is kept; it is for devices only."""
    return lambda patch: patch.setattr(refimpl.precision.state_encodings, "replace_unless", wrong)


def round_to_nearest(self: Any, parts: Any, values: Array, key: RandomKey) -> None:
    refimpl.precision.state_encodings.Plain.write(self, parts, values, key)


def draw_at_the_start(self: Any, parts: Any, values: Array, key: RandomKey) -> None:
    bits = random_bits(key.seed, xp.asarray(np.int64(0)), key.start, values.size, xp=xp)
    stochastic_round(values, "bf16", bits, out=parts[MAIN])


def lose_the_remainder(self: Any, parts: Any, values: Array, key: RandomKey) -> None:
    parts[MAIN][...], _ = split(values)


def change_the_values(self: Any, parts: Any, values: Array, update: Any) -> None:
    update(values)


def ignores_found_inf(keep: Array, parts: Any, new: Any, xp: Any) -> None:
    for name, part in parts.items():
        part[...] = new[name]


def only_the_main_part(keep: Array, parts: Any, new: Any, xp: Any) -> None:
    right = {name: part for name, part in parts.items() if not name}
    replace_unless(keep, right, new, xp)
    ignores_found_inf(keep, {name: part for name, part in parts.items() if name}, new, xp)


MISTAKES: dict[str, tuple[str, Inject, str]] = {
    "rounded to nearest": (WEIGHTS[0], on_devices(Stochastic, "write", round_to_nearest), "weights differs"),
    "the same draws in each step": (WEIGHTS[0], on_devices(Stochastic, "write", draw_at_the_start), "weights differs"),
    "no compensation": (WEIGHTS[1], on_devices(Kahan, "change", change_the_values), "weights_compensation differs"),
    "no remainder": (WEIGHTS[2], on_devices(Remainder, "write", lose_the_remainder), "weights_remainder differs"),
    "no skip": (WEIGHTS[0], replacing(ignores_found_inf), "step 1: weights moved"),
    "half a skip": (WEIGHTS[2], replacing(only_the_main_part), "step 1: weights_remainder moved"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inject, fault = MISTAKES[name]
    inject(monkeypatch)
    assert any(fault in difference for difference in differences(STRICT, weights, "fp32", "adamw"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_results_do_not_depend_on_the_blocks_of_a_device(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device takes all at once, up to 2^24; in pieces of any size the bits are the same."""
    ends, launches = [], []
    for block in (1 << 24, 3000, 999):
        monkeypatch.setattr(refimpl.optim.layout, "DEVICE_BLOCK", block)
        training = training_of(STRICT, weights, "bf16", "adamw")
        counter.reset()
        list(trained(training, 2))
        ends.append(kept(training.state))
        launches.append(counter.launches)
    assert ends[0] == ends[1] == ends[2]
    assert launches[0] < launches[1] < launches[2]


# ---------------------------------------------------------------------------------------------------------- costs, resuming


def step_costs(backend: Any, weights: str, moments: str, rule: str) -> tuple[int, int, int]:
    """Copies and waits of a step; the batch is there."""
    training = training_of(backend, weights, moments, rule)
    batch = tuple(backend.from_host(np.zeros((4, 8), np.int64)) for _ in range(2))
    training.step([batch])
    counter.reset()
    with counter.no_sync():
        training.step([batch])
    return counter.h2d, counter.d2h, counter.syncs


@pytest.mark.parametrize("backend", [STRICT, PLAIN], ids=["strict", "plain"])
@pytest.mark.parametrize(("weights", "moments", "rule"), others_slow(CASES, plain=OF_EACH_KIND))
def test_a_step_neither_waits_nor_copies(weights: str, moments: str, rule: str, backend: Any) -> None:
    assert step_costs(backend, weights, moments, rule) == (0, 0, 0)


def test_control_a_look_at_t_is_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Stochastic.write
    monkeypatch.setattr(Stochastic, "write", lambda self, parts, x, key: write(self, parts, x, replace(key, t=int(key.t))))
    with pytest.raises(WaitError, match=r"int\(\)"):
        step_costs(STRICT, "bf16-stochastic", "fp32", "adamw")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_launches_of_an_update_do_not_grow_with_the_weights(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole buffers: a model four times as wide takes no launch more."""

    def launches(width: int) -> int:
        monkeypatch.setitem(encoding_cases.TINY, "n_embd", width)
        training = training_of(STRICT, weights, "fp32", "adamw")
        numbers = [STRICT.from_host(x) for x in (np.float32(1), np.float32(1), np.False_)]
        counter.reset()
        training.optimizer.update(training.state, *numbers)
        return counter.launches

    monkeypatch.setattr(refimpl.optim.layout, "BLOCK", 1000)  # of the host's blocks there are many
    assert launches(16) == launches(64) < 250


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_ends_with_the_same_bits(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "make_backend", lambda self: STRICT)
    whole, halves = resumed(STRICT, recipe, tmp_path)
    assert whole == halves and "weights" in whole


@pytest.mark.parametrize("recipe", RECIPES)
def test_control_what_a_checkpoint_loses_shows(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """t for draws; the second part for the others."""
    load = refimpl.training.resume.load_state_arrays

    def forgetful(path: Path, arrays: Any, state: Any) -> None:
        load(path, arrays, state)
        for name in ("weights_compensation", "weights_remainder"):
            if name in state.buffers:
                state.buffers[name][...] = 0
        state.seed += recipe == "bf16-sr"

    monkeypatch.setattr(refimpl.training.resume, "load_state_arrays", forgetful)
    monkeypatch.setattr(Config, "make_backend", lambda self: STRICT)
    whole, halves = resumed(STRICT, recipe, tmp_path)
    assert whole["weights"] != halves["weights"]
