"""An operation once more, in FP64: the twin of every operation that refimpl has no definition of its own for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.values import CannotJudge, Values

U = 2.0**-24
"""The relative error of one FP32 rounding."""


def gamma(n: float) -> float:
    """Return the largest relative error of n FP32 roundings in a row, n u / (1 - n u)."""
    if n * U >= 0.5:
        raise CannotJudge("a sum of more than 2^23 terms: no useful bound holds for every order")
    return n * U / (1 - n * U)


def in_fp64(values: Values, change: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Return the results of the operation on the same inputs in FP64, by the names of `Values.results`.

    change: is applied to each floating-point input before, such as `Tensor.abs`.

    Numbers among the arguments are rounded to FP32, as kernels take them for 16-bit and FP32 tensors. Random numbers are never
    drawn: `CannotJudge` is raised for an operation that does.
    """
    overload = values.operation.overload
    if torch.Tag.nondeterministic_seeded in overload.tags:
        raise CannotJudge("draws random numbers")

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                return value.clone() if values.written else value
            wide = value.to(torch.float64, copy=True)
            return wide if change is None else change(wide)
        if isinstance(value, list | tuple):
            return [widened(part) for part in value]
        if isinstance(value, float):
            return fp32(value) if change is None else float(change(torch.tensor(fp32(value), dtype=torch.float64)))
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        return value

    inputs = {name: widened(value) for name, value in values.inputs.items()}
    output = overload(*(inputs[name] for name in values.names[: len(values.args)]), **_keywords(values, inputs))
    written = {name: inputs[name] for name in values.written}
    found = dict(Values(values.operation, values.names, (), {}, output, written).results())
    if any(x.is_floating_point() and x.dtype != torch.float64 for x in found.values()):
        raise CannotJudge("PyTorch has it in one format only")
    return found


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
