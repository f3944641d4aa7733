"""PyTorch's own spread: how far from FP64 are transformers' gradients, with sums in other orders?

A model whose channels, hidden units and heads are in another order is the same function. Its results are the same formulas
with the same roundings, but the sums over channels, hidden units and heads run in another order, and some results are rounded
the other way. So its pass is what a correct program may compute as well, and how much the distances from FP64 of several such
passes differ is how much they differ by chance. That is what a gradient of ours is held to:

*The bound.* n passes in other orders and the recorded one have distances whose ratio, for one gradient and two passes, is at
most r. Ours may be 2 r times as far as the recorded one, or as near.

*Its derivation.* If ours is one more such pass, then the widest ratio of n + 2 passes involves it with probability 2 / (n +
2), since none of them is special. That it is wider than r by another factor of 2 is less likely. The square of a distance is
a sum of squares of errors, of which some v are independent and make most of it; the ratio of two such sums has the F
distribution with v and v degrees of freedom, whose tail falls as ratio^(-v) in terms of the distances. So the bound is
exceeded by chance with probability 2 / (n + 2) 2^-v: with n = 8 by 1 in 80 passes if v is 4, and by 1 in 1280 if v is 8. v
need not be known. No constant would do: between two passes of PyTorch the widest ratio was 1.05 to 20, by format and model,
in random models of 16 layers of which some have channels that are 30 times as large as the others. Of 6400 such pairs 791
were more than 2 times apart, and 5 more than 2 r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.nn.models.model import Model
from refimpl.numerics.arrays import Array
from refimpl.parity.tolerances import distance, l2
from refimpl.parity.transformers.distances import FLOOR

if TYPE_CHECKING:
    from refimpl.parity.transformers.training import TransformersTraining

ORDERS = 8
"""Passes in other orders."""

Order = tuple[np.ndarray | None, ...]


def orders(model: Model, rng: np.random.Generator) -> dict[str, Order]:
    """Return one order of channels, hidden units and heads: for each parameter the order of each axis, None if it stays.

    The channels of a head stay, since RoPE pairs and rotates them, and heads of queries stay with their head of keys.
    """
    sizes = model.config
    shapes = {name: p.shape for name, p in model.parameters.items()}
    C, H = int(sizes["n_embd"]), int(sizes["n_head"])
    K = int(sizes.get("n_kv_head", H))
    channels, groups = rng.permutation(C), rng.permutation(K)
    heads = np.concatenate([group * (H // K) + rng.permutation(H // K) for group in groups])
    hidden: dict[str, np.ndarray] = {}

    def by_head(order: np.ndarray, rows: int) -> np.ndarray:
        """Return the order of rows that are whole heads."""
        return np.arange(rows).reshape(len(order), -1)[order].reshape(-1)

    def units(name: str, size: int) -> np.ndarray:
        """Return the order of the hidden units of the MLP that a parameter belongs to."""
        return hidden.setdefault(name.partition(".mlp.")[0], rng.permutation(size))

    found: dict[str, Order] = {}
    for name, shape in shapes.items():
        part, rows = name.split(".")[-2], shape[0]
        out: np.ndarray | None = channels
        if part in ("embed_tokens", "wte", "wpe", "lm_head", "q_norm", "k_norm"):
            out = None
        elif part == "q_proj":
            out = by_head(heads, rows)
        elif part in ("k_proj", "v_proj"):
            out = by_head(groups, rows)
        elif part == "c_attn":
            out = np.concatenate([i * (rows // 3) + by_head(heads, rows // 3) for i in range(3)])
        elif part in ("gate_proj", "up_proj", "c_fc"):
            out = units(name, rows)
        into: np.ndarray | None = channels
        if part == "o_proj" or name.endswith(".attn.c_proj.weight"):
            into = by_head(heads, shape[-1])
        elif part == "down_proj" or name.endswith(".mlp.c_proj.weight"):
            into = units(name, shape[-1])
        found[name] = (out,) if len(shape) == 1 else (out, into)
    return found


def _taken(array: Any, order: Order) -> Any:
    """Return an array or a tensor with its axes in an order."""
    for axis, places in enumerate(order):
        if places is not None:
            array = array[(slice(None),) * axis + (places,)]
    return array


def _back(order: Order) -> Order:
    """Return the order that undoes one."""
    return tuple(None if places is None else np.argsort(places) for places in order)


def distances_in_other_orders(
    theirs: TransformersTraining, exact: Mapping[str, Array], batch: tuple[np.ndarray, np.ndarray], S: float, seed: int = 0,
    passes: int = ORDERS,
) -> list[dict[str, float]]:  # fmt: skip
    """Return, for the last pass and for some in other orders, how far from FP64 each gradient is, relative L2.

    exact: FP64's gradients. Parameters are left as they were, without gradients.
    """
    sizes = {name: l2(x) or 1.0 for name, x in exact.items()}

    def distances(by_name: Mapping[str, Order]) -> dict[str, float]:
        grads = theirs.gradients()
        return {name: distance(_taken(g, _back(by_name[name])), exact[name]) / sizes[name] for name, g in grads.items()}

    found = [distances(dict.fromkeys(exact, ()))]
    parameters = dict(theirs.model.named_parameters())
    kept = {name: p.data for name, p in parameters.items()}
    try:
        for i in range(passes):
            by_name = orders(theirs.ours, np.random.default_rng([seed, i]))
            for name, p in parameters.items():
                order = by_name[name][::-1] if name in theirs.transposed else by_name[name]
                p.data = _taken(kept[name], order).contiguous()
            theirs.forward_backward(*batch, S)
            found.append(distances(by_name))
    finally:
        for name, p in parameters.items():
            p.data, p.grad = kept[name], None
    return found


def widest_ratio(found: Sequence[Mapping[str, float]]) -> float:
    """Return the largest ratio of the distances of one gradient in two passes, at least 1, as `Distance.beyond` measures it."""
    pairs = ((max(d), min(d)) for d in zip(*(each.values() for each in found), strict=True))
    return max([1.0, *((far - FLOOR) / near for far, near in pairs if near > 0 and math.isfinite(far))])
