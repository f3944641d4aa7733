"""scripts/inspect_precision.py: what it prints, its page and its data, held against the inspection that they are made from.

The page is read by a parser that knows which tags must be closed, and, where Chromium is installed, by a browser.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browse, measured, needs_browser
from pages import MADE, SCRIPTS
from paths import ROOT
from script_loader import load_script, run_here

import refimpl
from refimpl.errors import UsageError
from refimpl.numerics.casts import cast
from refimpl.numerics.rounding_effects import LOWEST, Counts
from refimpl.numerics.rounding_words import percent, power
from refimpl.parity.mistakes import MISTAKES
from refimpl.parity.trace import record, save
from refimpl.tools.precision_report import main as show_precision
from refimpl.tools.precision_report.collect import Inspection, StepRow, fresh, inspect
from refimpl.tools.precision_report.counts import kind_of
from refimpl.tools.precision_report.exponent_figures import draw_histogram, range_shown
from refimpl.tools.precision_report.figures import all_pictures, draw_loss_scale, run_pictures
from refimpl.tools.precision_report.layer_figures import PANELS
from refimpl.tools.precision_report.main import command, data, inspect_precision, terminal_text
from refimpl.tools.precision_report.page import precision_page
from refimpl.tools.precision_report.sweep_figures import draw_sweep, sweep_caption, sweep_pictures, sweep_text
from refimpl.tools.precision_report.tables import (
    COLUMNS,
    cast_of,
    loss_sentence,
    other_formats_by_kind,
    range_sentence,
    scales_text,
    skipped_sentence,
    summary,
    totals,
    worst_sentence,
    zone_shares,
    zones,
)
from refimpl.tools.precision_report.update_figures import SAME, update_pictures, update_texts
from refimpl.tools.precision_report.verdict_columns import verdict_table
from refimpl.tools.precision_report.verdicts import verdicts_of
from refimpl.training.config import Config
from refimpl.training.console import json_text
from refimpl.training.html.figures import Picture
from refimpl.training.html.style import CSS, OF_SCREEN
from refimpl.training.machine import processor
from refimpl.training.run import train

TINY: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 4, "warmup": 2, "lr": 1e-2,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "fp16": {"init_scale": 2.0**17},  # the first steps are skipped
    "bf16": {"recipe": "bf16"},
    "pure-bf16": {"recipe": "pure-bf16"},
    "amp-bf16": {"recipe": "amp-bf16"},
    "fp32": {"recipe": "fp32"},
    "mlp": {"model": "mlp", "init_scale": 1024.0},
    "one step": {"steps": 1, "init_scale": 1024.0},
    "all skipped": {"loss_scale": "1e30"},
    "no finite loss": {"recipe": "pure-fp16", "lr": 1e3, "warmup": 0},
}
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@functools.cache
def inspected(case: str) -> Inspection:
    what_if = ("e4m3", "bf16") if case in ("fp16", "pure-bf16", "fp32") else ()
    return inspect(fresh(Config.of({**TINY, **CASES[case]})), every=2, what_if=what_if)


@functools.cache
def pictures_of(case: str) -> dict[str, list[Picture]]:
    return all_pictures(inspected(case))


@functools.cache
def page_of(case: str) -> str:
    return precision_page(inspected(case), MADE)


def counted(x: Sequence[float], fmt: str = "fp16") -> Counts:
    counts, values = Counts(fmt), np.array(x, np.float32)
    counts.add(values, cast(values, fmt, overflow="inf"))
    return counts


def step_row(step: int, loss: float = 2.0, scale: float = 1.0, skipped: bool = False) -> StepRow:
    return StepRow(step, loss, scale, skipped, 0.0, 0.5, 0.25, 1.0, 0.75)


def by_hand(sites: dict[str, Counts], scale: float = 1.0) -> Inspection:
    """One step of a run, with these counts."""
    result = Inspection("a run by hand", Config.of(TINY), "fp16", ())
    result.add(1, scale, sites, {})
    result.rows.append(step_row(1, scale=scale))
    return result


def test_the_cases_are_what_their_names_say() -> None:
    assert 0 < sum(row.skipped for row in inspected("fp16").rows) < 4
    assert all(row.skipped for row in inspected("all skipped").rows)
    assert [math.isfinite(row.loss) for row in inspected("no finite loss").rows] == [True, False, False, False]
    assert len(inspected("one step").rows) == 1 and not inspected("one step").rows[0].skipped
    assert not inspected("fp32").sites


# -- sentences and tables ----------------------------------------------------------------------------------------------


def test_zones_are_where_rounding_says_they_are() -> None:
    for fmt in ("fp16", "bf16", "e4m3", "e5m2"):
        subnormal, normal, overflow = zones(fmt)
        assert counted([1.01 * 2.0**subnormal], fmt).flushed == 0 and counted([0.99 * 2.0**subnormal], fmt).flushed == 1
        assert counted([2.0**normal], fmt).subnormal == 0 and counted([0.75 * 2.0**normal], fmt).subnormal == 1
        finite, beyond = counted([2.0 ** (overflow - 1)], fmt), counted([min(2.0**overflow, 3.4e38)], fmt)
        assert finite.overflowed + finite.saturated == 0 and beyond.overflowed + beyond.saturated == 1
    assert zones("fp16") == (-25, -14, 16)


def test_shares_of_the_zones_by_hand() -> None:
    counts = counted([0.0, 2.0**-30, 2.0**-25, 2.0**-15, 2.0**-14, 1.0, 2.0**15, 2.0**16])
    assert zone_shares(counts) == {"flushed": 1 / 7, "subnormal": 2 / 7, "normal": 3 / 7, "overflow": 1 / 7}
    sentence = range_sentence(counts)
    assert "29 % are in the subnormal range of fp16" in sentence and "14 % below it" in sentence
    assert "fp16 is too small for the largest of them. 12 % of all values are zero" in sentence
    assert "loses the smallest" in range_sentence(counted([2.0**-30, 1.0]))
    assert range_sentence(counted([1.0, 2.0])) == "All finite nonzero values are in the normal range of fp16."
    assert range_sentence(counted([1.0, math.inf, math.nan])).endswith(" 2 values more had been Inf or NaN before.")


def test_the_summary_by_hand() -> None:
    """A gradient of which 3 of 8 nonzero values would be flushed at S = 1 and one was at S = 2^8, and an activation."""
    gradient = [1.5 * 2.0**-36, 1.5 * 2.0**-30, 1.5 * 2.0**-26, *[0.5] * 5, 0.0, 0.0]
    scaled = counted([2.0**8 * value for value in gradient])
    inspection = by_hand({"lm_head:linear.dw.dw": scaled, "lm_head:linear.y.y": counted([1e9, 1.0])}, 256.0)
    run, casts, gradients, loss = summary(inspection)
    assert run.startswith("A run by hand: gpt with ") and "recipe fp16" in run
    assert casts.startswith("1 of 1 step was inspected, at 2 casts each: 12 values in all. 10 % of the nonzero values")
    assert "1 overflowed." in casts and "is dw of lm_head: 12 %." in casts
    assert gradients.startswith("Without a loss scale, 38 % of the nonzero gradients")
    assert "(S = 2^8) 12 % did. No step was skipped." in gradients
    assert loss == "The loss was 2.000 at step 1 and 2.000 at step 1."
    nothing = by_hand({"lm_head:linear.y.y": counted([1.0])})
    assert "None of them was flushed to zero, and none overflowed." in summary(nothing)[1]
    mistaken = replace(nothing, config=replace(nothing.config, mistake="no-unscale"))
    assert "with the mistake 'no-unscale' injected" in summary(mistaken)[0]


def test_words() -> None:
    assert [power(s) for s in (65536.0, 1.0, 1000.0, 2.0**-3)] == ["2^16", "1", "1000", "2^-3"]
    assert scales_text([step_row(1, scale=8.0), step_row(2, scale=4.0)]) == "2^2 to 2^3"
    rows = [step_row(i, skipped=i > 2) for i in range(1, 10)]
    expected = "7 of 9 steps were skipped because a gradient was not finite (step 3, 4, 5, 6, 7, ...)."
    assert skipped_sentence(rows) == expected
    broken = [step_row(1, 3.0), step_row(2, math.nan), step_row(3, math.inf), step_row(4, 1.0)]
    assert loss_sentence(broken) == (
        "The loss was 3.000 at step 1 and 1.000 at step 4; it was not finite at 2 steps, first at step 2."
    )
    assert loss_sentence(broken[1:2]) == "The loss was not finite at any step."
    assert cast_of("transformer.h.3.attn:attention.scale.dS") == "attention.scale.dS"


def test_totals_are_the_sums_over_the_tensors_of_a_kind() -> None:
    inspection = inspected("fp16")
    before = {site: asdict(counts) for site, counts in inspection.sites.items()}
    for total in totals(inspection.sites):
        chosen = [counts for site, counts in inspection.sites.items() if kind_of(site) == total.kind]
        assert total.sites == len(chosen) and total.counts.elements == sum(c.elements for c in chosen)
        assert total.counts.flushed == sum(c.flushed for c in chosen)
    assert sum(total.sites for total in totals(inspection.sites)) == len(inspection.sites)
    for site, counts in inspection.sites.items():  # adding up leaves the parts as they were
        assert before[site]["elements"] == counts.elements and np.array_equal(before[site]["binades"], counts.binades)


def test_other_formats_stand_beside_the_run_s_own() -> None:
    inspection = inspected("fp16")
    compared = dict(other_formats_by_kind(inspection))
    assert compared.keys() == {total.kind for total in totals(inspection.sites)}
    weights = dict(compared["weights"])
    assert list(weights) == ["fp16", "e4m3", "bf16"]
    others = [c for site, c in inspection.others["e4m3"].items() if kind_of(site) == "weights"]
    assert weights["e4m3"] is not None and weights["e4m3"].noise == pytest.approx(sum(c.noise for c in others))
    wider = replace(inspection, others={"fp32": {}})
    assert dict(other_formats_by_kind(wider))["weights"][1] == ("fp32", None)


def test_the_worst_are_not_called_so_where_nothing_is_lost() -> None:
    good, bad = by_hand({"lm_head:linear.y.y": counted([1.0])}), by_hand({"lm_head:linear.y.y": counted([2.0**-30])})
    assert worst_sentence(verdicts_of(good), 10).startswith("No tensor loses more than")
    assert worst_sentence(verdicts_of(bad), 10).startswith("The 1 of 1 tensors that lose most, or would without a loss scale")


def test_verdicts_as_columns_by_hand() -> None:
    """A gradient that needs S = 2^7, a good activation, and FP8 weights of which one in 256 became zero."""
    gradient = [1.5 * 2.0**-32] + [0.5] * 3
    own = counted([2.0**-12] + [1.0] * 255, "e4m3")
    sites = {"lm_head:linear.dw.dw": counted([2.0**8 * x for x in gradient]), "lm_head:linear.y.w": own}
    inspection = by_hand({**sites, "lm_head:linear.y.y": counted([1.0, 1.0])}, 2.0**8)
    heads, rows = verdict_table(inspection, verdicts_of(inspection))
    columns = ["zero at S = 1", "S needed", "overflows above S", "became zero", "subnormal", "SNR"]
    assert heads == ["tensor", "loses by", *columns, "kind", "format", "cast"]
    assert rows[0][:7] == ["dw of lm_head", "zeros at S = 1", "25 %", "2^7", "2^16", "0 %", "25 %"]
    assert rows[1][:6] == ["w of lm_head", "zeros", "-", "-", "-", "0.39 %"] and rows[1][-3:] == [
        "weights",
        "e4m3",
        "linear.y.w",
    ]
    assert rows[2][:2] == ["y of lm_head", "nothing"] and rows[2][7] == "without an error"
    words = verdicts_of(inspection)[1].text
    assert words.startswith("divided by its own scale, 0.39 % of the nonzero values became zero in e4m3, 0 % saturated")
    assert "the others keep 4 significant bits" in words


@pytest.mark.parametrize(
    ("gradient", "needed", "above"),
    [
        ([1.5 * 2.0**-32, 2.0**15], "none", "1"),  # no scale saves the one and keeps the other
        ([1.0, 2.0**17], "1", "<1"),  # too large without a scale
    ],
)
def test_scales_that_do_not_do_are_said(gradient: list[float], needed: str, above: str) -> None:
    inspection = by_hand({"lm_head:linear.dw.dw": counted(gradient)}, 1.0)
    heads, [row] = verdict_table(inspection, verdicts_of(inspection))
    cells = dict(zip(heads, row, strict=True))
    assert (cells.get("S needed"), cells["overflows above S"]) == (needed, above)


def swept(head: list[tuple[float, int]], block: list[tuple[float, int]]) -> Inspection:
    """A sweep over 2^0, 2^2, ...: (share flushed, number overflowed) of two layers at each."""
    layers = [{"head": h, "block 0": b} for h, b in zip(head, block, strict=True)]
    return replace(by_hand({}), sweep=[{"exponent": 2 * i, "layers": row} for i, row in enumerate(layers)])


def test_the_caption_of_the_sweep_by_hand() -> None:
    caption = sweep_caption(swept([(0.2, 0), (0.0005, 0), (0, 0)], [(0.1, 0), (0, 0), (0, 3)]))
    assert "At S = 1 the layer that loses most is head: 20 %" in caption
    assert "From S = 2^2 on no layer loses more than 0.10 %." in caption
    assert "From S = 2^4 on gradients overflow (first in block 0)" in caption and caption.endswith("This run had S = 1.")
    hopeless = sweep_caption(swept([(0.2, 0), (0, 9)], [(0, 0), (0, 0)]))
    assert "At no S below overflow does every layer lose less than 0.10 %." in hopeless
    fine = sweep_caption(swept([(0, 0)], [(0, 0)]))
    assert "At S = 1 no gradient becomes zero." in fine and "At none of these scales does a gradient overflow." in fine
    assert "NaNs count neither" in sweep_caption(inspected("no finite loss")) and "NaNs" not in caption


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def axes() -> Any:
    return pytest.importorskip("matplotlib.figure").Figure().subplots()


def test_a_histogram_draws_shares_over_the_ranges_of_the_format(axes: Any) -> None:
    counts = counted([0.0, 2.0**-30, 2.0**-20, 1.0, 1.5])
    spread = range_shown("fp16", [counts])
    assert spread == (-30, 20)
    draw_histogram(axes, "fp16", {"weights": counts}, spread)
    bars, *spans = axes.patches
    shares, edges, _ = bars.get_data()
    drawn = {int(e): float(share) for e, share in zip(edges, shares, strict=False) if share}
    assert drawn == {-30: 25.0, -20: 25.0, 0: 50.0}
    ends = [(span.get_x(), span.get_x() + span.get_width()) for span in spans]
    assert ends == [(-30, -25), (-25, -14), (-14, 16), (16, 20)]
    assert [text.get_text() for text in axes.texts] == ["flushed", "subnormal", "normal in FP16", "overflow"]


def test_the_range_shown_ends_with_what_is_counted() -> None:
    """Of a wide format only where values are, and of a narrow one not much beyond its range."""
    assert range_shown("bf16", [counted([1.0], "bf16")]) == (-8, 8)
    assert range_shown("bf16", [counted([2.0**-130, 2.0**127], "bf16")]) == (-138, 129)
    assert range_shown("fp16", [counted([2.0**20], "bf16")]) == (-29, 21)
    assert range_shown("fp16", [counted([2.0**100], "bf16")]) == (-29, 28)


def test_the_outermost_bars_hold_what_is_beyond_them(axes: Any) -> None:
    counts = counted([2.0**-90, 2.0**-92, 1.0, 2.0**100], "bf16")
    spread = range_shown("fp16", [counts])
    draw_histogram(axes, "fp16", {"weights": counts}, spread)
    shares, edges, _ = axes.patches[0].get_data()
    assert spread == (-37, 28) and (edges[0], edges[-1]) == spread
    assert (shares[0], shares[37], shares[-1], sum(shares)) == (50.0, 25.0, 25.0, 100.0)


def test_the_sweep_draws_lines_up_to_the_first_overflow_and_crosses_from_there(axes: Any) -> None:
    draw_sweep(axes, swept([(0.2, 0), (0.02, 0), (0, 1)], [(0.1, 0), (0, 3), (0, 0)]))
    lines = {(line.get_label(), line.get_marker()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines[("block 0", ".")] == ([0, 2], [10.0, 0.0]) and lines[("head", "^")] == ([0, 2], [20.0, 2.0])
    crosses = sorted((*x, *y) for (_, marker), (x, y) in lines.items() if marker == "x" and x)
    assert crosses == [(2, 0.0), (4, 0.0)]


def test_of_many_blocks_only_the_first_and_the_last_are_named(axes: Any) -> None:
    layers = dict.fromkeys(("head", *(f"block {i}" for i in range(12)), "embedding"), (0.1, 0))
    draw_sweep(axes, replace(by_hand({}), sweep=[{"exponent": 0, "layers": layers}]))
    named = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert named == ["embedding", "block 0", "block 11", "head"] and len(axes.lines) == 14
    blocks = [line.get_linestyle() for line in axes.lines if line.get_marker() == "."]
    assert len(blocks) == 12 and all(one != other for one, other in pairwise(blocks))


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("fp8", {}), ("nvfp4", {}), ("bf16-kahan", {}), ("bf16-remainder", {}), ("adam-fp8", {}), ("apex-o2", {}),
        ("bf16", {"loss_scale": "megatron", "init_scale": 1e38, "growth_interval": 1}),  # S becomes infinite
    ],
)  # fmt: skip
def test_recipes_of_every_kind_and_an_infinite_scale_have_a_page(recipe: str, more: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 4}
    inspection = inspect(fresh(Config.of({**sizes, "recipe": recipe, **more})), what_if=("e4m3", "fp16"))
    text = precision_page(inspection, MADE)
    assert ("fp32 masters, in two halves" in text) == (recipe == "bf16-remainder")
    assert ("divided by its scales" in " ".join(terminal_text(inspection).split())) == (recipe in ("fp8", "nvfp4"))
    assert math.isinf(inspection.rows[-1].loss_scale) == bool(more)


def test_a_skipped_step_does_not_always_halve_the_scale() -> None:
    """Megatron bears one overflow before it backs off."""
    pytest.importorskip("matplotlib")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "steps": 2}
    inspection = inspect(fresh(Config.of({**sizes, "loss_scale": "megatron"})))
    assert inspection.rows[0].skipped and inspection.rows[1].loss_scale == inspection.rows[0].loss_scale
    (picture, _) = run_pictures(inspection)
    assert "is reduced, at once or after several of them" in picture.caption and "halves" not in picture.caption


def test_the_loss_scale_is_drawn_with_the_steps_that_were_skipped(axes: Any) -> None:
    draw_loss_scale(axes, [step_row(1, scale=8.0, skipped=True), step_row(2, scale=4.0)])
    line, marks = axes.lines
    assert list(line.get_ydata()) == [3.0, 2.0]
    assert (list(marks.get_xdata()), list(marks.get_ydata())) == ([1], [3.0])


@needs_matplotlib
def test_each_case_has_the_figures_that_it_can_have() -> None:
    def titles(case: str) -> list[str]:
        return [picture.title for pictures in pictures_of(case).values() for picture in pictures]

    layers = [title for _, title, _, _ in PANELS]
    scaled = f"Gradients in FP16 times the loss scale, {scales_text(inspected('fp16').rows)}"
    gradients, sweep = ["Gradients in FP16 before the loss scale", scaled], "Flushed to zero, layer by layer"
    assert titles("fp16") == ["Weights in FP16", "Activations in FP16", *gradients, sweep, "Loss scale", "Loss", *layers]
    plain = "Gradients in BF16 (there is no loss scale)"
    assert titles("bf16") == ["Weights in BF16", "Activations in BF16", plain, "Loss", *layers]
    moved = ["Weights that an update did not move", "Weights that have moved since the start"]
    assert titles("pure-bf16") == ["Activations in BF16", plain, "Updated states in BF16", "Loss", *moved, *layers]
    assert titles("fp32") == ["Loss", *layers]
    assert titles("all skipped")[-6:] == ["Loss scale", "Loss", *layers]


@needs_matplotlib
def test_a_figure_that_would_show_nothing_is_left_out_with_a_sentence() -> None:
    nothing = swept([(0, 0), (0, 0)], [(0, 0), (0, 0)])
    assert sweep_pictures(nothing) == [] and sweep_text(nothing).startswith("Nothing to show: with the loss scales of 1 to 2^2")
    assert len(sweep_pictures(swept([(0, 0)], [(0, 1)]))) == 1 and "16 bits" in sweep_text(by_hand({}))
    apart, rows = by_hand({}), [replace(step_row(i), alone_still=0.5, alone_moved=1.0) for i in (1, 2)]
    same = replace(apart, rows=rows)
    last = replace(apart, rows=[rows[0], replace(rows[1], alone_still=0.51)])
    assert [[picture.name for picture in update_pictures(each)] for each in (apart, same, last)] == [
        ["still", "moved"],
        [],
        ["still"],
    ]
    assert [sum(SAME in text for text in update_texts(each)) for each in (apart, same, last)] == [0, 2, 1]


@needs_matplotlib
def test_gradients_before_the_loss_scale_are_the_unscaled_ones() -> None:
    inspection = by_hand({"lm_head:linear.dw.dw": counted([2.0**-20, 2.0**8, 0.0])}, 256.0)
    before, after = all_pictures(inspection)["exponents"]
    titles = "Gradients in FP16 before the loss scale", "Gradients in FP16 times the loss scale, 2^8"
    assert (before.title, after.title) == titles
    assert before.caption.startswith("3 values, exponents 2^-28 to 2^0.") and "50 % below it" in before.caption
    assert after.caption.startswith("3 values, exponents 2^-20 to 2^8.") and " 0 % below it" in after.caption
    assert "33 % of all values are zero" in before.caption


@needs_matplotlib
def test_captions_on_updates_name_what_the_recipe_keeps() -> None:
    def captions(case: str) -> list[str]:
        return [*update_texts(inspected(case))[1:], *(picture.caption for picture in pictures_of(case)["updates"])]

    rows = [row for row in inspected("bf16").rows if not row.skipped]
    mean = percent(sum(row.weights_still or 0.0 for row in rows) / len(rows))
    assert f"{mean} of the bf16 copies of them" in captions("bf16")[0] and "of the fp32 masters" in captions("bf16")[0]
    last = rows[-1]
    assert last.weights_moved is not None
    at_start = percent(1 - last.weights_moved)
    assert f"After step 4, {at_start} of the bf16 copies have their initial values" in captions("bf16")[1]
    assert "of the fp32 weights" in captions("fp32")[0]
    assert "of the bf16 weights without masters" in captions("pure-bf16")[0]


# -- the page as HTML --------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a page holds, and every tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.errors: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.feed(text)
        self.close()
        self.errors += [f"{tag} is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)
        if tag == "sup":
            self.handle_data("^")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.errors += [f"{tag} repeats an attribute"] * (len(found) < len(attrs))
        if found.get("role") == "region":
            self.table = self.tables.setdefault(found["aria-label"] or "", [])
        if tag == "tr":
            self.table.append([])
        if tag in ("th", "td"):
            self.table[-1].append("")
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"{tag} is closed where it is not open")

    def handle_data(self, text: str) -> None:
        text = text.replace("\N{NO-BREAK SPACE}", " ")
        for tag in set(self.open):
            self.texts[tag][-1] += text
        if {"th", "td"} & set(self.open):
            self.table[-1][-1] += text

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


def without_origin(text: str) -> str:
    """A page without what its head says on when, where and by which command it was made."""
    whole, count = re.subn(r'<div class="made">.*?</div>', "", text, flags=re.DOTALL)
    assert count == 1
    return whole


def complaints(text: str) -> list[str]:
    """What is wrong with a page: tags, ids that clash or lead nowhere, things from outside, scripts other than SCRIPTS."""
    reader = Reader(functools.reduce(lambda rest, script: rest.replace(script, ""), SCRIPTS, text))
    ids = reader.attributes("id")
    errors = reader.errors + [f"two of {i}" for i in set(ids) if ids.count(i) > 1]
    used = [link.removeprefix("#") for name in ("href", "xlink:href") for link in reader.attributes(name)]
    used += re.findall(r"url\(#?([^)]*)\)", text)
    errors += [f"nothing is called {name}" for name in used if name not in ids]
    outside = ("src", "srcset", "data", "action", "poster", "onload", "onclick")
    errors += [f"{name} at {tag}" for tag, attrs in reader.tags for name in attrs if name in outside]
    foreign = ("script", "link", "iframe", "object", "embed", "base", "img")
    errors += [f"{tag} is there" for tag, _ in reader.tags if tag in foreign]
    errors += ["a style from elsewhere"] * ("@import" in text)
    errors += [f"{tag} without scope" for tag, attrs in reader.tags if tag == "th" and "scope" not in attrs]
    return errors


@needs_matplotlib
@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_stands_alone(case: str) -> None:
    assert complaints(page_of(case)) == []
    reader = Reader(page_of(case))
    tags = [tag for tag, _ in reader.tags]
    assert [tags.count(tag) for tag in ("main", "h1", "title")] == [1, 1, 1]
    assert tags.count("section") == tags.count("h2") and reader.attributes("lang") == ["en"]
    links = [link for tag, attrs in reader.tags if tag == "a" for link in [attrs["href"]]]
    assert links == [f"#{attrs['id']}" for tag, attrs in reader.tags if tag == "section"]
    assert reader.texts["a"] == reader.texts["h2"]
    assert reader.attributes("charset") == ["utf-8"] and "width=device-width, initial-scale=1" in reader.attributes("content")
    assert not re.search(r"\bnan\b|\bNone\b(?! of)", " ".join(reader.texts["section"]))


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("<p>", "p is not closed"),
        ("<b></i></b>", "i is closed where it is not open"),
        ('<p id="a"></p><p id="a"></p>', "two of a"),
        ('<a href="http://a.b"></a>', "nothing is called http://a.b"),
        ('<path clip-path="url(#c)"/>', "nothing is called c"),
        ("<style>p { background: url(a.png) }</style>", "nothing is called a.png"),
        ("<script></script>", "script is there"),
        ('<img src="a.png"/>', "src at img"),
    ],
)
def test_what_is_wrong_with_a_page_is_seen(bad: str, complaint: str) -> None:
    assert complaint in complaints(bad)


@needs_matplotlib
@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_there_with_its_label_and_caption(case: str) -> None:
    reader = Reader(page_of(case))
    pictures = [picture for chosen in pictures_of(case).values() for picture in chosen]
    images = [attrs for tag, attrs in reader.tags if tag == "svg"]
    assert [attrs["aria-label"] for attrs in images] == [unescape(picture.label) for picture in pictures]
    assert {attrs["role"] for attrs in images} == {"img"}
    captions = [text.replace("^", "") for text in reader.texts["figcaption"]]
    assert captions == [picture.caption.replace("^", "") for picture in pictures] and len(captions) >= 2


@needs_matplotlib
@pytest.mark.parametrize("case", ["fp16", "pure-bf16", "amp-bf16", "mlp"])
def test_the_tables_hold_every_number(case: str) -> None:
    inspection, tables = inspected(case), Reader(page_of(case)).tables
    heads, *worst = tables["The worst tensors"]
    for v, row in zip(verdicts_of(inspection)[:20], worst, strict=True):
        cells, counts = dict(zip(heads, row, strict=True)), inspection.sites[v.site]
        assert [*row[:2], *row[-3:]] == [v.name, v.reason, v.kind, counts.fmt, cast_of(v.site)]
        assert cells["SNR"] == next(column.cell(counts) for column in COLUMNS if column.heading == "SNR")
        at_one = inspection.unscaled[v.site].flushed_at(0, counts.fmt) if v.site in inspection.unscaled else None
        assert cells.get("zero at S = 1", "-") in ("-" if at_one is None else percent(at_one), "-")
    assert "overflowed" not in heads or any(row[heads.index("overflowed")] != "0" for row in worst)
    every = {row[0]: row[1:] for row in tables["All tensors"][1:]}
    assert every.keys() == inspection.sites.keys()
    for site, counts in inspection.sites.items():
        assert every[site] == [kind_of(site), counts.fmt, *(column.cell(counts) for column in COLUMNS)]
        nonzero = counts.elements - counts.zeros
        cells = dict(zip(tables["All tensors"][0][1:], every[site], strict=True))
        assert cells["elements"] == f"{counts.elements:,}" and cells["overflowed"] == f"{counts.overflowed:,}"
        assert cells["flushed"] == percent(counts.flushed / nonzero if nonzero else 0.0)
    kinds = [row[0] for row in tables["All casts by kind of tensor"][1:]]
    assert kinds == [total.kind for total in totals(inspection.sites)]
    assert [row[0] for row in tables["What the columns mean"][1:]] == [column.heading for column in COLUMNS]


@needs_matplotlib
def test_other_formats_are_shown_where_they_were_asked_for() -> None:
    table = Reader(page_of("fp16")).tables["By kind of tensor"]
    assert table[1][:2] == ["weights", "fp16 (this run)"] and [row[0] for row in table[2:4]] == ["e4m3", "bf16"]
    expected = dict(dict(other_formats_by_kind(inspected("fp16")))["weights"])["bf16"]
    assert expected is not None and table[3][4] == f"{expected.snr:.1f} dB"
    assert "first multiplied by a power of two" in page_of("fp16") and "By kind of tensor" not in Reader(page_of("mlp")).tables
    assert len(Reader(page_of("fp16")).tables["The worst tensors in other formats"]) == 1 + 20 * 3
    spans = [int(span) for span in Reader(page_of("fp16")).attributes("rowspan")]
    assert spans.count(3) == 20 + len(totals(inspected("fp16").sites)) and set(spans) == {1, 3}


@needs_matplotlib
def test_text_is_escaped() -> None:
    inspection = replace(inspected("fp32"), what='<script>alert("1")</script> & Größe')
    text = precision_page(inspection, replace(MADE, command="python 'a & b' <i>"))
    assert complaints(text) == [] and text.isascii()
    reader = Reader(text)
    assert '<script>alert("1")</script> & Größe' in reader.texts["main"][0] and reader.texts["code"] == ["python 'a & b' <i>"]


@needs_matplotlib
def test_the_same_inspection_makes_the_same_page() -> None:
    assert precision_page(inspected("fp16"), MADE) == page_of("fp16")
    assert precision_page(inspected("fp16"), replace(MADE, command="another command")) != page_of("fp16")


def test_every_color_has_one_for_dark_screens() -> None:
    light, dark = (re.findall(r"(--[\w-]+): (#\w+)", block) for block in re.findall(r":root {.*}", CSS))
    assert [name for name, _ in light] == [name for name, _ in dark] and len(light) == 11
    assert {f"--{name}" for name in OF_SCREEN.values()} <= {name for name, _ in light}
    assert [name for (name, color), (_, other) in zip(light, dark, strict=True) if color == other] == []


# -- the page in a browser ---------------------------------------------------------------------------------------------


@needs_browser
@needs_matplotlib
def test_a_browser_shows_all_of_it_on_a_desktop_and_on_a_phone(tmp_path: Path) -> None:
    text = page_of("fp16")
    wide = text.replace("</main>", '<div style="width: 3000px">x</div></main>')
    found = measured(tmp_path, {"desktop": (text, 1280), "phone": (text, 390), "overflowing": (wide, 390)})
    assert found["overflowing"]["page"] > 3000  # so that the next lines can fail
    for name, width in (("desktop", 1280), ("phone", 390)):
        assert found[name]["window"] == width and found[name]["page"] <= width
    n = sum(len(pictures) for pictures in pictures_of("fp16").values())
    for name, least in (("desktop", 400), ("phone", 340)):
        figures = found[name]["figures"]
        assert len(figures) == n and min(figure["width"] for figure in figures) >= least
        assert all(figure["height"] == pytest.approx(figure["width"] * 3.1 / 4.3, rel=0.02) for figure in figures)
    first, second = ({figure["top"] for figure in found[name]["figures"][:2]} for name in ("desktop", "phone"))
    assert len(first) == 1 and len(second) == 2  # beside each other, and one below the other
    boxes = found["phone"]["boxes"]
    assert max(visible for visible, _ in boxes) <= 390 and max(inside for _, inside in boxes) > 800


@needs_browser
@needs_matplotlib
def test_a_screenshot_is_not_blank(tmp_path: Path) -> None:
    from matplotlib.image import imread

    for name, text in (("report", page_of("fp16")), ("blank", "<!DOCTYPE html><title>blank</title>")):
        (tmp_path / f"{name}.html").write_text(text)
        target = (tmp_path / f"{name}.html").as_uri()
        browse(tmp_path, f"--screenshot={tmp_path / name}.png", "--window-size=1280,1200", target)
    shots = {name: imread(tmp_path / f"{name}.png")[..., :3] for name in ("report", "blank")}
    colors = {name: len(np.unique(shot.reshape(-1, 3), axis=0)) for name, shot in shots.items()}
    assert shots["report"].shape == (1200, 1280, 3)
    assert colors["blank"] == 1 and colors["report"] > 100


# -- the terminal and the data -----------------------------------------------------------------------------------------


def test_the_terminal_gets_summary_tables_and_the_ten_worst() -> None:
    inspection = inspected("fp16")
    text = terminal_text(inspection)
    flowing = " ".join(text.split())
    for sentence in summary(inspection):
        assert sentence in flowing
    ranked = verdicts_of(inspection)
    for v in ranked[:10]:
        assert f"{v.name} ({cast_of(v.site)}) {v.text}" in flowing
    assert f"({cast_of(ranked[10].site)}) {ranked[10].text}" not in flowing
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["tensors"] == [str(total.sites) for total in totals(inspection.sites)]
    assert rows["elements"] == [f"{total.counts.elements:,}" for total in totals(inspection.sites)]
    assert {line.split()[0] for line in text.splitlines() if line} >= {column.heading for column in COLUMNS}
    assert "e4m3" in text and "e4m3" not in terminal_text(inspected("mlp"))


def test_the_terminal_says_so_where_there_is_no_cast() -> None:
    text = terminal_text(inspected("fp32"))
    assert "casts no tensor to a narrower format" in text and "elements" not in text


def test_the_data_are_those_of_the_inspection() -> None:
    inspection = inspected("fp16")
    found = json.loads(json_text(data(inspection)))
    assert found["config"] == asdict(inspection.config) and found["what"] == inspection.what
    assert found["rows"] == [asdict(row) for row in inspection.rows]
    assert [row["step"] for row in found["sampled"]] == [1, 2, 4]
    ranked = {v.site: v for v in verdicts_of(inspection)}
    assert found["sites"].keys() == inspection.sites.keys()
    for site, counts in inspection.sites.items():
        row = found["sites"][site]
        assert row["verdict"] == ranked[site].text and row["kind"] == kind_of(site)
        assert row["flushed"] == counts.flushed == sum(s["sites"][site]["flushed"] for s in found["sampled"])
        assert row["shares"]["rounded"] == counts.share("rounded")
        assert row["snr_db"] == (counts.snr if math.isfinite(counts.snr) else None)
        assert sum(row["binades"].values()) == counts.binades.sum() and all(int(e) >= LOWEST for e in row["binades"])
        assert (row["binades_unscaled"] is None) == (site not in inspection.unscaled)
    assert [row["loss_scale"] for row in found["sweep"]] == [2.0 ** row["exponent"] for row in inspection.sweep]
    assert found["sweep"][0]["layers"]["block 0"]["flushed"] == inspection.sweep[0]["layers"]["block 0"][0]
    assert found["what_if"].keys() == {"e4m3", "bf16"}


# -- the script --------------------------------------------------------------------------------------------------------

TINY_FLAGS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
FP16_FLAGS = [*TINY_FLAGS, "--init-scale", str(2.0**17)]


def run(*words: str) -> None:
    """What the script does with these words, in this process."""
    module = load_script("inspect_precision")
    arguments = vars(module.parser().parse_args(words))
    own = {name: arguments.pop(name) for name in module.OWN_FLAGS}
    inspect_precision(arguments, **own)


def in_a_process(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "scripts/inspect_precision.py", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_flags_of_the_script_are_fields_of_the_configuration() -> None:
    names = {field.name for field in fields(Config)}
    script = load_script("inspect_precision")
    assert set(script.CONFIG_FLAGS) | {"steps"} <= names and not names & set(script.OWN_FLAGS)


@needs_matplotlib
def test_a_fresh_run_in_a_process_of_its_own_writes_the_same_page(tmp_path: Path) -> None:
    out, target = tmp_path / "new" / "report.html", tmp_path / "data.json"
    words = [*FP16_FLAGS, "--every", "2", "--what-if", "e4m3,bf16"]
    done = in_a_process(*words, "--out", str(out), "--json", str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"written: {target}\nwritten: {out} (open it in a browser)\n")
    made, text = Reader(out.read_text()).texts["code"][0], out.read_text()
    assert without_origin(text) == without_origin(page_of("fp16"))
    origin = Reader(text).texts["p"][0]
    assert origin.startswith(f"Made on {datetime.now(UTC):%Y-}")
    assert f"with refimpl {refimpl.__version__}, Python 3." in origin
    assert f"numpy {np.__version__}, ml_dtypes " in origin and f"on {processor()}, by:" in origin
    assert target.read_text() == json_text(data(inspected("fp16"))) + "\n"
    given = {**TINY, "init_scale": 2.0**17}
    assert made == command(given, 2, ["e4m3", "bf16"])
    assert made.startswith("python scripts/inspect_precision.py --n-layer 2") and made.endswith("--every 2 --what-if e4m3,bf16")


def test_without_a_page_no_matplotlib_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    run(*TINY_FLAGS, "--no-page")
    assert "tensors" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(show_precision, "inspect", None)  # called, it would raise another error
    with pytest.raises(UsageError, match="pip install matplotlib"):
        run(*TINY_FLAGS)


@needs_matplotlib
def test_the_page_lands_under_runs_beside_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is the run's, which a mistake is part of; the page says so itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    older = tmp_path / "runs" / "report-fp16-no-unscale.html"
    older.write_text("an older one")
    run(*TINY_FLAGS, "--mistake", "no-unscale")
    precision_page = (tmp_path / "runs" / "report-fp16-no-unscale-2.html").read_text()
    assert complaints(precision_page) == [] and older.read_text() == "an older one"
    assert "<h1>Precision report: gpt, fp16, with the MISTAKE no-unscale</h1>" in precision_page
    assert f"<p>{MISTAKES['no-unscale'].announcement}.</p>" in precision_page


def test_a_run_of_train_py_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a run"
    train({**TINY, "eval_batches": 1, "sample_bytes": 0}, folder, False, False, None)
    run("--run", str(folder), "--steps", "2", "--no-page", "--json", str(tmp_path / "data.json"))
    assert "steps from the checkpoint of" in capsys.readouterr().out
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["what"] == f"2 steps from the checkpoint of {folder.name} at step 4" and len(found["rows"]) == 2
    line = command({"run": folder, "steps": 2}, 10, [])
    assert line == f"python scripts/inspect_precision.py --run '{folder}' --steps 2"
    with pytest.raises(UsageError, match="--run has a configuration of its own: it takes no --lr, --seed"):
        run("--run", str(folder), "--steps", "2", "--lr", "1", "--seed", "3", "--no-page")
    with pytest.raises(UsageError, match="--steps is 0"):
        run("--run", str(folder), "--steps", "0", "--no-page")


def test_after_a_checkpoint_fifty_steps_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(show_precision, "from_checkpoint", lambda folder, steps: asked.append(steps))
    show_precision.make_source({}, tmp_path, None)
    assert asked == [50] and show_precision.make_source({}, None, None).steps == 200


def test_a_trace_is_taken_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.safetensors"
    save(path, record(Config.of(TINY)))
    run("--trace", str(path), "--no-page")
    assert "The 4 steps of the trace t.safetensors" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--trace has a configuration of its own: it takes no --steps"):
        run("--trace", str(path), "--steps", "2", "--no-page")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-page", "--out", "a.html"], "contradict"),
        (["--run", "a", "--trace", "b", "--no-page"], "--run and --trace contradict each other"),
        (["--trace", "b", "--init-from", "c", "--no-page"], "--trace and --init-from contradict each other"),
        (["--no-page", "--plot", "layers.svg"], "its name must end in .png"),
        (["--run", "missing", "--no-page"], "there is no run in missing"),
        (["--trace", "missing", "--no-page"], "missing"),
        (["--every", "0", "--no-page"], "--every is 0"),
        (["--what-if", "fp8", "--no-page"], "--what-if: unknown format 'fp8'"),
        (["--recipe", "fp7", "--no-page"], "unknown recipe 'fp7'"),
        (["--no-page", "--json", "."], "--json . is a folder"),
        (["--no-page", "--json", "file/data.json"], "--json file/data.json: its folder cannot be created"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_before_any_step(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        run(*words)
    assert "\n" not in str(error.value) and capsys.readouterr() == ("", "")


def test_the_exit_code_of_wrong_arguments_is_2() -> None:
    done = run_here("inspect_precision", "--what-if", "fp8", "--no-page")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --what-if: unknown format 'fp8': choose one of fp32,")
    assert done.stderr.count("\n") == 1
