"""The loss: mean cross-entropy of the next token."""

from __future__ import annotations

from typing import Any

from refimpl.formats import format_of
from refimpl.ops.op import Op
from refimpl.policy import Bound

Array = Any


def cross_entropy_forward(logits: Array, targets: Array, p: Bound) -> tuple[Array, Any]:
    """loss = mean over rows of  log(sum exp(z)) - z[target],  the largest logit subtracted first.

    logits (..., V), targets (...) integers -> a 0-d loss. Saved: the logits as stored and a log-sum a row, so that no
    second array of the size of the logits is kept.
    PyTorch: torch.nn.functional.cross_entropy(logits.float(), targets).
    """
    zc = p.cast(logits, "logits").reshape(-1, logits.shape[-1])
    z, target = p.wide(zc), targets.reshape(-1)
    largest = z.max(-1, keepdims=True)
    log_sum = p.xp.log(p.xp.exp(z - largest).sum(-1, keepdims=True))
    at_target = z[p.xp.arange(target.size), target][:, None]
    loss = (log_sum - (at_target - largest)).mean()
    saved_logits = logits if format_of(logits) != format_of(zc) else zc
    return p.out(loss, "loss", zc), (saved_logits, largest, log_sum, target, logits.shape, format_of(logits))


def cross_entropy_backward(dloss: Array, saved: Any, p: Bound) -> tuple[Array, None]:
    """dz = (softmax(z) - onehot(target)) dloss / rows. dloss is the loss scale S (S/n with n micro-batches): here it enters."""
    logits, largest, log_sum, target, shape, logits_format = saved
    z = p.wide(p.cast(logits, "logits").reshape(-1, shape[-1]))
    each = p.wide(dloss) / target.size
    dz = p.xp.exp(z - largest - log_sum) * each
    dz[p.xp.arange(target.size), target] -= each
    return p.grad(dz, "logits", logits_format).reshape(shape), None


cross_entropy = Op("cross_entropy", cross_entropy_forward, cross_entropy_backward)
