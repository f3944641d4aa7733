"""Elementwise operations: computed in FP32 and rounded once to the result's format. u = 2^-24, r is the exact result.

Sums, differences, products, quotients and square roots are the correctly rounded ones, to the bit. In 16 bits they round twice,
to FP32 and then to the result, which is innocuous for operands of p bits where FP32 has at least 2 p + 2 (Figueroa 1995,
'When is double rounding innocuous?'): 24 >= 2 * 11 + 2. It is not where an operand has more bits, a number or a tensor
without dimensions in FP32: there the bound is u |r|.

On the CPU, 16-bit kernels round such an operand to the tensor's format first, all but the second one of products and quotients:
the bound then has what that loses, and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from refimpl.parity.audit.judge.again import U, computed_in, fp32, in_fp64, is_16_bit
from refimpl.parity.audit.values import CannotJudge, Twin, Values, is_float

SCALAR = "the CPU kernel rounds the number to the tensor's format first"
SQUARE_ROOT = "the CPU's vectorized FP32 square root is not correctly rounded"
FACTOR = "the CPU kernel rounds alpha to the tensor's format first"
EXPONENT = "the CPU kernel rounds the exponent to the tensor's format first"
BASE = "the CPU kernel rounds the base to the tensor's format first"
POWER = "the CPU kernel rounds to 16 bits inside: x * x, or the root in the elements that are left over by vectors"
RANGE = "the CPU kernel computes the step in the tensor's format"
FLOOR = 2.0**-126
"""What FP32 arithmetic may flush to 0."""


def arithmetic(values: Values) -> Iterator[Twin]:
    """Judge add, sub, mul and div: correctly rounded; with alpha, or an operand of more bits, within u of its terms."""
    name, actual = float_result(values)
    exact = in_fp64(values)[name]
    given = values.inputs
    x, y, alpha = given["self"], given.get("other"), given.get("alpha", 1)
    kernel = short_name(values)
    is_sum = kernel in ("add", "sub", "rsub")
    bound: Tensor | float = 0.0
    note = ""
    if alpha != 1 and isinstance(y, Tensor):
        # fused or not: the product's rounding, and one more of the sum where the result is rounded again
        scaled = x if kernel == "rsub" else y
        term = (fp32(alpha) * scaled.double()).abs()
        bound = 2 * U * term + (U * exact.abs() if is_16_bit(actual) else 0.0)
        if is_16_bit(actual) and not actual.is_cuda:
            bound, note = bound + torch.finfo(actual.dtype).eps * term, FACTOR
    elif is_16_bit(actual) and (_is_wider(x, actual) or _is_wider(y, actual)):
        bound = U * exact.abs()
        if not actual.is_cuda:
            if loss := _lost(x, actual):
                bound, note = bound + (loss if is_sum else loss * exact.abs() / abs(float(x))), SCALAR
            if is_sum and (loss := _lost(y, actual)):
                bound, note = bound + loss, SCALAR
    elif actual.is_cuda and kernel in ("div", "true_divide") and not isinstance(y, Tensor):
        bound = U * exact.abs()  # x * (1 / y)
    yield Twin(name, actual, exact, with_format(values, actual, exact, bound), note=note)


def whole_quotient(values: Values) -> Iterator[Twin]:
    """Judge a quotient that is rounded to an integer, down or toward zero: either one, where x / y is all but an integer.

    In FP32, or in 16 bits, x / y may be rounded to the next integer before it is rounded down.
    """
    name, actual = float_result(values)
    given = values.inputs
    if given.get("rounding_mode", "floor") is None:
        yield from arithmetic(values)
        return
    exact = in_fp64(values)[name]
    y = given["other"]
    if not actual.is_cuda and not isinstance(y, Tensor):
        y = float(torch.tensor(y, dtype=actual.dtype))
    quotient = given["self"].double() / (y.double() if isinstance(y, Tensor) else y)
    rounding = torch.finfo(actual.dtype).eps * quotient.abs()
    is_near = (quotient - quotient.round()).abs() <= rounding
    lost = abs(1 / y - 1 / fp32(given["other"])) if not isinstance(y, Tensor) and y else 0.0
    bound = is_near.double() + lost * given["self"].double().abs()
    yield Twin(name, actual, exact, bound, note=SCALAR if lost else "")


def square_root(values: Values) -> Iterator[Twin]:
    """Judge sqrt: correctly rounded, but for the CPU's in FP32, within 1 ulp."""
    name, actual = float_result(values)
    exact = in_fp64(values)[name]
    vectorized = actual.dtype == torch.float32 and not actual.is_cuda
    yield Twin(name, actual, exact, U * exact.abs() if vectorized else 0.0, note=SQUARE_ROOT if vectorized else "")


