"""refimpl.optim.loss_scale: the scale and its counter, step by step, against recorded traces, a restatement and PyTorch.

The traces are those of torch.amp.GradScaler (scale after each step, 1 = overflow). No number here has a tolerance: a loss
scale is exact.
"""

import math
import struct

import numpy as np
import pytest
from recipe_lists import others_slow

from refimpl.backends.base import Backend
from refimpl.errors import UsageError
from refimpl.optim.loss_scale import DynamicLossScale, StaticLossScale, make_loss_scale


def trace(scale: DynamicLossScale, pattern: str) -> list[float]:
    """The scale after each step of a pattern; 1 is an overflow."""
    result = []
    for c in pattern:
        scale.update(scale.xp.asarray(c == "1"))
        result.append(float(scale.scale))
    return result


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("00000000", [1024, 1024, 2048, 2048, 2048, 4096, 4096, 4096]),
        ("1010100000", [512, 512, 256, 256, 128, 128, 128, 256, 256, 256]),
        ("1110000101", [512, 256, 128, 128, 128, 256, 256, 128, 128, 64]),
    ],
)
def test_golden_traces_from_1024(pattern: str, expected: list[int], backend: Backend) -> None:
    assert trace(DynamicLossScale(1024.0, growth_interval=3, xp=backend.xp), pattern) == expected


def test_golden_trace_from_65536(backend: Backend) -> None:
    expected = [65536, 65536, 32768, 32768, 32768, 65536, 65536, 65536, 131072, 65536, 32768, 32768]
    assert trace(DynamicLossScale(65536.0, growth_interval=3, xp=backend.xp), "001000000110") == expected


def test_growth_needs_good_steps_in_a_row(backend: Backend) -> None:
    # the mistake of counting good steps in total gives another trace
    assert trace(DynamicLossScale(8.0, growth_interval=3, xp=backend.xp), "001001") == [8, 8, 4, 4, 4, 2]


# ----------------------------------------------------------------------------------------------------------- restatement


