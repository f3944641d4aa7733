"""optim.loss_scale: PyTorch's rule, against the one in its docstring, against golden traces, and against torch.amp.GradScaler.

1 is an overflow, a trace is the scale after each step. No number has a tolerance: a loss scale is exact.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import textwrap
import types
from collections.abc import Iterator

import numpy as np
import pytest
from recipe_lists import others_slow
from scaler_traces import GOLDEN, TOP, a_case, follow, fp32
from strict_backend import STRICT
from strict_cupy import WaitError, counter

from refimpl.backends.base import Backend
from refimpl.optim import loss_scale as module
from refimpl.optim.loss_scale import DynamicLossScale
from refimpl.optim.loss_scalers import make_loss_scale

# ----------------------------------------------------------------------------------------------------------- the written rule


def written_rule() -> str:
    """The rule in the docstring of DynamicLossScale: its indented lines, which are Python."""
    text = inspect.getdoc(DynamicLossScale) or ""  # without the indentation that Python 3.13 takes away and others keep
    lines = re.search(r"(?m)^ +if found_inf:\n(?: {4}.*\n)+", text)
    assert lines is not None
    return textwrap.dedent(lines[0])


def pytorch_with(
    scale: float, growth: float, backoff: float, interval: int, pattern: list[bool], rule: str | None = None
) -> Iterator[tuple[float, int]]:
    """The scale and its counter, for any factors, by the rule as it is written."""
    code = compile(written_rule() if rule is None else rule, "the docstring of DynamicLossScale", "exec")
    names = {"fp32": fp32, "isfinite": math.isfinite, "growth_factor": growth, "backoff_factor": backoff,
             "growth_interval": interval, "S": fp32(scale), "good_steps": 0}  # fmt: skip
    for overflow in pattern:
        names["found_inf"] = overflow
        exec(code, names)
        yield names["S"], names["good_steps"]


def test_the_written_rule_gives_the_golden_traces() -> None:
    for pattern, expected in GOLDEN["torch", None].items():
        scales = [S for S, _ in pytorch_with(1024.0, 2.0, 0.5, 3, [c == "1" for c in pattern])]
        assert scales == [float(x) for x in expected.split()]


@pytest.mark.parametrize("seed", others_slow(range(200), plain=range(20)))
def test_any_factors_equal_the_restatement(seed: int, backend: Backend) -> None:
    rng = np.random.default_rng(seed)
    init = float(10.0 ** rng.uniform(-40, 38))
    growth, backoff = float(rng.choice([2.0, 1.37, 1.001, 10.0])), float(rng.choice([0.5, 0.9, 0.123]))
    interval = int(rng.integers(1, 8))
    pattern = (rng.random(60) < rng.choice([0.0, 0.12, 0.5])).tolist()
    scale = DynamicLossScale(init, growth, backoff, interval, backend.xp)
    measured = []
    for overflow in pattern:
        scale.update(backend.xp.asarray(overflow))
        measured.append((float(scale.scale), int(scale.good_steps)))
    assert measured == list(pytorch_with(init, growth, backoff, interval, pattern))
    assert scale.scale.dtype == np.float32 and scale.scale.shape == ()
    assert scale.good_steps.dtype == np.int32 and scale.good_steps.shape == ()


def test_backoff_rounds_once_from_double(backend: Backend) -> None:
    scale = DynamicLossScale(3.0, backoff_factor=0.3, xp=backend.xp)
    scale.update(backend.xp.asarray(True))
    assert float(scale.scale) == fp32(3.0 * 0.3)
    assert float(scale.scale) != float(np.float32(3) * np.float32(0.3))  # a product in fp32 rounds the factor too


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("S * backoff_factor)", "S * backoff_factor / 2)"),
        ("    good_steps = 0\nelse", "    pass\nelse"),
        ("good_steps + 1", "good_steps + 2"),
        ("if isfinite(fp32(S * growth_factor))", "if True"),
        ("        good_steps = 0", "        pass"),
    ],
)
def test_the_written_rule_is_held_to_each_of_its_lines(right: str, wrong: str) -> None:
    """Negative control of the restatement: with one line of the docstring changed, it is no longer the class's rule."""
    assert written_rule().count(right) == 1
    differs = False
    for seed in range(20):
        start, interval, _, pattern = a_case(np.random.default_rng(seed), 0.0)
        changed = pytorch_with(start, 2.0, 0.5, interval, pattern, written_rule().replace(right, wrong))
        bits = "".join("01"[overflow] for overflow in pattern)
        differs |= [S for S, _ in changed] != follow(make_loss_scale("torch", start, interval), bits)
    assert differs