def power(values: Values) -> Iterator[Twin]:
    """Judge pow, exp(p log x): u |p log x| of the argument, 2 ulp of exp, one rounding; squares are correctly rounded.

    On the CPU in 16 bits, exponents and bases that are numbers are rounded, and some exponents have kernels that round inside.
    The powers 1/2 and -1/2 of -Inf are Inf and 0, or NaN where a kernel takes the root.
    """
    name, actual = float_result(values)
    exact = in_fp64(values)[name]
    x, exponent = values.inputs["self"], values.inputs["exponent"]
    if not isinstance(exponent, Tensor) and abs(exponent) == 0.5:
        known = actual.isnan() | (actual == (torch.inf if exponent > 0 else 0))
        exact = torch.where((x == -torch.inf) & known, actual, exact)
    if not isinstance(exponent, Tensor) and exponent == 2:
        yield Twin(name, actual, exact, 0.0)
        return
    base = torch.as_tensor(x, dtype=torch.float64, device=exact.device)
    p = torch.as_tensor(exponent, dtype=torch.float64, device=exact.device)
    logarithm = (p * base.abs().log()).abs().nan_to_num(0.0, 0.0, 0.0)
    bound, note = U * (5 + logarithm) * exact.abs() + FLOOR, ""
    if is_16_bit(actual) and not actual.is_cuda:
        u = torch.finfo(actual.dtype).eps / 2
        if exponent in (3, -3, -2, -0.5) if not isinstance(exponent, Tensor) else False:
            bound, note = bound + 2 * u * exact.abs(), POWER
        elif loss := _lost(exponent, actual):
            bound, note = bound + 2 * loss / abs(float(exponent)) * logarithm * exact.abs(), EXPONENT
        elif loss := _lost(x, actual):
            change = (p * loss / abs(float(x))).abs()
            bound, note = bound + (1 + 2 * u) * torch.expm1(change) * exact.abs(), BASE
    yield Twin(name, actual, exact, bound, note=note)


def with_product(values: Values) -> Iterator[Twin]:
    """Judge addcmul and addcdiv: self + value a b, or a / b: three roundings of the term, and the sum's.

    A product that FP32 flushes to 0, or rounds to a subnormal, is divided by b after that.
    """
    name, actual = float_result(values)
    exact = in_fp64(values)[name]
    given = values.inputs
    bound = given["self"].double().sub(exact).abs_().mul_(3 * U).add_(FLOOR)
    if is_16_bit(actual):
        bound += U * exact.abs()
    if short_name(values) == "addcdiv" and exact.numel():
        smallest = float(given["tensor2"].abs().min())
        bound += FLOOR / smallest if smallest > 2.0**-60 else FLOOR / given["tensor2"].double().abs()
    yield Twin(name, actual, exact, bound)


def interpolated(values: Values) -> Iterator[Twin]:
    """Judge lerp: self + w d, or end - (1 - w) d where |w| >= 1/2, d = end - self: three roundings of the term, and a sum."""
    name, actual = float_result(values)
    exact = in_fp64(values)[name]
    given = values.inputs
    start, end = given["self"].double(), given["end"].double()
    weight = torch.as_tensor(given["weight"], dtype=torch.float64, device=exact.device)
    note, bound = "", torch.where(weight.abs() < 0.5, start, end).sub_(exact).abs_().mul_(3 * U).add_(FLOOR)
    if is_16_bit(actual):
        bound += U * exact.abs()
    if is_16_bit(actual) and not actual.is_cuda and (loss := _lost(given["weight"], actual)):
        bound, note = bound + loss * (end - start).abs(), SCALAR
    yield Twin(name, actual, exact, bound, note=note)


