"""`Values`: one operation of the user's step while its tensors are alive, as the judge and the probes see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.operation import Operation


class CannotJudge(Exception):
    """Raised by a function that judges an operation; its text is the reason, for the report."""


class Twin(NamedTuple):
    """What an operation's result is in FP64, and how far a correct implementation may be from it before its last rounding.

    result: which result, as `Values.results` names it. actual: the result, or the elements of it that are judged. exact: the
    same operation in FP64 on the same inputs. bound: the largest error of a correct implementation before it rounds to the
    result's format (that rounding is added by the judge); 0 where the result must be the correctly rounded one.
    typical: the error that independent roundings make, about the root of their number where bound has their number; a result
    beyond it is worse than it need be; None where no such estimate is made.
    by: whose definition exact is: 'refimpl', 'PyTorch', or 'exact' (nothing is computed, as in a copy or a cast).
    products: for matrix products, |A| |B| / sqrt(K) for each element, the size of a typical sum: gives the effective bits.
    note: what is known of this kernel, said beside a verdict that is not fine.
    """

    result: str
    actual: Tensor
    exact: Tensor
    bound: Tensor | float
    typical: Tensor | float | None = None
    by: str = "PyTorch"
    products: Tensor | None = None
    note: str = ""


@dataclass(slots=True)
class Values:
    """An operation that has run, with its tensors.

    args, kwargs: what it was called with; tensors that it wrote to, or that share memory with one, are clones from before.
    output: what it returned. written: the arguments that it wrote to, by name, as they are now.
    twins: by result, what the judge has computed in FP64; empty before it has. samples: the same where it judges only a sample.
    All tensors but the clones are the user's own: who looks must not write to them, keep them, or draw random numbers.
    """

    operation: Operation
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    written: Mapping[str, Any]
    twins: dict[str, Twin] = field(default_factory=dict)
    samples: dict[str, Twin] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments by the names of the schema, as they were before the operation ran."""
        unnamed = (str(i) for i in range(len(self.names), len(self.args)))
        return {**dict(zip((*self.names, *unnamed), self.args, strict=False)), **self.kwargs}

    def results(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that the operation made or wrote, by name, each once.

        Written arguments are named as in the schema: 'self', and 'self.3' in a list; what is returned besides is 'out', or
        'out.0', 'out.1' where there are several.
        """
        seen: set[int] = set()
        for name, tensor in (*_named_tensors(self.written), *_named_tensors({"out": self.output})):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor


def _named_tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from _named_tensors({f"{name}.{i}": part for i, part in enumerate(value)})


def is_float(value: object) -> bool:
    """Return whether a value is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.dtype.is_floating_point and value.layout is torch.strided