def fp32(x: float) -> float:
    """A double rounded once to fp32, by the C library and not by NumPy; inf where it does not fit."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.inf


def restated(scale: float, growth: float, backoff: float, interval: int, pattern: list[bool]) -> list[tuple[float, int]]:
    """The rules of the docstring on Python floats."""
    scale, tracker, result = fp32(scale), 0, []
    for overflow in pattern:
        if overflow:
            scale, tracker = fp32(scale * backoff), 0
        else:
            tracker += 1
            if tracker == interval:
                scale, tracker = (fp32(scale * growth) if fp32(scale * growth) < math.inf else scale), 0
        result.append((scale, tracker))
    return result


@pytest.mark.parametrize("seed", others_slow(range(200), plain=range(20)))
def test_random_patterns_equal_the_restatement(seed: int, backend: Backend) -> None:
    rng = np.random.default_rng(seed)
    init = float(10.0 ** rng.uniform(-40, 38))
    growth, backoff = float(rng.choice([2.0, 1.37, 1.001, 10.0])), float(rng.choice([0.5, 0.9, 0.123]))
    interval = int(rng.integers(1, 8))
    pattern = (rng.random(60) < rng.choice([0.0, 0.12, 0.5])).tolist()
    scale = DynamicLossScale(init, growth, backoff, interval, backend.xp)
    measured = []
    for overflow in pattern:
        scale.update(backend.xp.asarray(overflow))
        measured.append((float(scale.scale), int(scale.growth_tracker)))
    assert measured == restated(init, growth, backoff, interval, pattern)
    assert scale.scale.dtype == np.float32 and scale.scale.shape == ()
    assert scale.growth_tracker.dtype == np.int32 and scale.growth_tracker.shape == ()


# ------------------------------------------------------------------------------------------------------- the two far ends


def test_growth_never_reaches_infinity(backend: Backend) -> None:
    scale = DynamicLossScale(2.0**126, growth_interval=1, xp=backend.xp)
    assert trace(scale, "00000") == [2.0**127] * 5  # 2^128 is not a number of fp32; the old scale stays
    assert int(scale.growth_tracker) == 0  # and the counter starts again
    assert trace(scale, "1") == [2.0**126]


def test_there_is_no_floor(backend: Backend) -> None:
    scale = DynamicLossScale(2.0**-147, growth_interval=1, xp=backend.xp)
    assert trace(scale, "111") == [2.0**-148, 2.0**-149, 0.0]
    assert trace(scale, "0000") == [0.0] * 4  # nothing brings it back


def test_backoff_rounds_once_from_double(backend: Backend) -> None:
    scale = DynamicLossScale(3.0, backoff_factor=0.3, xp=backend.xp)
    scale.update(backend.xp.asarray(True))
    assert float(scale.scale) == fp32(3.0 * 0.3)
    assert float(scale.scale) != float(np.float32(3) * np.float32(0.3))  # a product in fp32 rounds the factor too


# ------------------------------------------------------------------------------------------------------------ checkpoints


def test_state_dict_has_torchs_five_keys_and_plain_numbers(backend: Backend) -> None:
    scale = DynamicLossScale(1024.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=5, xp=backend.xp)
    trace(scale, "001000")
    state = scale.state_dict()
    assert state == {
        "scale": 256.0,
        "growth_factor": 4.0,
        "backoff_factor": 0.25,
        "growth_interval": 5,
        "_growth_tracker": 3,
    }
    assert [type(value) for value in state.values()] == [float, float, float, int, int]


def test_a_resumed_scale_goes_on_as_if_never_stopped(backend: Backend) -> None:
    pattern = "0001000000100000010000"
    whole = trace(DynamicLossScale(1024.0, 2.0, 0.5, 3, backend.xp), pattern)
    for stop in range(len(pattern)):
        first = DynamicLossScale(1024.0, 2.0, 0.5, 3, backend.xp)
        start = trace(first, pattern[:stop])
        resumed = DynamicLossScale(xp=backend.xp)  # other settings: all five come back from the state
        resumed.load_state_dict(first.state_dict())
        assert start + trace(resumed, pattern[stop:]) == whole, stop
        assert resumed.state_dict().keys() == first.state_dict().keys()


def test_forgetting_the_tracker_would_be_seen() -> None:
    # negative control: a resume that drops the counter grows later
    first = DynamicLossScale(1024.0, growth_interval=3)
    trace(first, "00")
    resumed = DynamicLossScale()
    resumed.load_state_dict(first.state_dict() | {"_growth_tracker": 0})
    assert trace(resumed, "0") == [1024.0] != trace(first, "0")


# ---------------------------------------------------------------------------------------------------------- bad arguments


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
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
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


# ---------------------------------------------------------------------------------------------------------------- static


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
    scale = make_loss_scale(kind, init_scale=512.0, growth_interval=7, xp=backend.xp)
    assert isinstance(scale.scale, backend.xp.ndarray)
    assert type(scale) is expected_class and float(scale.scale) == value and scale.adapts is adapts
    if adapts:
        assert scale.state_dict()["growth_interval"] == 7


@pytest.mark.parametrize("kind", ["", "dynamic ", "big", "0", "-1", "nan", "inf"])
def test_make_loss_scale_refuses(kind: str) -> None:
    with pytest.raises(UsageError, match=r"^loss scale"):
        make_loss_scale(kind)


# --------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize(
    ("init", "growth", "backoff", "interval"),
    [
        (65536.0, 2.0, 0.5, 5),
        (1024.0, 1.37, 0.7, 3),
        (1e38, 2.0, 0.5, 2),  # growth meets fp32's end
        (2.0**-140, 1.001, 0.3, 1),  # backoff meets zero
        (65536.0, 2.0, 0.5, 2000),
    ],
)
def test_equal_to_torch_for_500_steps(init: float, growth: float, backoff: float, interval: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler(
        "cpu", init_scale=init, growth_factor=growth, backoff_factor=backoff, growth_interval=interval
    )
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs.scale(torch.zeros(()))  # makes the scale; `step` raises before it
    ours = DynamicLossScale(init, growth, backoff, interval)
    rng = np.random.default_rng(7)
    overflows = rng.random(500) < 0.12
    for step, overflow in enumerate(overflows):
        weight.grad = torch.full((3,), math.inf if overflow else 0.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(np.asarray(overflow))
        state = theirs.state_dict()
        assert float(ours.scale) == state["scale"], step
        assert int(ours.growth_tracker) == state["_growth_tracker"], step
    assert 30 < overflows.sum() < 90
    assert ours.state_dict().keys() == theirs.state_dict().keys()
