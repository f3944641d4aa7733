"""Batch norm and group norm, whose bounds are in norms.py (a row is a channel, or a group of a sample), and weight norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, gamma, is_16_bit
from refimpl.parity.audit.judge.norms import (
    NOTHING,
    ROUNDED,
    Errors,
    Known,
    Rows,
    backward,
    bound_of_y,
    by_cpu_in_16_bits,
    forward,
    sizes_of,
    summed,
    twin,
    wanted,
)
from refimpl.parity.audit.judge.roundings import smallest, spread, unit
from refimpl.parity.audit.values import Twin, Values

SUMS_ROUNDED = "PyTorch's CPU kernel rounds the sums to 16 bits before it uses them"
RUNNING = ("running_mean", "running_var")


def group_norm(values: Values) -> Iterator[Twin]:
    """Judge `native_group_norm`: y, mean, rstd. PyTorch's CPU kernel for channels-last inputs has mean(x^2) - mean^2."""
    one_pass = not values.inputs["input"].is_contiguous()
    yield from forward(_groups(values.inputs), values.inputs["eps"], values.output, one_pass)[0]


def group_norm_gradient(values: Values) -> Iterator[Twin]:
    """Judge `native_group_norm_backward`: dx, dw, db.

    PyTorch sums dy x and dy in each channel first, so that dw = rstd (sum(dy x) - mean sum(dy)) cancels where mean^2 >> var:
    its bound is gamma(N + 2) sum|dy| (|x| + |mean|) rstd.
    """
    inputs, (dx, dw, db) = values.inputs, values.output
    rows = _groups(inputs)
    N, C, HW, _ = _sizes_of_groups(inputs)
    dy = inputs["grad_out"].double().reshape(rows.x.shape)
    mean, rstd = (inputs[key].double().reshape(-1, 1) for key in ("mean", "rstd"))
    if wanted(dx):
        yield backward(rows, dy, mean, rstd, dx)
    if wanted(dw):
        terms = (rows.x - mean).mul_(rstd).mul_(dy).reshape(N, C, HW)
        sizes = (rows.x.abs() + mean.abs()).mul_(rstd.abs()).mul_(dy.abs()).reshape(N, C, HW)
        yield summed("out.1", dw, terms, sizes, (0, 2))
    if wanted(db):
        dy = dy.reshape(N, C, HW)
        yield summed("out.2", db, dy, dy.abs(), (0, 2))


def _sizes_of_groups(inputs: dict[str, Any]) -> tuple[int, int, int, int]:
    N, C, HW, G = (int(inputs[key]) for key in ("N", "C", "HxW", "group"))
    return N, C, HW, G


def _groups(inputs: dict[str, Any]) -> Rows:
    """Return the rows of group norm, (N G, C/G HW)."""
    N, C, HW, G = _sizes_of_groups(inputs)
    x, shape = inputs["input"], inputs["input"].shape

    def spread_out(w: Tensor | None) -> Tensor | None:
        return None if w is None else w.double().reshape(1, C, 1).expand(N, C, HW).reshape(N * G, -1)

    w, b = (spread_out(inputs.get(key)) for key in ("weight", "bias"))
    return Rows(x.double().reshape(N * G, -1), w, b, lambda t: t.reshape(shape))


# ---------------------------------------------------------------------------------------------------------------- batch norm


