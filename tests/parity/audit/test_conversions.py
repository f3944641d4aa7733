"""The audit's counts of conversions are those of refimpl's own counters on the same numbers, in every category."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import Tensor, nn

from refimpl.numerics.bits import from_bits
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS, widens_to
from refimpl.numerics.rounding_effects import OUTCOMES, SWEEP, Counts, overflow_threshold, room_below
from refimpl.parity.audit import Audit
from refimpl.parity.audit.conversions import Conversion, Place
from refimpl.parity.audit.rounding_counts import count_roundings, count_widened

TYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip
PAIRS = [(a, b) for a in TYPES for b in TYPES if not widens_to(a, b) and FORMATS[a].bits > 8]
SAME_ORDER = ("signal", "noise")
"""Sums of squares, which the two add up in another order."""


def array(x: Tensor) -> np.ndarray:
    """A tensor's bits as refimpl's array."""
    fmt = next(name for name, dtype in TYPES.items() if dtype == x.dtype)
    unsigned = {8: torch.uint64, 4: torch.uint32, 2: torch.uint16, 1: torch.uint8}[x.element_size()]
    return from_bits(x.detach().contiguous().view(unsigned).numpy(), fmt)


def numbers(source: str, target: str) -> Tensor:
    """Numbers of one format around all borders of the other: ties, subnormals, half the smallest, the largest, far beyond."""
    row, rng = FORMATS[target], np.random.default_rng(0)
    near = np.array([row.max, overflow_threshold(target), row.smallest_normal, row.smallest_subnormal, 1.0, 300.0])
    near = np.concatenate([near * factor for factor in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)])
    ties = 2.0 ** rng.integers(-20, 8, 500) * (1 + (2 * rng.integers(0, 8, 500) + 1) * row.eps / 2)
    tiny = row.smallest_subnormal * rng.integers(0, 40, 500) / 2
    wide = rng.standard_normal(17_000) * 2.0 ** rng.uniform(-160, 130, 17_000)  # with the others more than a piece
    with np.errstate(all="ignore"):
        x = np.concatenate([near, ties, tiny, wide, [0.0, -0.0, math.inf, -math.inf, math.nan]])
        x = np.concatenate([x, -x, np.nextafter(x, 0), x * (1 + 1e-7)])
    return torch.from_numpy(x).to(TYPES[source])


def assert_same(one: Counts, other: Counts) -> None:
    for f in fields(Counts):
        a, b = getattr(one, f.name), getattr(other, f.name)
        same = np.isclose(a, b, rtol=1e-9, equal_nan=True) if f.name in SAME_ORDER else np.array_equal(a, b)
        assert same, (f.name, a, b)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_counts_are_those_of_refimpl(source: str, target: str) -> None:
    x = numbers(source, target)
    y = x.to(TYPES[target])
    with np.errstate(all="ignore"):
        expected, counts = Counts(target), Counts(target)
        expected.add(array(x), array(y))
    count_roundings(counts, x, y)
    assert_same(counts, expected)
    beyond = FORMATS[source].max > FORMATS[target].max
    assert counts.exact and counts.rounded and counts.tie and counts.arrived
    assert bool(counts.overflowed or counts.saturated) == beyond
    assert bool(counts.flushed) == (FORMATS[source].smallest_subnormal < FORMATS[target].smallest_subnormal)


def test_saturated_and_stochastically_rounded_values_are_counted_as_refimpl_does() -> None:
    x = numbers("fp32", "fp16")
    down = cast(array(x), "fp16", overflow="saturate")
    other = np.where(np.arange(x.numel()) % 2 == 0, down, np.nextafter(down, np.float16(0)))
    for y in (down, other):
        expected, counts = Counts("fp16"), Counts("fp16")
        with np.errstate(all="ignore"):
            expected.add(array(x), y)
        count_roundings(counts, x, torch.from_numpy(y))
        assert_same(counts, expected)
        assert counts.saturated


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integers_are_counted_as_the_fp64_numbers_that_they_are(dtype: torch.dtype) -> None:
    x = torch.arange(3000).to(dtype)
    counts, expected = Counts("bf16"), Counts("bf16")
    count_roundings(counts, x, x.to(torch.bfloat16))
    expected.add(x.double().numpy(), array(x.to(torch.bfloat16)))
    assert_same(counts, expected)


def test_an_empty_tensor_and_one_without_a_finite_number_are_counted() -> None:
    counts = Counts("fp16")
    for x in (torch.zeros(0), torch.full((3,), math.nan), torch.tensor([math.inf])):
        count_roundings(counts, x, x.half())
        count_widened(counts, x) if x.numel() else None
    assert counts.elements == counts.arrived == 8 and not counts.binades.any()


@pytest.mark.parametrize("pair", [("bf16", "fp32"), ("fp16", "fp32"), ("e5m2", "fp16"), ("fp32", "fp64")])
def test_a_widening_conversion_has_outcomes_only(pair: tuple[str, str]) -> None:
    source, target = pair
    x = numbers("fp64", source).to(TYPES[source])
    counts, expected = Counts(target), Counts(target)
    count_widened(counts, x)
    with np.errstate(all="ignore"):
        expected.add(array(x), array(x.to(TYPES[target])))
    for name in ("elements", "zeros", "largest", *OUTCOMES):
        assert getattr(counts, name) == getattr(expected, name), name
    assert counts.exact + counts.arrived == counts.elements and counts.arrived


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp32", "e5m2", "e4m3"])
def test_room_is_the_number_of_doublings_that_stay_finite(fmt: str) -> None:
    for largest in (1.0, 3.1e4, 65520 / 4, 448.0, 465.0, 1e-30, overflow_threshold(fmt) * 8, overflow_threshold(fmt)):
        room = room_below(largest, fmt)
        assert room is not None and math.ldexp(largest, room) < overflow_threshold(fmt) <= math.ldexp(largest, room + 1)
    assert room_below(0.0, fmt) is None and room_below(1.0, "fp64") is None


# -------------------------------------------------------------------------------------------------------- in a loop


class Net(nn.Module):
    """A linear layer, and what is read from outside: its weights can be set to any numbers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def audited(step: Any, model: nn.Module, steps: int = 1, **options: Any) -> Audit:
    """Audit a step of a loop."""
    with Audit(model, torch.optim.SGD(model.parameters(), 0.0), steps=steps, **options) as audit:
        for _ in range(steps):
            step()
            audit.step()
    assert audit.failures == {}
    return audit


