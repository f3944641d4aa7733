"""Gradient checkpointing: a block of layers saves nothing in forward, and is computed again when backward comes to it.

    with t.block("transformer.h.0"):              # in a model: a scope that is a block
        x = _block(t, x, config.n_head)

The operations of a block are recorded as those of any scope, so that gradients meet and reach the sink in the same order. But
what they save is dropped, and the tape keeps the arrays that the block reads from outside: its input x. The first operation
whose gradient arrives has the block computed again: the same operations, in the same formats, on the same arrays. What they
save then is used and freed as always. So memory is one input per block and the activations of one block, instead of those of
all blocks, and the results are the same to the bit.

The second time, neither monitor nor observer is called, delayed scaling records nothing, and stochastic rounding draws the
random numbers of the first. On the host a checksum of the block's output says whether it came out the same; on a device
nothing is compared, since that would wait for it.

Source: Chen et al. 2016, arXiv 1604.06174. PyTorch: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False), with
preserve_rng_state=True. Differs from PyTorch: the recorded operations are replayed, not the Python code of the model; all of
them, where PyTorch stops after the last that saves something; and the check is of bits, where determinism_check is of shapes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from refimpl.errors import UsageError, unknown
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bytes_of
from refimpl.numerics.quantization.scaling_state import ScalingState
from refimpl.precision.context import Run

if TYPE_CHECKING:
    from refimpl.nn.autograd import Entry, Node, Tape

CHECKPOINTING: Mapping[str, str] = {
    "none": "everything that backward needs is stored",
    "full": "each block stores its input, and is computed again in backward",
}
"""What a run may do: `Run.checkpointing`."""


class Block:
    """One pass through a block: the operations that ran, and the arrays that they read from outside.

    kept: those arrays, by node. saved: what the operations saved when they were computed again, by output.
    """

    def __init__(self, tape: Tape, name: str) -> None:
        self.name, self.run, self.parameters = name, tape.run, tape.parameters
        self.scales = tape.run.scales.replay()
        self.calls: list[tuple[Entry, tuple[Node | Array, ...]]] = []
        self.kept: dict[Node, Array] = {}
        self.saved: dict[Node, Any] = {}
        self._made: set[Node] = set()
        self._output: Array = None
        self._checksum = 0

    def add(self, entry: Entry, inputs: Sequence[Any], made: Array, used: Array) -> None:
        """Take over an operation that was recorded: drop what it saved, and keep those of its inputs that are from outside.

        inputs: those of `Tape.__call__`. made: its result. used: what the model continues with; if an observer has replaced the
        result, that is kept too.
        """
        for node, x in zip(entry.inputs, inputs, strict=True):
            if node is not None and node not in self._made:
                self.kept[node] = x.array
        read = tuple(x if node is None else node for node, x in zip(entry.inputs, inputs, strict=True))
        self.calls.append((replace(entry, saved=None), read))
        entry.saved = self
        self._made.add(entry.output)
        if used is not made:
            self.kept[entry.output] = used
        self._output = used

    def end(self) -> None:
        """Note the checksum of the output of the last operation."""
        self._checksum, self._output = self._sum(self._output), None

    def saved_by(self, output: Node) -> Any:
        """Return what the operation with this output saved, and forget it. The first call computes the block again.

        Errors: RuntimeError if the output of the block has changed.
        """
        if self.calls:
            self._compute_again()
        return self.saved.pop(output)

    def _compute_again(self) -> None:
        calls, self.calls = self.calls, []
        arrays, self.kept = self.kept, {}
        last_use = {x: i for i, (entry, _) in enumerate(calls) for x in entry.inputs}
        y: Array = None
        with _silent(self.run, self.scales):
            for i, (entry, read) in enumerate(calls):
                inputs = [x if node is None else arrays[node] for node, x in zip(entry.inputs, read, strict=True)]
                params = map(self.parameters.array, entry.params)
                y, self.saved[entry.output] = entry.op.forward(*inputs, *params, p=entry.p, **entry.static)
                y = arrays.setdefault(entry.output, y)
                for node in entry.inputs:
                    if node is not None and last_use[node] == i:
                        arrays.pop(node, None)
        if self._sum(y) != self._checksum:
            raise RuntimeError(
                f"{self.name} has another output when recomputed for backward: an operation in it does not depend "
                f"on its inputs alone, or a weight or an input has changed since; train with checkpointing 'none'"
            )

    def _sum(self, x: Array) -> int:
        """Return a checksum of the bits of an array; 0 on a device, which would have to be waited for."""
        if x is None or not self.run.backend.on_host:
            return 0
        return zlib.crc32(bytes_of(self.run.backend.xp.ascontiguousarray(x).reshape(-1)))


@contextmanager
def block_scope(tape: Tape, name: str) -> Iterator[None]:
    """Open a scope of a model that is a block: see above. A block inside a block belongs to the outer one.

    Errors: UsageError for a `Run.checkpointing` that does not exist.
    """
    if tape.run.checkpointing not in CHECKPOINTING:
        raise UsageError(unknown("checkpointing", tape.run.checkpointing, CHECKPOINTING))
    begins = tape.record and tape.in_block is None and tape.run.checkpointing == "full"
    with tape.scope(name):
        if not begins:
            yield
            return
        tape.in_block = Block(tape, name)
        try:
            yield
            tape.in_block.end()
        finally:
            tape.in_block = None


@contextmanager
def _silent(run: Run, scales: ScalingState) -> Iterator[None]:
    """Report nothing to the monitor, and use these scales, so that nothing is remembered."""
    before = run.monitor, run.scales
    run.monitor, run.scales = None, scales
    try:
        yield
    finally:
        run.monitor, run.scales = before


def saved_by(entry: Entry) -> Any:
    """Return what an operation saved for backward; if its block has dropped that, the block is computed again."""
    return entry.saved.saved_by(entry.output) if isinstance(entry.saved, Block) else entry.saved
