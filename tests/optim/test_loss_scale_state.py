"""optim.loss_scale and optim.loss_scalers: what is saved and comes back, what can be chosen, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from scaler_traces import FP32_MAX, PATIENT, TINY, exhausted, follow, fp32, stored

from refimpl.backends.base import Backend
from refimpl.errors import UsageError
from refimpl.optim.loss_scale import DynamicLossScale, StaticLossScale
from refimpl.optim.loss_scalers import SCALER_RULES, ProjectLossScale, make_loss_scale
from refimpl.training.config import Config
from refimpl.training.resume import conflicts


@pytest.mark.parametrize("name", SCALER_RULES)
def test_a_resumed_scale_goes_on_as_if_never_stopped(name: str, backend: Backend) -> None:
    pattern = "00010010100000011100001000000000"
    whole = follow(make_loss_scale(name, 3.0, 3, backend.xp), pattern)
    for stop in range(0, len(pattern), 1 if backend.on_host else 7):
        first = make_loss_scale(name, 3.0, 3, backend.xp)
        start = follow(first, pattern[:stop])
        resumed = make_loss_scale(name, xp=backend.xp)  # other settings: they come back from the state
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert resumed.state_dict() == first.state_dict()
        assert start + follow(resumed, pattern[stop:]) == whole, stop
        assert exhausted(resumed) == (name == "deepspeed" and "exhausted" in resumed.state_dict())


def test_each_number_of_the_state_is_needed() -> None:
    """Negative control: a state that lacks one is refused, and one with another number goes on in another way."""
    others = {"overflowed": -1, "backoff_factor": 0.25, "_hysteresis_tracker": 2}

    def goes_on(name: str, state: dict[str, float]) -> list[Any]:
        found = []
        for pattern in ("0", "1100", "0000110111", "0" * 24 + "1", "0" * 38):
            scale = make_loss_scale(name)
            scale.load_state_dict(state)
            found.append((follow(scale, pattern), exhausted(scale)))
        return found

    for name, scaler in SCALER_RULES.items():
        first = make_loss_scale(name, 4.0, 40 if scaler.tolerance else 5)
        follow(first, "1100")
        state = first.state_dict()
        for key, value in state.items():
            with pytest.raises(ValueError, match=f"lacks {key}$"):
                goes_on(name, {k: v for k, v in state.items() if k != key})
            more = 30 if scaler.tolerance and key in ("_growth_tracker", "_steps_since_change") else others.get(key, 1)
            if key == "_hysteresis_tracker" and value == state["hysteresis"]:
                more = -1
            other = state | {key: value + more}
            unused = scaler.gradual and key in ("growth_factor", "_growth_tracker")  # it is past its first overflow
            assert (goes_on(name, other) == goes_on(name, state)) == unused, (name, key)


KNOBS: dict[str, tuple[str, ...]] = {
    "growth_factor": ("torch", "apex-amp", "apex-fp16", "apex-kernel", "megatron", "deepspeed", "deepspeed-consecutive",
                      "fairseq", "fairseq-tolerance", "flax", "jmp"),
    "backoff_factor": ("torch", "apex-kernel", "megatron", "flax"),
    "scale_floor": ("apex-amp", "megatron", "deepspeed", "deepspeed-consecutive", "fairseq", "fairseq-tolerance", "flax",
                    "jmp"),
    "hysteresis": ("apex-kernel", "megatron", "deepspeed", "deepspeed-consecutive"),
}  # fmt: skip
"""What each project lets one choose: arguments of its class, the others are constants in its code."""


@pytest.mark.parametrize("knob", KNOBS)
def test_knobs(knob: str) -> None:
    value = {"growth_factor": 4.0, "backoff_factor": 0.25, "scale_floor": 32.0, "hysteresis": 3}[knob]
    for name in SCALER_RULES:
        if name in KNOBS[knob]:
            before, after = (follow(make_loss_scale(name, 64.0, 2, **{knob: x}), "1110001111") for x in (None, value))
            assert before != after, name
        else:
            with pytest.raises(UsageError, match=f"{knob.replace('_', ' ')} {value} with {name}, which has no such setting; "):
                make_loss_scale(name, 64.0, 2, **{knob: value})
    for kind in ("none", "128"):
        with pytest.raises(UsageError, match=f"{knob.replace('_', ' ')} {value} with loss scale {kind}: only a dynamic"):
            make_loss_scale(kind, **{knob: value})


CHOSEN: list[tuple[str, dict[str, float], float, str, list[float]]] = [
    ("torch", {"growth_factor": 4.0, "backoff_factor": 0.25}, 64.0, "11000", [16, 4, 4, 4, 16]),
    ("torch", {"backoff_factor": 0.1}, 1.0, "1", [fp32(fp32(1.0) * 0.1)]),
    ("megatron", {"growth_factor": 4.0, "scale_floor": 20.0}, 64.0, "1111000", [64, 32, 20, 20, 20, 20, 80]),
    ("deepspeed", {"growth_factor": 4.0}, 64.0, "111", [64, 16, 4]),  # one factor, both ways
    ("jmp", {"growth_factor": 8.0, "scale_floor": 4.0}, 64.0, "1100000", [8, 4, 4, 4, 32, 32, 32]),
    ("apex-amp", {"scale_floor": 32.0}, 64.0, "111", [32, 32, 32]),
    ("flax", {"scale_floor": 0.1}, 1.0, "1111", [0.5, 0.25, 0.125, fp32(0.1)]),
    ("fairseq", {"growth_factor": 4.0, "scale_floor": 1.0}, 64.0, "1111", [16, 4, 4, 4]),
]
"""Scaler, settings, start, pattern and trace with interval 3, by hand."""


@pytest.mark.parametrize(("name", "knobs", "start", "pattern", "expected"), CHOSEN)
def test_chosen_factors_and_floors(
    name: str, knobs: dict[str, Any], start: float, pattern: str, expected: list[float], backend: Backend
) -> None:
    assert follow(make_loss_scale(name, start, 3, backend.xp, **knobs), pattern) == expected
    config = Config.of({"loss_scale": name, "init_scale": start, "growth_interval": 3, **knobs})
    assert follow(config.make_loss_scale(), pattern) == expected


def test_a_chosen_floor_ends_the_run_where_its_project_does() -> None:
    deepspeed = make_loss_scale("deepspeed", 64.0, 3, hysteresis=1, scale_floor=32.0)
    assert follow(deepspeed, "1") == [32] and not exhausted(deepspeed)
    assert follow(deepspeed, "1") == [32] and exhausted(deepspeed)
    fairseq = make_loss_scale("fairseq", 64.0, 3, scale_floor=32.0)
    assert follow(fairseq, "1") == [64] and exhausted(fairseq)


def test_rows_without_hysteresis_end_runs_too(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """A row that stops at its floor does so whether it has hysteresis or not."""
    monkeypatch.setitem(SCALER_RULES, "jmp", dataclasses.replace(SCALER_RULES["jmp"], stops="at the floor"))
    scale = make_loss_scale("jmp", 2.0, 3, backend.xp)
    flags = [(follow(scale, c), exhausted(scale))[1] for c in "1011"]
    assert flags == [False, False, True, True] and scale.state_dict()["exhausted"] == 1


@pytest.mark.parametrize(
    ("name", "knobs", "says"),
    [
        ("torch", {"growth_factor": 1.0}, "growth factor 1.0: it must be above 1"),
        ("torch", {"growth_factor": 0.5}, "growth factor 0.5: it must be above 1"),
        ("torch", {"growth_factor": math.inf}, "growth factor inf: it must be"),
        ("torch", {"growth_factor": math.nan}, "growth factor nan: it must be"),
        ("torch", {"backoff_factor": 1.0}, "backoff factor 1.0: it must be between 0 and 1"),
        ("torch", {"backoff_factor": 0.0}, "backoff factor 0.0: it must be"),
        ("torch", {"backoff_factor": -0.5}, "backoff factor -0.5: it must be"),
        ("torch", {"scale_floor": 1.0}, "scale floor 1.0 with torch, which has no such setting; it is only for"),
        ("deepspeed", {"backoff_factor": 0.25}, "backoff factor 0.25 with deepspeed, which has no such setting; it is only"),
        ("chainer", {"growth_factor": 4.0}, "growth factor 4.0 with chainer"),
        ("megatron", {"scale_floor": 128.0}, "init scale 64.0: it must be at least 128, the floor of megatron"),
        ("megatron", {"scale_floor": 0.0}, "scale floor 0.0: it must be from 1.18e-38"),
        ("megatron", {"scale_floor": -1.0}, "scale floor -1.0: it must be"),
        ("megatron", {"scale_floor": math.nan}, "scale floor nan: it must be"),
        ("megatron", {"scale_floor": 1e-40}, "scale floor 1e-40: it must be"),
        ("apex-amp", {"scale_floor": 2.0**25}, "scale floor 33554432.0: it must be .* to 1.68e.07"),
        ("none", {"scale_floor": 1.0}, "scale floor 1.0 with loss scale none"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        Config.of({"loss_scale": name, "init_scale": 64.0, **knobs})
    assert "\n" not in str(error.value)


def test_settings_that_are_the_projects_own_change_nothing() -> None:
    own = {"growth_factor": 2.0, "backoff_factor": 0.5, "scale_floor": 1.0}
    for name, scaler in SCALER_RULES.items():
        given = {k: scaler.floor if k == "scale_floor" else v for k, v in own.items()}
        assert Config.of({"loss_scale": name, **given}) == Config.of({"loss_scale": name})


def test_state_dict_has_torchs_five_keys_and_plain_numbers(backend: Backend) -> None:
    scale = DynamicLossScale(1024.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=5, xp=backend.xp)
    follow(scale, "001000")
    state = scale.state_dict()
    assert state == {
        "scale": 256.0,
        "growth_factor": 4.0,
        "backoff_factor": 0.25,
        "growth_interval": 5,
        "_growth_tracker": 3,
    }
    assert [type(value) for value in state.values()] == [float, float, float, int, int]


# ------------------------------------------------------------------------------------------------- what cannot be a state


IMPOSSIBLE = (0, 0.0, -4.0, math.nan, math.inf, -math.inf, 1e-45, 1e-39, 1e39, 1e300, "4", None, True, [4.0], {}, 10**400)
NO_FP32 = 1 + 2.0**-30
SETTINGS_OF_A_STATE = {
    "growth_factor": (1.0, 0.5, -2.0, math.nan, math.inf, "2", None, True),
    "backoff_factor": (0.0, 1.0, 2.0, -0.5, math.nan, "0.5", None),
    "growth_interval": (0, -1, 2.5, 3.0, math.nan, math.inf, "3", None, True, 2**70),
    "_growth_tracker": (-1, 0.5, 4, 2**70, math.nan, "0", None, False, [0]),
    "hysteresis": (0, -1, 1.5, "2", None, True),
    "_hysteresis_tracker": (-1, 3, 0.5, "1", None, 2**70),
    "_steps_since_change": (-1, 0.5, 2**31, None),
    "_overflows": (-1, 0.5, 2**31, None),
    "exhausted": (-1, 2, 0.5, "no", None),
    "overflowed": (-1, 2, 0.5, "no", None),
}


@pytest.mark.parametrize("name", [*SCALER_RULES, "128"])
def test_what_cannot_be_a_state_is_refused(name: str) -> None:
    scale = make_loss_scale(name, 64.0, 3) if name in SCALER_RULES else make_loss_scale(name)
    scale.update(np.asarray(True))
    state = scale.state_dict()
    scaler = SCALER_RULES.get(name)
    kept = scaler.fmt if scaler else "fp32"
    bad: list[Any] = [{**state, "scale": x} for x in IMPOSSIBLE if not (x == 1e300 or x == 1e39) or kept == "fp32"]
    bad += [{**state, "scale": NO_FP32}] if kept == "fp32" else []
    bad += [{**state, "scale": scaler.floor * 0.99}] if scaler and scaler.floor else []
    bad += [{**state, "scale": scaler.ceiling * 1.01}] if scaler and scaler.ceiling < FP32_MAX and not scaler.gradual else []
    bad += [{**state, key: x} for key in state.keys() - {"scale"} for x in SETTINGS_OF_A_STATE[key]]
    bad += [{k: v for k, v in state.items() if k != key} for key in state] + [{**state, "more": 1}, {}, [], None, "state"]
    for wrong in bad:
        with pytest.raises(ValueError, match=r"^the state of a loss scale ") as error:
            scale.load_state_dict(wrong)
        assert "\n" not in str(error.value) and scale.state_dict() == state, wrong
    scale.load_state_dict(json.loads(json.dumps(state)))
    assert scale.state_dict() == state


def test_states_of_long_runs_are_taken() -> None:
    """Negative control of the bounds: whatever a run that goes on has come to is a state of the same scaler."""
    for name in SCALER_RULES:
        first, rng = make_loss_scale(name, 64.0, 3), np.random.default_rng(0)
        for bad in rng.random(300) < 0.3:
            first.update(np.asarray(bad))
            if exhausted(first) or not TINY <= stored(first) <= FP32_MAX:
                break
            make_loss_scale(name).load_state_dict(first.state_dict())


def test_the_defaults_are_each_projects_own() -> None:
    for name, scaler in SCALER_RULES.items():
        scale = make_loss_scale(name)
        assert (float(scale.scale), scale.growth_interval) == (scaler.init_scale, scaler.growth_interval)
        assert scale.adapts and getattr(scale, "hysteresis", 1) == (2 if name in PATIENT else 1)
        assert type(scale) is DynamicLossScale if name == "torch" else isinstance(scale, ProjectLossScale)
    assert type(make_loss_scale("dynamic")) is DynamicLossScale
    assert type(make_loss_scale("none")) is type(make_loss_scale("8")) is StaticLossScale


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("torch", 8.0, 3, np, 2), "hysteresis 2 with torch, .*only for apex-kernel, megatron, deepspeed"),
        (("megatron", 8.0, 3, np, 0), "hysteresis 0: it must be a whole number, at least 1"),
        (("megatron", 8.0, 3, np, 1.5), "hysteresis 1.5: it must be a whole number, at least 1"),
        (("megatron", 8.0, 2.5), "growth interval 2.5: it must be a whole number, at least 1"),
        (("none", None, None, np, 2), "hysteresis 2 with loss scale none: only a dynamic loss scale has this setting"),
        (("128", None, None, np, 2), "hysteresis 2 with loss scale 128: only a dynamic loss scale has this setting"),
        (("128", 5.0), "init scale 5.0 with loss scale 128: only a dynamic loss scale has this setting"),
        (("none", None, 3), "growth interval 3 with loss scale none: only a dynamic loss scale has this setting"),
        (("megatron", 0.5), "init scale 0.5: it must be at least 1, the floor of megatron"),
        (("flax", 2.0**-127), "the floor of flax"),
        (("Torch",), "unknown loss scale 'Torch': choose one of torch, .*, dynamic, none, or a number; did you mean torch"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_loss_scale(*arguments)


def test_configurations() -> None:
    config = Config.of({"loss_scale": "megatron"})
    assert (config.init_scale, config.growth_interval, config.hysteresis) == (2.0**32, 1000, 2)
    given = Config.of({"loss_scale": "deepspeed", "init_scale": 8.0, "growth_interval": 5, "hysteresis": 1})
    assert (given.init_scale, given.growth_interval, given.hysteresis) == (8.0, 5, 1)
    scale = given.make_loss_scale()
    assert isinstance(scale, ProjectLossScale) and (scale.rule, scale.hysteresis) == (SCALER_RULES["deepspeed"], 1)
    assert Config.of({"loss_scale": "torch"}) == Config.of({"loss_scale": "dynamic"}) == Config.of({})
    assert Config.of({}).hysteresis is None and Config.of({"loss_scale": "8"}).hysteresis is None
    with pytest.raises(UsageError, match="hysteresis 2 with torch"):
        Config.of({"hysteresis": 2})


def test_a_checkpoint_from_before_there_was_a_hysteresis_is_read() -> None:
    saved = dataclasses.asdict(Config.of({}))
    del saved["hysteresis"]
    assert conflicts(Config.of(saved), saved) == []
    assert conflicts(Config.of({**saved, "loss_scale": "megatron"}), saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": 0.0}, "init scale 0.0"),
        ({"init_scale": -1.0}, "init scale -1.0"),
        ({"init_scale": math.inf}, "init scale inf"),
        ({"init_scale": math.nan}, "init scale nan"),
        ({"growth_factor": 1.0}, "growth factor 1.0"),
        ({"growth_factor": 0.5}, "growth factor 0.5"),
        ({"backoff_factor": 1.0}, "backoff factor 1.0"),
        ({"backoff_factor": 0.0}, "backoff factor 0.0"),
        ({"backoff_factor": -0.5}, "backoff factor -0.5"),
        ({"backoff_factor": math.nan}, "backoff factor nan"),
        ({"growth_interval": 0}, "growth interval 0"),
        ({"growth_interval": -3}, "growth interval -3"),
        ({"growth_interval": 2.5}, "growth interval 2.5: it must be a whole number"),
        ({"growth_interval": 2.0}, "growth interval 2.0: it must be a whole number"),
        ({"growth_interval": True}, "growth interval True: it must be a whole number"),
    ],
)
def test_bad_arguments_of_a_dynamic_scale(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DynamicLossScale(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"init_scale": 1e39}, {"init_scale": 1e-60}, {"growth_factor": math.nan}, {"growth_factor": math.inf}]
)
def test_bad_arguments_in_fp32(arguments: dict[str, float]) -> None:
    with np.errstate(over="ignore"), pytest.raises(UsageError):
        DynamicLossScale(**arguments)


@pytest.mark.parametrize("scale", [1e39, 1e-60])
def test_bad_static_scales_in_fp32(scale: float) -> None:
    with np.errstate(over="ignore"), pytest.raises(UsageError):
        StaticLossScale(scale)


# ------------------------------------------------------------------------------------------ static scales, and the choice


def test_a_static_scale_never_moves(backend: Backend) -> None:
    scale = StaticLossScale(128.0, backend.xp)
    for overflow in (True, False, True):
        scale.update(backend.xp.asarray(overflow))
    assert float(scale.scale) == 128.0 and scale.scale.dtype == np.float32
    other = StaticLossScale(1.0, backend.xp)
    other.load_state_dict(scale.state_dict())
    assert scale.state_dict() == other.state_dict() == {"scale": 128.0}


@pytest.mark.parametrize("bad", [0.0, -8.0, math.inf, math.nan])
def test_a_static_scale_must_be_a_positive_number(bad: float) -> None:
    with pytest.raises(UsageError, match=r"loss scale .* must be positive and finite"):
        StaticLossScale(bad)


@pytest.mark.parametrize(
    ("kind", "expected_class", "value", "adapts"),
    [
        ("dynamic", DynamicLossScale, 512.0, True),
        ("none", StaticLossScale, 1.0, False),
        ("128", StaticLossScale, 128.0, False),
        ("1e3", StaticLossScale, 1000.0, False),
    ],
)
def test_make_loss_scale(kind: str, expected_class: type, value: float, adapts: bool, backend: Backend) -> None:
    settings = {"init_scale": 512.0, "growth_interval": 7} if adapts else {}
    scale = make_loss_scale(kind, **settings, xp=backend.xp)
    assert isinstance(scale.scale, backend.xp.ndarray)
    assert type(scale) is expected_class and float(scale.scale) == value and scale.adapts is adapts
    if adapts:
        assert scale.state_dict()["growth_interval"] == 7


@pytest.mark.parametrize("kind", ["", "dynamic ", "big", "0", "-1", "nan", "inf"])
def test_make_loss_scale_refuses(kind: str) -> None:
    with pytest.raises(UsageError, match=r"^(unknown )?loss scale"):
        make_loss_scale(kind)
