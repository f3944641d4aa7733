"""What roundings did: against the list of all values of a format, and by hand at the boundaries."""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np
import pytest
from recipe_lists import BASIC, others_slow

from refimpl.nn.ops import OPS
from refimpl.numerics.casts import cast
from refimpl.numerics.formats import FORMATS, dtype_of, format_of, widens_to
from refimpl.numerics.rounding_effects import KINDS, LOWEST, OUTCOMES, Counts, effects_of, overflow_threshold
from refimpl.precision.recipes import RECIPES
from refimpl.tools.precision_report.counts import RoundingMonitor, by_kind, kind_of, scaled_to_fit
from refimpl.training.config import Config
from refimpl.training.data import load_corpus, sample_batch
from refimpl.training.setup import BATCHES, INIT, generator

NARROW = ["fp16", "bf16", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]
TINY: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 8, "warmup": 2}


def positive_values(fmt: str) -> list[float]:
    """All finite values of a narrow format from 0 up, from its codes."""
    row = FORMATS[fmt]
    codes = np.arange(1 << (row.bits - 1), dtype=np.uint16 if row.itemsize == 2 else np.uint8)
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype_of(fmt)).astype(np.float64)
    return sorted(float(v) for v in values[np.isfinite(values)])


def samples(fmt: str) -> np.ndarray:
    """FP32 values of all sizes: every value of the format, the middles, their FP32 neighbors, and far beyond both ends."""
    values = np.array(positive_values(fmt))
    values = values[:: max(1, values.size // 3000)]
    middles = (values[1:] + values[:-1]) / 2
    threshold = overflow_threshold(fmt)
    tails = [threshold, FORMATS[fmt].max, FORMATS[fmt].smallest_subnormal / 2, FORMATS[fmt].smallest_subnormal / 4, 1e-44, 3e38]
    points = np.concatenate([values, middles, tails]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(math.inf)), np.nextafter(points, np.float32(0))])
    return np.concatenate([points[np.isfinite(points)], -points[np.isfinite(points)], np.float32([math.inf, -math.inf])])


def by_hand(x: float, y: float, values: list[float]) -> tuple[str, bool]:
    """The outcome and whether it was a tie, from the sorted list of the format's magnitudes."""
    a, b = abs(x), abs(y)
    if not math.isfinite(a):
        return "arrived", False
    if a == b:
        return "exact", False
    i = bisect.bisect_left(values, a)
    step_beyond = values[-1] + (values[-1] - values[-2])
    upper = values[i] if i < len(values) else step_beyond
    lower = values[i - 1]
    tie = 2 * a == lower + upper and math.isfinite(a)
    if not math.isfinite(b):
        return "overflowed", False
    if i == len(values):  # above the largest: rounding down to it is rounding, coming from the upper half is not
        came_down = 2 * a < lower + upper or (tie and len(values) % 2 == 1)
        return ("rounded", tie) if came_down else ("saturated", False)
    return ("flushed" if b == 0 else "rounded"), tie


@pytest.mark.parametrize("fmt", NARROW)
@pytest.mark.parametrize("overflow", ["inf", "saturate"])
def test_effects_are_those_of_the_list_of_values(fmt: str, overflow: str) -> None:
    x, values = samples(fmt), positive_values(fmt)
    y = cast(x, fmt, overflow=overflow)
    effects = effects_of(x, y, fmt)
    seen = set()
    for i, (before, after) in enumerate(zip(x.astype(float), y.astype(float), strict=True)):
        outcome, tie = by_hand(float(before), float(after), values)
        found = [name for name in OUTCOMES if getattr(effects, name)[i]]
        assert found == [outcome] and effects.tie[i] == tie, (before, after, found, outcome)
        assert effects.subnormal[i] == (0 < abs(after) < FORMATS[fmt].smallest_normal)
        seen.add(outcome)
    beyond = "overflowed" if overflow == "inf" and FORMATS[fmt].specials != "none" else "saturated"
    assert seen == {"exact", "rounded", "flushed", "arrived", beyond}