def batch_norm(values: Values) -> Iterator[Twin]:
    """Judge batch norm in all its forms: y, the mean and 1 / sqrt(var + eps) that it saves, and the running statistics.

    running = (1 - momentum) running + momentum statistic, of which the variance is var n / (n - 1). Bound: momentum times the
    statistic's error, and 4 u of both terms. In evaluation mean and variance are given: dmu = dvar = 0, and y alone is judged.
    PyTorch on the CPU keeps statistics in the format of the parameters: for 16 bits each of them is rounded, and 3 u_o for 4 u.
    """
    inputs, outputs = values.inputs, values.output
    eps, momentum = (_either(inputs, *keys) for keys in (("eps", "epsilon"), ("momentum", "exponential_average_factor")))
    rows = _channels(inputs)
    old = {key: inputs[key].double().reshape(-1, 1) for key in RUNNING if inputs.get(key) is not None}
    if not inputs.get("training", "no_update" not in values.operation.name):
        mean, rstd = old["running_mean"], (old["running_var"] + eps).rsqrt()
        h, none = (rows.x - mean).mul_(rstd), torch.zeros_like(mean)
        bound = bound_of_y(rows, h, mean, rstd, Errors(none, none, none + 6 * U))
        yield Twin("out.0", outputs[0], rows.back(rows.affine(h)), rows.back(bound), by="refimpl")
        yield from (Twin(key, after, inputs[key].double(), 0.0, by="exact") for key, after in values.written.items())
        return
    saved = outputs[1]
    low = saved.dtype if by_cpu_in_16_bits(saved) else None
    twins, mean, var, errors, usual = forward(rows, eps, outputs[:3], low=low)
    yield from twins
    unbiased = rows.n / max(rows.n - 1, 1)
    statistics = ((mean, errors.mean, usual.mean), tuple(t * unbiased for t in (var, errors.var, usual.var)))
    for key, (new, error, typical) in zip(RUNNING, statistics, strict=True):
        after = values.written.get(key)
        if after is not None:
            terms = (1 - momentum) * old[key].abs() + momentum * new.abs()
            parts = (
                (1 - momentum) * old[key] + momentum * new,
                terms * (4 * U if low is None else 3 * unit(low)) + momentum * error, terms * (4 * U) + momentum * typical,
            )  # fmt: skip
            yield twin(key, after, (t.reshape(after.shape) for t in parts), ROUNDED if low is not None else "")


def batch_norm_gradient(values: Values) -> Iterator[Twin]:
    """Judge backward of batch norm in all its forms: dx, dw, db. In evaluation dx = dy w rstd, with the running variance.

    PyTorch on the CPU rounds sums, and products of them, to the 16 bits of the input where the gradient is laid out otherwise
    than the input, and those of 16-bit parameters always: 4 u_o of all terms, and half a smallest number times
    rstd for each.
    """
    inputs, (dx, dw, db) = values.inputs, values.output
    rows = _channels(inputs)
    given = _either(inputs, "grad_out", "grad_output")
    dy, known = _channels({"input": given}).x, NOTHING
    reordered = given.stride() != inputs["input"].stride()
    low = by_cpu_in_16_bits(inputs["input"]) and (reordered or (dw is not None and is_16_bit(dw)))
    training = _either(inputs, "train", "update", otherwise=True)
    if training:
        mean, rstd = (_either(inputs, *keys).double().reshape(-1, 1) for keys in (("save_mean",), ("save_invstd", "save_var")))
    else:
        mean, var = (inputs[key].double().reshape(-1, 1) for key in RUNNING)
        rstd = (var + _either(inputs, "eps", "epsilon")).rsqrt()
    if low:
        dtype = inputs["input"].dtype
        known = Known(4 * unit(dtype), rows.n * smallest(dtype) / 2 * rstd.flatten(), SUMS_ROUNDED)
    if wanted(dx) and training:
        yield backward(rows, dy, mean, rstd, dx, known)
    elif wanted(dx):
        exact = dy * rstd if rows.w is None else dy * (rstd * rows.w)
        bound = rows.back(exact.abs() * (8 * U + known.relative))
        yield Twin("out.0", dx, rows.back(exact), bound, rows.back(exact.abs() * (8 * U)), by="refimpl", note=known.note)
    if wanted(dw):
        terms = (rows.x - mean).mul_(rstd).mul_(dy)
        yield summed("out.1", dw, terms, sizes_of(terms, dy, rows.x, mean, rstd, rows.n), (1,), known)
    if wanted(db):
        yield summed("out.2", db, dy, dy.abs(), (1,), known)


