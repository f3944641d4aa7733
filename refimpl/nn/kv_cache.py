"""A KV cache: keys and values of the positions that a model has read, so that a new token is computed alone.

    cache = KVCache()
    run = replace(run.frozen(), overrides=cache.overrides)
    model.logits(Tape(run, weights, model.tied, record=False), tokens, start=cache.length)

The operations of attention are replaced by ones that add this call's keys and values to those of earlier calls, and attend to
all of them. All others see the new tokens alone. So logits are those of one call for the whole sequence, but for the order of
sums in products, which have fewer rows; and but for tensors with one scale (FP8, NVFP4), which is that of the call's tokens.
Dynamic RoPE, whose frequencies depend on the length, needs a cache only as long as the length of pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refimpl.nn.attention import attend, merge_heads, split_heads
from refimpl.nn.fused_attention import attend_fused
from refimpl.nn.grouped_attention import all_heads, ungroup_heads
from refimpl.nn.op import Op
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision

FIRST = 64
"""Positions for which memory is taken at first. It is doubled when they are full."""


@dataclass
class Kept:
    """Keys and values of one layer, (..., capacity, D) in the format in which they arrived, of which `length` are there."""

    k: Array
    v: Array
    length: int = 0


class KVCache:
    """Keys and values by the name of the attention in the model. Backward is refused."""

    def __init__(self) -> None:
        self.places: dict[str, Kept] = {}

    @property
    def overrides(self) -> Mapping[str, Op]:
        """Return the operations for `Run.overrides`."""
        return {
            "attention": Op("attention", self._attention),
            "grouped_attention": Op("grouped_attention", self._grouped_attention, key="attention"),
        }

    @property
    def length(self) -> int:
        """Return the number of positions in the cache, which is the position of the next token."""
        return max((kept.length for kept in self.places.values()), default=0)

    def clear(self) -> None:
        """Forget all positions. The memory stays."""
        for kept in self.places.values():
            kept.length = 0

    def _attention(self, qkv: Array, p: OpPrecision, n_head: int) -> tuple[Array, Any]:
        """Return O (B, T, C) of the new positions. qkv (B, T, 3C): those of the new positions."""
        q, k, v = split_heads(qkv, n_head)
        return merge_heads(self._attend("attention", q, k, v, p, "softmax")), None

    def _grouped_attention(
        self, q: Array, k: Array, v: Array, p: OpPrecision, n_head: int, n_kv_head: int
    ) -> tuple[Array, Any]:
        """Return O (B, T, H D) of the new positions. q (B, T, H D), k and v (B, T, K D): those of the new positions."""
        q, k, v = all_heads(q, k, v, n_head, n_kv_head)
        return ungroup_heads(self._attend("grouped_attention", q, k, v, p, "wide_softmax")), None

    def _attend(self, name: str, q: Array, k: Array, v: Array, p: OpPrecision, softmax: str) -> Array:
        """Attend from the new queries to all keys, as the policy's version of the operation does."""
        k, v = self._extended(k, v, p)
        if p.run.policy.operation(name, p.place) != name:
            return attend_fused(q, k, v, p)[0]
        return attend(q, k, v, p, p[softmax])[0]

    def _extended(self, k: Array, v: Array, p: OpPrecision) -> tuple[Array, Array]:
        """Add the keys and values of new positions, (..., T, D), and return those of all positions."""
        kept = self.places.get(p.place)
        stop = k.shape[-2] + (kept.length if kept else 0)
        if kept is None or stop > kept.k.shape[-2]:
            kept = self.places[p.place] = _enlarged(kept, max(stop, FIRST), k, p)
        kept.k[..., kept.length : stop, :], kept.v[..., kept.length : stop, :] = k, v
        kept.length = stop
        return kept.k[..., :stop, :], kept.v[..., :stop, :]


def _enlarged(kept: Kept | None, least: int, k: Array, p: OpPrecision) -> Kept:
    """Return memory for at least that many positions, and for twice as many as before, with what was kept."""
    length = kept.length if kept else 0
    shape = (*k.shape[:-2], max(least, 2 * length), k.shape[-1])
    larger = Kept(p.empty(shape, format_of(k)), p.empty(shape, format_of(k)), length)
    if kept:
        larger.k[..., :length, :], larger.v[..., :length, :] = kept.k[..., :length, :], kept.v[..., :length, :]
    return larger