def only(audit: Audit, **wanted: Any) -> Conversion:
    """The one row whose place has all these."""
    found = [row for place, row in audit.conversions.rows.items() if wanted.items() <= place._asdict().items()]
    assert len(found) == 1, list(audit.conversions.rows)
    return found[0]


def test_the_casts_of_autocast_are_counted_by_module_kind_and_phase() -> None:
    net = Net()
    weights = numbers("fp32", "fp16")
    weights = weights[weights.abs() < 1][:2048]
    net.fc.weight.data = weights.reshape(32, 64).clone()
    x = torch.randn(8, 64)

    def step() -> None:
        with torch.autocast("cpu", torch.float16):
            y = net(x)
        net.zero_grad()
        (y.float() * 1024.0).sum().backward()

    audit = audited(step, net, steps=2)
    row, expected = only(audit, kind="weights"), Counts("fp16")
    expected.add(array(weights), array(weights.half()))
    once = Counts("fp16")
    once += expected
    expected += once  # two steps
    assert_same(row.counts, expected)
    assert row.calls == 2 and row.unscaled is None
    place = next(place for place, found in audit.conversions.rows.items() if found is row)
    assert place == Place("fc", "forward", "weights", "cast", "fp32", "fp16")
    assert only(audit, kind="activations", operation="cast", source="fp32").counts.elements == 2 * 8 * 64
    back = only(audit, kind="weight gradients", operation="cast")
    assert back.counts.exact == 2 * 64 * 32 and back.counts.fmt == "fp32"
    assert only(audit, kind="weight gradients", operation="aten.mm", target="fp16").counts.elements
    json.dumps(audit.conversions.data(), allow_nan=False)


def test_what_loss_scales_would_do_to_fp16_gradients_is_the_same_whatever_scale_they_had() -> None:
    """The gradient of the weight is 2^-24 of one element, 2^-12 of another; S = 2^8 and 2^4 are divided out again."""

    def with_scale(scale: float) -> Audit:
        net = Net(torch.float16)
        seed = torch.zeros(1, 32, dtype=torch.float16)
        seed[0, 0], seed[0, 1] = 2.0**-12, 2.0**-10
        x = torch.full((1, 64), 2.0**-14, dtype=torch.float16)
        return audited(lambda: net(x).backward(seed * scale), net, scaler=torch.amp.GradScaler("cpu", init_scale=scale))

    audits = [with_scale(2.0**k) for k in (4, 8)]
    effects = [audit.conversions.loss_scales() for audit in audits]
    assert effects[0] == effects[1] and [effect.exponent for effect in effects[0]] == list(SWEEP)
    rows = [only(audit, kind="weight gradients", operation="aten.mm") for audit in audits]
    # 2^-26 and 2^-24 are rounded at S = 1: the first is flushed; from S = 2^2 both survive.
    assert [row.unscaled.flushed_at(0, "fp16") for row in rows if row.unscaled] == [0.5, 0.5]
    assert [effect.flushed for effect in effects[0]][:2] == [0.5, 0.0]
    assert audits[0].conversions.advice().startswith("50 % would become zero in fp16 at S = 1; S >= 2^1 saves")
    gradients = audits[0].conversions.gradients()["fc"]
    largest = max(k for k in range(64) if gradients.fits_at(k, "fp16"))
    at = {effect.exponent: effect.overflowing for effect in effects[0]}
    assert all((at[k] == ("fc",)) == (k > largest) for k in SWEEP)