def test_outcomes_at_the_boundaries_of_fp16() -> None:
    def outcome(x: float) -> list[str]:
        before = np.float64([x])
        effects = effects_of(before, cast(before, "fp16"), "fp16")
        return [name for name in (*OUTCOMES, "tie", "subnormal") if getattr(effects, name)[0]]

    assert outcome(65519.0) == ["rounded"]
    assert outcome(65520.0) == ["overflowed"]
    assert outcome(2.0**-25) == ["flushed", "tie"]
    assert outcome(2.0**-25 * 1.01) == ["rounded", "subnormal"]
    assert outcome(2.0**-24) == ["exact", "subnormal"]
    assert outcome(1 + 2.0**-11) == ["rounded", "tie"]
    assert outcome(0.0) == ["exact"] and outcome(-0.0) == ["exact"]
    assert outcome(math.inf) == ["arrived"] and outcome(math.nan) == ["arrived"]


@pytest.mark.parametrize("fmt", ["fp32", "tf32", *NARROW])
def test_the_threshold_is_where_overflow_begins(fmt: str) -> None:
    threshold = overflow_threshold(fmt)
    below = np.float64([math.nextafter(threshold, 0)])
    if fmt in ("fp32", "fp16", "bf16", "e5m2"):
        assert np.isinf(cast(np.float64([threshold]), fmt, overflow="inf").astype(float))
        if fmt == "fp32":  # narrower formats take FP64 by way of FP32
            assert np.isfinite(cast(below, fmt, overflow="inf").astype(float))
    if widens_to(fmt, "fp32") and fmt != "fp32":
        single = np.nextafter(np.float32(threshold), np.float32(0))
        assert np.isfinite(cast(np.array([single]), fmt, overflow="inf").astype(float))
    assert threshold > FORMATS[fmt].max


def test_known_thresholds() -> None:
    assert overflow_threshold("fp16") == 65520
    assert overflow_threshold("e4m3") == math.nextafter(464, math.inf)
    assert overflow_threshold("e5m2") == 61440
    assert overflow_threshold("e2m1") == 7
    assert math.isinf(overflow_threshold("fp64"))


# -- counts ------------------------------------------------------------------------------------------------------------


def counted(x: np.ndarray, fmt: str = "fp16") -> Counts:
    counts = Counts(fmt)
    counts.add(x, cast(x, fmt))
    return counts


def test_counts_partition_the_elements_and_add_up() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(150_001) * 2.0 ** rng.uniform(-40, 20, 150_001)).astype(np.float32)
    x[:7] = [0, -0.0, math.inf, math.nan, 1e-9, 1e9, 1]
    whole, parts = counted(x), counted(x[:70_000])
    parts += counted(x[70_000:])
    assert sum(getattr(whole, name) for name in OUTCOMES) == whole.elements == x.size
    assert whole.flushed and whole.overflowed and whole.subnormal and whole.zeros == 2
    for name in ("elements", "zeros", "largest", "tie", "subnormal", *OUTCOMES):
        assert getattr(whole, name) == getattr(parts, name), name
    assert np.array_equal(whole.binades, parts.binades)
    assert math.isclose(whole.noise, parts.noise, rel_tol=1e-12)
    with pytest.raises(ValueError, match="bf16"):
        whole += counted(x, "bf16")


def test_signal_to_noise_by_its_formula() -> None:
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    error = x.astype(float) - x.astype(np.float16).astype(float)
    assert math.isclose(counted(x).snr, 10 * math.log10(float((x.astype(float) ** 2).sum() / (error**2).sum())), rel_tol=1e-9)
    assert math.isinf(counted(np.ones(3, np.float32)).snr)
    assert math.isnan(counted(np.zeros(3, np.float32)).snr)


def test_noise_leaves_out_what_is_not_finite() -> None:
    x = np.float32([1.0, 1e9, math.nan, math.inf])
    assert counted(x).signal == 1.0 and counted(x).noise == 0.0
    assert counted(x).largest == np.float32(1e9)


