"""Elementwise operations: computed in FP32 and rounded once to the result's format. u = 2^-24, r is the exact result.

Sums, differences, products, quotients and square roots are the correctly rounded ones, to the bit. In 16 bits they round twice,
to FP32 and then to the result, which is innocuous for operands of p bits where FP32 has at least 2 p + 2 (Figueroa 1995,
'When is double rounding innocuous?'): 24 >= 2 * 11 + 2. It is not where an operand has more bits, a number or a tensor
without dimensions in FP32: there the bound is u |r|.

Functions have the error that their library states, in units of u |r|, in `FUNCTIONS`. Where a function subtracts inside, as
gelu does in 1 + erf(x), its error is relative to what is subtracted, so the bound has that size too.

What no entry knows and PyTorch tags as pointwise has the default bound: 8 roundings, each as large as the result or as what
a relative change of one operand by u makes of it, 8 u (|r| + sum |x df/dx|), with the derivative by central differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, float_inputs, fp32, in_fp64, is_16_bit
from refimpl.parity.audit.values import CannotJudge, Twin, Values, is_float

SCALAR = "the CPU kernel rounds the number to the tensor's format first"
SQUARE_ROOT = "the CPU's vectorized FP32 square root is not correctly rounded"
FACTOR = "the CPU kernel rounds alpha to the tensor's format first"
EXPONENT = "the CPU kernel rounds the exponent to the tensor's format first"
POWER = "the CPU kernel rounds x * x to 16 bits before the second product"
ROOT = "the CPU kernel rounds the root to 16 bits in the elements that are left over by vectors"
ERF = "the CPU kernel of erf for 16 bits has an absolute error of 1.5e-7"
INSIDE = "the CPU kernel rounds to 16 bits inside"
ROUND_INSIDE = {"sigmoid_backward": 2, "logit": 2, "logit_backward": 2, "glu_backward": 4}
"""How many times kernels of the CPU do before the last, the first one in FP16 only: once for each operation in them."""
HALVES = ("glu", "glu_backward")
"""Operations whose results have not their arguments' shape."""
RANGE = "the CPU kernel computes the step in the tensor's format"
FLOOR = 2.0**-126
"""What FP32 arithmetic may flush to 0."""


def arithmetic(values: Values) -> Iterator[Twin]:
    """Judge add, sub, mul and div: correctly rounded; with alpha, or an operand of more bits, within u of its terms."""
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    given = values.inputs
    x, y, alpha = given["self"], given.get("other"), given.get("alpha", 1)
    bound: Tensor | float = 0.0
    note = ""
    if alpha != 1 and isinstance(y, Tensor):
        # fused or not: the product's rounding, and one more of the sum where the result is rounded again
        term = (fp32(alpha) * y.double()).abs()
        bound = 2 * U * term + (U * exact.abs() if is_16_bit(actual) else 0.0)
        if is_16_bit(actual) and not actual.is_cuda:
            bound, note = bound + torch.finfo(actual.dtype).eps * term, FACTOR
    elif is_16_bit(actual) and any(_is_wider(operand, actual) for operand in (x, y)):
        bound = U * exact.abs()
        is_sum = "add" in values.operation.name or "sub" in values.operation.name
        if isinstance(y, int | float) and is_sum and not actual.is_cuda:
            loss = abs(fp32(y) - float(torch.tensor(y, dtype=actual.dtype)))
            bound, note = bound + loss, SCALAR if loss else ""
    elif actual.is_cuda and "div" in values.operation.name and not isinstance(y, Tensor):
        bound = U * exact.abs()  # x * (1 / y)
    yield Twin(name, actual, exact, bound, note=note)


def square_root(values: Values) -> Iterator[Twin]:
    """Judge sqrt: correctly rounded, but for the CPU's in FP32, within 1 ulp."""
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    vectorized = actual.dtype == torch.float32 and not actual.is_cuda
    yield Twin(name, actual, exact, U * exact.abs() if vectorized else 0.0, note=SQUARE_ROOT if vectorized else "")


