"""Sentences and table cells on an inspection, for the page and for the terminal."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from refimpl.numerics.formats import FORMATS
from refimpl.numerics.rounding_effects import LOWEST, NEGLIGIBLE, Counts
from refimpl.numerics.rounding_words import decibels, percent, powers
from refimpl.optim.loss_scalers import find_scaler
from refimpl.parity.mistakes import MISTAKES
from refimpl.tools.precision_report.collect import Inspection, StepRow, has_own_scale, uncounted
from refimpl.tools.precision_report.counts import by_kind, kind_of
from refimpl.tools.precision_report.verdicts import Verdict, plain_name

# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One column of a table of counts: its heading, the text of a cell, and its meaning."""

    heading: str
    cell: Callable[[Counts], str]
    meaning: str


def _share(name: str) -> Callable[[Counts], str]:
    return lambda counts: percent(counts.share(name))


def cast_of(site: str) -> str:
    """Return the cast of a site: 'transformer.h.3.attn:attention.scale.dS' -> 'attention.scale.dS'."""
    return site.partition(":")[2]


def exponents_text(counts: Counts) -> str:
    """Return the range of binades of the values: '2^-24 to 2^3'."""
    return "-" if counts.exponents is None else f"2^{counts.exponents[0]} to 2^{counts.exponents[1]}"


COLUMNS = (
    Column("elements", lambda c: f"{c.elements:,}", "number of values rounded, over all inspected steps"),
    Column("exact", _share("exact"), "the value is one of the format and did not change"),
    Column("rounded", _share("rounded"), "it became a neighboring value of the format"),
    Column("ties", _share("tie"),
           "it was halfway between two values of the format, and became the even one (or either, with stochastic rounding)"),
    Column("subnormal", _share("subnormal"), "it became a subnormal value, which has fewer significant bits the smaller it is"),
    Column("flushed", _share("flushed"), "it was not zero, and became zero"),
    Column("overflowed", lambda c: f"{c.overflowed:,}",
           "number of values that were too large and became an infinity, or NaN if the format has no infinity"),
    Column("saturated", lambda c: f"{c.saturated:,}", "number of values that were too large and became the largest value"),
    Column("arrived", lambda c: f"{c.arrived:,}", "number of values that were Inf or NaN before the cast"),
    Column("SNR", lambda c: decibels(c.snr),
           "signal-to-noise ratio, 10 log10(sum x^2 / sum (x - y)^2) for x rounded to y, over finite values"),
    Column("exponents", exponents_text,
           "the smallest and the largest e of values in [2^e, 2^(e+1)), before rounding"),
)  # fmt: skip
"""All columns, with the definitions of `counts.Effects` and `counts.Counts`. Shares are of the finite nonzero values."""

OTHER_COLUMNS = tuple(column for column in COLUMNS if column.heading in ("flushed", "overflowed", "saturated", "SNR"))
"""The columns in tables of other formats."""


@dataclass(frozen=True)
class Total:
    """All sites of one kind that round to one format, counted together."""

    kind: str
    fmt: str
    sites: int
    counts: Counts


def totals(sites: Mapping[str, Counts]) -> list[Total]:
    """Return the totals of each kind, in the order of a step."""
    result = []
    for kind, chosen in by_kind(sites):
        for fmt in dict.fromkeys(counts.fmt for counts in chosen.values()):
            same = [counts for counts in chosen.values() if counts.fmt == fmt]
            result.append(Total(kind, fmt, len(same), merged(same)))
    return result


def merged(counts: Iterable[Counts]) -> Counts:
    """Return the sum of counts of one format; there must be at least one."""
    first, *others = counts
    return functools.reduce(Counts.__iadd__, others, Counts(first.fmt).__iadd__(first))


Compared = list[tuple[str, Counts | None]]
"""Formats with the counts of rounding the same tensors to each; None for a format that holds all their values."""


def other_formats_by_kind(inspection: Inspection) -> list[tuple[str, Compared]]:
    """Return, for each kind, the counts in the run's own format and in each of the others."""
    return [
        (kind, [(total.fmt, total.counts) for total in totals(chosen)] + _others(inspection, list(chosen)))
        for kind, chosen in by_kind(inspection.sites)
    ]


def other_formats_of(inspection: Inspection, worst: Sequence[Verdict]) -> list[tuple[str, Compared]]:
    """Return, for each of some tensors, the counts in the run's own format and in each of the others."""
    own = inspection.sites
    return [(f"{v.name} ({cast_of(v.site)})", [(own[v.site].fmt, own[v.site]), *_others(inspection, [v.site])]) for v in worst]


