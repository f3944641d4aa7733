"""What is added, multiplied or put at indices: scatter, index_put, index_add and their like, and so the gradients of indexing.

A target that receives k numbers is the result of k additions, in any order: its error is at most k u times the sum of absolute
values, whatever k is, and one that receives none is not changed. With alpha the products are rounded too. In 16 bits kernels
round after each addition: u is that of the format, and a note says so.
Source: Jeannerod and Rump 2013, 'Improved error bounds for inner products in floating-point arithmetic' (no k is too large).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, in_fp64, is_16_bit
from refimpl.parity.audit.judge.casts import moved
from refimpl.parity.audit.judge.elementwise import FLOOR, forms
from refimpl.parity.audit.judge.roundings import smallest, unit
from refimpl.parity.audit.values import CannotJudge, Twin, Values, is_float

EACH = "the kernel adds in the tensor's format, and rounds each time"


def added(values: Values) -> Iterator[Twin]:
    """Judge index_add, scatter_add, and index_put and put with accumulate."""
    values = _with_floats(values)
    name, actual = _result(values)
    exact, size = in_fp64(values)[name], in_fp64(values, Tensor.abs)[name]
    additions = in_fp64(values, torch.ones_like)[name] - 1
    yield _sum(name, actual, exact, size, additions, scaled=values.inputs.get("alpha", 1) != 1)


def put(values: Values) -> Iterator[Twin]:
    """Judge index_put and put: sums with accumulate, else moves. Of several numbers at one index any one may stay."""
    given = values.inputs
    if given.get("accumulate", False):
        yield from added(values)
        return
    for twin in moved(values):
        differs = twin.exact.to(twin.actual.dtype) != twin.actual
        if bool((differs & ~twin.actual.isnan()).any()) and _repeats(values):
            raise CannotJudge("several numbers are written to one index, and any of them may remain")
        yield twin


def reduced(values: Values) -> Iterator[Twin]:
    """Judge scatter, scatter_reduce and index_reduce by what `reduce` says: sums, means, products, or the largest or smallest.

    The mean is a sum and a quotient. A product of k + 1 numbers has k roundings; what it may lose below the smallest number on
    the way is multiplied by the factors above 1 that come after.
    """
    values = _with_floats(values)
    how = values.inputs["reduce"]
    if how in ("amax", "amin"):
        yield from moved(values)
        return
    name, actual = _result(values)
    exact, times = in_fp64(values)[name], _additions(values)
    if how in ("sum", "add", "mean"):
        size = in_fp64(values, Tensor.abs)[name]
        yield _sum(name, actual, exact, size, times + (times > 0) * (how == "mean"))
        return
    u, least, note = (unit(actual.dtype), smallest(actual.dtype), EACH) if is_16_bit(actual) else (U, FLOOR, "")
    above = in_fp64(values, lambda x: x.abs().clamp(min=1.0))[name]
    relative = times * u / (1 - (times * u).clamp(max=0.5))
    yield Twin(name, actual, exact, relative * exact.abs() + times * least * above, note=note)


def _sum(name: str, actual: Tensor, exact: Tensor, size: Tensor, additions: Tensor, scaled: bool = False) -> Twin:
    """Return the twin of sums with numbers of additions. scaled: by alpha, which may be rounded, and the products."""
    rounds = is_16_bit(actual)
    u, least = (unit(actual.dtype), smallest(actual.dtype)) if rounds else (U, FLOOR)
    bound = (additions + 2 * scaled * (additions > 0)) * u * size
    return Twin(name, actual, exact, bound + additions * least if scaled else bound, note=EACH if rounds else "")


def _additions(values: Values) -> Tensor:
    """Return how many numbers each target of a reduction receives."""
    given = values.inputs
    target, index, source = given["self"], given["index"], given.get("src", given.get("source"))
    ones = torch.ones(index.shape if source is None else source.shape, dtype=torch.float64, device=target.device)
    add = torch.index_add if "index_reduce" in values.operation.name else torch.scatter_add
    return add(torch.zeros_like(target, dtype=torch.float64), given["dim"], index, ones)


def _result(values: Values) -> tuple[str, Tensor]:
    for name, tensor in values.results():
        if is_float(tensor):
            return name, tensor
    raise CannotJudge("no floating-point result")


def _with_floats(values: Values) -> Values:
    """Return the operation with its numbers as floats, to which `in_fp64` applies a change."""

    def wide(name: str, value: object) -> object:
        return float(value) if name in ("alpha", "value") and isinstance(value, int) else value

    args = tuple(wide(name, value) for name, value in zip(values.names, values.args, strict=False))
    return replace(values, args=args, kwargs={name: wide(name, value) for name, value in values.kwargs.items()})


def _repeats(values: Values) -> bool:
    """Return whether two numbers are put at one index."""
    at = values.names.index("accumulate")
    sums = Values(values.operation, values.names, values.args[:at], {"accumulate": True}, values.output, values.written)
    return any(bool((count > 2).any()) for count in in_fp64(sums, torch.ones_like).values())


JUDGES = {
    **dict.fromkeys(forms("index_add", "scatter_add"), added),
    "aten._unsafe_masked_index_put_accumulate": added,
    **dict.fromkeys((*forms("index_put", "put"), "aten._index_put_impl_", "aten._unsafe_index_put"), put),
    **dict.fromkeys((f"{name}.{of}" for name in forms("scatter") for of in ("reduce", "value_reduce")), reduced),
    **dict.fromkeys(forms("scatter_reduce", "index_reduce"), reduced),
}
