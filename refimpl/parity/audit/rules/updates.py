"""What an operation of the update overwrites: each tensor with its elements before, after, and what FP64 gives.

An update is one fused operation, a few on lists of tensors (foreach), or several for each tensor; here they are all single
tensors: `overwritten` yields them one by one. What FP64 gives is the judge's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.operation import TensorFacts
from refimpl.parity.audit.values import Values, is_float

KINDS = ("add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv", "copy")
"""The operations that updates are made of."""


class Overwritten(NamedTuple):
    """One tensor that an operation overwrites.

    result: its name among the operation's results. kind: of the operation, without 'foreach': 'mul', 'add', 'lerp', 'copy',
    'adamw' of a fused one. facts: of the tensor. before, after: its elements. partners: what else of this tensor's update the
    operation reads, by argument; and scalars: the numbers. exact: the result in FP64, None where the judge
    has none.
    """

    result: str
    kind: str
    facts: TensorFacts
    before: Tensor
    after: Tensor
    partners: Mapping[str, Tensor]
    partner_facts: Mapping[str, TensorFacts]
    scalars: Mapping[str, float]
    exact: Tensor | None


def overwritten(values: Values) -> Iterator[Overwritten]:
    """Yield what an operation overwrites, and the result of a multiplication by a number as if it overwrote its input."""
    base = values.operation.name.rpartition(".")[0].removeprefix("aten.")
    if base.startswith("_fused_") and base.endswith("_"):
        yield from _fused(values, base)
        return
    kind = base.removeprefix("_foreach_").removesuffix("_")
    if kind not in KINDS or (not values.written and kind != "mul"):
        return
    inputs, facts = values.inputs, values.operation.arguments
    many = base.startswith("_foreach_")
    targets = values.written.get("self", values.output)
    for i in range(len(inputs["self"]) if many else 1):
        one, its_facts = _at(inputs, i, many), _at(facts, i, many)
        after = targets[i] if many else targets
        before = one.pop("self")
        if not (is_float(before) and is_float(after) and before.shape == after.shape):
            continue
        partners = {name: value for name, value in one.items() if isinstance(value, Tensor) and value.dim()}
        scalars = {name: float(value) for name, value in one.items() if _is_scalar(value)}
        if kind == "mul" and not values.written and "other" not in scalars:
            continue
        result = ("self" if values.written else "out") + (f".{i}" if many else "")
        yield Overwritten(
            result, kind, its_facts["self"], before, after, partners,
            {name: its_facts[name] for name in partners if isinstance(its_facts.get(name), TensorFacts)}, scalars,
            _exact(values, result),
        )  # fmt: skip


def _at(arguments: Mapping[str, Any], i: int, many: bool) -> dict[str, Any]:
    """Return the arguments for the i-th tensor of lists, under the names that the operation for one tensor has."""
    if not many:
        return dict(arguments)
    single = {"tensors1": "end", "weights": "weight", "scalars": "value", "scalar": "other"}
    result = {}
    for name, value in arguments.items():
        part = value[i] if isinstance(value, list | tuple) or (name == "scalars" and isinstance(value, Tensor)) else value
        result[single.get(name, name)] = part
    return result


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and not value.dim() and value.layout is torch.strided)


def _exact(values: Values, result: str) -> Tensor | None:
    twin = values.twins.get(result)
    return twin.exact if twin is not None else None


# ------------------------------------------------------------------------------------------------- fused


def _fused(values: Values, base: str) -> Iterator[Overwritten]:
    """Yield what a fused optimizer overwrites; nothing where it skips the update, because of Inf in the gradients."""
    inputs, facts = values.inputs, values.operation.arguments
    found = inputs.get("found_inf")
    if isinstance(found, Tensor) and bool(found):
        return
    plain = {name: float(v) for name, v in inputs.items() if _is_scalar(v)}
    for i in range(len(inputs["self"])):
        tensors = {n: v[i] for n, v in inputs.items() if isinstance(v, list | tuple) and len(v) > i}
        its_facts = {n: facts[n][i] for n in tensors if isinstance(facts.get(n), tuple)}
        for name in values.written:
            if name not in ("grads", "state_steps") and name in tensors and is_float(tensors[name]):
                partners = {n: v for n, v in tensors.items() if n not in (name, "state_steps")}
                yield Overwritten(
                    f"{name}.{i}", base.removeprefix("_fused_").removesuffix("_"), its_facts[name], tensors[name],
                    values.written[name][i], partners, {n: its_facts[n] for n in partners if n in its_facts}, plain,
                    _exact(values, f"{name}.{i}"),
                )  # fmt: skip
