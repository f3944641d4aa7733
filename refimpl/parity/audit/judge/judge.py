"""`Judge`: judges operations as they run, and counts what it judged and what it could not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from refimpl.errors import one_line
from refimpl.parity.audit.judge.functions import default
from refimpl.parity.audit.judge.table import family_of
from refimpl.parity.audit.operation import Operation
from refimpl.parity.audit.values import CannotJudge, Values, is_float
from refimpl.parity.audit.verdict import Verdict, measure

ALLOCATIONS = (
    "aten.empty", "aten.new_empty", "aten.resize_",
    "aten._unsafe_view", "aten._reshape_alias", "aten.unsafe_split", "aten.unsafe_chunk",
)  # fmt: skip
"""They compute nothing: elements of the first ones are garbage until somebody writes them, the others are views."""
MOST_KEPT = 2**22
"""Elements of an operation whose FP64 results are kept for the probes: an optimizer's may write all parameters and states."""


class Judge:
    """Judges one operation at a time.

    judged: elements judged, over all operations. unjudged: elements that were not, by reason.
    """

    def __init__(self) -> None:
        self.judged = 0
        self.unjudged: Counter[str] = Counter()

    def __call__(self, values: Values) -> tuple[Verdict, ...]:
        """Return the verdicts over an operation's results, one each; the twins of whole results stay in `values.twins`."""
        results = {name: tensor for name, tensor in values.results() if is_float(tensor) and tensor.numel()}
        if not results or not produces(values.operation):
            return ()
        if values.operation.completes_later:
            if "reduce" in values.operation.name and torch.distributed.get_world_size() > 1:
                self.unjudged["sums over ranks, whose addends are elsewhere"] += sum(x.numel() for x in results.values())
            return ()
        verdicts, kept = [], 0
        if any(tensor.dtype == torch.float64 for tensor in results.values()):
            self.unjudged["in FP64 already"] += sum(tensor.numel() for tensor in results.values())
            return ()
        family = family_of(values.operation.name)
        if family is None and torch.Tag.pointwise in values.operation.overload.tags:
            family = default
        why = "no function judges it: " + values.operation.name.rpartition(".")[0]
        try:
            for twin in family(values) if family is not None else ():
                tensor = results.pop(twin.result)
                verdicts.append(measure(twin, tensor.numel()))
                self.judged += tensor.numel()
                kept += tensor.numel()
                if twin.actual.shape != tensor.shape:
                    values.samples[twin.result] = twin
                elif kept <= MOST_KEPT:
                    values.twins[twin.result] = twin
            why = "no twin for this result of " + values.operation.name if family is not None else why
        except CannotJudge as reason:
            why = str(reason)
        except Exception as error:
            why = one_line(f"the judge failed on {values.operation.name}: {error}", 100)
            raise
        finally:
            for tensor in results.values():
                self.unjudged[why] += tensor.numel()
        return tuple(verdicts)


def produces(operation: Operation) -> bool:
    """Return whether an operation makes numbers: views, allocations and random numbers are no arithmetic."""
    schema: Any = getattr(operation.overload, "_schema", None)
    if schema is None or operation.name.startswith(ALLOCATIONS):
        return False
    views = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    views |= torch.Tag.inplace_view in operation.overload.tags
    seeded = torch.Tag.nondeterministic_seeded in operation.overload.tags
    return not views and (not seeded or family_of(operation.name) is not None)  # attention is seeded, without dropout too
