"""Fused optimizers: one call that updates all parameters and their states, judged one parameter at a time. u = 2^-24.

With everything in FP64, refimpl's AdamW and SGD are the twins. The kernels compute in FP32 from numbers rounded to FP32, so
each number, product, sum and root of a chain costs u or, for a root, 2 u, relative to its own result:

    m    3 u (|m| + (1 - beta1) |g|):  1 - beta1, the product, and the difference where it is m + (1 - beta1) (g - m)
    v    3 u v':  a sum of positive terms of at most three roundings
    p    2 u |p| for decay, 16 u |change|, and what the error of m does: step / denominator times it. The change is a chain of
         m, sqrt(v), two bias corrections, eps and the step size, without cancellation (16 too in tolerances.update_bound).
         Where a coupled decay cancels g, v is the square of rounding errors: the denominator is anywhere in its interval
    buf  2 u |momentum buf| + 3 u |(1 - dampening) d|, and the error of d, a sum of g and wd p: u (2 |wd p| + |d|)

PyTorch 2.13's fused SGD on the CPU is wrong for 16 bits: elements in vectors hardly move, and its first step reads a buffer
that nobody wrote.

A gradient that is unscaled on the way is the correctly rounded quotient, or within 2 u of it where the kernel multiplies by the
inverse; the update uses it before it is rounded to 16 bits. Where found_inf is set nothing may change, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refimpl.optim.adamw import AdamW
from refimpl.optim.sgd import SGD
from refimpl.parity.audit.judge.again import U, is_16_bit
from refimpl.parity.audit.judge.roundings import FLUSHED
from refimpl.parity.audit.values import CannotJudge, Twin, Values

BLOCK = 2**15
"""Elements whose FP64 copies stay in the cache together."""


def adamw(values: Values) -> Iterator[Twin]:
    """Judge `_fused_adamw_`."""
    yield from _adam(values, decoupled=True)


def adam(values: Values) -> Iterator[Twin]:
    """Judge `_fused_adam_`, whose weight decay is added to the gradient."""
    yield from _adam(values, decoupled=False)


def _adam(values: Values, decoupled: bool) -> Iterator[Twin]:
    given = values.inputs
    if _skipped(given):
        yield from _unchanged(values)
        return
    rule = AdamW((given["beta1"], given["beta2"]), given["eps"], given["weight_decay"])
    for i in range(len(given["self"])):
        scalars = rule.scalars(float(given["lr"]), int(given["state_steps"][i]))
        yield from _gradient(values, i)
        p, m, v = (_wide(given[key][i]) for key in ("self", "exp_avgs", "exp_avg_sqs"))
        top = _wide(given["max_exp_avg_sqs"][i]) if given["amsgrad"] else None
        g, (of_p, of_m, of_v) = _unscaled(given, i), (np.empty_like(p) for _ in range(3))
        for block in _blocks(p):
            parts = [x[block] for x in (p, g, m, v)]
            bounds = _adam_block(rule, scalars, decoupled, _unscaling(given), None if top is None else top[block], *parts)
            of_p[block], of_m[block], of_v[block] = bounds
        yield _twin(values, f"self.{i}", p, of_p)
        yield _twin(values, f"exp_avgs.{i}", m, of_m)
        yield _twin(values, f"exp_avg_sqs.{i}", v, of_v)
        if top is not None:
            lost = np.isnan(v)  # the larger one of a number and NaN is NaN in vectors only, not in what is left over by them
            top[lost] = _wide(values.written["max_exp_avg_sqs"][i])[lost]
            yield _twin(values, f"max_exp_avg_sqs.{i}", top, of_v)


@np.errstate(all="ignore")
def _adam_block(
    rule: AdamW, scalars: tuple[float, ...], decoupled: bool, unscaling: float, top: np.ndarray | None,
    p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Update one block in place; return the bounds of p, m and v. unscaling: the relative error of g."""
    beta1 = rule.betas[0]
    of_g = _add_decay(g, p, 0.0 if decoupled else rule.weight_decay, unscaling)
    of_m = 3 * U * (np.abs(m) + (1 - beta1) * np.abs(g)) + (1 - beta1) * of_g
    of_v = (1 - rule.betas[1]) * (2 * np.abs(g) + of_g) * of_g
    of_p = (2 * U) * np.abs(p)
    if decoupled:
        rule.decay(p, g, np.array(scalars))
    before = p.copy()
    rule.update_block(p, g, (m, v), np.array(scalars), np)
    second = v
    if top is not None:
        second = np.maximum(top, v, out=top)
        p[:] = before - scalars[1] * m / (np.sqrt(second) / scalars[2] + rule.eps)
    slope = steepest = _slope(rule, scalars, second)
    if of_v.any():
        steepest, flattest = _slope(rule, scalars, np.maximum(second - of_v, 0)), _slope(rule, scalars, second + of_v)
        of_p += np.abs(m) * np.maximum(steepest - slope, slope - flattest)
    of_p += 16 * U * np.abs(before - p) + steepest * of_m
    return of_p, of_m, of_v + 3 * U * np.maximum(v, second) + FLUSHED


