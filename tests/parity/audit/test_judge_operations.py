"""The judge on PyTorch's own kernels, which it must not call wrong, and on results that are, which it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.operation import Keep, Operation
from refimpl.parity.audit.recorder import Recorder
from refimpl.parity.audit.values import Twin, Values
from refimpl.parity.audit.verdict import Verdict, measure

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ALLOWED = ("fine", "note")


def every(operation: Operation) -> Keep:
    return Keep.VALUES


def judged(body: Callable[[], object], spoil: Callable[[Values], None] = lambda values: None) -> tuple[list[Verdict], Judge]:
    """Judge the operations of a body, whose results `spoil` may change before."""
    judge, found = Judge(), list[Verdict]()

    def observe(values: Values) -> None:
        spoil(values)
        found.extend(judge(values))

    recorder = Recorder(nn.Identity(), choose=every, observe=observe)
    with recorder:
        body()
    assert recorder.failures == {}
    return found, judge


def draw(*shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * size).to(dtype)


def differentiated(f: Callable[..., Tensor], *operands: Tensor) -> None:
    leaves = [x.clone().requires_grad_() for x in operands]
    y = f(*leaves)
    y.backward(draw(*y.shape, dtype=y.dtype) if y.dim() else None)


ARITHMETIC: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sums": lambda x, y: (x + y, x - y, x + 1e-8, 1 - x, x.add(y, alpha=0.37), x.clone().add_(y, alpha=-0.01)),
    "products": lambda x, y: (x * y, x / y, x * 0.3, x / 0.7, x.clone().mul_(0.999), x.square(), x.reciprocal()),
    "powers": lambda x, y: (x**2, x**3, x**-3, x.abs() ** 1.7, x.abs().sqrt(), x.abs().rsqrt(), 2.0 ** x.clamp(-5, 5)),
    "functions": lambda x, y: (x.clamp(-8, 8).exp(), x.abs().log(), x.sin(), x.tanh(), x.sigmoid(), x.erf(), x.expm1()),
    "in place": lambda x, y: (x.clone().lerp_(y, 0.3), x.clone().addcmul_(y, y, value=1e-3), x.clone().addcdiv_(y, y + 9)),
    "mixed": lambda x, y: (x + y.double().float(), x.float() * y, x * torch.tensor(0.3), x + torch.tensor(2)),
    "broadcast": lambda x, y: (x[:, :1] * y[0], x.T + y.T.contiguous(), x[::2] - y[::2], x[:0] + y[:0]),
    "moves": lambda x, y: (torch.cat([x, y]), x[:, 3], torch.where(x > 0, x, y), x.masked_fill(y > 0, -1e4), x.topk(3)),
    "casts": lambda x, y: (x.bfloat16(), x.half(), x.float(), x.clone().copy_(y.float()), torch.full((3,), 0.1, dtype=x.dtype)),
    "sums of many": lambda x, y: (x.sum(), x.sum(0), x.mean(-1), x.var(-1), x.std(), x.cumsum(1), x[:, :6].prod(1)),
    "norms": lambda x, y: (x.norm(), x.norm(dim=1), x.norm(1), torch.linalg.vector_norm(x, ord=float("inf"))),
}  # fmt: skip


@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_what_pytorch_computes_is_not_called_wrong(name: str, dtype: torch.dtype, size: float) -> None:
    x, y = draw(120, 33, dtype=dtype, size=size), draw(33, 120, dtype=dtype, size=size).T
    if name == "sums of many" and dtype == torch.float16 and size > 1:
        x = x[:, :2].abs().clamp(max=10)  # products of six overflow, which is another matter
    verdicts, judge = judged(lambda: ARITHMETIC[name](x, y))
    assert len(verdicts) >= 3 and [v for v in verdicts if v.level not in ALLOWED] == []
    assert not judge.unjudged or set(judge.unjudged) == {"in FP64 already"}


ACTIVATIONS = (F.silu, F.gelu, F.softplus, F.mish, F.elu, F.leaky_relu, F.hardswish, F.logsigmoid, F.relu, F.tanh)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
def test_activations_and_their_derivatives_are_not_called_wrong(activation: Callable, dtype: torch.dtype) -> None:
    for size in (1.0, 1e-3, 30.0):
        verdicts, judge = judged(lambda size=size: differentiated(activation, draw(90, 40, dtype=dtype, size=size)))
        assert len(verdicts) >= 2 and [v for v in verdicts if v.level not in ALLOWED] == [] and not judge.unjudged


PRODUCTS: dict[str, Callable[[torch.dtype], object]] = {
    "matrices": lambda d: draw(70, 90, dtype=d) @ draw(90, 50, dtype=d),
    "long": lambda d: (draw(60, 5000, dtype=d) + 1) @ draw(5000, 40, dtype=d),
    "one sign": lambda d: draw(60, 5000, dtype=d).abs() @ draw(5000, 40, dtype=d).abs(),
    "batches": lambda d: draw(9, 60, 70, dtype=d) @ draw(9, 70, 50, dtype=d),
    "bias": lambda d: F.linear(draw(60, 70, dtype=d, size=1e-3), draw(50, 70, dtype=d), draw(50, dtype=d)),
    "alpha, beta": lambda d: draw(2, 9, 8, dtype=d).baddbmm(draw(2, 9, 7, dtype=d), draw(2, 7, 8, dtype=d), beta=0.5, alpha=3),
    "vectors": lambda d: (draw(60, 70, dtype=d) @ draw(70, dtype=d), draw(70, dtype=d) @ draw(70, dtype=d)),
    "convolution": lambda d: differentiated(
        lambda *a: F.conv2d(*a, padding=1), draw(3, 4, 9, 9, dtype=d), draw(8, 4, 3, 3, dtype=d), draw(8, dtype=d)
    ),
    "groups, stride": lambda d: differentiated(
        lambda *a: F.conv1d(*a, groups=2, stride=2), draw(2, 4, 20, dtype=d), draw(6, 2, 5, dtype=d)
    ),
    "transposed": lambda d: differentiated(
        lambda *a: F.conv_transpose2d(*a, stride=2), draw(2, 3, 5, 5, dtype=d), draw(3, 4, 3, 3, dtype=d)
    ),
    "pooling": lambda d: differentiated(lambda x: F.avg_pool2d(F.max_pool2d(x, 3, 2), 2), draw(2, 3, 13, 13, dtype=d)),
    "resized": lambda d: differentiated(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), draw(2, 3, 5, 5, dtype=d)),
    "losses": lambda d: (differentiated(lambda x: F.mse_loss(x, x.detach() * 2), draw(40, 30, dtype=d)),
                         differentiated(lambda x: F.smooth_l1_loss(x, x.detach() * 2), draw(40, 30, dtype=d))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_not_called_wrong(name: str, dtype: torch.dtype) -> None:
    verdicts, judge = judged(lambda: PRODUCTS[name](dtype))
    assert verdicts and [v for v in verdicts if v.level not in ALLOWED] == [] and not judge.unjudged


def test_a_large_product_is_judged_on_a_sample_and_another_step_sees_another() -> None:
    a, b = draw(300, 200, dtype=torch.bfloat16), draw(200, 400, dtype=torch.bfloat16)
    (first, second), judge = judged(lambda: (a @ b, a @ b))
    assert 1000 < first.judged < first.elements / 10 and judge.judged == 2 * first.elements
    assert first.expected != second.expected  # other rows and columns


# ------------------------------------------------------------------------------------------------- wrong results


def in_16_bits(a: Tensor, b: Tensor) -> Tensor:
    """A product whose partial sums over 16 terms are rounded to the operands' format."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for k in range(0, a.shape[1], 16):
        total = (total.double() + a[:, k : k + 16].double() @ b[k : k + 16].double()).to(a.dtype)
    return total


