"""Which function judges which operation: the tables of all families in one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from refimpl.parity.audit.judge import (
    attention,
    casts,
    channel_norms,
    elementwise,
    embeddings,
    exponentials,
    functions,
    lists,
    losses,
    norms,
    products,
    recurrent,
    reductions,
    scaling,
    scatters,
    updates,
)
from refimpl.parity.audit.values import Twin, Values

Family = Callable[[Values], Iterable[Twin]]
JUDGES: dict[str, Family] = {
    **casts.JUDGES, **elementwise.JUDGES, **functions.JUDGES, **lists.JUDGES, **products.JUDGES, **reductions.JUDGES,
    **exponentials.JUDGES, **norms.JUDGES, **channel_norms.JUDGES, **scaling.JUDGES, **scatters.JUDGES, **updates.JUDGES,
    **recurrent.JUDGES, **attention.JUDGES, **embeddings.JUDGES, **losses.JUDGES,
}  # fmt: skip
"""By an operation's name, with its overload ('aten.add.Tensor') or for all of its overloads ('aten.mm')."""


def family_of(name: str) -> Family | None:
    """Return the function that judges an operation: that of its overload, else that of all its overloads."""
    return JUDGES.get(name) or JUDGES.get(name.rpartition(".")[0])
