"""`Flow`: which operation made the values that another one reads, by the storages of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.step import Step, View

LOW = ("float16", "bfloat16")
"""The 16-bit formats, by PyTorch's names."""
COPIES = ("aten.clone", "aten._unsafe_view", "aten.contiguous", "aten.cat", "aten.copy_", "aten.expand_copy", "aten.stack")
"""Operations whose results have their inputs' values, in the same format."""
CASTS = ("aten._to_copy",)


class Flow:
    """The operations of a step by the storages that they make or write, and read."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._makers: dict[int, list[Operation]] = {}
        self._readers: dict[int, list[Operation]] = {}
        for operation in operations:
            read = {t.storage for t in tensors_in(operation.arguments)}
            written = {t.storage for name in operation.written for t in tensors_in(operation.arguments[name])}
            # An output in an input's storage that is not written is a view.
            made = ({t.storage for t in tensors_in(operation.outputs)} - read) | written
            for storages, table in ((made, self._makers), (read, self._readers)):
                for storage in storages:
                    if storage is not None:
                        table.setdefault(storage, []).append(operation)

    def maker(self, tensor: TensorFacts, before: int) -> Operation | None:
        """Return the last operation below an index that made or wrote a tensor's storage; None: it is older than the step."""
        makers = self._makers.get(tensor.storage, ()) if tensor.storage is not None else ()
        return next((o for o in reversed(makers) if o.index < before), None)

    def source(self, operation: Operation, name: str, through: tuple[str, ...] = COPIES) -> Operation | None:
        """Return the operation that made an argument's values, looking through those named, to their first tensor."""
        tensor = operation.arguments.get(name)
        while isinstance(tensor, TensorFacts):
            maker = self.maker(tensor, operation.index)
            if maker is None or not is_any(maker, through):
                return maker
            operation = maker
            tensor = maker.arguments["src"] if "src" in maker.arguments else next(tensors_in(maker.arguments), None)
        return None

    def readers(self, operation: Operation) -> Iterator[Operation]:
        """Yield the operations after one that read what it made or wrote, views and copies of it included, each once."""
        seen: set[int] = set()
        waiting = [operation]
        while waiting:
            maker = waiting.pop()
            for tensor in results_of(maker):
                for o in self._readers.get(tensor.storage, ()) if tensor.storage is not None else ():
                    if o.index > maker.index and o.index not in seen:
                        seen.add(o.index)
                        yield o
                        if is_any(o, COPIES):
                            waiting.append(o)


@lru_cache(maxsize=1)
def flow_of(step: Step) -> Flow:
    """Return the flow of a step; that of the last step is kept for the next rule."""
    return Flow(step.operations)


def is_any(operation: Operation, names: Iterable[str]) -> bool:
    """Return whether an operation is one of those named, in any overload, in place or not."""
    base = operation.name.rpartition(".")[0]
    return base in names or (base.endswith("_") and not base.endswith("__") and base[:-1] in names)


def results_of(operation: Operation) -> Iterator[TensorFacts]:
    """Yield what an operation returned, and the arguments that it wrote to."""
    yield from tensors_in(operation.outputs)
    for name in operation.written:
        yield from tensors_in(operation.arguments[name])


def format_of_result(operation: Operation) -> str:
    """Return the format of an operation's first result, '' if it has none."""
    return next((t.dtype for t in results_of(operation)), "")


def forward(view: View) -> Iterator[Operation]:
    """Yield the operations of the step's forward pass, recomputed ones not."""
    return (o for o in view.step.operations if o.phase in ("forward", "other") and not o.recomputed)


def finding_at(view: View, operation: Operation, code: str, name: str, level: str, **sentences: Any) -> Finding:
    """Return a finding that an operation of the view's step shows. sentences: number, effect, fix."""
    return Finding(
        code, name, level, view.step.number, operation.module, operation.line or operation.code_line,
        parameters=operation.parameters, operation=operation.index, **sentences,
    )  # fmt: skip
