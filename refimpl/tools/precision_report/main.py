"""The `inspect_precision` command: trains, prints a summary of the casts, and writes the page and the data."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.rounding_effects import LOWEST, OUTCOMES, Counts
from refimpl.tools.precision_report.collect import (
    Inspection,
    Source,
    fresh,
    from_checkpoint,
    from_trace,
    has_own_scale,
    inspect,
)
from refimpl.tools.precision_report.counts import kind_of
from refimpl.tools.precision_report.layer_figures import draw_layers, plot_for_flag
from refimpl.tools.precision_report.layer_tables import layer_parts, layers_data
from refimpl.tools.precision_report.page import precision_page
from refimpl.tools.precision_report.tables import (
    COLUMNS,
    OTHER_COLUMNS,
    cast_of,
    other_formats_by_kind,
    summary,
    totals,
    worst_sentence,
)
from refimpl.tools.precision_report.verdicts import verdicts_of
from refimpl.training.columns import table
from refimpl.training.config import Config
from refimpl.training.console import json_text
from refimpl.training.html.made import made_now
from refimpl.training.init_from import settings_from
from refimpl.training.outputs import target
from refimpl.training.pictures import save
from refimpl.training.program import as_called
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.run_folder import short_name

STEPS, MORE_STEPS, FIRST_STEPS = 200, 50, 5
"""Default numbers of steps of a new run, after the checkpoint of a run, and of a new run from the weights of another."""
WORST = 10
PAGE = Path("runs/report.html")
"""The default page; the name of the run is added, as in report-fp8.html."""


def inspect_precision(
    given: Mapping[str, Any],
    run: Path | None = None,
    trace: Path | None = None,
    every: int = 10,
    what_if: str = "",
    out: Path | None = None,
    no_page: bool = False,
    json_file: Path | None = None,
    overwrite: bool = False,
    init_from: Path | None = None,
    plot: Path | None = None,
    quiet: bool = False,
) -> None:
    """Train, print the summary, and write the page, the data and the picture.

    given: fields of Config, for a new run. run: the folder of a run to continue. trace: a trace whose run is repeated.
    init_from: a checkpoint or a Hugging Face folder with whose weights a new run starts. plot: a PNG of the layers.
    quiet: show no progress.
    Errors: UsageError, before any step, for contradicting flags, or files that cannot be read or written.
    """
    if no_page and out is not None:
        raise UsageError("--no-page and --out contradict each other: choose one")
    if not no_page:
        _require_matplotlib()
    source = make_source(given, run, trace, init_from)
    formats = [fmt for fmt in what_if.split(",") if fmt]
    page_file = None if no_page else target("--out", out, PAGE.with_stem(f"report-{short_name(source.config)}"), overwrite)
    data_file = None if json_file is None else target("--json", json_file, json_file, overwrite)
    picture = None if plot is None else plot_for_flag(plot, overwrite)
    with ProgressBar(source.steps, "step", quiet=quiet) as bar:
        inspection = inspect(source, every, formats, bar)
    print(terminal_text(inspection))
    if data_file is not None:
        print(f"written: {data_file.write_text(json_text(data(inspection)) + chr(10))}")
    if picture is not None:
        figure, file = picture
        draw_layers(figure, inspection.layers, f"{source.what}, {source.config.recipe}")
        print(f"written: {file.write(lambda temporary: save(figure, temporary))}")
    if page_file is not None:
        called = command({"init_from": init_from, "run": run, "trace": trace, **given}, every, formats)
        page = precision_page(inspection, made_now(called, "numpy", "ml_dtypes"))
        print(f"written: {page_file.write_text(page)} (open it in a browser)")


def make_source(given: Mapping[str, Any], run: Path | None, trace: Path | None, init_from: Path | None = None) -> Source:
    """Return the run to inspect. Errors: UsageError for wrong flags, or flags that do not go together."""
    sources = {"--run": run, "--trace": trace, "--init-from": init_from}
    chosen = [name for name, path in sources.items() if path is not None]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} contradict each other: choose one")
    bound = [f"--{name.replace('_', '-')}" for name in given if run is None or name != "steps"]
    if (run or trace) and bound:
        raise UsageError(f"{'--run' if run else '--trace'} has a configuration of its own: it takes no {', '.join(bound)}")
    if run is not None:
        steps = given.get("steps", MORE_STEPS)
        if steps < 1:
            raise UsageError(f"--steps is {steps}: it must be at least 1")
        return from_checkpoint(run, steps)
    if trace is not None:
        return from_trace(trace)
    if init_from is not None:
        settings, first = settings_from(init_from, {"steps": FIRST_STEPS, **given})
        return fresh(Config.of(settings), first)
    return fresh(Config.of({"steps": STEPS, **given}))


def _require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise UsageError("the page needs matplotlib: pip install matplotlib (or give --no-page)") from None


def command(given: Mapping[str, Any], every: int, what_if: Sequence[str]) -> str:
    """Return the command line that makes this page. given: flags and their values; None for one that is not given."""
    flags = {**given, "every": None if every == 10 else every, "what_if": ",".join(what_if) or None}
    words = [word for k, v in flags.items() if v is not None for word in (f"--{k.replace('_', '-')}", str(v))]
    return as_called(shlex.join(["python", "scripts/inspect_precision.py", *words]))


# -- the terminal ------------------------------------------------------------------------------------------------------


def terminal_text(inspection: Inspection) -> str:
    """Return the summary, a table by kind of tensor, the worst tensors, a table of other formats, and tables of the layers."""
    parts = list(summary(inspection))
    if inspection.sites:
        parts += [_kinds_text(inspection), _worst_text(inspection)]
    if inspection.sites and inspection.what_if:
        parts.append(_other_formats_text(inspection))
    for text, rows in layer_parts(inspection.layers, inspection.scale):
        parts.append(f"{text}\n{table(*rows)}")
    return "\n\n".join(parts) + "\n"


def _kinds_text(inspection: Inspection) -> str:
    """Return a table with one column per kind, which fits a terminal."""
    found = totals(inspection.sites)
    rows = [["format", *(total.fmt for total in found)], ["tensors", *(str(total.sites) for total in found)]]
    rows += [[column.heading, *(column.cell(total.counts) for total in found)] for column in COLUMNS]
    return table(["", *(total.kind for total in found)], rows)


def _worst_text(inspection: Inspection) -> str:
    ranked = verdicts_of(inspection)
    lines = [worst_sentence(ranked, WORST)]
    for v in ranked[:WORST]:
        lines.append(f"{v.name} ({cast_of(v.site)})")
        lines.append(f"    {v.text}")
    return "\n".join(lines)


def _other_formats_text(inspection: Inspection) -> str:
    rows = []
    for kind, formats in other_formats_by_kind(inspection):
        for i, (fmt, counts) in enumerate(formats):
            cells = [column.cell(counts) if counts else "-" for column in OTHER_COLUMNS]
            rows.append([kind if i == 0 else "", fmt, *cells])
    own = "; values that this run quantizes are divided by its scales" * any(map(has_own_scale, inspection.sites.values()))
    heading = f"The same values in other formats; for 8 bits and fewer, each tensor is scaled by a power of two first{own}:"
    return heading + "\n" + table(["", "format", *(column.heading for column in OTHER_COLUMNS)], rows)


# -- data --------------------------------------------------------------------------------------------------------------


def data(inspection: Inspection) -> dict[str, Any]:
    """Return an inspection as plain data. Numbers that are not finite, such as an SNR without error, become null in JSON."""
    ranked = {verdict.site: verdict for verdict in verdicts_of(inspection)}
    return {
        "what": inspection.what,
        "config": asdict(inspection.config),
        "weights_format": inspection.low,
        "non_finite": inspection.non_finite,
        "rows": [asdict(row) for row in inspection.rows],
        "sampled": inspection.sampled,
        "sites": {
            site: {
                "name": ranked[site].name,
                "kind": kind_of(site),
                **_counts_data(counts),
                "binades": _binades(counts),
                "binades_unscaled": _binades(inspection.unscaled[site]) if site in inspection.unscaled else None,
                "severity": ranked[site].severity,
                "verdict": ranked[site].text,
            }
            for site, counts in inspection.sites.items()
        },
        "sweep": [
            {
                "loss_scale": 2.0 ** row["exponent"],
                "layers": {k: {"flushed": share, "overflowed": n} for k, (share, n) in row["layers"].items()},
            }
            for row in inspection.sweep
        ],
        "layers_loss_scale": inspection.scale,
        "layers": layers_data(inspection.layers),
        "what_if": {fmt: {k: _counts_data(c) for k, c in counts.items()} for fmt, counts in inspection.others.items()},
    }


def _binades(counts: Counts) -> dict[int, int]:
    """Return the number of values in [2^e, 2^(e+1)) for each e that has any."""
    return {int(i) + LOWEST: int(counts.binades[i]) for i in np.flatnonzero(counts.binades)}


def _counts_data(counts: Counts) -> dict[str, Any]:
    return {**counts.plain(), "shares": {name: counts.share(name) for name in (*OUTCOMES, "tie", "subnormal")}}
