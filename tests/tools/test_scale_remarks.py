"""tools.scale_remarks: what is said of a loss scale after a step is what it did, and what it promises comes."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
from scaler_traces import FP32_MAX, PATIENT, exhausted

from refimpl.optim.loss_scale import DynamicLossScale
from refimpl.optim.loss_scalers import SCALER_RULES, ProjectLossScale, ScalerRule, make_loss_scale
from refimpl.tools.scale_remarks import explain


@pytest.mark.parametrize("hysteresis", [None, 3])
@pytest.mark.parametrize("name", SCALER_RULES)
def test_what_a_scale_says_of_itself_is_what_it_does(name: str, hysteresis: int | None) -> None:
    """Every sentence is held against the scale before and after, and every promise in it against what comes."""
    if hysteresis and name not in PATIENT:
        return
    rng, heard = np.random.default_rng(0), set()
    for start in (2.0, 30000.0, 2.0**23, 2.0**127):
        scale = make_loss_scale(name, start, 3, hysteresis=hysteresis)
        for bad in [*(rng.random(60) < 0.3), *[True] * 12, *[False] * 30]:
            before = float(scale.scale)
            scale.update(np.bool_(bad))
            heard.add(_held_to_its_word(scale, before, bool(bad)))
    assert len(heard) >= 3


def rule_of(scale: DynamicLossScale) -> ScalerRule:
    return scale.rule if isinstance(scale, ProjectLossScale) else SCALER_RULES["torch"]


def _held_to_its_word(scale: DynamicLossScale, before: float, bad: bool) -> str:
    """Check what a scale says after an update; the kind of sentence that it was."""
    text, after, rule = explain(scale, before, bad), float(scale.scale), rule_of(scale)
    if match := re.fullmatch(r"grows after (\d+) more good steps?( in a row)?", text):
        assert not bad and after == before
        assert _steps_until_it_changes(scale, False, int(match[1])) in (int(match[1]), None)
        return "grows later"
    if match := re.fullmatch(r"an overflow that is tolerated: backs off at (the next one|number (\d+) from here)", text):
        assert bad and after == before
        assert _steps_until_it_changes(scale, True, int(match[2] or 1)) in (int(match[2] or 1), None)
        return "borne"
    if match := re.fullmatch(r"(.+) \* (.+): (backs off|grows.*)", text):
        factor = 2 ** (1 / 3) if "^" in match[2] else float(match[2])
        assert match[1] == f"{before:g}" and bad == (match[3] == "backs off")
        assert after == pytest.approx(before * factor, rel=1e-6 * rule.gradual, abs=0) or before == math.inf
        return match[3]
    end = re.fullmatch(r"(stays at|backs off to|grows to|at) (.+), its (floor|ceiling)", text)
    if end:
        assert f"{after:g}" == end[2] and after == np.float32(getattr(rule, end[3]))
        holds = {"stays at": after == before, "backs off to": bad and after < before, "grows to": after > before, "at": True}
        assert holds[end[1]]
        return f"{end[1]} {end[3]}"
    if text == "infinite in FP32":
        assert math.isinf(after) and rule.unbounded
        return text
    if text.endswith("ends the run"):
        assert exhausted(scale) and (after == rule.floor or (before == after and after / 2 <= rule.floor))
        return "ends"
    if text == "an overflow that is tolerated: below 5% of the steps since it changed":
        assert isinstance(scale, ProjectLossScale) and bad and after == before
        assert int(scale.overflows) / int(scale.steps_since_change) < 0.05
        return "tolerated"
    assert text == "stays: larger, it would be infinite in FP32" and after == before and before * 2 > FP32_MAX and not bad
    return "stays"


def _steps_until_it_changes(scale: DynamicLossScale, bad: bool, most: int) -> int | None:
    """After how many such steps a copy has another scale; None where an end of its range keeps it for that long."""
    copied = copy.copy(scale)  # no update changes an array in place
    for step in range(1, most + 1):
        before = float(copied.scale)
        copied.update(np.bool_(bad))
        if float(copied.scale) != before:
            return step
    assert before in (rule_of(scale).floor, rule_of(scale).ceiling) or before * 2 > FP32_MAX
    return None
