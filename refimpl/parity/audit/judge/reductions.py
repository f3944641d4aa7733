"""Sums, means, norms and pooling: sums of n terms in FP32, in any order.

A result that is linear in its inputs, with coefficients >= 0, is within gamma(n + 2) of the same sum over absolute values, n
the number of terms of one result: n products at most, n - 1 sums, a division.
Source: Higham, Accuracy and Stability of Numerical Algorithms, sections 3.1 and 4.2.

In practice roundings are independent, and the partial sums of a kernel many, so the error is about sqrt(n) u of that sum: a
16-bit result beyond six times this, or that is seldom the correctly rounded one, was summed in fewer bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from refimpl.parity.audit.judge.again import U, fp32, gamma, in_fp64, is_16_bit
from refimpl.parity.audit.judge.casts import moved
from refimpl.parity.audit.judge.roundings import smallest, unit
from refimpl.parity.audit.values import CannotJudge, Twin, Values, is_float
from refimpl.parity.audit.verdict import measure

MEAN, SUM = 1, 2
"""What `reduction` is."""
TERMS = "the CPU kernel rounds each term to the tensor's format"
SCALED = "the CPU kernel rounds 2 / n, and its products, to the tensor's format"
WINDOWS = "the CPU kernel adds the gradients of overlapping windows in the tensor's format"
WEIGHTS = "the CPU kernel rounds weights and products to the tensor's format"
PRODUCT = "the CPU kernel rounds each partial product to the tensor's format"


def linear(terms: Callable[[Values], float]) -> Callable[[Values], Iterator[Twin]]:
    """Return the function that judges a sum. terms: gives the number of terms of one result."""

    def judge(values: Values) -> Iterator[Twin]:
        exact, size, n = in_fp64(values), in_fp64(values, Tensor.abs), terms(values)
        for name, actual in values.results():
            if is_float(actual):
                terms_size = size[name].abs()  # a divisor may be negative
                yield Twin(name, actual, exact[name], gamma(n + 2) * terms_size, U * math.sqrt(n + 2) * terms_size)

    return judge


def reduced(values: Values) -> float:
    """Return how many elements one element of the result comes from."""
    result = next(tensor for _, tensor in values.results())
    return values.inputs["self"].numel() / max(result.numel(), 1)


def window(values: Values) -> float:
    """Return the number of elements in a pooling window."""
    size = values.inputs["kernel_size"]
    return float(math.prod(size if len(size) > 1 else size * (values.inputs["self"].dim() - 1)))


def overlap(values: Values) -> float:
    """Return how many gradients one element may receive: all of its channel's."""
    gradient = values.inputs["grad_output"]
    return float(math.prod(gradient.shape[2:]))


def spread_over(values: Values) -> float:
    """Return the number of terms of an interpolation, or of its derivative: not more than the elements of a channel."""
    source = values.inputs["grad_output" if "grad_output" in values.inputs else "self"]
    return float(math.prod(source.shape[2:]))


def interpolated_linearly(values: Values) -> Iterator[Twin]:
    """Judge linear upsampling on 1 to 3 axes, and its backward: weighted sums, whose weights come from positions in FP32.

    A result has 2 terms per axis, in backward at most as many as there are positions within 1 of a point, 2 s + 3 on an axis of
    scale s; each of 2 roundings per axis. A position on an axis of n points, i / s or (i + 1/2) / s - 1/2, errs by 4 u (n + 1)
    at most, and that much of each neighbour's weight goes to another one, also where the position passes a point. So a result
    changes by 8 u (n + 1) for each axis times the largest of the points around it, for which the sum over three points on each
    axis stands; in backward it is the gradients that reach these points.
    In 16 bits the CPU rounds weights, products and sums to the tensor's format forward, 3 per axis, on 1 and 3 axes; a weight
    1 - w has the error of w, which counts for all points around.
    """
    given = values.inputs
    exact, size = in_fp64(values)["out"], in_fp64(values, Tensor.abs)["out"].abs()
    if "grad_output" in given:
        around, points = _around(size), given["input_size"][2:]
        n = math.prod(map(_reaching, given["output_size"], points, _scales(given, len(points))))
    else:
        at = values.names.index("self")
        args = (*values.args[:at], _around(given["self"].double().abs()), *values.args[at + 1 :])
        around = in_fp64(Values(values.operation, values.names, args, values.kwargs, values.output, {}))["out"]
        points = given["self"].shape[2:]
        n = 2.0 ** len(points)
    moved = 8 * U * (sum(points) + len(points)) * around
    roundings, actual = n + 2 * len(points), values.output
    bound, typical = gamma(roundings) * size + moved, U * math.sqrt(roundings) * size + moved
    if is_16_bit(actual) and not actual.is_cuda and "self" in given and len(points) != 2:
        bound = bound + 3 * len(points) * (unit(actual.dtype) * around + smallest(actual.dtype) / 2)
        yield Twin("out", actual, exact, bound, typical, note=WEIGHTS)
        return
    yield Twin("out", actual, exact, bound, typical)


