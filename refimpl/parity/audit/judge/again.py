"""An operation once more, in FP64: the twin of every operation that refimpl has no definition of its own for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.values import CannotJudge, Values

U = 2.0**-24
"""The relative error of one FP32 rounding."""
EXACT = 2**24
"""FP32 holds all integers up to this one."""


LONG = 2**22
"""A sum of more terms than this is not made by one partial sum."""
LANES = 16
"""The least number of partial sums that PyTorch's kernels keep in a long FP32 sum."""


def gamma(n: float) -> float:
    """Return the largest relative error of a sum of n FP32 terms, or of n roundings in a row: n u / (1 - n u).

    That holds for sums in any order. Of more than LONG terms it is about 1 and says nothing; there it is the error of a sum by
    LANES partial sums, which have n / LANES terms each, and LANES more roundings where they are added.
    """
    rows = n if n <= LONG else n / LANES + LANES
    if rows * U >= 0.5:
        raise CannotJudge("a sum of more than 2^27 terms: no useful bound is known")
    return rows * U / (1 - rows * U)


def in_fp64(values: Values, change: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Return the results of the operation on the same inputs in FP64, by the names of `Values.results`.

    change: is applied to each floating-point input before, such as `Tensor.abs`.

    What PyTorch converts before it computes is converted here too, as far as it loses something: numbers, and FP64 tensors
    without dimensions, to FP32; integers of a pointwise operation to the format of its floating-point operands. Random numbers
    are never drawn: `CannotJudge` is raised for an operation that does.
    """
    overload = values.operation.overload
    if torch.Tag.nondeterministic_seeded in overload.tags:
        raise CannotJudge("draws random numbers")
    numbers = _number_arguments(overload)
    promoted = computed_in(values) if torch.Tag.pointwise in overload.tags else None

    def widened(value: Any, is_number: bool = False) -> Any:
        if isinstance(value, Tensor):
            return tensor(value)
        if isinstance(value, list | tuple):
            return [widened(part, is_number) for part in value]
        if isinstance(value, float) or (is_number and type(value) is int and abs(value) > EXACT):
            return fp32(value) if change is None else float(change(torch.tensor(fp32(value), dtype=torch.float64)))
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        return value

    def tensor(value: Tensor) -> Tensor:
        if value.layout is not torch.strided:
            raise CannotJudge("a sparse tensor")
        if not value.is_floating_point():
            if promoted is not None and value.dtype in (torch.int16, torch.int32, torch.int64):
                return value.to(promoted).double()
            return value.clone() if values.written else value
        wide = (value if value.dim() or value.dtype != torch.float64 else value.float()).to(torch.float64, copy=True)
        return wide if change is None else change(wide)

    inputs = {name: widened(value, name in numbers) for name, value in values.inputs.items()}
    output = overload(*(inputs[name] for name in values.names[: len(values.args)]), **_keywords(values, inputs))
    written = {name: inputs[name] for name in values.written}
    found = dict(Values(values.operation, values.names, (), {}, output, written).results())
    if any(x.is_floating_point() and x.dtype != torch.float64 for x in found.values()):
        raise CannotJudge("PyTorch implements it in one format only")
    return found


def computed_in(values: Values) -> torch.dtype | None:
    """Return the format in which a pointwise operation computes, to which PyTorch converts what it is given: `out` is not.

    None without a floating-point operand. Tensors without dimensions decide only where there are no others.
    """
    given = [value for name, value in values.inputs.items() if isinstance(value, Tensor) and name != "out"]
    for formats in ([x.dtype for x in given if x.dim()], [x.dtype for x in given]):
        floating = [dtype for dtype in formats if dtype.is_floating_point]
        if floating:
            return reduce(torch.promote_types, floating)
    return None


@cache
def _number_arguments(overload: Any) -> frozenset[str]:
    """Return the names of the arguments that may be numbers: not sizes, dimensions or flags."""
    return frozenset(a.name for a in overload._schema.arguments if "number" in str(a.type) or "Tensor" in str(a.type))


def _keywords(values: Values, inputs: Mapping[str, Any]) -> dict[str, Any]:
    keywords = {name: inputs[name] for name in values.kwargs}
    schema = values.operation.overload._schema
    # An operation that makes a tensor without a tensor among its arguments would make it in the default format.
    makes = any(a.name == "dtype" for a in schema.arguments) and "dtype" not in values.inputs
    floating = isinstance(values.output, Tensor) and values.output.dtype.is_floating_point
    return {**keywords, "dtype": torch.float64} if makes and floating else keywords


def fp32(x: float) -> float:
    """Return a number rounded to FP32; what FP32 cannot hold becomes an infinity."""
    return float(torch.tensor(x, dtype=torch.float32))


def float_inputs(values: Values) -> Iterator[Tensor]:
    """Yield the floating-point tensors among the arguments, those of lists included."""
    for value in values.inputs.values():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Tensor) and each.is_floating_point():
                yield each


def is_16_bit(tensor: Tensor) -> bool:
    """Return whether a tensor's format has 16 bits."""
    return tensor.dtype in (torch.float16, torch.bfloat16)