def _channels(inputs: dict[str, Any]) -> Rows:
    """Return the rows of batch norm, (C, n)."""
    x = inputs["input"].transpose(0, 1)
    w, b = (None if inputs.get(key) is None else inputs[key].double().reshape(-1, 1) for key in ("weight", "bias"))
    return Rows(x.double().reshape(x.shape[0], -1), w, b, lambda t: t.reshape(x.shape).transpose(0, 1))


def _either(inputs: dict[str, Any], *names: str, otherwise: Any = None) -> Any:
    """Return the argument by the first of its names that the operation has."""
    return next((inputs[name] for name in names if name in inputs), otherwise)


# --------------------------------------------------------------------------------------------------------------- weight norm


def weight_norm(values: Values) -> Iterator[Twin]:
    """Judge `_weight_norm_interface`: norms = |v| over all axes but one, w = v g / norms.

    Bound, relative: a sum of n squares and its root, gamma(n + 2) / 2 + 2 u; then 2 u.
    """
    inputs, (w, norms) = values.inputs, values.output
    v, g, axes = _weight(inputs, "v", "g")
    exact = v.square().sum(axes, keepdim=True).sqrt()
    n = v.numel() // max(exact.numel(), 1)
    relative, usual = gamma(n + 2) / 2 + 2 * U, spread(n) / 2 + 3 * U
    whole = v * (g.reshape(exact.shape) / exact)
    yield Twin("out.0", w, whole, whole.abs() * (relative + 2 * U), whole.abs() * (usual + 2 * U), by="refimpl")
    exact = exact.reshape(norms.shape)
    yield Twin("out.1", norms, exact, exact * relative, exact * usual, by="refimpl")


def weight_norm_gradient(values: Values) -> Iterator[Twin]:
    """Judge `_weight_norm_interface_backward`: dg = sum(dw v) / norms, dv = g / norms (dw - v sum(dw v) / norms^2).

    Bound: gamma(n + 3) sum|dw v| / norms; for dv that times |v g| / norms^2, and 6 u of both terms.
    """
    inputs, (dv, dg) = values.inputs, values.output
    v, g, axes = _weight(inputs, "saved_v", "saved_g")
    dw = inputs["grad_w"].double()
    norms = inputs["saved_norms"].double().reshape([s if i not in axes else 1 for i, s in enumerate(v.shape)])
    g, terms = g.reshape(norms.shape), dw * v
    along, size = (t.sum(axes, keepdim=True) / norms for t in (terms, terms.abs()))
    n = v.numel() // max(norms.numel(), 1)
    scale, part = g / norms, v / norms
    exact = scale * (dw - part * along)
    few, sums = (scale * dw).abs().mul_(6 * U), (scale * part).abs().mul_(size)
    yield Twin("out.0", dv, exact, few + sums * gamma(n + 9), few + sums * (spread(n) + 9 * U), by="refimpl")
    along, size = along.reshape(dg.shape), size.reshape(dg.shape)
    yield Twin("out.1", dg, along, size * gamma(n + 3), size * (spread(n) + 3 * U), by="refimpl")


def _weight(inputs: dict[str, Any], *names: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return v, g and the axes of the norm."""
    v, g = (inputs[name].double() for name in names)
    kept = inputs.get("dim", 0) % v.dim()
    return v, g, tuple(i for i in range(v.dim()) if i != kept)


FORWARD = (
    "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "_batch_norm_no_update",
)  # fmt: skip
BACKWARD = ("native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward")
JUDGES = {
    "aten.native_group_norm": group_norm,
    "aten.native_group_norm_backward": group_norm_gradient,
    **{f"aten.{name}": batch_norm for name in FORWARD},
    **{f"aten.{name}": batch_norm_gradient for name in BACKWARD},
    "aten._weight_norm_interface": weight_norm,
    "aten._weight_norm_interface_backward": weight_norm_gradient,
}  # fmt: skip
