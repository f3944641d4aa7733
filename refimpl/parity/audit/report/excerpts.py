"""A part of an operation that is too large to be kept: the elements that its verdict is about, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.judge.products import SAMPLE, SMALL, sampled
from refimpl.parity.audit.operation import Operation
from refimpl.parity.audit.values import Values

MATRICES = {"aten.mm": ("self", "mat2"), "aten.addmm": ("mat1", "mat2")}
"""Products of two matrices, with the names of their operands."""
ELEMENTS = 1 << 16
"""How many elements of an elementwise operation are kept."""


def excerpt(values: Values) -> Values | None:
    """Return a part of an operation, None where it cannot be divided."""
    name = values.operation.name.rpartition(".")[0]
    if name in MATRICES:
        return _rows_and_columns(values, *MATRICES[name])
    if torch.Tag.pointwise in values.operation.overload.tags and values.operation.verdicts:
        return _around_the_worst(values)
    return None


def _rows_and_columns(values: Values, a: str, b: str) -> Values:
    """Return the product of those rows and columns that the judge has looked at, who then looks at all of what is left."""
    m, n = values.inputs[a].shape[0], values.inputs[b].shape[1]
    at = values.operation.index
    small = m * n * values.inputs[a].shape[1] <= SMALL
    rows, columns = (slice(None), slice(None)) if small else (sampled(m, at, SAMPLE), sampled(n, at, SAMPLE))
    picks = {a: (rows, slice(None)), b: (slice(None), columns)}

    def pick(name: str, tensor: Tensor) -> Tensor:
        if name in picks:
            return tensor[picks[name]]
        return tensor.expand(m, n)[rows, columns]  # the result, and a bias

    return _picked(values, pick)


def _around_the_worst(values: Values) -> Values | None:
    """Return the elements around the one with the largest error."""
    worst = max(values.operation.verdicts, key=lambda verdict: verdict.ratio)
    shape = dict(values.results())[worst.result].shape
    where = worst.where or (0,) * len(shape)
    if len(where) != len(shape) or worst.judged != worst.elements:
        return None
    ranges, count = [], shape.numel()
    for size, at in zip(shape, where, strict=True):
        rest = count // size
        wanted = min(size, max(1, ELEMENTS // rest)) if count > ELEMENTS else size
        first = min(at, size - wanted)
        ranges.append(slice(first, first + wanted))
        count = rest * wanted

    def pick(name: str, tensor: Tensor) -> Tensor:
        own = ranges[len(ranges) - tensor.dim() :] if tensor.dim() else []
        return tensor[tuple(part if size > 1 else slice(None) for part, size in zip(own, tensor.shape, strict=True))]

    return _picked(values, pick)


def _picked(values: Values, pick: Callable[[str, Tensor], Tensor]) -> Values:
    """Return an operation with parts of its tensors."""
    made: dict[int, Tensor] = {}

    def part(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [part(name, each) for each in value]
        if not isinstance(value, Tensor):
            return value
        return made.setdefault(id(value), pick(name, value))

    operation: Operation = replace(values.operation, verdicts=(), probed={})
    return Values(
        operation,
        values.names,
        tuple(part(name, value) for name, value in zip(values.names, values.args, strict=False)),
        {name: part(name, value) for name, value in values.kwargs.items()},
        part("", values.output),
        {name: part(name, value) for name, value in values.written.items()},
    )
