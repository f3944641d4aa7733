"""Rules D14 to D18: kernels that do not compute what they could. A faulty kernel is one whose results a test overwrites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from audit_nets import HALF, LOW, ROWS, N, audited, serious, the_one
from torch import Tensor

from refimpl.parity.audit.rules.kernels import FP32_PRODUCTS, REDUCTIONS, settings_for
from refimpl.parity.audit.session import Audit
from refimpl.parity.audit.values import Values

FP32 = torch.float32
Kernel = Callable[[Values], Tensor]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Kernel], None]]:
    """Replace the results of an operation, before anybody sees them, by those of another kernel."""
    observe = Audit._observe

    def install(name: str, other: Kernel) -> None:
        def observed(self: Audit, values: Values) -> None:
            if values.operation.name.startswith(name) and values.output.dtype != torch.float64:
                values.output.copy_(other(values))
            observe(self, values)

        monkeypatch.setattr(Audit, "_observe", observed)

    yield install


def truncate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x with the bits that a 16-bit format does not hold cut off."""
    y = x.to(dtype)
    y.view(torch.int16).sub_((y.double().abs() > x.double().abs()).to(torch.int16))
    return y


def cut_to(x: Tensor, bits: int) -> Tensor:
    """Return x with the first bits of its significand only, as a tensor core reads FP32."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp((fraction * 2.0**bits).trunc() / 2.0**bits, exponent)


# ------------------------------------------------------------------------------------------------- D14 truncation


def figures(text: str) -> tuple[float, float, float]:
    """Return two shares and a signed number of a sentence."""
    words = text.replace(",", " ").split()
    shares = [float(w.strip("%")) / 100 for w in words if w.endswith("%")]
    return shares[0], shares[1], float(next(w for w in words if w[0] in "+-"))


def residual(x: Tensor) -> Tensor:
    return x + torch.linspace(-1, 1, N).to(x.dtype)


@pytest.mark.parametrize("dtype", [LOW, HALF])
def test_a_sum_that_is_truncated_is_half_a_unit_too_small(
    kernel: Callable[[str, Kernel], None], dtype: torch.dtype
) -> None:
    kernel("aten.add.Tensor", lambda v: truncate(v.inputs["self"].float() + v.inputs["other"].float(), v.output.dtype))
    finding = the_one(audited(residual, dtype), "D14")
    share, equal, outward = figures(finding.number)
    assert share == 1.0 and 0.3 < equal < 0.8 and -0.7 < outward < -0.2


def test_a_cast_that_is_truncated_is_found(kernel: Callable[[str, Kernel], None]) -> None:
    kernel("aten._to_copy", lambda v: truncate(v.inputs["self"], LOW) if v.output.dtype == LOW else v.inputs["self"])
    assert "are truncated" in the_one(audited(lambda x: x, FP32, autocast=LOW), "D14").number


@pytest.mark.parametrize("dtype", [FP32, LOW, HALF])
def test_kernels_that_round_to_nearest_are_not_found(dtype: torch.dtype) -> None:
    assert serious(audited(residual, dtype)) == set()
    assert serious(audited(lambda x: x.tanh().exp().sigmoid(), dtype)) == set()


# ------------------------------------------------------------------------------------------------- D15, D16 products


def mixed(x: Tensor) -> Tensor:
    return x @ torch.linspace(-1, 1, N * N).mul(1e4).sin().reshape(N, N).to(x.dtype)


@pytest.mark.parametrize(("bits", "effective"), [(11, 11.1), (8, 8.1)])
def test_products_of_shorter_operands_have_fewer_effective_bits(
    kernel: Callable[[str, Kernel], None], bits: int, effective: float
) -> None:
    def product(values: Values) -> Tensor:
        a, b = (cut_to(values.inputs[key].double(), bits) for key in ("self", "mat2"))
        return (a @ b).float()

    kernel("aten.mm", product)
    finding = the_one(audited(mixed, FP32), "D15")
    found = float(finding.number.split(" has ")[1].split()[0])
    assert found == pytest.approx(effective, abs=0.5) and finding.level == "worse than it need be"


def test_products_that_a_setting_allows_are_a_note(kernel: Callable[[str, Kernel], None]) -> None:
    kernel("aten.mm", lambda v: (cut_to(v.inputs["self"], 8) @ cut_to(v.inputs["mat2"], 8)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        audit = audited(mixed, FP32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert serious(audit) == set() and "allowed by float32_matmul_precision" in audit.findings["D15"].number
    assert audited(mixed, FP32).findings["D15"].level != "note"


def split(parts: int) -> Kernel:
    """Return a kernel that rounds the partial sums of a product to 16 bits, and adds them in 16 bits."""

    def product(values: Values) -> Tensor:
        a, b = values.inputs["self"].float(), values.inputs["mat2"].float()
        total = torch.zeros_like(values.output)
        for x, y in zip(a.chunk(parts, 1), b.chunk(parts, 0), strict=True):
            total = (total.float() + (x @ y).to(total.dtype).float()).to(total.dtype)
        return total

    return product


@pytest.mark.parametrize(("parts", "share"), [(2, 0.63), (4, 0.50)])
def test_partial_sums_in_16_bits_leave_fewer_results_correctly_rounded(
    kernel: Callable[[str, Kernel], None], parts: int, share: float
) -> None:
    kernel("aten.mm", split(parts))
    finding = the_one(audited(mixed), "D16")
    said = float(finding.number.split("%")[0]) / 100
    assert abs(said - share) < 0.12 and "FP32 sums leave 9" in finding.number


@pytest.mark.parametrize("dtype", [FP32, LOW, HALF])
def test_products_of_this_machine_are_not_found(dtype: torch.dtype) -> None:
    assert {"D15", "D16"} & set(audited(lambda x: x @ x.T @ x / 8, dtype).findings) == set()


def test_the_settings_are_those_of_the_operations_device() -> None:
    operation = next(o for o in audited(lambda x: x @ x.T @ x, FP32).steps[0].operations if o.name == "aten.mm.default")
    assert settings_for(operation, FP32_PRODUCTS) == [] == settings_for(operation, REDUCTIONS)
    assert {device for device, _, _ in REDUCTIONS} == {"cuda"}
    assert all(isinstance(is_on(), bool) for _, _, is_on in (*FP32_PRODUCTS, *REDUCTIONS))


# ------------------------------------------------------------------------------------------------- D18 other kernels


def test_a_kernel_that_rounds_inside_is_a_note_with_its_name() -> None:
    """GPT-2's gelu_new has x^3, which PyTorch's CPU kernel rounds twice in bf16."""
    finding = audited(lambda x: F.gelu(x, approximate="none") + x.pow(3) + 1e-3).findings["D18"]
    assert finding.level == "note" and "aten.pow (bfloat16)" in finding.number and "aten.add (bfloat16)" in finding.number
    assert "D18" not in audited(lambda x: x * x * x + 0.5).findings


def test_a_kernel_that_is_proved_wrong_says_by_how_much(kernel: Callable[[str, Kernel], None]) -> None:
    kernel("aten.exp.", lambda v: v.inputs["self"].exp() * (1 + 2.0**-18))
    finding = the_one(audited(lambda x: x.exp(), FP32), "D18")
    times = float(finding.number.split("error ")[1].split()[0])
    assert finding.level == "wrong" and times == pytest.approx(2.0**-18 / (4 * 2.0**-24), rel=0.2)


def test_an_operation_that_rounds_twice_is_found(kernel: Callable[[str, Kernel], None]) -> None:
    kernel("aten.silu.default", lambda v: (v.inputs["self"] * v.inputs["self"].sigmoid()))
    assert "correctly rounded" in the_one(audited(F.silu), "D18").number
    assert math.prod((ROWS, N)) >= 1000
