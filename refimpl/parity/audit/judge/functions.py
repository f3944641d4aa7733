"""Functions of one number and their derivatives, within the error that their library states; and what no other file knows.

u = 2^-24, r is the exact result. A function's error is in `FUNCTIONS`, in units of u |r|. Where a function subtracts inside, as
gelu does in 1 + erf(x), its error is relative to what is subtracted, so the bound has that size too.

What PyTorch tags as pointwise and no entry knows has the default bound: 8 roundings, each as large as the result or as what
a relative change of one operand by u makes of it, 8 u (|r| + sum |x df/dx|), with the derivative by central differences.
On the CPU, kernels for 16 bits that nobody has looked at may round to 16 bits inside: there u is that of the format, and a note
says so where a result is beyond the bound of FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, float_inputs, in_fp64, is_16_bit
from refimpl.parity.audit.judge.elementwise import FLOOR, float_result, forms, short_name
from refimpl.parity.audit.values import CannotJudge, Twin, Values, is_float

ROOT = "the CPU kernel rounds the root to 16 bits in the elements that are left over by vectors"
ERF = "the CPU kernel of erf for 16 bits has an absolute error of 1.5e-7"
INSIDE = "the CPU kernel rounds to 16 bits inside"
LARGE = 2.0**16
"""Operands below this one are flushed with what they multiply to less than 2^-90."""

Size = Callable[[Values, Tensor], Tensor]


def _r(values: Values, r: Tensor) -> Tensor:
    return r.abs()


def _r_and_x(values: Values, r: Tensor) -> Tensor:
    return r.abs() + values.inputs["self"].double().abs()


def _gradient(values: Values, r: Tensor) -> Tensor:
    """Return |r| + |g| (1 + |x|): derivatives of sigmoid's family add terms as large as this."""
    given = values.inputs
    x = given["self"] if "self" in given else given["output"]
    return r.abs() + given["grad_output"].double().abs() * (1 + x.double().abs())


def _gradient_of_output(values: Values, r: Tensor) -> Tensor:
    """Return |r| + |g| (1 + y^2): tanh's derivative is 1 - y^2, sigmoid's (1 - y) y."""
    y = values.inputs["output"].double()
    return r.abs() + values.inputs["grad_output"].double().abs() * (1 + y.square())


def _gradient_of_halves(values: Values, r: Tensor) -> Tensor:
    """Return |r| + |g| (1 + |a|) for both halves a, b of glu's input: g sigmoid(b), and g a times its derivative."""
    given = values.inputs
    a = given["self"].chunk(2, given["dim"])[0].double().abs()
    size = given["grad_output"].double().abs() * (1 + a)
    return r.abs() + torch.cat([size, size], given["dim"])


FUNCTIONS: dict[str, tuple[float, Size]] = {
    "exp": (3, _r), "exp2": (3, _r), "log": (3, _r), "log2": (3, _r), "log10": (3, _r), "log1p": (4, _r), "expm1": (4, _r),
    "sin": (3, _r), "cos": (3, _r), "tan": (4, _r), "reciprocal": (2, _r), "square": (1, _r),
    "tanh": (4, _r), "sigmoid": (4, _r), "silu": (6, _r), "gelu": (6, _r_and_x),
    "silu_backward": (10, _gradient), "mish_backward": (16, _gradient), "glu_backward": (10, _gradient_of_halves),
    "gelu_backward": (16, _gradient), "tanh_backward": (4, _gradient_of_output), "sigmoid_backward": (4, _gradient_of_output),
}  # fmt: skip
"""(units of u, of what size) per function: a library's 1 to 2 ulp, each 2 u, and one u for each operation around it."""




def inverse_root(values: Values) -> Iterator[Twin]:
    """Judge rsqrt: 3 u; the CPU's in 16 bits rounds the root to 16 bits in the last elements, those left over by vectors."""
    name, actual = float_result(values)
    exact = in_fp64(values)[name]
    rounds = is_16_bit(actual) and not actual.is_cuda
    u = torch.finfo(actual.dtype).eps / 2 if rounds else 0.0
    yield Twin(name, actual, exact, (3 * U + u) * exact.abs(), note=ROOT if rounds else "")


def function(values: Values) -> Iterator[Twin]:
    """Judge a function within its library's error. The CPU computes the derivatives in IN_16_BITS in the tensor's format."""
    name, actual = float_result(values)
    exact = in_fp64(values)[name]
    kernel = short_name(values)
    units, size = FUNCTIONS[kernel]
    terms = size(values, exact)
    bound = units * U * terms + _flushed(values)
    rounds = actual.dtype in IN_16_BITS.get(kernel, ()) and not actual.is_cuda
    if rounds:
        bound = bound + _in_the_format(actual, exact.abs() if kernel == "sigmoid_backward" else terms, 4)
    yield Twin(name, actual, exact, bound, note=INSIDE if rounds else "")


