"""Which forward operation a node of the autograd graph belongs to, by PyTorch's sequence numbers.

A forward operation that makes a node takes the thread's next sequence number n; the node keeps n until its backward runs.
`torch._C._autograd._get_sequence_nr()` is the next number, so an operation that is dispatched just after its node was made
finds n + 1. Hooks on tensors or modules are not needed, which would change the order in which gradients are added.
"""

from __future__ import annotations

from typing import NamedTuple


class Site(NamedTuple):
    """Where a forward operation stands: module path, the user's line, the innermost line that is not PyTorch's."""

    module: str | None
    line: str
    code_line: str


class Nodes:
    """The sites of the nodes that were made since a recording began on the thread `main`."""

    def __init__(self, main: int, next_number: int) -> None:
        """main: the recording thread; next_number: its next sequence number, below which nodes are older than the recording."""
        self._main = main
        self._next = {main: next_number}
        self._sites: dict[int, dict[int, Site]] = {main: {}}
        self._tasks: set[int] = set()
        self._nested: set[int] = set()
        self._repeats: set[int] = set()  # threads whose last operation was a recomputation

    def made_one(self, thread: int, next_number: int) -> bool:
        """Return whether a node has been made on the thread since its last operation."""
        # A thread that is new to the recording has made its nodes at an unknown time: what is older than now is not counted.
        return next_number > self._next.setdefault(thread, next_number)

    def record(self, thread: int, next_number: int, site: Site) -> None:
        """Note the site of the nodes that `made_one` saw; only the first operation after a node was made is the node's own.

        There are several where a node contains others: an autograd.Function, whose forward pass then makes one.
        """
        sites = self._sites.setdefault(thread, {})
        for number in range(self._next[thread], next_number):
            sites[number] = site
        self._next[thread] = next_number

    def enter_task(self, thread: int, task: int, recomputing: bool) -> None:
        """Note that an operation runs in a call of backward, `task` (-1: in none).

        A call that follows a recomputation on its thread is nested: reentrant checkpointing calls backward inside backward.
        """
        if task >= 0 and task not in self._tasks:
            self._tasks.add(task)
            if thread in self._repeats:
                self._nested.add(task)
        (self._repeats.add if recomputing else self._repeats.discard)(thread)

    def site(self, thread: int, task: int, number: int) -> Site | None:
        """Return the site of the node `number` that `task` runs on the thread; None if it was made before the recording.

        Every thread counts its own nodes. On CUDA backward runs on a thread of the device: its nodes were made by the forward
        pass on the main thread, but in a nested call by the recomputation on the device's own thread.
        """
        main, own = self._sites[self._main], self._sites.get(thread, {})
        first, second = (own, main) if task in self._nested else (main, own)
        return first.get(number) or second.get(number)