def ranged(values: Values) -> Iterator[Twin]:
    """Judge arange and linspace: start + i step, in FP32 at least: three roundings, each of numbers within the range."""
    name, actual = float_result(values)
    given = values.inputs
    i = torch.arange(actual.numel(), dtype=torch.float64, device=actual.device)
    start, end = float(given.get("start", 0)), float(given["end"])
    if "steps" in given:
        exact = start + i * ((end - start) / max(given["steps"] - 1, 1))
    else:
        exact = start + i * float(given.get("step", 1))
    exact = exact.reshape(actual.shape)
    largest = max(abs(start), abs(end))
    rounds = is_16_bit(actual) and not actual.is_cuda
    u = torch.finfo(actual.dtype).eps / 2 if rounds else U
    integers = all(float(x).is_integer() for x in (start, exact[-1] if exact.numel() else end, given.get("step", 1)))
    bound = 0.0 if integers and "steps" not in given and largest <= 2**24 else 3 * u * largest
    yield Twin(name, actual, exact, bound, by="exact", note=RANGE if rounds and bound else "")


def float_result(values: Values) -> tuple[str, Tensor]:
    """Return the one floating-point result of an elementwise operation, and its name."""
    for name, tensor in values.results():
        if is_float(tensor):
            if tensor.dtype == torch.float64:
                raise CannotJudge("in FP64 already")
            return name, tensor
    raise CannotJudge("no floating-point result")


def with_format(values: Values, actual: Tensor, exact: Tensor, bound: Tensor | float) -> Tensor | float:
    """Return a bound with the rounding to the operands' format, which comes before that of an `out` of another."""
    inside = computed_in(values) if "out" in values.written else None
    if inside in (None, torch.float64, actual.dtype):
        return bound
    info = torch.finfo(inside)
    overflowed = exact.abs() >= info.max  # to Inf, in the operands' format
    return torch.where(overflowed, torch.inf, bound + info.eps / 2 * exact.abs() + info.smallest_normal * info.eps / 2)


def short_name(values: Values) -> str:
    """Return an operation's name without namespace, overload and sign of being in place."""
    return values.operation.name.split(".")[1].rstrip("_")


def forms(*names: str) -> list[str]:
    """Return the names of the operations, in place too."""
    return [f"aten.{name}{ending}" for name in names for ending in ("", "_")]


def _is_wider(operand: object, actual: Tensor) -> bool:
    return not isinstance(operand, Tensor) or operand.dtype != actual.dtype


def _lost(operand: object, actual: Tensor) -> float:
    """Return by how much a number, or a tensor without dimensions, changes where it is rounded to a result's format."""
    if isinstance(operand, Tensor) and (operand.dim() or not actual.dim() or not operand.is_floating_point()):
        return 0.0
    if not isinstance(operand, Tensor | int | float):
        return 0.0
    number = fp32(float(operand))
    return abs(number - float(torch.tensor(number, dtype=actual.dtype)))


JUDGES = {
    **dict.fromkeys(forms("add", "sub", "rsub", "mul", "div", "true_divide"), arithmetic),
    **dict.fromkeys((f"{div}.{of}_mode" for div in forms("div") for of in ("Tensor", "Scalar")), whole_quotient),
    **dict.fromkeys(forms("floor_divide"), whole_quotient),
    **dict.fromkeys(forms("sqrt"), square_root),
    **dict.fromkeys(forms("pow"), power),
    **dict.fromkeys(forms("addcmul", "addcdiv"), with_product),
    **dict.fromkeys(forms("lerp"), interpolated),
    **dict.fromkeys(("aten.arange", "aten.linspace"), ranged),
}
