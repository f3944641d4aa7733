"""Copies and casts: the exact value is the input, so the result is the correctly rounded input, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

from refimpl.parity.audit.values import Twin, Values


def cast(values: Values) -> Iterator[Twin]:
    """Judge `_to_copy`, `clone` and their like: bound 0, one rounding."""
    source = values.inputs["self"]
    yield Twin("out", values.output, source.double(), 0.0, by="exact")


def copied(values: Values) -> Iterator[Twin]:
    """Judge `copy_`: what is written is the source, broadcast and rounded once."""
    target = values.written["self"]
    yield Twin("self", target, values.inputs["src"].double().expand(target.shape), 0.0, by="exact")


JUDGES = {"aten._to_copy": cast, "aten.clone": cast, "aten.copy_": copied}
