"""`_foreach_` operations: what they do to the lists' tensors one by one, judged as the operation on a single tensor is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.judge import casts, elementwise, functions, reductions
from refimpl.parity.audit.values import CannotJudge, Twin, Values, is_float

PREFIX = "_foreach_"
SECOND = ("other", "scalar", "scalars", "exponent", "ord", "src")
"""What the second operand is called in the schemas of lists."""


def each(values: Values) -> Iterator[Twin]:
    """Judge an operation on lists, tensor by tensor, so that FP64 copies of one tensor at a time are in memory."""
    given = values.inputs
    if not isinstance(given["self"], list | tuple):
        raise CannotJudge(f"{values.operation.name} takes no list as its first argument")
    results = {name: tensor for name, tensor in values.results() if is_float(tensor)}
    for i, tensor in enumerate(given["self"]):
        name = next((name for name in (f"self.{i}", f"out.{i}") if name in results), None)
        if name is None or not tensor.numel():
            continue
        single = _single(values, {key: _part(key, value, i) for key, value in given.items()}, results[name])
        for twin in JUDGED[_short(values)](single):
            yield twin._replace(result=name)


def _part(key: str, value: Any, i: int) -> Any:
    """Return what an argument is for tensor i of the list."""
    if key == "scalars" and isinstance(value, Tensor):
        return float(value[i])
    return value[i] if isinstance(value, list | tuple) else value


def _single(values: Values, given: Mapping[str, Any], actual: Tensor) -> Values:
    """Return the operation on one tensor. given: its arguments by the names of the schema for lists."""
    short, in_place = _short(values), bool(values.written)
    if short in ("addcmul", "addcdiv"):
        kwargs = {"value": given.get("value", given.get("scalars", 1))}
        operands = tuple(given[name] for name in ("tensor1", "tensor2"))
    elif short == "lerp":
        kwargs, operands = {}, (given["tensors1"], next(given[key] for key in ("weight", "weights", "scalars") if key in given))
    else:
        kwargs = {key: given[key] for key in ("alpha", "dtype") if key in given}
        operands = tuple(given[key] for key in SECOND if key in given)
    overload = _overload(short, operands, in_place)
    operation = replace(values.operation, name=str(overload), overload=overload)
    names = tuple(argument.name for argument in overload._schema.arguments)
    args = (given["self"], *operands)
    if in_place:
        return Values(operation, names, args, kwargs, None, {"self": actual})
    return Values(operation, names, args, kwargs, actual, {})


def _overload(short: str, operands: tuple[Any, ...], in_place: bool) -> Any:
    """Return PyTorch's operation on a single tensor."""
    name = {"norm": "linalg_vector_norm"}.get(short, short)
    if short in ("maximum", "minimum") and not isinstance(operands[0], Tensor):
        name = {"maximum": "clamp_min", "minimum": "clamp_max"}[short]
    packet = getattr(torch.ops.aten, name + ("_" if in_place and not name.endswith("_") else ""))
    wanted = "Tensor" if operands and isinstance(operands[-1], Tensor) else "Scalar"
    for overload in (f"Tensor_{wanted}", wanted, "default") if operands and short != "copy" else ("default",):
        if overload in packet.overloads():
            return getattr(packet, overload)
    raise CannotJudge(f"no operation on a single tensor is known for aten.{PREFIX}{short}")


def _short(values: Values) -> str:
    return values.operation.name.split(".")[1].removeprefix(PREFIX).rstrip("_")


JUDGED: dict[str, Callable[[Values], Iterator[Twin]]] = {
    **dict.fromkeys(("add", "sub", "mul", "div"), elementwise.arithmetic),
    **dict.fromkeys(("addcmul", "addcdiv"), elementwise.with_product),
    "lerp": elementwise.interpolated,
    "sqrt": elementwise.square_root,
    "rsqrt": functions.inverse_root,
    "pow": elementwise.power,
    **{name: functions.function for name in functions.FUNCTIONS if hasattr(torch.ops.aten, f"{PREFIX}{name}")},
    **dict.fromkeys(("abs", "neg", "sign", "ceil", "floor", "round", "trunc", "zero"), casts.moved),
    **dict.fromkeys(("maximum", "minimum", "clamp_min", "clamp_max", "max"), casts.moved),
    "copy": casts.copied,
    "norm": reductions.norm,
}
"""Who judges the operation on a single tensor."""

JUDGES = {f"aten.{PREFIX}{name}{ending}": each for name in JUDGED for ending in ("", "_")}
