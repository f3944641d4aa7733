"""The CuPy backend on the strict stand-in: its own code, unchanged, with NumPy in the place of the kernels and of cuBLAS.

    from strict_backend import STRICT

    training = config.make_training(STRICT)       # any run: what cupy_ops.py and cupy_passes.py do is really done
    STRICT.kernels.launched["adamw"]              # how often a kernel was launched

Each kernel of kernels.cu has a function here that computes its NumPy definition in refimpl/nn or refimpl/optim. A launch
of it passes the very check that a launch on a GPU passes (`launch.check`), covers what its grid covers, and counts as one; a
product is checked as `cublas.product` checks it and counts as one GEMM. So a run on `STRICT` waits, copies and launches as one
on a GPU does, and refuses what CuPy, the launcher or cuBLAS would refuse or misread. What it does not show is whether the
kernels compute their definitions: that is what kernel_cases.py is for.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import strict_cupy
from kernel_cases import bound
from strict_cupy import counter

from refimpl.backends.base import Backend
from refimpl.backends.cupy import cublas
from refimpl.backends.cupy.backend import CupyBackend
from refimpl.backends.cupy.launch import COLUMNS, THREADS, WARPS, Kernels, Module
from refimpl.backends.numpy.backend import NUMPY
from refimpl.nn.attention import hide_later
from refimpl.nn.ops import OPS, fan_in
from refimpl.nn.softmax import softmax_slope, unrounded_softmax
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import dtype_of, format_of
from refimpl.optim.adamw import AdamW

Array = Any
Grid = tuple[int, ...]


def on_host(x: Any) -> Any:
    """What lies behind a device array, to read and to write; anything else as it is."""
    return x._host if isinstance(x, strict_cupy.Array) else x


def put(out: Array | None, value: Array | None) -> None:
    """Write a result of the same type and size where a kernel would write it; nothing where there is no room for it."""
    if out is not None and value is not None:
        assert out.dtype == value.dtype, f"{value.dtype} written where the kernel writes {out.dtype}"
        out[...] = value.reshape(out.shape)


def covers(grid: Grid, *blocks: int) -> None:
    """A kernel that has a block for each row, or for some columns, needs exactly these."""
    assert grid == blocks, f"a grid of {grid}, where {blocks} blocks are needed"


def covers_rows(grid: Grid, rows: int, *before: int) -> None:
    """One that has a warp for each row; `before`: the grid in front of that."""
    covers(grid, *before, -(-rows // WARPS))


# --------------------------------------------------------------------- the definitions: (format, grid, arguments of the kernel)


def add_forward(fmt: str, grid: Grid, a: Array, b: Array, y: Array, n: np.int64) -> None:
    put(y, fan_in.forward(a.reshape(n), b.reshape(n), bound(fmt, "fan_in"))[0])


def gelu_tanh_forward(fmt: str, grid: Grid, x: Array, y: Array, n: np.int64) -> None:
    put(y, OPS["gelu_tanh"].forward(x.reshape(n), bound(fmt, "gelu_tanh"))[0])


def gelu_tanh_backward(fmt: str, grid: Grid, dy: Array, x: Array, dx: Array, n: np.int64) -> None:
    put(dx, OPS["gelu_tanh"].backward(dy.reshape(n), (x.reshape(n), fmt), bound(fmt, "gelu_tanh"))[0])


def silu_forward(fmt: str, grid: Grid, x: Array, y: Array, n: np.int64) -> None:
    put(y, OPS["silu"].forward(x.reshape(n), bound(fmt, "silu"))[0])


def silu_backward(fmt: str, grid: Grid, dy: Array, x: Array, dx: Array, n: np.int64) -> None:
    put(dx, OPS["silu"].backward(dy.reshape(n), (x.reshape(n), fmt), bound(fmt, "silu"))[0])


def swiglu_forward(fmt: str, grid: Grid, gate: Array, up: Array, y: Array, n: np.int64) -> None:
    put(y, OPS["swiglu"].forward(gate.reshape(n), up.reshape(n), bound(fmt, "swiglu"))[0])


def swiglu_backward(
    fmt: str, grid: Grid, dy: Array, gate: Array, up: Array, dgate: Array, dup: Array, n: np.int64
) -> None:
    saved = gate.reshape(n), up.reshape(n), fmt, fmt
    for out, value in zip((dgate, dup), OPS["swiglu"].backward(dy.reshape(n), saved, bound(fmt, "swiglu")), strict=True):
        put(out, value)


def rope(
    fmt: str, grid: Grid, x: Array, cos: Array, sin: Array, y: Array, positions: np.int32, H: np.int32, half: np.int32,
    sign: np.float32,
) -> None:  # fmt: skip
    covers(grid, x.size // (H * 2 * half))
    rows, angles = x.reshape(-1, positions, H * 2 * half), (cos.reshape(positions, half), sin.reshape(positions, half))
    if sign > 0:
        put(y, OPS["rope"].forward(rows, *angles, bound(fmt, "rope"))[0])
    else:
        put(y, OPS["rope"].backward(rows, (*angles, fmt), bound(fmt, "rope"))[0])


def layernorm_forward(
    fmt: str, grid: Grid, x: Array, w: Array, b: Array | None, y: Array, mean: Array, rstd: Array, rows: np.int32, C: np.int32,
    eps: np.float32,
) -> None:  # fmt: skip
    assert mean.size == rows
    covers_rows(grid, mean.size)
    result, (_, m, r, _) = OPS["layernorm"].forward(x.reshape(-1, C), w, b, bound(fmt, "layernorm"), float(eps))
    for out, value in ((y, result), (mean, m), (rstd, r)):
        put(out, value)


def layernorm_gradients(dy: Array, x: Array, w: Array, mean: Array, rstd: Array, fmt: str, C: np.int32) -> tuple[Array, ...]:
    """dx, dw and db of the definition, which two kernels share."""
    saved = x.reshape(-1, C), mean.reshape(-1, 1), rstd.reshape(-1, 1), fmt
    gradients: Any = OPS["layernorm"].backward(dy.reshape(-1, C), saved, w, w, bound(fmt, "layernorm"))
    return tuple(gradients)


def layernorm_backward(
    fmt: str, grid: Grid, dy: Array, x: Array, w: Array, mean: Array, rstd: Array, dx: Array, rows: np.int32, C: np.int32
) -> None:
    assert mean.size == rows
    covers_rows(grid, mean.size)
    put(dx, layernorm_gradients(dy, x, w, mean, rstd, fmt, C)[0])


def layernorm_weights_backward(
    fmt: str, grid: Grid, dy: Array, x: Array, mean: Array, rstd: Array, dw: Array, db: Array | None,
    rows: np.int32, C: np.int32,
) -> None:  # fmt: skip
    covers(grid, -(-C // COLUMNS))
    assert mean.size == rows
    any_w = np.ones(C, dtype_of(fmt))  # dw and db do not depend on it
    _, weight, bias = layernorm_gradients(dy, x, any_w, mean, rstd, fmt, C)
    put(dw, weight)
    put(db, bias)


def llama_rmsnorm_forward(
    fmt: str, grid: Grid, x: Array, w: Array, y: Array, rrms: Array, rows: np.int32, C: np.int32, eps: np.float32
) -> None:
    assert rrms.size == rows
    covers_rows(grid, rrms.size)
    result, (_, r, _) = OPS["llama_rmsnorm"].forward(x.reshape(-1, C), w, bound(fmt, "llama_rmsnorm"), float(eps))
    put(y, result)
    put(rrms, r)


def llama_rmsnorm_gradients(dy: Array, x: Array, w: Array, rrms: Array, fmt: str, C: np.int32) -> tuple[Array, ...]:
    """dx and dw of the definition, which two kernels share."""
    saved = x.reshape(-1, C), rrms.reshape(-1, 1), fmt
    gradients: Any = OPS["llama_rmsnorm"].backward(dy.reshape(-1, C), saved, w, bound(fmt, "llama_rmsnorm"))
    return tuple(gradients)


def llama_rmsnorm_backward(
    fmt: str, grid: Grid, dy: Array, x: Array, w: Array, rrms: Array, dx: Array, rows: np.int32, C: np.int32
) -> None:
    assert rrms.size == rows
    covers_rows(grid, rrms.size)
    put(dx, llama_rmsnorm_gradients(dy, x, w, rrms, fmt, C)[0])


def llama_rmsnorm_weights_backward(
    fmt: str, grid: Grid, dy: Array, x: Array, rrms: Array, dw: Array, rows: np.int32, C: np.int32
) -> None:
    covers(grid, -(-C // COLUMNS))
    assert rrms.size == rows
    put(dw, llama_rmsnorm_gradients(dy, x, np.ones(C, dtype_of(fmt)), rrms, fmt, C)[1])  # which does not depend on w


def bias_forward(fmt: str, grid: Grid, products: Array, b: Array, y: Array, C: np.int32) -> None:
    covers(grid, y.size // C)
    put(y, cast(products.reshape(-1, C) + widen(b), fmt))


def bias_backward(fmt: str, grid: Grid, dy: Array, db: Array, rows: np.int32, C: np.int32) -> None:
    covers(grid, -(-C // COLUMNS))
    put(db, cast(widen(dy.reshape(rows, C)).sum(0), fmt))


def split_heads(
    fmt: str, grid: Grid, x: Array, y: Array, positions: np.int32, parts: np.int32, H: np.int32, D: np.int32
) -> None:
    covers(grid, x.size // (parts * H * D))
    put(y, x.reshape(-1, positions, parts, H, D).transpose(2, 0, 3, 1, 4))


def merge_heads(
    fmt: str, grid: Grid, y: Array, x: Array, positions: np.int32, parts: np.int32, H: np.int32, D: np.int32
) -> None:
    covers(grid, y.size // (parts * H * D))
    put(x, y.reshape(parts, -1, H, positions, D).transpose(1, 3, 0, 2, 4))


def causal_softmax_forward(fmt: str, grid: Grid, S: Array, P: Array, queries: np.int32, scale: np.float32) -> None:
    causal_softmax(fmt, fmt, grid, S, P, queries, scale)


def wide_causal_softmax_forward(fmt: str, grid: Grid, S: Array, P: Array, queries: np.int32, scale: np.float32) -> None:
    causal_softmax(fmt, "fp32", grid, S, P, queries, scale)


def causal_softmax(fmt: str, stored: str, grid: Grid, S: Array, P: Array, queries: np.int32, scale: np.float32) -> None:
    """P in the format `stored`."""
    covers_rows(grid, int(queries), S.size // queries**2)
    p = bound(fmt, "attention")["softmax"]
    z = widen(cast(widen(S.reshape(-1, queries, queries)) * scale, fmt))
    z = unrounded_softmax(hide_later(z, p, -math.inf), p)
    put(P, cast(hide_later(z, p, 0.0), stored))  # later keys are 0 also where a row is NaN


def causal_softmax_backward(
    fmt: str, grid: Grid, P: Array, dP: Array, dS: Array, queries: np.int32, scale: np.float32
) -> None:
    covers_rows(grid, int(queries), P.size // queries**2)
    p = bound(fmt, "attention")["softmax"]
    d, probability = (widen(x.reshape(-1, queries, queries)) for x in (dP, P))
    d = hide_later(softmax_slope(hide_later(d, p, 0.0), probability), p, 0.0)
    put(dS, cast(widen(cast(d, fmt)) * scale, fmt))


def cross_entropy_forward(
    fmt: str, grid: Grid, logits: Array, target: Array, row_loss: Array, largest: Array, log_sum: Array, V: np.int32,
    ignore_index: np.int64,
) -> None:  # fmt: skip
    covers(grid, target.size)
    z, p = logits.reshape(target.size, V), bound(fmt, "cross_entropy")
    _, (_, most, log, *_) = OPS["cross_entropy"].forward(z, target, p, ignore_index)
    each = [0 if t == ignore_index else OPS["cross_entropy"].forward(row, t, p)[0] for row, t in zip(z, target, strict=True)]
    for out, value in ((row_loss, np.array(each, np.float32)), (largest, most), (log_sum, log)):
        put(out, value)


def cross_entropy_backward(
    fmt: str, grid: Grid, logits: Array, target: Array, largest: Array, log_sum: Array, counted: Array,
    dloss: Array, dz: Array, V: np.int32, ignore_index: np.int64,
) -> None:  # fmt: skip
    covers(grid, target.size)
    z = logits.reshape(-1, V)
    saved = z, largest.reshape(-1, 1), log_sum.reshape(-1, 1), target, counted.reshape(()), z.shape, fmt
    put(dz, OPS["cross_entropy"].backward(dloss.reshape(()), saved, bound(fmt, "cross_entropy"), ignore_index)[0])


def cross_entropy_mean(
    fmt: str, grid: Grid, row_loss: Array, target: Array, loss: Array, counted: Array, rows: np.int32, ignore_index: np.int64
) -> None:
    covers(grid, 1)
    n = np.float32((target.reshape(rows) != ignore_index).sum())
    put(counted, n)
    put(loss, row_loss.reshape(rows).sum() / n)


def embedding_backward(fmt: str, grid: Grid, tokens: Array, dy: Array, dw: Array, n: np.int32, C: np.int32) -> None:
    covers(grid, len(dw), -(-C // THREADS))
    put(dw, OPS["embedding"].backward(dy.reshape(n, C), tokens.reshape(n), dw, bound(fmt, "embedding"))[1])


def gradient_norm(
    fmt: str, grid: Grid, grads: Array, inverse_scale: Array, partial: Array, partial_bad: Array, n: np.int64, block: np.int32
) -> None:
    covers(grid, -(-n // block))
    for i, scaled in enumerate(np.split(widen(grads.reshape(n)), range(int(block), int(n), int(block)))):
        g = scaled * inverse_scale
        partial[i], partial_bad[i] = (g * g).sum(), not (np.isfinite(scaled).all() and np.isfinite(inverse_scale))


def gradient_norm_fold(
    fmt: str, grid: Grid, partial: Array, partial_bad: Array, norm: Array, found_inf: Array, blocks: np.int32
) -> None:
    covers(grid, 1)
    norm[...], found_inf[...] = np.sqrt(partial.reshape(blocks).sum()), partial_bad.any()


def adamw(
    fmt: str, grid: Grid, w: Array, m: Array, v: Array, grads: Array, inverse_scale: Array, clip: Array, scalars: Array,
    found_inf: Array, starts: Array, stops: Array, ranges: np.int32, one_minus_beta1: np.float32, beta2: np.float32,
    one_minus_beta2: np.float32, eps: np.float32, n: np.int64,
) -> None:  # fmt: skip
    if found_inf:
        return
    rule = AdamW((1 - float(one_minus_beta1), 1 - float(one_minus_beta2)), float(eps))
    assert np.float32(rule.betas[1]) == beta2
    g = widen(grads.reshape(n)) * inverse_scale
    g *= clip
    for start, stop in zip(starts.reshape(ranges), stops.reshape(ranges), strict=True):
        rule.decay(w[start:stop], g[start:stop], scalars)
    rule.update_block(w, g, (m, v), scalars, np)


DEFINITIONS: dict[str, Callable[..., None]] = {
    "wide_causal_softmax_backward": causal_softmax_backward,  # which widens P, whatever it is stored in
} | {
    definition.__name__: definition
    for definition in (
        add_forward, gelu_tanh_forward, gelu_tanh_backward, silu_forward, silu_backward, swiglu_forward, swiglu_backward, rope,
        layernorm_forward, layernorm_backward, layernorm_weights_backward, llama_rmsnorm_forward, llama_rmsnorm_backward,
        llama_rmsnorm_weights_backward, bias_forward, bias_backward, split_heads, merge_heads, causal_softmax_forward,
        causal_softmax_backward, wide_causal_softmax_forward, cross_entropy_forward, cross_entropy_backward,
        cross_entropy_mean, embedding_backward, gradient_norm, gradient_norm_fold, adamw,
    )
}  # fmt: skip


@dataclass
class CompiledTwins:
    """What stands where CuPy's compiled module would: the definitions of the kernels of one format."""

    fmt: str
    launched: collections.Counter[str]

    def get_function(self, name: str) -> Callable[..., None]:
        """The launch of a kernel by its name: one launch, and one call of its definition on the memory behind the arguments."""

        def launch(grid: Grid, block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
            counter.launches += 1
            self.launched[name] += 1
            with np.errstate(all="ignore"):
                DEFINITIONS[name](self.fmt, grid, *map(on_host, arguments))

        return launch


class TwinKernels(Kernels):
    """All kernels, with the declarations of kernels.cu and its checks. `launched`: how often each was launched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: collections.Counter[str] = collections.Counter()

    def __call__(self, fmt: str) -> Module:
        if fmt not in self._modules:
            super().__call__(fmt)._compiled = CompiledTwins(fmt, self.launched)
        return self._modules[fmt]


@dataclass(frozen=True)
class StrictBackend(CupyBackend):
    """`CupyBackend` with the stand-in's arrays."""

    kernels: TwinKernels = field(default_factory=TwinKernels)

    def product(self, a: Array, b: Array, fmt: str, out: Array | None = None) -> Array:
        """As `cublas.product`, whose checks these are; test_strict_backend.py holds them against the real ones."""
        if format_of(a) != format_of(b) or not {format_of(a), fmt} <= set(cublas.FORMATS):
            raise TypeError(f"no product of {format_of(a)} and {format_of(b)} in {fmt}")
        (*batch, M, K), N = a.shape, b.shape[-1]
        if tuple(batch) != b.shape[:-2] or b.shape[-2] != K:
            raise ValueError(f"cannot multiply {a.shape} by {b.shape}")
        out = self.xp.empty((*batch, M, N), dtype_of(fmt)) if out is None else out
        cublas._check_result(out, (*batch, M, N), fmt)
        if out.size and K:
            counter.gemms += 1
            counter.launches += sum(cublas._layout(x) is None for x in (a, b))  # copied to where cuBLAS can read it
        left, right, result = (on_host(x) for x in (a, b, out))
        with np.errstate(all="ignore"):
            result[...] = cast(np.matmul(widen(left), widen(right)), fmt)
        return out


STRICT = StrictBackend("strict", strict_cupy.xp)
PLAIN = Backend("plain", strict_cupy.xp)
"""The definitions, array operation by array operation, on the same stand-in: what a step costs without kernels."""

BACKENDS: dict[str, Backend] = {"numpy": NUMPY, "strict": STRICT}