def _scales(given: dict[str, Any], axes: int) -> list[float | None]:
    """Return the scales of an upsampling, None where none is given."""
    names = ("scales",) if axes == 1 else ("scales_d", "scales_h", "scales_w")[-axes:]
    return [given.get(name) for name in names]


def _reaching(results: int, points: int, scale: float | None) -> float:
    """Return how many results of an interpolation a point may reach on one axis: those past the end reach the last one."""
    past = max(0.0, results - points * scale) if scale else 0.0
    return min(2 * max(results / points, scale or 0.0) + 3 + past, results)


def _around(x: Tensor) -> Tensor:
    """Return the sums over a point and its neighbours on all axes."""
    x = functional.pad(x, (1, 1) * (x.dim() - 2))
    for axis in range(2, x.dim()):
        x = x.unfold(axis, 3, 1).sum(-1)
    return x


def running(values: Values) -> Iterator[Twin]:
    """Judge cumsum: after i terms gamma(i) of the sum of absolute values so far, so gamma(n) of it everywhere."""
    exact, size = in_fp64(values), in_fp64(values, Tensor.abs)
    x = values.inputs["self"]
    n = x.shape[values.inputs["dim"]] if x.dim() else 1
    for name, actual in values.results():
        yield Twin(name, actual, exact[name], gamma(n + 1) * size[name])


def product(values: Values) -> Iterator[Twin]:
    """Judge prod: n roundings of the result; the CPU's in 16 bits are in 16 bits."""
    exact, n = in_fp64(values), reduced(values)
    for name, actual in values.results():
        rounds = is_16_bit(actual) and not actual.is_cuda
        u = torch.finfo(actual.dtype).eps / 2 if rounds else U
        yield Twin(name, actual, exact[name], n * u / (1 - min(n * u, 0.5)) * exact[name].abs(), note=PRODUCT if rounds else "")


def variance(values: Values) -> Iterator[Twin]:
    """Judge var and std, from x - mean, in one pass (Welford) or two.

    The mean errs by d = gamma(n + 2) mean|x|, the variance by gamma(n + 6) var + 2 d sigma + d^2, the root by half of that
    relative to the variance, and 2 roundings.
    """
    x = values.inputs["self"].double()
    exact, n = in_fp64(values), reduced(values)
    dim = values.inputs.get("dim")
    axes = tuple(range(x.dim())) if dim is None else tuple(dim) if isinstance(dim, list | tuple) else (dim,)
    rooted = "std" in values.operation.name
    for name, actual in values.results():
        r = exact[name]
        mean = x.abs().mean(axes, keepdim=r.dim() == x.dim() and x.dim() > 0) if x.dim() else x.abs()
        if name == "out.1":
            yield Twin(name, actual, r, gamma(n + 2) * mean)
            continue
        var = r.square() if rooted else r
        d = gamma(n + 2) * mean
        error = gamma(n + 6) * var + 2 * d * var.sqrt() + d.square()
        yield Twin(name, actual, r, error / (2 * r + 2.0**-126) + 2 * U * r if rooted else error)


