"""What a state exchanges with the states of other ranks: here there are none. `distributed.zero.ShardedState` has others."""

from __future__ import annotations

from refimpl.numerics.arrays import Array
from refimpl.precision.state_encodings import buffer_name


class Exchange:
    """What the step asks of a state that may be one of several, one per rank. Here it is the only one.

    ranks: how many there are. first: the first parameter of the part that this one updates.
    """

    ranks, first = 1, 0
    buffers: dict[str, Array]

    def reduce(self, loss: Array) -> Array:
        """Return the loss of a step, 0-d. With several ranks, sum the gradients and the loss over ranks."""
        return loss

    def gather_grains(self, *grains: Array) -> tuple[Array, ...]:
        """Return arrays over all grains from arrays over those that are updated here."""
        return grains

    def sum_over_ranks(self, count: Array) -> Array:
        """Return the sum over ranks of a number, 0-d."""
        return count

    def min_over_ranks(self, index: int) -> int:
        """Return the smallest of the ranks' numbers."""
        return index

    def gather(self, kind: str, part: str) -> Array:
        """Return a buffer over the whole flat index, for a checkpoint."""
        return self.buffers[buffer_name(kind, part)]

    def load_gathered(self, kind: str, part: str, values: Array) -> None:
        """Set a buffer from what `gather` returned."""
        self.buffers[buffer_name(kind, part)][...] = values