def power(values: Values) -> Iterator[Twin]:
    """Judge pow, exp(p log x): u |p log x| of the argument, 2 ulp of exp, one rounding; squares are correctly rounded.

    On the CPU, x^3 in 16 bits has two roundings to 16 bits, and other exponents are rounded.
    """
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    exponent = values.inputs.get("exponent")
    fixed = isinstance(exponent, int | float)
    if fixed and exponent == 2:
        yield Twin(name, actual, exact, 0.0)
        return
    x = values.inputs["self"]
    base = x.double() if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)
    p = torch.as_tensor(exponent, dtype=torch.float64)
    logarithm = (p * base.abs().log()).abs().nan_to_num(0.0, 0.0, 0.0)
    bound, note = U * (5 + logarithm) * exact.abs() + FLOOR, ""
    if fixed and is_16_bit(actual) and not actual.is_cuda:
        if exponent in (3, -3):
            bound, note = bound + torch.finfo(actual.dtype).eps * exact.abs(), POWER
        elif exponent is not None and (loss := abs(fp32(exponent) - float(torch.tensor(exponent, dtype=actual.dtype)))):
            bound, note = bound + 2 * loss / abs(exponent) * logarithm * exact.abs(), EXPONENT
    yield Twin(name, actual, exact, bound, note=note)


def with_product(values: Values) -> Iterator[Twin]:
    """Judge addcmul and addcdiv: self + value a b, or a / b: three roundings of the term, and the sum's."""
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    term = exact - values.inputs["self"].double()
    yield Twin(name, actual, exact, 3 * U * term.abs() + (U * exact.abs() if is_16_bit(actual) else 0.0))


def interpolated(values: Values) -> Iterator[Twin]:
    """Judge lerp: self + w d, or end - (1 - w) d where |w| >= 1/2, d = end - self: three roundings of the term, and a sum."""
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    given = values.inputs
    start, end = given["self"].double(), given["end"].double()
    weight = torch.as_tensor(given["weight"], dtype=torch.float64, device=exact.device)
    term = torch.where(weight.abs() < 0.5, exact - start, end - exact).abs()
    yield Twin(name, actual, exact, 3 * U * term + (U * exact.abs() if is_16_bit(actual) else 0.0))


def ranged(values: Values) -> Iterator[Twin]:
    """Judge arange and linspace: start + i step, in FP32 at least: three roundings, each of numbers within the range."""
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    largest = exact.abs().max() if exact.numel() else exact.new_zeros(())
    rounds = is_16_bit(actual) and not actual.is_cuda
    u = torch.finfo(actual.dtype).eps / 2 if rounds else U
    yield Twin(name, actual, exact, 3 * u * largest, note=RANGE if rounds else "")


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


FUNCTIONS: dict[str, tuple[float, Size]] = {
    "exp": (3, _r), "exp2": (3, _r), "log": (3, _r), "log2": (3, _r), "log10": (3, _r), "log1p": (4, _r), "expm1": (4, _r),
    "sin": (3, _r), "cos": (3, _r), "tan": (4, _r), "reciprocal": (2, _r), "square": (1, _r),
    "tanh": (4, _r), "sigmoid": (4, _r), "silu": (6, _r), "gelu": (6, _r_and_x),
    "silu_backward": (10, _gradient), "gelu_backward": (16, _gradient),
    "tanh_backward": (4, _gradient_of_output), "sigmoid_backward": (4, _gradient_of_output),
}  # fmt: skip
"""(units of u, of what size) per function: a library's 1 to 2 ulp, each 2 u, and one u for each operation around it."""


def inverse_root(values: Values) -> Iterator[Twin]:
    """Judge rsqrt: 3 u; the CPU's in 16 bits rounds the root to 16 bits in the last elements, those left over by vectors."""
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    rounds = is_16_bit(actual) and not actual.is_cuda
    u = torch.finfo(actual.dtype).eps / 2 if rounds else 0.0
    yield Twin(name, actual, exact, (3 * U + u) * exact.abs(), note=ROOT if rounds else "")


def function(values: Values) -> Iterator[Twin]:
    """Judge a function within its library's error."""
    name, actual = _result(values)
    exact = in_fp64(values)[name]
    units, size = FUNCTIONS[_short(values)]
    inside, note = _inside(values, actual, exact)
    yield Twin(name, actual, exact, units * U * size(values, exact) + _flushed(values) + inside, note=note)