def _slope(rule: AdamW, scalars: tuple[float, ...], v: np.ndarray) -> np.ndarray:
    """Return how far a parameter moves for each unit of m."""
    found: np.ndarray = scalars[1] / (np.sqrt(v) / scalars[2] + rule.eps)
    return found


def sgd(values: Values) -> Iterator[Twin]:
    """Judge `_fused_sgd_`."""
    if _skipped(values.inputs):
        yield from _unchanged(values)
        return
    for i in range(len(values.inputs["self"])):
        yield from _gradient(values, i)
        for name, exact, bound in _sgd_step(values.inputs, i):
            yield _twin(values, f"{name}.{i}", exact, bound)


@np.errstate(all="ignore")
def _sgd_step(given: dict[str, Any], i: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return what the step writes to parameter i and its buffer, with bounds."""
    lr, momentum, kept, found = float(given["lr"]), given["momentum"], 1 - given["dampening"], []
    p, d = _wide(given["self"][i]), _unscaled(given, i)
    of_d = _add_decay(d, p, given["weight_decay"], _unscaling(given))
    if momentum:
        buffer = _wide(given["momentum_buffer_list"][i])
        if given["is_first_step"]:
            buffer[:], of_buffer = d, of_d
        else:
            of_buffer = 2 * U * np.abs(momentum * buffer) + 3 * U * np.abs(kept * d) + abs(kept) * of_d
            buffer *= momentum
            buffer += kept * d
        found.append(("momentum_buffer_list", buffer, of_buffer))
        of_stored = of_buffer + U * np.abs(buffer)
        if given["nesterov"]:
            of_d = of_d + momentum * of_stored + 2 * U * np.abs(momentum * buffer)
            d = d + momentum * buffer
            of_d = of_d + U * np.abs(d)
        else:
            d, of_d = buffer, of_stored
    bound, rule = lr * of_d + 3 * U * np.abs(lr * d), SGD(0.0)
    rule.update_block(p, d, (), np.array(rule.scalars(lr, 1)), np)
    return [*found, ("self", p, bound)]


def adagrad(values: Values) -> Iterator[Twin]:
    """Judge `_fused_adagrad_`: sum = sum + g^2, p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(sum) + eps), g = g + wd p.

    Bounds: 3 u sum and what the error of g does; 16 u |change| and what both errors do.
    """
    if _skipped(values.inputs):
        yield from _unchanged(values)
        return
    if any(is_16_bit(p) and not p.is_cuda for p in values.inputs["self"]):
        raise CannotJudge("PyTorch's fused Adagrad on the CPU rounds everything inside to 16 bits")
    for i in range(len(values.inputs["self"])):
        yield from _gradient(values, i)
        for name, exact, bound in _adagrad_step(values.inputs, i):
            yield _twin(values, f"{name}.{i}", exact, bound)
        if (after := values.written.get("state_steps")) is not None:
            yield Twin(f"state_steps.{i}", after[i], values.inputs["state_steps"][i].double(), 0.0, by="exact")


@np.errstate(all="ignore")
def _adagrad_step(given: dict[str, Any], i: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    p, total, g = _wide(given["self"][i]), _wide(given["state_sums"][i]), _unscaled(given, i)
    of_g = _add_decay(g, p, given["weight_decay"], _unscaling(given))
    total += g * g
    lr = float(given["lr"]) / (1 + (float(given["state_steps"][i]) - 1) * given["lr_decay"])
    of_total = 3 * U * total + (2 * np.abs(g) + of_g) * of_g + FLUSHED
    slopes = (lr / (np.sqrt(np.maximum(x, 0)) + given["eps"]) for x in (total, total - of_total, total + of_total))
    slope, steepest, flattest = slopes
    p -= slope * g
    of_p = 16 * U * np.abs(slope * g) + steepest * of_g + np.abs(g) * np.maximum(steepest - slope, slope - flattest)
    return [("state_sums", total, of_total), ("self", p, of_p)]


def _add_decay(g: np.ndarray, p: np.ndarray, weight_decay: float, unscaling: float) -> np.ndarray:
    """Add a coupled decay to a gradient with a relative error; return the error of the sum."""
    error: np.ndarray = unscaling * np.abs(g)
    if weight_decay:
        decay = weight_decay * p
        g += decay
        error += U * (2 * np.abs(decay) + np.abs(g))
    return error


# -------------------------------------------------------------------------------------------------------- what they share


def _skipped(given: dict[str, Any]) -> bool:
    """Return whether the kernel was told that a gradient has an Inf or a NaN."""
    found = given.get("found_inf")
    return found is not None and bool(found == 1)


def _unchanged(values: Values) -> Iterator[Twin]:
    for name, lists in values.written.items():
        for i, after in enumerate(lists):
            yield Twin(f"{name}.{i}", after, values.inputs[name][i].double(), 0.0, by="exact")


def _gradient(values: Values, i: int) -> Iterator[Twin]:
    """Yield the twin of a gradient, which the kernel unscales if it was given the scale."""
    before, after, scale = values.inputs["grads"][i].double(), values.written["grads"][i], values.inputs.get("grad_scale")
    if scale is None:
        yield Twin(f"grads.{i}", after, before, 0.0, by="exact")
        return
    exact = before / scale.double()
    unscaling = _unscaling(values.inputs)
    yield Twin(f"grads.{i}", after, exact, unscaling * exact.abs() if unscaling else 0.0, by="exact")


def _unscaling(given: dict[str, Any]) -> float:
    """Return the relative error of unscaling: none by a power of two."""
    scale = given.get("grad_scale")
    return 0.0 if scale is None or math.frexp(float(scale))[0] == 0.5 else 2 * U


def _unscaled(given: dict[str, Any], i: int) -> np.ndarray:
    """Return the gradient that the update uses."""
    g, scale = _wide(given["grads"][i]), given.get("grad_scale")
    if scale is not None:
        g /= float(scale)
    return -g if given["maximize"] else g


def _wide(x: Tensor) -> np.ndarray:
    """Return a copy in FP64, flat, on the host."""
    found: np.ndarray = x.detach().to("cpu", torch.float64, copy=True).reshape(-1).numpy()
    return found


def _blocks(x: np.ndarray) -> Iterator[slice]:
    for start in range(0, x.size, BLOCK):
        yield slice(start, start + BLOCK)


def _twin(values: Values, result: str, exact: np.ndarray, bound: np.ndarray) -> Twin:
    name, _, i = result.rpartition(".")
    after = values.written[name][int(i)]
    parts = [torch.from_numpy(x).reshape(after.shape).to(after.device) for x in (exact, bound)]
    return Twin(result, after, parts[0], parts[1], by="refimpl")


JUDGES = {
    "aten._fused_adamw_": adamw,
    "aten._fused_adam_": adam,
    "aten._fused_sgd_": sgd,
    "aten._fused_adagrad_": adagrad,
}  # fmt: skip