def norm(values: Values) -> Iterator[Twin]:
    """Judge vector_norm and norm: gamma(n + 4) of the result, for the sum of |x|^p, its root, and one rounding per power.

    The powers may be flushed to 0, n 2^-126 of their sum d, so that its root errs by d^(1/p) where it is small, and by d over
    its derivative elsewhere; and they may overflow.
    """
    order = values.inputs.get("ord", values.inputs.get("p", 2))
    exact, n = in_fp64(values), reduced(values)
    p = abs(float(order)) if order is not None else 2.0
    units = 1.0 if p in (0.0, math.inf) else n / max(p, 1.0) + 8 * max(p, 1.0)
    # PyTorch's FP32 norm keeps at least 8 partial sums: with p = 2 no order of 8 sums is worse than n / 8 additions in a row
    lanes = units if n * U < 0.25 else n / 8 / max(p, 1.0) + 16
    for name, actual in values.results():
        r = exact[name].abs()
        bound = gamma(lanes) * r
        if p not in (0.0, 1.0, math.inf):
            lost = n * 2.0**-126
            bound = bound + torch.minimum(lost / (p * r ** (p - 1)), torch.full_like(r, lost ** (1 / p)))
            bound = torch.where(r**p >= 2.0**126, math.inf, bound)
        yield Twin(name, actual, exact[name], bound)


def squared_loss(values: Values) -> Iterator[Twin]:
    """Judge mse_loss and its like: the mean of positive functions of differences, each of at most four roundings.

    The CPU's kernels for 16 bits round each of these to 16 bits.
    """
    exact = in_fp64(values)["out"]
    actual = values.output
    reduction, n = values.inputs.get("reduction", 1), values.inputs["self"].numel()
    bound = gamma(n + 5 if reduction else 5) * exact.abs()
    rounds = is_16_bit(actual) and not actual.is_cuda
    if rounds:
        info = torch.finfo(actual.dtype)
        bound = bound + 4 * info.eps * exact.abs() + (n if reduction == SUM else 1) * info.smallest_normal * info.eps
    yield Twin("out", actual, exact, bound, note=TERMS if rounds else "")


def squared_loss_gradient(values: Values) -> Iterator[Twin]:
    """Judge mse_loss_backward and its like: 2 g (x - y) / n, of which only the difference can cancel, exactly rounded.

    The CPU's kernels for 16 bits round 1 / n, which may be subnormal, and each product.
    """
    exact = in_fp64(values)["out"]
    actual = values.output
    rounds = is_16_bit(actual) and not actual.is_cuda
    bound = (6 * U) * exact.abs() + 2.0**-126
    if rounds:
        info = torch.finfo(actual.dtype)
        n = values.inputs["self"].numel() if values.inputs["reduction"] == MEAN else 1
        unit = info.eps / 2 * 6 + info.smallest_normal * info.eps / 2 * n
        bound = bound + unit * exact.abs() + 2 * info.smallest_normal * info.eps
    largest = torch.finfo(actual.dtype if rounds else torch.float32).max
    difference = (values.inputs["self"].double() - values.inputs["target"].double()).abs()
    bound = torch.where(2 * difference >= largest, math.inf, bound)  # an overflow before the product with g / n
    yield Twin("out", actual, exact, bound, note=SCALED if rounds else "")


def pooled_maximum_gradient(values: Values) -> Iterator[Twin]:
    """Judge the gradient of max pooling: an element receives the gradients of the windows whose maximum it is."""
    given: dict[str, Any] = values.inputs
    kernel = given["kernel_size"]
    n = math.prod(kernel if len(kernel) > 1 else kernel * 2)
    exact = in_fp64(values)["out"]
    size, actual = _with_gradient(values, given["grad_output"].abs()), values.output
    rounds = is_16_bit(actual) and not actual.is_cuda
    u = torch.finfo(actual.dtype).eps / 2 if rounds else U
    yield Twin("out", actual, exact, n * u / (1 - n * u) * size, note=WINDOWS if rounds else "")


def pooled_mean_gradient(values: Values) -> Iterator[Twin]:
    """Judge the gradient of average pooling: a sum over windows, which the CPU's kernel rounds to 16 bits at each addition."""
    exact, size, n = in_fp64(values)["out"], in_fp64(values, Tensor.abs)["out"].abs(), overlap(values)
    actual = values.output
    if not is_16_bit(actual) or actual.is_cuda:
        yield Twin("out", actual, exact, gamma(n + 2) * size, U * math.sqrt(n + 2) * size)
        return
    u = torch.finfo(actual.dtype).eps / 2
    windows = min(n, float(math.prod(values.inputs.get("kernel_size", [n]))) + 2)
    yield Twin("out", actual, exact, windows * u / (1 - min(windows * u, 0.5)) * size, note=WINDOWS)