def _others(inspection: Inspection, sites: Sequence[str]) -> Compared:
    found = {fmt: [counts[site] for site in sites if site in counts] for fmt, counts in inspection.others.items()}
    return [(fmt, merged(counts) if counts else None) for fmt, counts in found.items()]


# -- sentences ---------------------------------------------------------------------------------------------------------


def summary(inspection: Inspection) -> list[str]:
    """Return sentences on the run, the inspected casts and their losses, the loss scale, and the training loss."""
    sentences = (_the_run, _the_mistake, _the_casts, _the_states, _the_gradients)
    return [*filter(None, (sentence(inspection) for sentence in sentences)), loss_sentence(inspection.rows)]


def _the_mistake(inspection: Inspection) -> str:
    mistake = inspection.config.mistake
    return "" if mistake == "none" else f"{MISTAKES[mistake].announcement}."


def _the_run(inspection: Inspection) -> str:
    config, what = inspection.config, inspection.what
    mistake = f", with the mistake '{config.mistake}' injected" if config.mistake != "none" else ""
    return (
        f"{what[0].upper()}{what[1:]}: {config.model} with {config.make_model().n_params:,} parameters, "
        f"recipe {config.recipe} ({config.make_recipe().summary}){mistake}."
    )


def _the_casts(inspection: Inspection) -> str:
    n = len(inspection.sampled)
    looked = f"{n} of {plural(len(inspection.rows), 'step')} {'was' if n == 1 else 'were'} inspected"
    if not inspection.sites:
        return f"{looked}: this recipe casts no tensor to a narrower format, so there is no cast to count."
    every = inspection.sites.values()
    looked += f", at {len(every)} casts each: {sum(counts.elements for counts in every):,} values in all."
    nonzero = max(sum(counts.nonzero for counts in every), 1)
    flushed, overflowed, saturated = (sum(getattr(c, name) for c in every) for name in ("flushed", "overflowed", "saturated"))
    arrived = sum(counts.arrived for counts in every)
    looked += f" {arrived:,} of them arrived as Inf or NaN." if arrived else ""
    if not (flushed or overflowed or saturated):
        return f"{looked} {'None of the others' if arrived else 'None of them'} was flushed to zero, and none overflowed."
    lost = f"{percent(flushed / nonzero)} of the nonzero values became zero, {overflowed:,} overflowed"
    lost += f", and {saturated:,} became the largest value." if saturated else "."
    worst = max(inspection.sites, key=lambda site: inspection.sites[site].share("flushed"))
    share = percent(inspection.sites[worst].share("flushed"))
    most = f" The tensor with the largest share of new zeros is {plain_name(worst)}: {share}." if flushed else ""
    return f"{looked} {lost}{most}"


def _the_states(inspection: Inspection) -> str:
    """Return a sentence on the states whose roundings are not counted, or ''."""
    kept = [f"{kind} ({name})" for kind, name in uncounted(inspection.config).items()]
    return f"The roundings of {' and '.join(kept)} are not counted: these encodings do not report them." if kept else ""


def _the_gradients(inspection: Inspection) -> str:
    skipped = " ".join(filter(None, (skipped_sentence(inspection.rows), inspection.non_finite)))
    if not inspection.unscaled:
        return skipped
    every = inspection.unscaled.values()
    if any(counts.arrived for counts in every) and not any(counts.nonzero for counts in every):
        return f"All gradients were Inf or NaN before they were rounded, so nothing can be said about a loss scale. {skipped}"
    scaled = [inspection.sites[site] for site in inspection.unscaled]
    actual = percent(_joint(scaled, lambda counts: counts.share("flushed")))
    quantized = [c for site, c in inspection.sites.items() if kind_of(site).endswith("gradients") and has_own_scale(c)]
    what = "16-bit gradients" if quantized else "gradients"
    if quantized:
        flushed = percent(_joint(quantized, lambda counts: counts.share("flushed")))
        skipped = f"Quantized gradients have scales of their own: {flushed} of the nonzero values became zero. {skipped}"
    if scales(inspection.rows) == [1.0]:
        no_scale = "S was 1" if find_scaler(inspection.config.loss_scale or "") else "There is no loss scale (S = 1)"
        return f"{no_scale}, and {actual} of the nonzero {what} became zero. {skipped}"
    at_one = percent(_joint(inspection.unscaled.values(), lambda counts: counts.flushed_at(0, counts.fmt)))
    return (
        f"Without a loss scale, {at_one} of the nonzero {what} would have become zero; "
        f"with that of this run (S = {scales_text(inspection.rows)}) {actual} did. {skipped}"
    )


