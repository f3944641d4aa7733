"""`RoundingMonitor`: the effects of all roundings of a step, by site.

A run with a monitor reports its roundings: the name of the site, the values before, and the values after. Nothing in this
module rounds for the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from refimpl.nn.ops import OPS
from refimpl.numerics.arrays import Array
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of, widens_to
from refimpl.numerics.rounding_effects import KINDS, Counts


class RoundingMonitor:
    """Counts all roundings of a step by site: pass it to `Training.set_monitor`, and `take` the counts after the step.

    what_if: other formats; the effects of rounding the same values to them are counted too. Formats of 8 bits and fewer
    saturate, and the tensor is first multiplied by a power of two that brings its largest value just below the format's;
    wider formats take the values unchanged. only: a predicate for the sites that are counted; by default all.
    """

    def __init__(
        self,
        what_if: Sequence[str] = (),
        to_host: Callable[[Array], np.ndarray] = np.asarray,
        only: Callable[[str], bool] = lambda site: True,
    ) -> None:
        self.what_if, self.to_host, self.only = what_if, to_host, only
        self.sites: dict[str, Counts] = {}
        self.others: dict[str, dict[str, Counts]] = {fmt: {} for fmt in what_if}

    def __call__(self, site: str, before: Array, after: Array) -> None:
        """Count one rounding; the run calls this at each."""
        if not self.only(site):
            return
        x, y = self.to_host(before), self.to_host(after)
        self.sites.setdefault(site, Counts(format_of(y))).add(x, y)
        for fmt, counts in self.others.items():
            if not widens_to(format_of(x), fmt):
                scaled = scaled_to_fit(x, fmt)
                counts.setdefault(site, Counts(fmt)).add(scaled, _round_as_if(scaled, fmt))

    def take(self) -> tuple[dict[str, Counts], dict[str, dict[str, Counts]]]:
        """Return the counts since the last call, site -> counts, and those of each other format; start again from zero."""
        result = self.sites, self.others
        self.sites, self.others = {}, {fmt: {} for fmt in self.what_if}
        return result


def scaled_to_fit(x: np.ndarray, fmt: str) -> np.ndarray:
    """Return `x` times the power of two that brings its largest finite magnitude closest below the largest value of `fmt`.

    For formats wider than 8 bits, or if all values are zero, return `x` itself.
    Source: the per-tensor scaling of Micikevicius et al. 2022, arXiv 2209.05433. Differs from the source: the scale is
    a power of two, so that scaling is exact.
    """
    if FORMATS[fmt].bits > 8:
        return x
    wide: np.ndarray = widen(x, "fp64")
    magnitude = np.abs(wide[np.isfinite(wide)])
    largest = float(magnitude.max(initial=0.0))
    if largest == 0:
        return x
    return wide * math.ldexp(1.0, math.floor(math.log2(FORMATS[fmt].max / largest)))


def _round_as_if(x: np.ndarray, fmt: str) -> np.ndarray:
    y: np.ndarray = cast(x, fmt, overflow="saturate" if FORMATS[fmt].bits <= 8 else None)
    return y


# -- kinds of sites ------------------------------------------------------------------------------------------------------


def kind_of(site: str) -> str:
    """Return the kind of tensor that a site rounds: '...h.0.mlp.c_fc:linear.dw.dw' is of 'weight gradients'.

    A site is named `place:operation.parts.operand`; the gradient of operand x is called dx.
    """
    place, _, rest = site.partition(":")
    op, _, operand = rest.partition(".")
    operand = operand.removesuffix(".stored").rpartition(".")[2]
    if op in ("weights_down", "update"):
        return "weights" if op == "weights_down" else "updated states"
    if op == "fan_in":
        return "weight gradients" if {"weight", "bias"} & set(place.split(".")) else "activation gradients"
    of_gradient = operand.startswith("d")
    parameters = {"w"} if op == "cast" else {name for _, name in OPS[op].params}
    what = "weight" if operand.removeprefix("d") in parameters else "activation"
    return f"{what} gradients" if of_gradient else f"{what}s"


def layer_of(site: str) -> str:
    """Return the layer of a site: 'block 3' for 'transformer.h.3.mlp.c_fc:linear.dw.dw', else 'embedding' or 'head'."""
    place = site.partition(":")[0]
    block = _BLOCK.match(place)
    if block:
        return f"block {block[1]}"
    return "embedding" if re.search(r"\b(wte|wpe|embedding|embed_tokens|join)\b", place) else "head"


def within_layer(place: str) -> str:
    """Return the name of a place within its layer: 'mlp.c_fc' for 'transformer.h.3.mlp.c_fc'."""
    return _BLOCK.sub("", place)


_BLOCK = re.compile(r".*\b(?:h|layers)\.(\d+)\.")


def by_kind(sites: Mapping[str, Counts]) -> Iterator[tuple[str, dict[str, Counts]]]:
    """Yield each kind that has sites, with these, in the order of KINDS."""
    for kind in KINDS:
        chosen = {site: counts for site, counts in sites.items() if kind_of(site) == kind}
        if chosen:
            yield kind, chosen
