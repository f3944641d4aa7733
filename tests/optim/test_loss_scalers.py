"""optim.loss_scalers: every project's loss scaler, step by step, against recorded traces and against its own control flow.

1 is an overflow, a trace is the scale after each step. No number has a tolerance: a loss scale is exact. The restatements are
written from what each project does, as it does it: with branches, on Python's numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from recipe_lists import others_slow
from scaler_traces import FP32_MAX, GOLDEN, PATIENT, TINY, TOP, a_case, exhausted, follow, fp32, stored, with_row
from strict_backend import STRICT
from strict_cupy import WaitError, counter

from refimpl.backends.base import Backend
from refimpl.optim import loss_scalers as module
from refimpl.optim.loss_scale import DynamicLossScale
from refimpl.optim.loss_scalers import SCALER_RULES, ScalerRule, make_loss_scale
from refimpl.tools.loss_scale import number_text

# ---------------------------------------------------------------------------------------------------------- golden traces


ENDS: list[tuple[str, float, str, list[float]]] = [
    # the upper end: 2 * 2^127 is no number of fp32
    *((name, TOP, "0001", [TOP, TOP, TOP, TOP / 2]) for name in ("torch", "jmp")),
    ("apex-kernel", TOP, "00011", [TOP, TOP, TOP, TOP, TOP / 2]),
    ("flax", TOP, "00001", [TOP, TOP, TOP, FP32_MAX, fp32(FP32_MAX / 2)]),
    ("megatron", TOP, "000110", [TOP, TOP, math.inf, math.inf, math.inf, math.inf]),
    ("apex-fp16", TOP, "0001", [TOP, TOP, 2 * TOP, TOP]),
    *((name, TOP, "000011", [TOP, TOP, TOP, 2 * TOP, 2 * TOP, TOP]) for name in ("deepspeed", "deepspeed-consecutive")),
    ("apex-amp", TOP, "001", [2.0**24, 2.0**24, 2.0**23]),
    ("apex-amp", 2.0**23, "000000", [2.0**23, 2.0**23, *[2.0**24] * 4]),
    ("chainer", 2.0**16, "10", [2.0**15, 2.0**15 * 2 ** (1 / 3)]),
    # the lower end
    *((name, 2.0, "11000", [1, 1, 1, 1, 2]) for name in ("jmp", "apex-fp16")),
    ("megatron", 2.0, "1111000", [2, 1, 1, 1, 1, 1, 2]),
    *((name, 2.0, "1111", [2, 1, 1, 1]) for name in ("deepspeed", "deepspeed-consecutive")),
    ("deepspeed", 1.0, "101000011", [1, 1, 1, 1, 1, 1, 2, 2, 1]),
    ("deepspeed-consecutive", 1.0, "101000011", [1, 1, 1, 1, 1, 1, 2, 2, 1]),
    ("chainer", 1.0, "110", [1, 1, 2 ** (1 / 3)]),
    *((name, 0.5, "1" * 13, [2.0**-n for n in range(2, 14)] + [2.0**-13]) for name in ("fairseq", "fairseq-tolerance")),
    *((name, TOP, "0001", [TOP, TOP, 2 * TOP, TOP]) for name in ("fairseq", "fairseq-tolerance")),
    ("flax", 2 * TINY, "1100001", [TINY, TINY, TINY, TINY, TINY, 2 * TINY, TINY]),
    ("torch", 2.0**-148, "11000", [2.0**-149, 0, 0, 0, 0]),
    ("apex-kernel", 2.0**-148, "111000", [2.0**-148, 2.0**-149, 0, 0, 0, 0]),
    ("apex-amp", 2.0**-148, "11000", [2.0**-149, 2.0**-150, 2.0**-150, 2.0**-150, 2.0**-149]),
]
"""Scaler, start, pattern and trace, interval 3: worked out by hand from the projects' rules. Fairseq's 13 overflows from 0.5 on
end with its error 'Minimum loss scale reached (0.0001)' and the scale as it was (facebookresearch/fairseq, issue 512)."""

TOLERANT: list[tuple[str, list[float]]] = [
    ("0" * 19 + "1", [8.0] * 19 + [4]),  # 1 of 20 steps is 5 %
    ("0" * 20 + "1" + "0", [8.0] * 22),  # 1 of 21 is not
    ("0" * 20 + "11", [8.0] * 21 + [4]),  # 2 of 22 is
    ("0" * 20 + "1" + "0" * 18 + "1", [8.0] * 39 + [4]),  # 2 of 40 is
    ("0" * 20 + "1" + "0" * 25 + "11", [8.0] * 45 + [16, 8, 4]),  # grown: 2 of 1, then a new count: 1 of 1
    ("0" * 20 + "1" + "0" * 47 + "1", [8.0] * 45 + [16.0] * 23 + [8]),  # 2 of 23: growth leaves the count of overflows as it is
    ("1" + "0" * 19 + "1", [4.0] * 20 + [2]),
    ("1" + "0" * 20 + "1", [4.0] * 22),  # the count begins anew where S backs off: 1 of 21
]
"""Patterns and traces of fairseq with a tolerance of 5 %, from 8 and with an interval of 25, by hand."""

EXHAUSTED: list[tuple[str, int | None, str, int]] = [
    ("deepspeed", 2, "11110", 3),  # and stays over
    ("deepspeed-consecutive", 2, "1111", 3),
    ("deepspeed", 1, "1111", 2),
    ("deepspeed", 2, "1011", 4),  # 2 2 1, and the fourth finds it there
    ("deepspeed-consecutive", 2, "11011", 5),  # the fourth is borne
    ("deepspeed-consecutive", 2, "10101", 0),  # never two in a row: never out of hysteresis
    ("deepspeed", 2, "110000", 0),  # at the floor, but nothing overflows there
    ("deepspeed", 2, "1100001", 0),  # growth came in between
    ("megatron", 2, "111111", 0),
    *((name, None, "111111", 0) for name in ("jmp", "apex-fp16", "chainer", "flax", "torch")),
    *((name, None, "1" * 15 + "0", 15) for name in ("fairseq", "fairseq-tolerance")),  # 2^-13 is the last above 1e-4
    *((name, None, "1" * 14 + "0001", 0) for name in ("fairseq", "fairseq-tolerance")),
]
"""Scaler, hysteresis, pattern from a start of 2, and the step that ends the run (0: none), interval 3."""


def wrong_traces(make: Callable[..., Any], xp: Any, only: str | None = None) -> list[str]:
    """Every golden trace that a `make_loss_scale` does not give. only: those of one scaler."""
    wrong = []
    for (name, hysteresis), traces in GOLDEN.items():
        for pattern, expected in traces.items() if only in (None, name) else ():
            scales = follow(make(name, 1024.0, 3, xp, hysteresis), pattern)
            if " ".join(number_text(round(x, 4)) for x in scales) != expected:
                wrong.append(f"{name} {hysteresis} {pattern}")
    for name, start, pattern, expected_scales in ENDS:
        if only in (None, name) and follow(make(name, start, 3, xp), pattern) != expected_scales:
            wrong.append(f"{name} from {start} {pattern}")
    for pattern, expected_scales in TOLERANT if only in (None, "fairseq-tolerance") else ():
        if follow(make("fairseq-tolerance", 8.0, 25, xp), pattern) != expected_scales:
            wrong.append(f"fairseq-tolerance {pattern}")
    for name, hysteresis, pattern, step in EXHAUSTED:
        if only in (None, name):
            scale = make(name, 2.0, 3, xp, hysteresis)
            flags = [(follow(scale, c), exhausted(scale))[1] for c in pattern]
            if flags != [bool(step) and i >= step for i in range(1, len(pattern) + 1)]:
                wrong.append(f"{name} {hysteresis} {pattern} exhausted")
    return wrong


def test_golden_traces(backend: Backend) -> None:
    assert {name for name, _ in GOLDEN} == set(SCALER_RULES)
    assert wrong_traces(make_loss_scale, backend.xp) == []


# ----------------------------------------------------------------------------------------------------------- restatements


Steps = Iterator[float | str]  # the scale after each step; 'stop' where the project ends the run


def pytorch(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    scale, tracker = fp32(scale), 0
    for overflow in pattern:
        if overflow:
            scale, tracker = fp32(scale * 0.5), 0
        else:
            tracker += 1
            if tracker == interval:
                if not math.isinf(fp32(scale * 2)):
                    scale = fp32(scale * 2)
                tracker = 0
        yield scale


def apex_amp(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    scale, unskipped = min(2.0**24, scale), 0
    for overflow in pattern:
        if overflow:
            scale /= 2
            unskipped = 0
        else:
            unskipped += 1
        if unskipped == interval:
            scale = min(2.0**24, scale * 2)
            unskipped = 0
        yield scale


def apex_fp16(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    last = -1
    for step, overflow in enumerate(pattern):
        if overflow:
            scale = max(scale / 2, 1)
            last = step
        elif (step - last) % interval == 0:
            scale *= 2
        yield scale


def apex_kernel(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    scale, tracker, left = fp32(scale), 0, hysteresis
    for overflow in pattern:
        if overflow:
            left -= 1
            tracker = 0
            if left <= 0:
                scale = fp32(scale * 0.5)
        else:
            tracker += 1
            if tracker == interval:
                if not math.isinf(fp32(scale * 2)):
                    scale = fp32(scale * 2)
                tracker = 0
            left = hysteresis
        yield scale


def megatron(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    scale, tracker, left = fp32(scale), 0, hysteresis
    for overflow in pattern:
        if overflow:
            tracker = 0
            left -= 1
            if left <= 0:
                scale = max(fp32(scale * 0.5), 1.0)
        else:
            tracker += 1
            if tracker == interval:
                tracker, left = 0, hysteresis
                scale = fp32(scale * 2)
        yield scale


def deepspeed(scale: float, interval: int, hysteresis: int, pattern: list[bool], consecutive: bool = False) -> Steps:
    last, left = -1, hysteresis
    for step, overflow in enumerate(pattern):
        if overflow:
            if hysteresis == 1 or left == 1:
                if scale == 1:
                    yield "stop"
                    return
                scale = max(scale / 2, 1)
            else:
                left -= 1
            last = step
        else:
            if consecutive:
                left = hysteresis
            stable = step - last - 1
            if stable > 0 and stable % interval == 0:
                left = hysteresis
                scale *= 2
        yield scale


def deepspeed_consecutive(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    return deepspeed(scale, interval, hysteresis, pattern, consecutive=True)


def flax(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    scale, count = fp32(scale), 0
    for overflow in pattern:
        grow = count == interval
        if overflow:
            scale = max(fp32(scale * 0.5), TINY)
        elif grow:
            scale = min(fp32(scale * 2), FP32_MAX)
        count = 0 if grow or overflow else count + 1
        yield scale


def jmp(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    scale, counter = fp32(scale), 0
    for overflow in pattern:
        if overflow:
            scale = max(1.0, fp32(scale / 2))
        elif counter == interval - 1 and fp32(scale * 2) < math.inf:
            scale = fp32(scale * 2)
        counter = 0 if overflow else (counter + 1) % interval
        yield scale


def chainer(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    ever = False
    for overflow in pattern:
        ever = ever or overflow
        if overflow:
            factor = 0.5
        elif ever:
            factor = math.pow(2.0, 1.0 / interval)
        else:
            factor = 2.0
        scale = max(1, min(65504, scale * factor))
        yield scale


def fairseq(scale: float, interval: int, hysteresis: int, pattern: list[bool], tolerance: float = 0.0) -> Steps:
    last_overflow, last_rescale, overflows = -1, -1, 0
    for step, overflow in enumerate(pattern):
        if overflow:
            since, last_overflow = step - last_rescale, step
            overflows += 1
            if overflows / float(since) >= tolerance:
                scale /= 2.0
                last_rescale, overflows = step, 0
            if scale <= 1e-4:
                yield "stop"
                return
        elif (step - last_overflow) % interval == 0:
            scale *= 2.0
            last_rescale = step
        yield scale


def fairseq_tolerance(scale: float, interval: int, hysteresis: int, pattern: list[bool]) -> Steps:
    return fairseq(scale, interval, hysteresis, pattern, tolerance=0.05)


RESTATED = {
    "torch": pytorch, "apex-amp": apex_amp, "apex-fp16": apex_fp16, "apex-kernel": apex_kernel, "megatron": megatron,
    "deepspeed": deepspeed, "deepspeed-consecutive": deepspeed_consecutive, "flax": flax, "jmp": jmp, "chainer": chainer,
    "fairseq": fairseq, "fairseq-tolerance": fairseq_tolerance,
}  # fmt: skip


@pytest.mark.parametrize("name", SCALER_RULES)
def test_random_patterns_equal_the_restatement(name: str, backend: Backend) -> None:
    patterns = 25 if backend.on_host else 4
    moved = stopped = 0
    for seed in range(patterns):
        start, interval, hysteresis, pattern = a_case(np.random.default_rng(seed), SCALER_RULES[name].floor)
        scale = make_loss_scale(name, start, interval, backend.xp, hysteresis if name in PATIENT else None)
        for step, (overflow, expected) in enumerate(zip(pattern, RESTATED[name](start, interval, hysteresis, pattern))):  # noqa: B905 (it may stop)
            before = stored(scale)
            scale.update(backend.xp.asarray(overflow))
            assert exhausted(scale) == (expected == "stop"), (seed, step)
            if expected == "stop":
                stopped += 1
                break
            assert stored(scale) == expected, (seed, step)
            moved += before != expected
    assert moved > 4 * patterns
    assert not backend.on_host or (stopped > 0) == bool(SCALER_RULES[name].stops)
    assert scale.scale.dtype == np.float32 and scale.scale.shape == ()
    assert {x.dtype for x in (scale.good_steps, getattr(scale, "left", scale.good_steps))} == {np.dtype(np.int32)}


@pytest.mark.parametrize("seed", others_slow(range(200), plain=range(20)))
def test_pytorchs_row_of_the_table_is_pytorchs_rule(seed: int) -> None:
    """The default of each field of ScalerRule leaves the rule as it is in DynamicLossScale."""
    start, interval, _, pattern = a_case(np.random.default_rng(seed), 0.0)
    simple, row = make_loss_scale("torch", start, interval), with_row(SCALER_RULES["torch"], start, interval)
    assert type(simple) is DynamicLossScale
    for overflow in pattern:
        for scale in (simple, row):
            scale.update(np.asarray(overflow))
        assert simple.state_dict() == row.state_dict()
        assert simple.scale.dtype == row.scale.dtype and simple.good_steps.dtype == row.good_steps.dtype


def test_an_overflow_from_a_start_at_fairseqs_least_scale_ends_the_run() -> None:
    scale = make_loss_scale("fairseq", 1e-4, 3)
    assert follow(scale, "00") == [1e-4, 1e-4] and not exhausted(scale)
    assert follow(scale, "1") == [1e-4] and exhausted(scale)


def test_an_update_waits_for_nothing() -> None:
    for name in SCALER_RULES:
        scale, found_inf = make_loss_scale(name, xp=STRICT.xp), STRICT.xp.asarray(True)
        with counter.no_sync():
            for _ in range(3):
                scale.update(found_inf)
            with pytest.raises(WaitError):
                float(scale.scale)


# ------------------------------------------------------------------------------------------------------ negative controls


OTHER: dict[str, list[Any]] = {
    "late": ["", "first", "always"], "gradual": [False, True], "floor": [0.0, 1.0, 2.0**-140],
    "stops": ["", "at the floor", "to the floor"], "tolerance": [0.0, 0.75],
    "ceiling": [math.inf, 2.0**11, 2.0**24], "unbounded": [False, True], "hysteresis": [1, 2, 3],
    "refill": ["growth", "good step"], "fmt": ["fp32", "fp64"],
}  # fmt: skip


def matters(scaler: ScalerRule, field: str) -> bool:
    """Whether a field can be seen in a trace: others of the row may hide it."""
    if scaler.gradual and field not in ("gradual", "floor", "ceiling", "fmt"):
        return False
    hidden = {
        "refill": scaler.hysteresis == 1,
        "hysteresis": scaler.tolerance > 0,  # no project has both
        "stops": not scaler.floor or scaler.name == "flax",  # its floor is far below any trace's end but one
        "unbounded": scaler.ceiling < math.inf or scaler.fmt == "fp64",  # FP64 has room enough
        "fmt": scaler.ceiling < math.inf and scaler.floor >= TINY and not scaler.gradual,  # all that is between fits in both
    }
    return not hidden.get(field, False)


MUTANTS = [(name, field, value) for name, scaler in SCALER_RULES.items() for field, values in OTHER.items() for value in values
           if value != getattr(scaler, field) and matters(scaler, field)]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "value"), MUTANTS)
def test_every_fact_of_every_row_shows_in_a_golden_trace(
    name: str, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALER_RULES, name, dataclasses.replace(SCALER_RULES[name], **{field: value}))

    def make(name: str, start: float, interval: int, xp: Any, hysteresis: int | None = None) -> Any:
        rule = SCALER_RULES[name]
        return with_row(rule, max(start, rule.floor), interval, xp, hysteresis if rule.hysteresis > 1 else None)

    with np.errstate(all="ignore"):
        assert wrong_traces(make, np, only=name)


def test_all_facts_are_mutated() -> None:
    described = {"name", "source", "init_scale", "growth_interval", "knobs"}  # test_the_page_has_the_facts, test_knobs
    assert {field for _, field, _ in MUTANTS} == {f.name for f in dataclasses.fields(ScalerRule)} - described


BROKEN = [
    ("good_steps = self.good_steps + 1", "good_steps = self.good_steps + 2"),
    ("xp.where(found_inf | due, restart", "xp.where(due, restart"),
    ("xp.where(found_inf | due, restart", "xp.where(found_inf, restart"),
    ('widen(self._scale, "fp64") * self.backoff_factor', 'widen(self._scale, "fp64") / 4'),
    ('widen(self._scale, "fp64") * self.growth_factor', 'widen(self._scale, "fp64") * 4'),
    ("smaller = self.xp.maximum(smaller, rule.floor)", "pass"),
    ("larger = self.xp.minimum(larger, self.rule.ceiling)", "pass"),
    ("return larger if self.rule.unbounded else ", "return larger if True else "),
    ("return larger if self.rule.unbounded else ", "return "),
    ("+ bool(rule.late)", ""),
    ("restart + 1)", "restart)"),
    ("self.left - 1", "self.left"),
    ("xp.where(due, full, self.left)", "self.left"),
    ("xp.where(found_inf, left, refilled)", "refilled"),
    ("smaller = self.xp.where(backs_off, smaller, self._scale)", "pass"),
    ("return found_inf & (left == 0)", "return left == 0"),
    ("return found_inf & (left == 0)", "return found_inf"),
    (" & (self._scale == self.rule.floor)", ""),
    ("ends = backs_off & ", "ends = found_inf & "),
    ("found_inf & (smaller <= self.rule.floor)", "found_inf & (smaller < self.rule.floor / 2)"),
    ("self.exhausted = self.exhausted | ", "self.exhausted = "),
    ("return self.xp.where(ends, self._scale, smaller)", "return smaller"),
    ("overflows / steps >= self", "overflows / steps > self"),
    ("self.steps_since_change + 1", "self.steps_since_change + 2"),
    ("xp.where(backs_off | (due & ~found_inf), 0, steps)", "xp.where(backs_off, 0, steps)"),
    ("xp.where(backs_off | (due & ~found_inf), 0, steps)", "xp.where(due & ~found_inf, 0, steps)"),
    ("xp.where(backs_off, 0, overflows)", "overflows"),
    ("backs_off = found_inf & (overflows", "backs_off = (overflows"),
    ("self.overflowed = self.overflowed | found_inf", "self.overflowed = found_inf"),
    ("2.0 ** (1 / self.growth_interval)", "2.0"),
    ("S * self.backoff_factor, grown", "S, grown"),
    ("if rule.gradual else min(init_scale, rule.ceiling)", ""),
]


@pytest.mark.parametrize(("right", "wrong"), BROKEN)
def test_a_broken_rule_fails_the_golden_traces(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspect.getsource(module)
    assert text.count(right) == 1
    broken = types.ModuleType("broken_loss_scalers")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    exec(compile(text.replace(right, wrong), "broken", "exec"), broken.__dict__)
    with np.errstate(all="ignore"):
        assert wrong_traces(broken.make_loss_scale, np)