# ------------------------------------------------------------------------------------------------------------- golden traces


def test_the_trace_that_pytorch_was_seen_to_give(backend: Backend) -> None:
    expected = [65536, 65536, 32768, 32768, 32768, 65536, 65536, 65536, 131072, 65536, 32768, 32768]
    assert follow(make_loss_scale("torch", 65536.0, 3, backend.xp), "001000000110") == expected


def test_growth_needs_good_steps_in_a_row(backend: Backend) -> None:
    # the mistake of counting good steps in total gives another trace
    assert follow(DynamicLossScale(8.0, growth_interval=3, xp=backend.xp), "001001") == [8, 8, 4, 4, 4, 2]


def test_the_ends_of_fp32(backend: Backend) -> None:
    """2 * 2^127 is no number of FP32, so S stays; half of 2^-149 is 0, and stays so."""
    assert follow(DynamicLossScale(TOP, growth_interval=3, xp=backend.xp), "0001") == [TOP, TOP, TOP, TOP / 2]
    assert follow(DynamicLossScale(2.0**-148, growth_interval=3, xp=backend.xp), "11000") == [2.0**-149, 0, 0, 0, 0]


def test_an_update_waits_for_nothing() -> None:
    scale, found_inf = DynamicLossScale(xp=STRICT.xp), STRICT.xp.asarray(True)
    with counter.no_sync():
        for _ in range(3):
            scale.update(found_inf)
        with pytest.raises(WaitError):
            float(scale.scale)


# ---------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize(("growth", "backoff"), [(None, None), (1.001, 0.3), (1.37, 0.7), (3.0, 0.999)])
def test_torch_is_pytorch(growth: float | None, backoff: float | None) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for seed in range(10):
        start, interval, _, pattern = a_case(np.random.default_rng(seed), 0.0)
        theirs = torch.amp.GradScaler("cpu", start, growth or 2.0, backoff or 0.5, interval)
        theirs.scale(torch.zeros(()))
        ours = make_loss_scale("torch", start, interval, growth_factor=growth, backoff_factor=backoff)
        for step, overflow in enumerate(pattern):
            weight.grad = torch.full((3,), math.inf if overflow else 0.0)
            theirs.step(optimizer)
            theirs.update()
            ours.update(np.asarray(overflow))
            assert ours.state_dict() == theirs.state_dict(), (seed, step)


# ------------------------------------------------------------------------------------------------------ negative controls


BROKEN = [
    ("good_steps = self.good_steps + 1", "good_steps = self.good_steps + 2"),
    ("good_steps == self.growth_interval", "good_steps > self.growth_interval"),
    ("xp.where(found_inf | due, 0, good_steps)", "xp.where(due, 0, good_steps)"),
    ("xp.where(found_inf | due, 0, good_steps)", "xp.where(found_inf, 0, good_steps)"),
    ("exact * self.backoff_factor", "exact / 4"),
    ("exact * self.growth_factor", "exact * 4"),
    ("due & xp.isfinite(larger)", "due"),
    ("xp.where(found_inf, smaller, S_if_good)", "xp.where(found_inf, S, S_if_good)"),
]


@pytest.mark.parametrize(("right", "wrong"), BROKEN)
def test_a_broken_class_is_no_longer_the_written_rule(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspect.getsource(module)
    assert text.count(right) == 1
    broken = types.ModuleType("broken_loss_scale")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    exec(compile(text.replace(right, wrong), "broken", "exec"), broken.__dict__)
    differs = False
    for seed in range(20):
        start, interval, _, pattern = a_case(np.random.default_rng(seed), 0.0)
        scale = broken.DynamicLossScale(start, growth_interval=interval)
        with np.errstate(all="ignore"):
            scales = follow(scale, "".join("01"[overflow] for overflow in pattern))
        differs |= scales != [S for S, _ in pytorch_with(start, 2.0, 0.5, interval, pattern)]
    assert differs