def test_binades_hold_every_nonzero_finite_value_once() -> None:
    x = np.float32([1, 1.99, 2, 0.5, -3, 0, math.inf, math.nan, 2.0**-149, 3e38])
    counts = counted(x)
    assert counts.binades.sum() == 7
    assert {e + LOWEST: int(n) for e, n in enumerate(counts.binades) if n} == {0: 2, 1: 2, -1: 1, -149: 1, 127: 1}
    assert counts.exponents == (-149, 127)
    assert counted(np.zeros(4, np.float32)).exponents is None


@pytest.mark.parametrize("exponent", [0, 3, 10])
def test_flushed_at_another_scale_is_what_a_cast_would_do(exponent: int) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(20_000) * 2.0 ** rng.uniform(-50, -10, 20_000)).astype(np.float32)
    scaled = x * np.float32(2.0**exponent)
    assert counted(x).flushed_at(exponent, "fp16") == np.mean(cast(scaled, "fp16") == 0)


def test_fits_at_another_scale() -> None:
    counts = counted(np.float32([1.0, 0.9]))
    assert counts.fits_at(15, "fp16") and not counts.fits_at(16, "fp16")


def test_dividing_by_a_loss_scale_gives_the_counts_of_the_unscaled_values() -> None:
    x = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    there_and_back = counted(x * np.float32(4096)).divided_by(4096.0)
    assert np.array_equal(there_and_back.binades, counted(x).binades)
    assert there_and_back.largest == counted(x).largest


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e2m1"])
def test_scaled_to_fit_uses_the_range(fmt: str) -> None:
    x = np.float32([3e-5, -1e-6, 0])
    scaled = scaled_to_fit(x, fmt)
    assert FORMATS[fmt].max / 2 < np.abs(scaled).max() <= FORMATS[fmt].max
    assert math.log2(scaled[0] / x[0]) == round(math.log2(scaled[0] / x[0]))
    assert scaled_to_fit(x, "bf16") is x
    assert not scaled_to_fit(np.zeros(3, np.float32), fmt).any()


# -- the monitor, on real steps ----------------------------------------------------------------------------------------


def watched(recipe: str, monitor: Any, **more: Any) -> Any:
    """Two steps of a tiny run, the second one watched."""
    config = Config.of({**TINY, "recipe": recipe, **more})
    training, rng = config.make_training(config.make_backend()), generator(0, BATCHES)
    training.state.load_weights(training.model.initial_weights(generator(0, INIT)))
    corpus = load_corpus(config.data, config.block_size)
    for watch in (None, monitor):
        training.set_monitor(watch)
        training.step([sample_batch(corpus.train, config.batch_size, config.block_size, rng)])
    return training


ROUNDINGS = ("fp32", "fp16", "amp-bf16-cpu", "bf16-sr", "bf16-remainder", "adam-8bit", "nvfp4")


@pytest.mark.parametrize("recipe", others_slow(RECIPES, plain=ROUNDINGS))
def test_a_watched_step_computes_the_same(recipe: str) -> None:
    monitor = RoundingMonitor(("e4m3",))
    with_it, without = (watched(recipe, watch, backend="reference") for watch in (monitor, None))
    for kind, buffer in with_it.state.buffers.items():
        assert np.array_equal(buffer.view(np.uint8), without.state.buffers[kind].view(np.uint8)), kind