def split(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """A product whose parts over K are rounded to the operands' format and then added."""
    chunks = zip(a.chunk(parts, 1), b.chunk(parts), strict=True)
    return torch.stack([(x.double() @ y.double()).to(a.dtype).double() for x, y in chunks]).sum(0).to(a.dtype)


def shortened(x: Tensor, bits: int) -> Tensor:
    """FP32 numbers of which a matrix unit reads only the first bits, as TF32 (10) and bf16 (7) do."""
    return (x.view(torch.int32) & -(1 << (23 - bits))).view(torch.float32)


def truncated(values: Values) -> None:
    """Replace a 16-bit sum by its truncation toward zero."""
    if values.operation.name == "aten.add.Tensor" and values.output.dtype == torch.bfloat16:
        exact = values.inputs["self"].float() + values.inputs["other"].float()
        values.output = (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize("K", [64, 1024, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_few_bits_are_seen_at_any_length(K: int, dtype: torch.dtype) -> None:
    a, b = draw(40, K, dtype=dtype), draw(K, 40, dtype=dtype)
    exact = a.double() @ b.double()
    for computed in (in_16_bits(a, b), split(a, b, 2), split(a, b, 4)):
        values: Any = Values(operation_of(a, b), ("self", "mat2"), (a, b), {}, computed, {})
        verdict = Judge()(values)[0]
        assert verdict.level in ("wrong", "worse than it need be"), verdict
        assert verdict.equal < 0.75 < 0.95 < float((exact.to(dtype) == (a @ b)).double().mean())


def operation_of(a: Tensor, b: Tensor) -> Operation:
    recorder = Recorder(nn.Identity())
    with recorder:
        torch.mm(a[:1, :1], b[:1, :1])
    return recorder.operations[-1]


def test_products_of_subnormal_size_are_not_said_to_have_few_bits() -> None:
    a, b = torch.randn(32, 64), torch.randn(64, 32) * 2.0**-146
    (verdict,), _ = judged(lambda: a @ b)
    assert verdict.level == "fine" and verdict.bits is None
    b = b * 2.0**60
    (larger,), _ = judged(lambda: a @ b)
    assert larger.level == "fine" and larger.bits is not None and larger.bits > 20


@pytest.mark.parametrize(("bits", "effective"), [(10, 11.1), (7, 8.1)])
@pytest.mark.parametrize("K", [256, 4096])
def test_effective_bits_name_the_precision_of_a_product(bits: int, effective: float, K: int) -> None:
    a, b = draw(64, K, dtype=torch.float32), draw(K, 64, dtype=torch.float32)
    one = operation_of(a, b)
    right = Judge()(Values(one, ("self", "mat2"), (a, b), {}, a @ b, {}))[0]
    short = Judge()(Values(one, ("self", "mat2"), (a, b), {}, shortened(a, bits) @ shortened(b, bits), {}))[0]
    assert right.level == "fine" and right.bits is not None and right.bits > 20
    assert short.level in ("wrong", "worse than it need be") and short.bits is not None
    assert abs(short.bits - effective) < 1.2  # these operands are truncated, those of the study rounded


def test_truncation_is_a_bias_or_wrong_where_the_result_must_be_exact() -> None:
    x, y = draw(100, 90, dtype=torch.bfloat16), draw(90, 100, dtype=torch.bfloat16).T
    verdicts, _ = judged(lambda: x + y, truncated)
    assert [v.level for v in verdicts] == ["wrong"] and verdicts[0].excess != 0
    exact = (x.double().abs() + y.double().abs()).reshape(-1)
    down = (exact.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    biased = measure(Twin("out", down, exact, 2.0**-8 * exact, typical=exact * 2.0**-24), exact.numel())
    assert biased.level in ("biased", "worse than it need be") and -0.6 < biased.excess < -0.2


@pytest.mark.parametrize("name", ["mul", "exp", "sum", "mm", "cat"])
def test_one_element_off_by_a_few_units_is_wrong(name: str) -> None:
    x = draw(30, 30, dtype=torch.float32).abs() + 0.5
    bodies: dict[str, Callable[[], Tensor]] = {
        "mul": lambda: x * x, "exp": x.exp, "sum": lambda: x.sum(0), "mm": lambda: x @ x, "cat": lambda: torch.cat([x]),
    }  # fmt: skip

    def spoil(values: Values) -> None:
        values.output = values.output.clone()
        values.output.view(-1)[7] *= 1 + 2.0**-16

    verdicts, _ = judged(bodies[name], spoil)
    assert [v.level for v in verdicts] == ["wrong"] and verdicts[0].ratio > 3
    assert verdicts[0].where[-1] == 7


def test_special_values_are_judged_by_where_they_go() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 65504.0, 6e-8], dtype=torch.float16)
    verdicts, _ = judged(lambda: (x + x, x * x, x - x, x / x, x.exp(), x.float().half(), x.sum()))
    assert [v.level for v in verdicts] == ["fine"] * len(verdicts)

    def spoil(values: Values) -> None:
        values.output = values.output.nan_to_num()

    verdicts, _ = judged(lambda: x * x, spoil)
    assert verdicts[0].level == "wrong" and verdicts[0].ratio == float("inf")


def test_what_cannot_be_judged_is_counted_with_its_reason() -> None:
    x = draw(5, 5, dtype=torch.float32)
    verdicts, judge = judged(lambda: (x.double() * 2, torch.linalg.inv(x), F.dropout(x, 0.5)))
    assert judge.unjudged["in FP64 already"] == 50 and any("inv" in reason for reason in judge.unjudged)
    assert all(v.level == "fine" for v in verdicts)