def _inside(values: Values, actual: Tensor, exact: Tensor) -> tuple[Tensor | float, str]:
    """Return what CPU kernels lose that round to 16 bits inside, and a note: roundings of the result, or of a logarithm's."""
    kernel = _short(values)
    if actual.is_cuda or not is_16_bit(actual) or kernel not in ROUND_INSIDE:
        return 0.0, ""
    if kernel == "sigmoid_backward" and actual.dtype == torch.bfloat16:
        return 0.0, ""
    info = torch.finfo(actual.dtype)
    constant = 1.0 if kernel == "logit" else 0.0  # of log(x / (1 - x)), whose argument is rounded
    unit = info.eps / 2 * (exact.abs() + constant) + info.smallest_normal * info.eps / 2
    return ROUND_INSIDE[kernel] * unit, INSIDE


def default(values: Values) -> Iterator[Twin]:
    """Judge a pointwise operation that has no entry, by the default bound."""
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
        note = ERF if "erf" in values.operation.name and is_16_bit(actual) and not actual.is_cuda else ""
        inside, rounds = _inside(values, actual, exact[name])
        bound = 8 * U * sizes[name] + (2.0**-21 if note else 0.0) + _flushed(values) + inside
        yield Twin(name, actual, exact[name], bound, by="PyTorch, default bound", note=note or rounds)


def _flushed(values: Values) -> Tensor | float:
    """Return what flushing to 0 inside may cost: 2^-126, or a factor x or g times that."""
    given = [values.inputs[name] for name in ("self", "grad_output") if isinstance(values.inputs.get(name), Tensor)]
    sizes = [x.double().abs().nan_to_num(0.0, 0.0, 0.0) for x in given if x.is_floating_point()]
    if _short(values) in HALVES:
        sizes = [size.max() for size in sizes if size.numel()]
    return FLOOR * (1 + math.prod(1 + size for size in sizes)) if sizes else FLOOR


def _replaced(values: Values, chosen: Tensor, factor: float) -> Values:
    """Return the operation with one of its inputs, in FP64, multiplied by a factor."""

    def other(value: Any) -> Any:
        if value is chosen:
            return value.double() * factor
        return [other(part) for part in value] if isinstance(value, list | tuple) else value

    args = tuple(other(value) for value in values.args)
    kwargs = {name: other(value) for name, value in values.kwargs.items()}
    return Values(values.operation, values.names, args, kwargs, values.output, values.written)


def _result(values: Values) -> tuple[str, Tensor]:
    """Return the one floating-point result of an elementwise operation, and its name."""
    for name, tensor in values.results():
        if is_float(tensor):
            if tensor.dtype == torch.float64:
                raise CannotJudge("in FP64 already")
            return name, tensor
    raise CannotJudge("no floating-point result")


def _is_wider(operand: object, actual: Tensor) -> bool:
    return not isinstance(operand, Tensor) or operand.dtype != actual.dtype


def _short(values: Values) -> str:
    return values.operation.name.split(".")[1].rstrip("_")


def _forms(*names: str) -> list[str]:
    """Return the names of the operations, in place too."""
    return [f"aten.{name}{ending}" for name in names for ending in ("", "_")]


UNTAGGED = """
    elu_backward hardsigmoid_backward hardswish hardswish_ hardswish_backward leaky_relu_backward log_sigmoid_backward
    log_sigmoid_forward mish_backward smooth_l1_loss_backward huber_loss_backward softplus_backward glu glu_backward
    softshrink_backward hardshrink_backward _prelu_kernel _prelu_kernel_backward logit_backward
"""
"""Elementwise operations that PyTorch does not tag as pointwise."""

JUDGES = {
    **dict.fromkeys(_forms("add", "sub", "rsub", "mul", "div", "true_divide"), arithmetic),
    **dict.fromkeys(_forms("sqrt"), square_root),
    **dict.fromkeys(_forms("rsqrt"), inverse_root),
    **dict.fromkeys(_forms("pow"), power),
    **dict.fromkeys(_forms("addcmul", "addcdiv"), with_product),
    **dict.fromkeys(_forms("lerp"), interpolated),
    **dict.fromkeys(_forms(*FUNCTIONS), function),
    **dict.fromkeys(("aten.arange", "aten.linspace"), ranged),
    **dict.fromkeys((f"aten.{name}" for name in UNTAGGED.split()), default),
}