@pytest.mark.parametrize("model", ["gpt", "mlp"])
@pytest.mark.parametrize("recipe", BASIC)
def test_no_rounding_of_a_tensor_escapes(recipe: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every narrowing conversion that leaves cast.py is counted, but for those of single numbers (1/S, Adam's scalars)."""
    from refimpl.numerics import casts

    real, elements = casts._convert, []

    def counting(x: Any, dtype: Any, out: Any = None) -> Any:
        result = real(x, dtype, out)
        if x.size > 3 and not widens_to(format_of(x), format_of(result)):
            elements.append(x.size)
        return result

    monitor = RoundingMonitor()
    training = watched(recipe, None, model=model, backend="reference")
    training.set_monitor(monitor)
    corpus = load_corpus("pydoc", TINY["block_size"])
    batch = sample_batch(corpus.train, TINY["batch_size"], TINY["block_size"], generator(1, BATCHES))
    monkeypatch.setattr(casts, "_convert", counting)
    training.step([batch])
    assert sum(c.elements for c in monitor.take()[0].values() if c.elements > 3) == sum(elements)


def test_a_cast_that_is_not_told_is_missed_by_that_test() -> None:
    """The control: without the states' sites the sums differ."""
    sites = []
    training = watched("fp16", lambda site, x, y: sites.append((site, x.size)))
    told = sum(size for site, size in sites if site.endswith(":weights_down"))
    assert told == training.model.n_params


@pytest.mark.parametrize("recipe", BASIC)
def test_every_site_has_its_kind(recipe: str) -> None:
    monitor = RoundingMonitor()
    watched(recipe, monitor)
    kinds = {kind: list(sites) for kind, sites in by_kind(monitor.take()[0])}
    expected = {
        "fp64": set(),
        "fp32": set(),
        "fp16": set(KINDS) - {"updated states"},
        "bf16": set(KINDS) - {"updated states"},
        "pure-fp16": set(KINDS) - {"weights"},
        "pure-bf16": set(KINDS) - {"weights"},
    }.get(recipe, set(KINDS) - {"updated states"})
    assert set(kinds) == expected
    for site in kinds.get("weight gradients", []):
        assert site.endswith((".dw", ".db", ".grad:fan_in.sum")), site


def test_kinds_by_name() -> None:
    assert kind_of("transformer.h.0.mlp.c_fc:linear.dw.dw") == "weight gradients"
    assert kind_of("transformer.h.0.mlp.c_fc:linear.dw.db") == "weight gradients"
    assert kind_of("transformer.h.0.residual_1:add.db") == "activation gradients"  # add's b is an activation
    assert kind_of("transformer.h.0.attn:attention.scale.dS") == "activation gradients"
    assert kind_of("loss:cross_entropy.dlogits.stored") == "activation gradients"
    assert kind_of("transformer.wte.weight.grad:fan_in.sum") == "weight gradients"
    assert kind_of("transformer.h.0.residual_1.grad:fan_in.sum") == "activation gradients"
    assert kind_of("transformer.wte.weight.fp16:cast.w") == "weights"
    assert kind_of("transformer.wte.weight:weights_down") == "weights"
    assert kind_of("transformer.wte.weight:update.v") == "updated states"
    assert kind_of("transformer.h.1.attn:attention.softmax.P") == "activations"
    assert all(kind_of(f"x:{op}.y") == "activations" for op in OPS)


def test_what_if_counts_what_another_format_would_have_done() -> None:
    monitor = RoundingMonitor(("bf16", "e4m3"))
    x = np.float32([1.0, 1.00390625, 1e-30, 300.0])
    monitor("place:linear.y.y", x, cast(x, "fp16"))
    sites, others = monitor.take()
    assert sites["place:linear.y.y"].flushed == 1
    assert others["bf16"]["place:linear.y.y"].flushed == 0 and others["bf16"]["place:linear.y.y"].tie == 1
    assert others["e4m3"]["place:linear.y.y"].flushed == 1 and others["e4m3"]["place:linear.y.y"].saturated == 0
    assert monitor.take() == ({}, {"bf16": {}, "e4m3": {}})


def test_only_some_sites() -> None:
    monitor = RoundingMonitor(only=lambda site: site.startswith("a"))
    x = np.float32([0.1])
    for site in ("a:linear.y.y", "b:linear.y.y"):
        monitor(site, x, cast(x, "fp16"))
    assert list(monitor.take()[0]) == ["a:linear.y.y"]
