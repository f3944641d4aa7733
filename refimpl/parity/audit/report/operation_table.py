"""`OperationTable`: the verdicts of an audit, added up per kind of operation, so that its size does not depend on the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from refimpl.parity.audit.operation import Operation, TensorFacts
from refimpl.parity.audit.verdict import LEVELS, Verdict

SHORT = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2",
}  # fmt: skip
"""Formats by the names that they have elsewhere in refimpl."""


class Kind(NamedTuple):
    """What the rows of the table are told apart by. inputs: formats of the tensors among the arguments, in order."""

    operation: str
    inputs: tuple[str, ...]
    output: str
    phase: str


@dataclass(slots=True)
class Row:
    """All judged results of one kind.

    operations: how many results. elements: of them; checked: how many of these were compared, the others being results of
    products of which a sample of rows and columns was taken. level: the worst one; reason, note: of the first verdict that
    has it. ratio: the largest error over its bound among those of that level; step, index, module, line: of the operation
    that has it, and result, where: which element. equal: how many of those checked are the correctly rounded result; expected:
    the same as FP32 sums leave it, over expected_of elements. excess: sum over those checked. bits: the
    fewest. by: whose definition the results are held to.
    """

    operations: int = 0
    elements: int = 0
    checked: int = 0
    ratio: float = -1.0
    step: int = 0
    index: int = 0
    module: str | None = None
    line: str = ""
    result: str = ""
    where: tuple[int, ...] = ()
    level: str = LEVELS[-1]
    reason: str = ""
    note: str = ""
    equal: float = 0.0
    expected: float = 0.0
    expected_of: int = 0
    excess: float = 0.0
    bits: float | None = None
    by: dict[str, None] = field(default_factory=dict)

    def add(self, step: int, operation: Operation, verdict: Verdict) -> bool:
        """Add a result. Return whether it is the worst so far: of a worse level, or of the same one and further off."""
        self.operations += 1
        self.elements += verdict.elements
        self.checked += verdict.judged
        self.equal += verdict.equal * verdict.judged
        self.excess += verdict.excess * verdict.judged
        if verdict.expected is not None:
            self.expected += verdict.expected * verdict.judged
            self.expected_of += verdict.judged
        if verdict.bits is not None:
            self.bits = verdict.bits if self.bits is None else min(self.bits, verdict.bits)
        self.by[verdict.by] = None
        rank, worst = LEVELS.index(verdict.level), LEVELS.index(self.level)
        if rank < worst or not self.reason:
            self.level, self.reason, self.note = verdict.level, verdict.reason, verdict.note
        if rank > worst or (rank == worst and not verdict.ratio > self.ratio):
            return False
        self.ratio, self.step, self.index = verdict.ratio, step, operation.index
        self.module, self.line, self.result, self.where = operation.module, operation.line, verdict.result, verdict.where
        return True


class OperationTable:
    """The rows by kind, in the order in which the kinds first ran."""

    def __init__(self) -> None:
        self.rows: dict[Kind, Row] = {}

    def add(self, step: int, operation: Operation) -> list[Kind]:
        """Add an operation's verdicts. Return the kinds of which it is the worst so far."""
        inputs, worst = input_formats(operation), []
        for verdict in operation.verdicts:
            kind = Kind(operation.name, inputs, short(verdict.dtype), operation.phase)
            row = self.rows.setdefault(kind, Row())
            if row.add(step, operation, verdict):
                worst.append(kind)
        return worst

    def data(self) -> list[tuple[Kind, dict[str, Any]]]:
        """Return the rows as plain data with their kinds, the worst first."""
        ranked = sorted(self.rows.items(), key=lambda item: _rank(item[1]))
        return [(kind, _row_data(kind, row)) for kind, row in ranked]


def _rank(row: Row) -> tuple[int, float, float, int]:
    """Return what rows are ordered by: level, error over bound if it is beyond, share of correctly rounded results, size.

    An error within its bound says nothing: it is just 1 where the only error is the last rounding.
    """
    return LEVELS.index(row.level), -max(row.ratio, 1.0), row.equal / max(row.checked, 1), -row.elements


def _row_data(kind: Kind, row: Row) -> dict[str, Any]:
    n = max(row.checked, 1)
    return {
        "operation": kind.operation, "inputs": list(kind.inputs), "output": kind.output, "phase": kind.phase,
        "level": row.level, "reason": row.reason, "note": row.note, "results": row.operations, "elements": row.elements,
        "checked": row.checked, "error_over_bound": plain(row.ratio), "correctly_rounded": row.equal / n,
        "expected_correctly_rounded": row.expected / row.expected_of if row.expected_of else None,
        "excess_ulp": plain(row.excess / n), "effective_bits": row.bits, "definition": list(row.by),
        "worst": {
            "step": row.step, "operation": row.index, "module": row.module, "line": row.line, "result": row.result,
            "index": list(row.where),
        },
    }  # fmt: skip


def plain(number: float) -> float | str:
    """Return a number as JSON can have it: Inf and NaN as 'inf', '-inf' and 'nan'."""
    return number if math.isfinite(number) else str(number)


def short(dtype: str) -> str:
    """Return a format's short name."""
    return SHORT.get(dtype, dtype)


def input_formats(operation: Operation) -> tuple[str, ...]:
    """Return the formats of an operation's tensors, in order; those of a list once, as 'fp32[]'; written ones too."""
    found: list[str] = []
    for value in operation.arguments.values():
        if isinstance(value, TensorFacts):
            found.append(short(value.dtype))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found += dict.fromkeys(f"{short(part.dtype)}[]" for part in value if isinstance(part, TensorFacts))
    return tuple(found)