def default(values: Values) -> Iterator[Twin]:
    """Judge a pointwise operation that has no entry, by the default bound."""
    kernel = short_name(values)
    if kernel in PER_FORMAT:
        raise CannotJudge(f"aten.{kernel} is another function in another format")
    if kernel in INACCURATE:
        raise CannotJudge(f"no bound is known for aten.{kernel}")
    if kernel.startswith("logit") and values.inputs.get("eps") is not None and is_16_bit(values.output):
        raise CannotJudge(f"aten.{kernel}: the kernel may round eps, at which the result jumps")
    if kernel in ("fmod", "remainder") and is_16_bit(values.output) and not isinstance(values.inputs["other"], Tensor):
        raise CannotJudge(f"aten.{kernel} of a number, which the kernel may round: each multiple of it moves a jump")
    small = 2.0**-26
    results = [(name, actual) for name, actual in values.results() if is_float(actual)]
    exact = in_fp64(values)
    sizes = {name: exact[name].abs() for name, _ in results}
    for chosen in float_inputs(values):
        sides = [in_fp64(_replaced(values, chosen, 1 + sign * small)) for sign in (1, -1)]
        for name, _ in results:
            change = (sides[0][name] - sides[1][name]).abs() / (2 * small)
            sizes[name] = sizes[name] + change.nan_to_num(0.0, 0.0, 0.0)
    for name, actual in results:
        bound, note = 8 * U * sizes[name] + _flushed(values), ""
        if is_16_bit(actual) and not actual.is_cuda:
            if kernel in ("erf", "erfc"):
                bound, note = bound + 2.0**-21, ERF
            elif kernel not in IN_FP32.split():
                inside = bound + _in_the_format(actual, sizes[name], 8)
                if bool(((actual.double() - exact[name]).abs() > bound + _in_the_format(actual, exact[name].abs(), 1)).any()):
                    bound, note = inside, INSIDE
        yield Twin(name, actual, exact[name], bound, by="PyTorch, default bound", note=note)


def _in_the_format(actual: Tensor, size: Tensor, roundings: int) -> Tensor:
    """Return what roundings of numbers of a size, to a result's format, may cost."""
    info = torch.finfo(actual.dtype)
    return roundings * (info.eps / 2 * size + info.smallest_normal * info.eps / 2)


def _flushed(values: Values) -> Tensor | float:
    """Return what flushing to 0 inside may cost: 2^-126, or a factor x or g times that."""
    given = [values.inputs[name] for name in ("self", "grad_output") if isinstance(values.inputs.get(name), Tensor)]
    floating = [x for x in given if x.is_floating_point() and x.numel()]
    largest = [float(x.abs().max()) for x in floating]
    if all(size <= LARGE for size in largest):
        return FLOOR * (1 + math.prod(1 + size for size in largest))
    if short_name(values) in HALVES:
        return FLOOR * (1 + math.prod(1 + size for size in largest if math.isfinite(size)))
    return FLOOR * (1 + math.prod(1 + x.double().abs().nan_to_num(0.0, 0.0, 0.0) for x in floating))


def _replaced(values: Values, chosen: Tensor, factor: float) -> Values:
    """Return the operation with one of its inputs, in FP64, multiplied by a factor."""

    def other(value: Any) -> Any:
        if value is chosen:
            return value.double() * factor
        return [other(part) for part in value] if isinstance(value, list | tuple) else value

    args = tuple(other(value) for value in values.args)
    kwargs = {name: other(value) for name, value in values.kwargs.items()}
    return Values(values.operation, values.names, args, kwargs, values.output, values.written)



UNTAGGED = """
    elu_backward hardsigmoid_backward hardswish hardswish_ hardswish_backward leaky_relu_backward log_sigmoid_backward
    log_sigmoid_forward smooth_l1_loss_backward softplus_backward glu
    softshrink_backward hardshrink_backward _prelu_kernel _prelu_kernel_backward logit_backward
"""
"""Elementwise operations that PyTorch does not tag as pointwise."""
IN_FP32 = """
    elu_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward leaky_relu leaky_relu_backward
    log_sigmoid_backward log_sigmoid_forward mish smooth_l1_loss_backward softplus softplus_backward elu celu
    softshrink softshrink_backward hardshrink hardshrink_backward _prelu_kernel _prelu_kernel_backward glu
"""
"""Operations with the default bound whose CPU kernels for 16 bits compute in FP32, which has been tried."""
HALVES = ("glu", "glu_backward")
"""Operations whose results have not their arguments' shape."""
IN_16_BITS = {"sigmoid_backward": (torch.float16,), "glu_backward": (torch.float16, torch.bfloat16)}
"""Derivatives that the CPU computes in the tensor's format, with at most four roundings inside."""
INACCURATE = ("sinc", "lgamma", "digamma", "polygamma", "mvlgamma")
"""Special functions whose FP32 kernels have errors of many units in the last place, without a bound in any documentation."""
PER_FORMAT = ("nextafter", "frexp")
"""What the next number, or the exponent of a subnormal one, is depends on the format."""

JUDGES = {
    **dict.fromkeys(forms("rsqrt"), inverse_root),
    **dict.fromkeys(forms(*FUNCTIONS), function),
    **dict.fromkeys((f"aten.{name}" for name in UNTAGGED.split()), default),
}