def _joint(every: Iterable[Counts], share: Callable[[Counts], float]) -> float:
    """Return a share of all nonzero values from the share of each tensor."""
    weighted = [(counts.nonzero, share(counts)) for counts in every]
    return sum(n * part for n, part in weighted) / max(sum(n for n, _ in weighted), 1)


def skipped_sentence(rows: Sequence[StepRow]) -> str:
    """Return a sentence on the skipped steps."""
    steps = [row.step for row in rows if row.skipped]
    if not steps:
        return "No step was skipped."
    listed = ", ".join(str(step) for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    were = "was" if len(steps) == 1 else "were"
    return f"{len(steps)} of {plural(len(rows), 'step')} {were} skipped because a gradient was not finite (step {listed})."


def loss_sentence(rows: Sequence[StepRow]) -> str:
    """Return a sentence on the first and the last loss, and on losses that were not finite."""
    finite = [row for row in rows if math.isfinite(row.loss)]
    broken = [row.step for row in rows if not math.isfinite(row.loss)]
    if not finite:
        return "The loss was not finite at any step."
    way = f"The loss was {finite[0].loss:.3f} at step {finite[0].step} and {finite[-1].loss:.3f} at step {finite[-1].step}"
    return f"{way}; it was not finite at {plural(len(broken), 'step')}, first at step {broken[0]}." if broken else f"{way}."


def worst_sentence(ranked: Sequence[Verdict], n: int) -> str:
    """Return the sentence that introduces the list of worst tensors."""
    chosen = f"{min(n, len(ranked))} of {len(ranked)} tensors"
    if ranked[0].severity < NEGLIGIBLE:
        least = percent(NEGLIGIBLE)
        return f"No tensor loses more than {least} of its values beyond the usual rounding; the first {chosen} by order:"
    return f"The {chosen} that lose most, or would without a loss scale, the worst first:"


def range_sentence(counts: Counts) -> str:
    """Return a sentence on the shares of the nonzero values in each range of the format, by their binades."""
    fmt, shares = counts.fmt, zone_shares(counts)
    rest = f" {percent(counts.zeros / counts.elements)} of all values are zero and not shown." if counts.zeros else ""
    rest += f" {plural(counts.arrived, 'value')} more had been Inf or NaN before." if counts.arrived else ""
    if not counts.overflowed and not any(shares[zone] for zone in ("flushed", "subnormal", "overflow")):
        return f"All finite nonzero values are in the normal range of {fmt}.{rest}"
    where = (
        f"Of the nonzero values, {percent(shares['subnormal'])} are in the subnormal range of {fmt}, where bits are lost, "
        f"{percent(shares['flushed'])} below it, where they become zero, {percent(shares['overflow'])} above the largest "
        f"value, and the rest in the normal range"
    )
    if shares["overflow"] > 0 or counts.overflowed:
        end = f"{fmt} is too small for the largest of them."
    elif shares["flushed"] >= NEGLIGIBLE:
        end = f"{fmt} loses the smallest of them."
    else:
        end = f"less than {percent(NEGLIGIBLE)} is lost, and nothing overflows."
    return f"{where}: {end}{rest}"


def zones(fmt: str) -> tuple[int, int, int]:
    """Return the exponents at which a format's subnormal range, its normal range, and overflow begin: -25, -14, 16 for fp16.

    The first is that of half the smallest subnormal, since larger values round to the smallest subnormal.
    """
    row = FORMATS[fmt]
    lowest, normal, top = (math.frexp(value)[1] - 1 for value in (row.smallest_subnormal, row.smallest_normal, row.max))
    return lowest - 1, normal, top + 1


def zone_shares(counts: Counts) -> dict[str, float]:
    """Return the share of the nonzero values in each zone: flushed, subnormal, normal, overflow."""
    cuts = [max(0, cut - LOWEST) for cut in zones(counts.fmt)]
    bounds = [0, *cuts, counts.binades.size]
    nonzero = max(counts.nonzero, 1)
    names = ("flushed", "subnormal", "normal", "overflow")
    return {name: int(counts.binades[bounds[i] : bounds[i + 1]].sum()) / nonzero for i, name in enumerate(names)}


# -- words -------------------------------------------------------------------------------------------------------------


def scales(rows: Iterable[StepRow]) -> list[float]:
    """Return the loss scales of a run, sorted."""
    return sorted({row.loss_scale for row in rows})


def scales_text(rows: Iterable[StepRow]) -> str:
    """Return the range of loss scales: '2^16', or '2^14 to 2^16'."""
    return powers(scales(rows))


def plural(n: int, noun: str) -> str:
    """Return a number with its noun: '1 step', '2 steps'."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
