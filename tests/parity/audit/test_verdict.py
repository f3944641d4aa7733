"""`measure`: what the statistics of a result say of known errors."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import Tensor

from refimpl.parity.audit.values import Twin
from refimpl.parity.audit.verdict import Verdict, measure, ulp

FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def exact(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def judged(actual: Tensor, right: Tensor, bound: Tensor | float = 0.0, typical: Tensor | float | None = None) -> Verdict:
    return measure(Twin("out", actual, right, bound, typical), actual.numel())


@pytest.mark.parametrize("dtype", FORMATS)
def test_correctly_rounded_results_are_fine_with_no_bound(dtype: torch.dtype) -> None:
    right = torch.cat([exact(2000), exact(200) * 1e-7, torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e39, 70000.0])])
    verdict = judged(right.to(dtype), right)
    assert (verdict.level, verdict.ratio, verdict.equal, verdict.excess) == ("fine", 0.0, 1.0, 0.0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_one_element_a_unit_off_is_wrong_and_named(dtype: torch.dtype) -> None:
    right = exact(5, 7)
    actual = right.to(dtype)
    actual[3, 4] += 2 * ulp(right, dtype)[3, 4].to(dtype)
    verdict = judged(actual, right)
    assert (verdict.level, verdict.where, verdict.equal) == ("wrong", (3, 4), 1 - 1 / 35)
    assert 1.5 <= verdict.ratio <= 5  # two units and a rounding, of which a half to a whole unit is allowed
    assert judged(actual, right, 2 * ulp(right, dtype)).level == "fine"
    assert judged(actual, right, torch.tensor(1.0)).level == "fine"  # one bound for all


@pytest.mark.parametrize("dtype", FORMATS)
def test_truncation_has_an_excess_of_half_a_unit(dtype: torch.dtype) -> None:
    right = exact(4000).abs()
    nearest = right.to(dtype)
    truncated = torch.where(nearest.double() > right, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    verdict = judged(truncated, right, ulp(right, dtype) / 4)
    assert -0.55 < verdict.excess < -0.45 and verdict.level == "wrong"
    # Up from the middle between two numbers on, where to nearest is down as often as up.
    middle = (nearest.double() + ulp(nearest.double(), dtype) / 2)[:2000]
    ties_up = judged(torch.nextafter(nearest, torch.full_like(nearest, math.inf))[:2000], middle, ulp(middle, dtype) / 16)
    assert 0.45 < ties_up.excess < 0.55 and ties_up.level == "biased"


def test_infinity_is_right_only_where_rounding_gives_it() -> None:
    right = torch.tensor([65519.0, 65520.0, -65520.0], dtype=torch.float64)
    infinite = torch.tensor([math.inf, math.inf, -math.inf], dtype=torch.float16)
    verdict = judged(infinite, right)
    assert (verdict.level, verdict.where, verdict.ratio) == ("wrong", (0,), math.inf)
    assert judged(infinite, right, 1.0).level == "fine"
    assert judged(infinite[:1], torch.tensor([math.nan], dtype=torch.float64)).level == "wrong"
    assert judged(torch.tensor([math.nan]), torch.tensor([1.0], dtype=torch.float64)).level == "wrong"


def test_many_errors_within_the_bound_are_worse_than_need_be() -> None:
    right = exact(4000)
    tiny = 2.0**-24 * right.abs()
    assert judged((right * (1 + 2.0**-8)).bfloat16(), right, 1.0, tiny).level == "worse than it need be"
    assert judged((right + tiny).bfloat16(), right, 1.0, tiny).level == "fine"


def test_products_have_the_effective_bits_of_their_precision() -> None:
    a, b = exact(64, 256), exact(256, 64)
    right, size = a.float().double() @ b.float().double(), a.abs() @ b.abs() / 16

    def bits(x: Tensor, y: Tensor) -> Verdict:
        return measure(Twin("out", x @ y, right, size, products=size), 64 * 64)

    assert bits(a.float(), b.float()).level == "fine" and bits(a.float(), b.float()).bits > 20
    rounded = bits(a.bfloat16().float(), b.bfloat16().float())
    assert rounded.level == "worse than it need be" and 7 < rounded.bits < 9.5


def test_scalars_and_empty_results_are_judged() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    assert judged(one.float(), one).level == "fine"
    assert judged(one.float() * 1.5, one).where == () and judged(one.float() * 1.5, one).level == "wrong"
    assert judged(torch.zeros(0), torch.zeros(0, dtype=torch.float64)).judged == 0