def test_fp16_results_that_are_flushed_or_overflow_are_counted_although_nothing_casts() -> None:
    net = Net(torch.float16)
    net.fc.weight.data.fill_(2.0**-13)
    x = torch.zeros(3, 64, dtype=torch.float16)
    x[0, 0], x[1, 0], x[2] = 2.0**-13, 1.0, 65504.0
    net.fc.weight.data[0, :] = 1.0
    audit = audited(lambda: net(x), net)
    counts = only(audit, operation="aten.mm").counts
    assert (counts.flushed, counts.overflowed, counts.exact) == (31, 1, counts.elements - 32 - counts.rounded)
    room = audit.conversions.rooms()[0]
    assert room.module == "fc" and room.largest == 511.75 and room.room == room_below(511.75, "fp16") == 7


def test_a_mask_takes_no_room() -> None:
    net, lowest = Net(torch.float16), torch.finfo(torch.float16).min
    x = torch.ones(2, 64, dtype=torch.float16)
    audit = audited(lambda: net(x).masked_fill(torch.arange(32) > 5, lowest) * 1.0 + torch.full((32,), lowest).half(), net)
    forward = [room for room in audit.conversions.rooms() if room.phase == "forward"]
    assert all(room.largest < 100 for room in forward), forward


def test_copies_in_place_and_lists_of_them_are_casts() -> None:
    net = Net(torch.bfloat16)
    masters = [numbers("fp32", "bf16")[:2048].reshape(32, 64)]

    def step() -> None:
        with torch.no_grad():
            net.fc.weight.copy_(masters[0])
            torch._foreach_copy_([net.fc.weight], masters)

    audit = audited(step, net)
    row, expected = only(audit, operation="cast"), Counts("bf16")
    for _ in range(2):
        expected.add(array(masters[0]), array(masters[0].bfloat16()))
    assert_same(row.counts, expected)
    assert row.calls == 2 and next(iter(audit.conversions.rows)).kind == "weights"


def test_what_an_operation_writes_into_a_narrower_tensor_is_counted() -> None:
    net, change = Net(torch.bfloat16), torch.randn(32, 64) * 1e-3

    def step() -> None:
        with torch.no_grad():
            net.fc.weight.add_(change)

    before = net.fc.weight.detach().clone()
    audit = audited(step, net)
    row, expected = only(audit, operation="aten.add_"), Counts("bf16")
    expected.add((before.double() + change.double()).numpy(), array(net.fc.weight))
    assert_same(row.counts, expected)
    assert [(p.source, p.target) for p in audit.conversions.rows] == [("fp32", "bf16")]


def test_integers_that_become_equal_are_counted() -> None:
    net = Net()
    audit = audited(lambda: net(torch.arange(1024).to(torch.bfloat16).reshape(16, 64).float()), net)
    row = only(audit, source="int64")
    assert row.integers == (1024, len(np.unique(cast(np.arange(1024.0), "bf16").astype(float))))
    assert row.counts.rounded == 1024 - row.counts.exact > 0
    small = audited(lambda: net(torch.arange(64).to(torch.bfloat16).reshape(1, 64).float()), net)
    assert only(small, source="int64").integers is None


def test_totals_are_the_rows_of_all_modules() -> None:
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            net(torch.randn(4, 16)).sum().backward()

    audit = audited(step, net)
    rows, totals = audit.conversions.rows, audit.conversions.totals()
    assert sum(row.counts.elements for row in rows.values()) == sum(row.counts.elements for row in totals.values())
    weights = [row for place, row in totals.items() if place.kind == "weights"]
    assert [row.counts.elements for row in weights] == [3 * (16 * 16 + 16)] and weights[0].calls == 6
    assert {place.module for place in rows if place.kind == "weights"} == {"0", "1", "2"}
    again = audit.conversions.totals()
    assert [row.counts.elements for row in again.values()] == [row.counts.elements for row in totals.values()]


def test_recomputed_operations_are_counted_once() -> None:
    net = Net()

    def step(checkpoint: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.ones(4, 64)
            y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False) if checkpoint else net(x)
        y.sum().backward()

    calls = [audited(lambda which=which: step(which), net).conversions.totals() for which in (False, True)]
    forward = [{p: c.calls for p, c in found.items() if p.phase == "forward"} for found in calls]
    assert forward[0] == forward[1] and forward[0]


def test_formats_that_refimpl_does_not_know_are_said() -> None:
    net = Net()
    with Audit(net, torch.optim.SGD(net.parameters(), 0.0)) as audit:
        net(torch.ones(1, 64).to(torch.float8_e4m3fnuz).float())
        audit.step()
    assert audit.conversions.uncounted == {"float8_e4m3fnuz": 128}
