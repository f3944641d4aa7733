"""Elementwise operations under the judge: numbers, formats, shapes and sizes of all kinds; results that are off by little."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.operation import Keep
from refimpl.parity.audit.recorder import Recorder
from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import Verdict

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {(): [1.0], (1,): ["spread"], (0, 3): [1.0], (7,): [1.0, 60.0], (30, 33): [1.0, 60.0, "subnormal", "large", "spread"]}
"""Shapes, and how large the numbers are that are drawn for each."""
NUMBERS = (1e-8, 0.3, 1000.1, 1e-40, 2**24 + 1)


def judged(body: Callable[[], object], spoil: Callable[[Values], None] = lambda values: None) -> tuple[list[Verdict], Judge]:
    """Judge the operations of a body, whose results `spoil` may change before."""
    judge, found = Judge(), list[Verdict]()

    def observe(values: Values) -> None:
        spoil(values)
        found.extend(judge(values))

    recorder = Recorder(nn.Identity(), choose=lambda operation: Keep.VALUES, observe=observe)
    with recorder:
        body()
    assert recorder.failures == {}
    return found, judge


def draw(shape: tuple[int, ...], size: float | str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    info = torch.finfo(dtype)
    if size == "subnormal":
        x = x * info.smallest_normal / 2
    elif size == "large":
        x = (x * info.max / 2).clamp(info.min, info.max)
    elif size == "spread":
        x = x.sign() * torch.exp(torch.rand(shape, generator=generator, dtype=torch.float64) * 16 - 10)
    else:
        x = x * size
    return x.to(dtype)


def operands(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for shape, sizes in SHAPES.items():
        for i, size in enumerate(sizes):
            x, y = draw(shape, size, dtype, i), draw(shape, size, dtype, 100 + i)
            yield (x, y) if size != "spread" or len(shape) < 2 else (x.T, y.T.contiguous())


def with_numbers(f: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, Tensor], object]:
    return lambda x, y: [f(x, number) for number in NUMBERS]


def with_scalars(f: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor, Tensor], object]:
    scalars = [torch.tensor(number, dtype=dtype) for number in NUMBERS]
    return lambda x, y: [(f(x, scalar), f(scalar, x)) for scalar in scalars]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "numbers added": with_numbers(lambda x, s: (x + s) + (s - x)),
    "numbers multiplied": with_numbers(lambda x, s: (x * s) + (x / s)),
    "numbers in place": with_numbers(lambda x, s: x.clone().add_(s).mul_(s).div_(s)),
    "FP32 scalars": with_scalars(lambda x, y: x + y - y * x, torch.float32),
    "FP64 scalars": with_scalars(lambda x, y: x + y - y * x, torch.float64),
    "of two": lambda x, y: (x + y, x - y, x * y, x / y, torch.maximum(x, y), torch.atan2(x, y), torch.hypot(x, y)),
    "alpha": lambda x, y: (x.add(y, alpha=0.37), torch.rsub(x, y, alpha=0.7), x.clone().sub_(y, alpha=1e-3)),
    "of three": lambda x, y: (torch.addcmul(x, y, y, value=1e-3), x.clone().addcdiv_(x, y.abs() + 0.5, value=-0.01)),
    "lerp": lambda x, y: [torch.lerp(x.clamp(-1e4, 1e4), y.clamp(-1e4, 1e4), w) for w in (0.3, 0.5, 0.999, -0.6)],
    "integers": lambda x, y: (x * 257, x + torch.arange(x.numel()).reshape(x.shape) * 999, x * (y > 0)),
    "out": lambda x, y: (
        torch.add(x, y, out=torch.empty_like(x)),
        torch.mul(x, y, out=torch.empty(x.shape, dtype=torch.bfloat16)),
        torch.sub(x, y, out=torch.empty(x.shape)),
    ),
    "wider": lambda x, y: (x.clone().mul_(y.float()), x.clone().add_(y.float(), alpha=0.3), x + y.float()),
    "powers": lambda x, y: [x.abs() ** p for p in (2, 3, -1, -2, -3, 0.5, -0.5, 1.7, 0)] + [1.37**x, 10000**x],
    "whole quotients": lambda x, y: [torch.div(x, y, rounding_mode=mode) for mode in ("floor", "trunc", None)],
    "filled": with_numbers(lambda x, s: torch.where(x > 0, x.masked_fill(x < 0, min(s, 6e4)), torch.full_like(x, s / 999))),
    "special numbers": lambda x, y: (torch.nan_to_num(x / 0), x.clamp(-0.3, 0.37), F.threshold(x, 0.1, 0.3)),
    "ranges": lambda x, y: (torch.arange(0.1, 1.1, dtype=x.dtype), torch.linspace(-1, 3, 7, dtype=x.dtype)),
    "functions": lambda x, y: (x.exp(), x.abs().log1p(), x.sin(), x.cos(), x.abs().rsqrt(), x.abs().sqrt(), x.reciprocal()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_pytorchs_kernels_are_not_called_wrong(name: str, dtype: torch.dtype) -> None:
    for x, y in operands(dtype):
        verdicts, _ = judged(lambda x=x, y=y: OPERATIONS[name](x, y))
        assert [v for v in verdicts if v.level not in ("fine", "note")] == [], (x.shape, x)


DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda x, y: F.silu(x), "gelu": lambda x, y: F.gelu(x), "tanh": lambda x, y: x.tanh(),
    "gelu tanh": lambda x, y: F.gelu(x.clamp(-1e4, 1e4), approximate="tanh"), "sigmoid": lambda x, y: x.sigmoid(),
    "hardswish": lambda x, y: F.hardswish(x), "glu": lambda x, y: F.glu(torch.stack([x, y]), 0), "mse": F.mse_loss,
    "prelu": lambda x, y: F.prelu(x, y.detach().flatten()[:1]), "huber": lambda x, y: F.huber_loss(x, y, delta=0.7),
    "logit": lambda x, y: x.logit(), "mse none": lambda x, y: F.mse_loss(x, y, reduction="none"),
    "smooth": lambda x, y: F.smooth_l1_loss(x, y, reduction="sum"),
    "norm": lambda x, y: torch.linalg.vector_norm(x), "mish": lambda x, y: F.mish(x - 1.19),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_pytorchs_derivatives_are_not_called_wrong(name: str, dtype: torch.dtype) -> None:
    for x, y in operands(dtype):
        if not x.numel():
            continue
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()

        def body(a: Tensor = a, b: Tensor = b) -> None:
            result = DERIVATIVES[name](a, b)
            result.backward(draw(tuple(result.shape), 1.0, dtype, 7))

        verdicts, _ = judged(body)
        assert [v for v in verdicts if v.level not in ("fine", "note")] == [], (x.shape, x)


def units_off(units: int) -> Callable[[Values], None]:
    """Return what moves one element of a result by a few numbers of its format."""

    def spoil(values: Values) -> None:
        result = values.output if isinstance(values.output, Tensor) else next(iter(values.written.values()))
        if not result.is_floating_point():
            return
        bits = torch.int32 if result.dtype == torch.float32 else torch.int16
        off = result.clone()
        off.view(bits).view(-1)[5] += units
        values.output, values.written = off, dict.fromkeys(values.written, off)

    return spoil


EXACT: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "copy": lambda x, y: torch.clone(x),
    "add_": lambda x, y: x.add_(y), "where": lambda x, y: torch.where(y > 0, x, y), "square": lambda x, y: x**2,
    "relu": lambda x, y: torch.relu(x), "cast": lambda x, y: x.to(torch.bfloat16 if x.element_size() == 4 else torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_one_unit_is_wrong_where_there_is_one_right_result(name: str, dtype: torch.dtype) -> None:
    x, y = draw((12, 5), 1.0, dtype, 1).abs(), draw((12, 5), 1.0, dtype, 2).abs()
    verdicts, _ = judged(lambda: EXACT[name](x, y), units_off(1))
    wrong = [v for v in verdicts if v.level == "wrong"]
    assert wrong and wrong[0].ratio > 1


WITHIN: dict[str, tuple[int, Callable[[Tensor], object]]] = {
    "exp": (4, torch.exp), "tanh": (5, torch.tanh), "silu": (8, F.silu), "rsqrt": (5, torch.rsqrt), "sqrt": (3, torch.sqrt),
    "log": (4, torch.log), "gelu": (16, F.gelu), "pow": (8, lambda x: x**1.7),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHIN)
def test_functions_may_be_off_by_what_their_library_states(name: str) -> None:
    units, function = WITHIN[name]
    x = draw((12, 5), 1.0, torch.float32, 1).abs() + 1.1
    for off, level in ((units, "wrong"), (0, "fine")):
        verdicts, _ = judged(lambda: function(x), units_off(off))
        assert verdicts[-1].level in (level, "note" if level == "fine" else level)


@pytest.mark.parametrize("dtype", FORMATS[1:], ids=str)
def test_what_a_kernel_is_known_to_round_is_a_note_with_its_name(dtype: torch.dtype) -> None:
    x = draw((40, 33), 1.0, dtype, 1).abs() + 0.5
    expected = {
        "number": lambda: x + 0.3, "tensor": lambda: x + torch.tensor(0.3), "base": lambda: 1.37**x,
        "exponent": lambda: x**1.7, "alpha": lambda: x.add(x, alpha=0.37),
        "term": lambda: F.mse_loss(x, x * 3, reduction="none"),
    }  # fmt: skip
    for name, body in expected.items():
        verdicts, _ = judged(body)
        assert verdicts[-1].level == "note" and name.replace("tensor", "number") in verdicts[-1].reason, name
        assert verdicts[-1].equal < 0.99


def test_an_overflow_on_the_way_to_a_sum_is_no_error_and_a_lost_number_is() -> None:
    x = torch.tensor([2e38, 2e38, -2e38, -2e38])
    verdicts, _ = judged(lambda: x.sum())
    assert math.isinf(float(x.sum())) and verdicts[0].level == "fine"
    verdicts, _ = judged(lambda: x[:1] * 0.5, lambda values: setattr(values, "output", values.output / 0))
    assert verdicts[-1].level == "wrong"
