"""The loss: mean cross-entropy of the next token, over all targets that are not ignored."""

from __future__ import annotations

from typing import Any

from refimpl.nn.indices import check_targets
from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision

IGNORE_INDEX = -100
"""The target that is ignored by default, as in PyTorch."""


def cross_entropy_forward(logits: Array, targets: Array, p: OpPrecision, ignore_index: int = IGNORE_INDEX) -> tuple[Array, Any]:
    """Return the mean of log(sum exp(z)) - z[target] over all rows whose target is not ignore_index.

    logits (..., V), targets (...) integers -> a 0-d loss, NaN where all targets are ignored. The largest logit of each row is
    subtracted first. Saved: the logits as stored, two numbers per row and the number of rows that count, but no second array of
    the size of the logits.
    Errors: UsageError for targets of another shape, and for one that is neither in 0 to V - 1 nor ignored (the latter on the
      host only: see `check_indices`).
    PyTorch: torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=ignore_index).
    """
    check_targets(logits, targets, p, ignore_index)
    zc = p.cast(logits, "logits").reshape(-1, logits.shape[-1])
    z, target = p.widen(zc), targets.reshape(-1)
    largest = z.max(-1, keepdims=True)
    log_sum = p.xp.log(p.xp.exp(z - largest).sum(-1, keepdims=True))
    counts = target != ignore_index
    n = p.xp.where(counts, p.xp.ones((), z.dtype), 0).sum()
    n = p.xp.where(n == 0, p.xp.nan, n)
    at_target = z[p.xp.arange(target.size), p.xp.where(counts, target, 0)][:, None]
    row_loss = log_sum - (at_target - largest)
    loss = p.xp.where(counts[:, None], row_loss, 0).sum() / n
    return p.round(loss, "loss", zc), (logits, largest, log_sum, target, n, logits.shape, format_of(logits))


def cross_entropy_backward(dloss: Array, saved: Any, p: OpPrecision, ignore_index: int = IGNORE_INDEX) -> tuple[Array, None]:
    """Return dz = (softmax(z) - onehot(target)) dloss / n in the n rows that count, 0 in the others.

    dloss is the loss scale S, or this micro-batch's share of it. As in PyTorch, dz is 0 where all targets are ignored, although
    the loss is NaN, and a row of logits with a NaN has a gradient of NaN, ignored or not.
    """
    logits, largest, log_sum, target, n, shape, logits_format = saved
    z = p.widen(p.cast(logits, "logits").reshape(-1, shape[-1]))
    counts = target != ignore_index
    each = p.xp.where(counts, p.widen(dloss) / n, 0)
    dz = p.xp.exp(z - largest - log_sum) * each[:, None]
    dz[p.xp.arange(target.size), p.xp.where(counts, target, 0)] -= each
    return p.round_grad(dz, "logits", logits_format).reshape(shape), None
