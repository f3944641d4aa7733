"""The judge of operations on lists: each tensor of a list is judged, as the operation on a single tensor is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import Tensor, nn

from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.operation import Keep
from refimpl.parity.audit.recorder import Recorder
from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import Verdict

FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def judged(body: Callable[[], object], spoil: Callable[[Values], None] = lambda values: None) -> tuple[list[Verdict], Judge]:
    """Judge the operations of a body, whose results `spoil` may change before."""
    judge, found = Judge(), list[Verdict]()

    def observe(values: Values) -> None:
        if "_foreach" in values.operation.name:
            spoil(values)
            found.extend(judge(values))

    recorder = Recorder(nn.Identity(), choose=lambda _: Keep.VALUES, observe=observe)
    with recorder:
        body()
    assert recorder.failures == {}
    return found, judge


def draw(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 30), (7,), (), (0, 3))]


NUMBERS = [0.37, -1e-3, 2.0, 1.0]
ADD, SUB, MUL, DIV = torch._foreach_add, torch._foreach_sub, torch._foreach_mul, torch._foreach_div
ABS, LERP, POW, NORM = torch._foreach_abs, torch._foreach_lerp, torch._foreach_pow, torch._foreach_norm
ADDCMUL, ADDCDIV = torch._foreach_addcmul, torch._foreach_addcdiv
BODIES: dict[str, Callable[[list[Tensor], list[Tensor], list[Tensor]], object]] = {
    "numbers": lambda x, y, z: [f(x, 0.3) for f in (ADD, SUB, MUL, DIV)],
    "a number each": lambda x, y, z: [MUL(x, NUMBERS), torch._foreach_add_(x, NUMBERS)],
    "lists": lambda x, y, z: [ADD(x, y, alpha=-0.7), MUL(x, y), torch._foreach_div_(x, y)],
    "a tensor": lambda x, y, z: [torch._foreach_mul_(x, torch.tensor(0.3)), DIV(x, torch.tensor(0.7))],
    "terms": lambda x, y, z: [torch._foreach_addcmul_(x, y, z, 0.001), ADDCDIV(x, y, ABS(z), NUMBERS)],
    "numbers in a tensor": lambda x, y, z: ADDCMUL(x, y, z, torch.tensor(NUMBERS)),
    "lerp": lambda x, y, z: [torch._foreach_lerp_(x, y, 0.1), LERP(x, y, NUMBERS), LERP(x, y, z)],
    "roots": lambda x, y, z: [torch._foreach_sqrt(ABS(x)), torch._foreach_rsqrt(ABS(y))],
    "powers": lambda x, y, z: [POW(x, 2), POW(ABS(y), 0.7)],
    "functions": lambda x, y, z: [torch._foreach_exp(x), torch._foreach_tanh_(y), torch._foreach_sigmoid(z)],
    "moves": lambda x, y, z: [torch._foreach_neg_(x), torch._foreach_maximum_(y, 0.1), torch._foreach_clamp_min(x, y)],
    "copies": lambda x, y, z: [torch._foreach_copy_(x, [t.float() for t in y]), torch._foreach_zero_(z)],
    "norms": lambda x, y, z: [NORM(x[:3]), NORM(y[:3], 1), NORM(z[:3], float("inf"))],
}


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_what_pytorch_does_to_lists_is_judged_and_not_called_wrong(name: str, dtype: torch.dtype) -> None:
    verdicts, judge = judged(lambda: BODIES[name](draw(dtype, 1), draw(dtype, 2), draw(dtype, 3)))
    assert judge.unjudged == {} and judge.judged == sum(v.elements for v in verdicts) > 0
    assert {v.level for v in verdicts} <= {"fine", "note"}, [v for v in verdicts if v.level not in ("fine", "note")]


@pytest.mark.parametrize("name", BODIES)
def test_one_wrong_tensor_of_a_list_is_found(name: str) -> None:
    def spoil(values: Values) -> None:
        results = dict(values.results())
        next(x for key, x in results.items() if key.endswith(".1")).mul_(1 + 2.0**-12).add_(2.0**-20)

    verdicts, _ = judged(lambda: BODIES[name](draw(torch.float32, 1), draw(torch.float32, 2), draw(torch.float32, 3)), spoil)
    assert {v.level for v in verdicts if v.result.endswith(".1")} == {"wrong"}
    assert "wrong" not in {v.level for v in verdicts if v.result.endswith(".0")}


def test_a_number_that_takes_lists_is_not_judged() -> None:
    verdicts, judge = judged(lambda: torch._foreach_pow(2.0, draw(torch.float32, 1)))
    assert verdicts == [] and list(judge.unjudged) == ["aten._foreach_pow.ScalarAndTensor takes no list as its first argument"]