def gathered(values: Values) -> Iterator[Twin]:
    """Judge sums of elements that were copied to several places, as gradients of padding and windows: k - 1 additions of k.

    CPU kernels for 16 bits add in the tensor's format. A number of elements is the sum of as many ones.
    """
    ones = replace(values, args=(torch.ones_like(values.args[0]), *values.args[1:]))
    exact, size, count = in_fp64(values), in_fp64(values, Tensor.abs), in_fp64(ones)
    for name, actual in values.results():
        if is_float(actual):
            rounds = is_16_bit(actual) and not actual.is_cuda
            u = torch.finfo(actual.dtype).eps / 2 if rounds else U
            additions = (count[name] - 1).clamp(min=0)
            yield Twin(name, actual, exact[name], additions * u * size[name], note=WINDOWS if rounds else "")


def nearest(values: Values) -> Iterator[Twin]:
    """Judge upsampling to the nearest point: elements that are moved, in backward sums of their gradients.

    A position between two points whose quotient FP32 rounds may be taken for the next point: then nothing is judged.
    """
    twins = list(gathered(values) if "grad_output" in values.inputs else moved(values))
    if _a_position_is_near_the_next(values) and any(measure(twin, twin.actual.numel()).level == "wrong" for twin in twins):
        raise CannotJudge("positions that FP32 may round to the next point")
    yield from twins


def _a_position_is_near_the_next(values: Values) -> bool:
    """Return whether i s or (i + 1/2) s is within its error of a point, and FP32 does not hold the quotient s."""
    given = values.inputs
    points = given["input_size"][2:] if "input_size" in given else given["self"].shape[2:]
    for n, results, scale in zip(points, given["output_size"], _scales(given, len(points)), strict=True):
        step = 1 / scale if scale else n / results
        i = torch.arange(results, dtype=torch.float64) + ("exact" in values.operation.name) / 2
        away = (i * step - (i * step).round()).abs()
        if fp32(step) != step and bool((away <= 4 * U * (n + 1))[i > 0].any()):
            return True
    return False


def _with_gradient(values: Values, gradient: Tensor) -> Tensor:
    at = values.names.index("grad_output")
    args = (*values.args[:at], gradient, *values.args[at + 1 :])
    if len(args) <= at:
        raise CannotJudge("the gradient is given by keyword")
    return in_fp64(Values(values.operation, values.names, args, values.kwargs, values.output, {}))["out"]


NEAREST = """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
LINEAR = ("linear1d", "bilinear2d", "trilinear3d")
COPIED = """
    col2im unfold_backward adaptive_max_pool2d_backward max_pool3d_with_indices_backward
    reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
    replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
"""
"""Operations that add what was copied, or selected several times, in forward."""

JUDGES = {
    **dict.fromkeys(("aten.sum", "aten.mean", "aten.nansum", "aten.trace"), linear(reduced)),
    **dict.fromkeys(("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d"), linear(window)),
    **dict.fromkeys(("aten._adaptive_avg_pool2d", "aten.adaptive_avg_pool1d"), linear(spread_over)),
    **dict.fromkeys(("aten.avg_pool2d_backward", "aten._adaptive_avg_pool2d_backward"), pooled_mean_gradient),
    **{f"aten.upsample_{name}{ending}": interpolated_linearly for name in LINEAR for ending in ("", "_backward")},
    **{f"aten.{name}{ending}": nearest for name in NEAREST.split() for ending in ("", "_backward")},
    **{f"aten.{name}": gathered for name in COPIED.split()},
    "aten.cumsum": running,
    "aten.prod": product,
    **dict.fromkeys(("aten.var", "aten.std", "aten.var_mean", "aten.std_mean"), variance),
    **dict.fromkeys(("aten.linalg_vector_norm", "aten.norm"), norm),
    **dict.fromkeys(("aten.mse_loss", "aten.smooth_l1_loss", "aten.huber_loss"), squared_loss),
    **dict.fromkeys(("aten.mse_loss_backward", "aten.huber_loss_backward"), squared_loss_gradient),
    "aten.max_pool2d_with_indices_backward": pooled_maximum_gradient,
}
