"""Layer norm and RMS norms over the last axis. Statistics and sums are in the accumulation format."""

from __future__ import annotations

from typing import Any

from refimpl.numerics.arrays import Array
from refimpl.numerics.formats import format_of
from refimpl.precision.context import OpPrecision

EPS = 1e-5  # PyTorch's default for both norms here; GPT-2's too


def layernorm_forward(x: Array, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any]:
    """Return y = (x - mean) rstd w + b,  rstd = 1 / sqrt(var + eps).

    x (..., C), w (C,), b (C,) or None -> y (..., C). Saved: x after its cast, and mean and rstd of each row in `acc`.
    Source: Ba et al. 2016, arXiv 1607.06450. PyTorch: torch.nn.functional.layer_norm.
    """
    xc = p.cast(x, "x")
    z = p.widen(xc)
    mean = z.mean(-1, keepdims=True)
    centered = z - mean
    rstd = 1 / p.xp.sqrt((centered * centered).mean(-1, keepdims=True) + eps)
    y = centered * rstd * p.widen(p.cast(w, "w"))
    if b is not None:
        y = y + p.widen(p.cast(b, "b"))
    return p.round(y, "y", x), (xc, mean, rstd, format_of(x))


def layernorm_backward(
    dy: Array, saved: Any, w: Array, b: Array | None, p: OpPrecision, eps: float = EPS
) -> tuple[Array | None, ...]:
    """Return dx = rstd (dh - mean(dh) - h mean(dh h)),  dw = sum(dy h),  db = sum(dy), with h = (x - mean) rstd, dh = dy w."""
    x, mean, rstd, x_format = saved
    dy = p.widen(dy)
    h = (p.widen(x) - mean) * rstd
    dh = dy * p.widen(p.cast(w, "w"))
    dx = (dh - dh.mean(-1, keepdims=True) - h * (dh * h).mean(-1, keepdims=True)) * rstd
    axes = tuple(range(dy.ndim - 1))
    dw = p.round_grad((dy * h).sum(axes), "w", format_of(w))
    db = None if b is None else p.round_grad(dy.sum(axes), "b", format_of(b))
    return p.round_grad(dx, "x", x_format), dw, db


def rmsnorm_forward(x: Array, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any]:
    """Return y = x rrms w,  rrms = 1 / sqrt(mean(x^2) + eps).

    x (..., C), w (C,) -> y (..., C).
    Source: Zhang and Sennrich 2019, arXiv 1910.07467. PyTorch: torch.nn.functional.rms_norm(x, (C,), w, eps).
    """
    xc = p.cast(x, "x")
    z = p.widen(xc)
    rrms = 1 / p.xp.sqrt((z * z).mean(-1, keepdims=True) + eps)
    return p.round(z * rrms * p.widen(p.cast(w, "w")), "y", x), (xc, rrms, format_of(x))


def rmsnorm_backward(dy: Array, saved: Any, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Array]:
    """Return dx = rrms (dh - h mean(dh h)),  dw = sum(dy h), with h = x rrms, dh = dy w."""
    x, rrms, x_format = saved
    dy = p.widen(dy)
    h = p.widen(x) * rrms
    dh = dy * p.widen(p.cast(w, "w"))
    dx = (dh - h * (dh * h).mean(-1, keepdims=True)) * rrms
    dw = (dy * h).sum(tuple(range(dy.ndim - 1)))
    return p.round_grad(dx, "x", x_format), p.round_grad(dw, "w", format_of(w))


def llama_rmsnorm_forward(x: Array, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Any]:
    """Return y = R(w n),  n = R(x rrms),  rrms = 1 / sqrt(mean(x^2) + eps): rounded before the weight and after it.

    x (..., N C), w (C,) -> y (..., N C); each C consecutive values are a row, so that the heads of a query can be normalized.
    Source: Zhang and Sennrich 2019, arXiv 1910.07467. PyTorch: `LlamaRMSNorm` of transformers, and those of Mistral and Qwen.
    """
    xc = p.cast(x, "x")
    z = p.widen(xc).reshape(-1, len(w))
    rrms = 1 / p.xp.sqrt((z * z).mean(-1, keepdims=True) + eps)
    n = p.round(z * rrms, "n", x)
    y = p.round(p.widen(n) * p.widen(p.cast(w, "w")), "y", x, w)
    return y.reshape(x.shape), (xc, rrms, format_of(x))


def llama_rmsnorm_backward(dy: Array, saved: Any, w: Array, p: OpPrecision, eps: float = EPS) -> tuple[Array, Array]:
    """Return dx = rrms (dn - h mean(dn h)),  dn = R(dy w),  dw = sum(R(dy n)), with h = x rrms, and n = R(h) once more."""
    x, rrms, x_format = saved
    dy_format, dy = format_of(dy), p.widen(dy).reshape(-1, len(w))
    h = p.widen(x).reshape(dy.shape) * rrms
    n_format = p.result_format(x_format)
    dyn = p.round_to(dy * p.widen(p.round_to(h, n_format, "n")), dy_format, "dy_n")
    dn = p.widen(p.round_to(dy * p.widen(p.cast(w, "w")), n_format, "dn"))
    dx = (dn - h * (dn * h).mean(-1, keepdims=True)) * rrms
    dw = p.widen(dyn).sum(0)
    return p.round_grad(dx, "x", x_format).reshape(x.shape), p.round_grad(dw, "w", format_of(w))
