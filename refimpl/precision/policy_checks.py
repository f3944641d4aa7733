"""The check of a policy's table, so that a misspelled row or format is an error, and not a row that nothing reads."""

from __future__ import annotations

from collections.abc import Mapping

from refimpl.errors import nearest, unknown
from refimpl.numerics.accumulators import accumulator
from refimpl.numerics.formats import FORMATS
from refimpl.numerics.quantization.registry import SCHEMES
from refimpl.precision.policy import EVERY_OTHER, PRODUCTS, SAME, WIDE, Precision

PARTS = {"linear": ("y", "dx", "dw", "db"), "attention": ("scores", "scale", "softmax", "wide_softmax", "values")}
"""The parts of operations that look up rows of their own. The other operations have one row for everything."""

ROWS = (
    *PARTS, *(f"{op}.{part}" for op, parts in PARTS.items() for part in parts),
    "matmul", "rope", "layernorm", "rmsnorm", "llama_rmsnorm", "softmax", "add", "fan_in", "relu", "silu", "swiglu",
    "gelu_tanh", "gelu_new", "gelu_erf", "embedding", "cross_entropy", "reshape", "transpose", "split", "cast", EVERY_OTHER,
)  # fmt: skip
"""The keys of a policy, without a place: the operations of `nn/ops.py`, which no module of this package may import, their
parts, and the row of all others. An operation of your own has that last row, or the one that its `Op.key` names."""


def check_rows(policy: str, rows: Mapping[str, Precision]) -> None:
    """Check the rows of the policy of that name.

    Each key is one of ROWS, perhaps after a place and a colon, and EVERY_OTHER is among them. Inputs and results are in a
    format or SAME, and sums in one of WIDE. Only PRODUCTS may have schemes of `quantization.registry.SCHEMES` as inputs, and
    the accumulators of `numerics/accumulators.py`. Errors: ValueError, in one line, for any other table.
    """
    for key, row in rows.items():
        _, _, name = key.rpartition(":")
        if name not in ROWS:
            raise ValueError(f"policy {policy}: {unknown('row', name, ROWS)}")
        where = f"policy {policy}: row {key!r}"
        for fmt in [row.inputs] if isinstance(row.inputs, str) else row.inputs.values():
            _check_format(f"{where}: input", fmt, *SCHEMES)
        _check_format(f"{where}: output", row.out)
        if row.acc not in WIDE:
            _check_accumulator(where, row.acc)
        if not row.in_formats and name not in PRODUCTS:
            raise ValueError(f"{where} quantizes or sums in fewer bits, as only {', '.join(PRODUCTS)} can")
    if EVERY_OTHER not in rows:
        raise ValueError(f"policy {policy}: it lacks the row {EVERY_OTHER!r}, of all operations that it does not list")


def _check_format(what: str, fmt: str, *schemes: str) -> None:
    """Raise ValueError unless it is SAME, a format or one of the schemes, which are too many to list."""
    known = (SAME, *FORMATS)
    if fmt not in (*known, *schemes):
        more = ", or a scheme of quantization" if schemes else ""
        raise ValueError(f"{what} {fmt!r}: choose one of {', '.join(known)}{more}{nearest(fmt, (*known, *schemes))}")


def _check_accumulator(where: str, acc: str) -> None:
    """Raise ValueError unless it is the name of an accumulator."""
    try:
        accumulator(acc)
    except ValueError as error:
        raise ValueError(f"{where}: {error}{nearest(acc, WIDE)}") from None
