"""Cross-entropy, fast: in blocks of rows, so that no array of the size of the logits is made beside them and their gradient.

With a vocabulary of 49,152 tokens each FP32 array of that size takes 192 KiB per token, and the definition makes three.
"""

from __future__ import annotations

from typing import Any

from refimpl.backends.numpy.blocks import by_example
from refimpl.nn.indices import check_targets
from refimpl.nn.loss import IGNORE_INDEX
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision


def cross_entropy_forward(logits: Array, targets: Array, p: OpPrecision, ignore_index: int = IGNORE_INDEX) -> tuple[Array, Any]:
    """Return the mean of log(sum exp(z)) - z[target] over all rows whose target is not ignore_index."""
    check_targets(logits, targets, p, ignore_index)
    rows, target = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counts = target != ignore_index

    def parts(logits: Array, at: Array) -> tuple[Array, ...]:
        """Return the largest logit of some of the rows, log(sum exp(z - largest)), and z[target] - largest."""
        z = p.widen(p.cast(logits, "logits"))
        largest = z.max(-1, keepdims=True)
        e = z - largest
        at_target = e[p.xp.arange(at.size), at][:, None]
        p.xp.exp(e, out=e)
        return largest, p.xp.log(e.sum(-1, keepdims=True)), at_target

    largest, log_sum, at_target = by_example(p.run.backend, parts, rows.size, rows, p.xp.where(counts, target, 0))
    n = p.xp.where(counts, p.xp.ones((), largest.dtype), 0).sum()
    n = p.xp.where(n == 0, p.xp.nan, n)
    loss = p.xp.where(counts[:, None], log_sum - at_target, 0).sum() / n
    saved = (logits, largest, log_sum, target, n, logits.shape, format_of(logits))
    return p.round(loss, "loss", p.cast(rows[:0], "logits")), saved


def cross_entropy_backward(dloss: Array, saved: Any, p: OpPrecision, ignore_index: int = IGNORE_INDEX) -> tuple[Array, None]:
    """Return dz = (softmax(z) - onehot(target)) dloss / n in the n rows that count, 0 in the others."""
    logits, largest, log_sum, target, n, shape, logits_format = saved
    counts = target != ignore_index
    each = p.xp.where(counts, p.widen(dloss) / n, 0)

    def gradient(logits: Array, largest: Array, log_sum: Array, at: Array, each: Array) -> tuple[Array, ...]:
        """Return dz of some of the rows."""
        dz = p.widen(p.cast(logits, "logits")) - largest
        dz -= log_sum
        p.xp.exp(dz, out=dz)
        dz *= each[:, None]
        dz[p.xp.arange(at.size), at] -= each
        return (p.round_grad(dz, "logits", logits_format),)

    rows = logits.reshape(-1, shape[-1])
    (dz,) = by_example(p.run.backend, gradient, rows.size, rows, largest, log_sum, p.xp.where(counts, target, 0), each)
    return dz.reshape(shape), None
