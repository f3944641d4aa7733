"""Softmax, norms and the loss scaler's operations: PyTorch's own within their bounds, and other kernels that are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from judged import FORMATS, as_if, forged, moved, observed, the, verdicts
from torch import Tensor

from refimpl.parity.audit.judge.judge import Judge
from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import LEVELS

SOFTMAX = ("_softmax", "_softmax_backward_data", "_safe_softmax", "_log_softmax", "_log_softmax_backward_data", "logsumexp")
NORMS = (
    "native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward", "native_batch_norm",
    "native_batch_norm_backward", "_weight_norm_interface", "_weight_norm_interface_backward", "_fused_rms_norm",
    "_fused_rms_norm_backward",
)  # fmt: skip
Call = Callable[[], object]


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale + mean
    return x.to(dtype).requires_grad_()


def backward(y: Tensor) -> None:
    y.backward(draw(*y.shape, dtype=y.dtype).detach())


def levels(function: Call, names: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """Return operation and result -> worst level, for the operations with these names; all of them are judged."""
    found = dict[tuple[str, str], str]()

    def judge(values: Values) -> None:
        name = values.operation.name.split(".")[1]
        for verdict in verdicts(values).values() if name in names else ():
            found[name, verdict.result] = min(found.get((name, verdict.result), "fine"), verdict.level, key=LEVELS.index)
            assert verdict.ratio <= 1, (name, verdict)

    observed(function, judge)
    return found


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), -1), ((40, 1000), -1), ((8, 33, 50), 1), ((2, 9001), -1)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_softmax_of_pytorch_is_within_its_bound(dtype: torch.dtype, shape: tuple[int, ...], dim: int, scale: float) -> None:
    def run() -> None:
        x = draw(*shape, dtype=dtype, scale=scale)
        backward(x.softmax(dim))
        backward(x.log_softmax(dim))
        torch.logsumexp(x, dim)
        masked = x.detach().clone()
        masked[..., :2] = -math.inf
        masked[0] = -math.inf
        for each in (masked, torch.full_like(masked, 1.3)):
            each.softmax(dim), each.log_softmax(dim), torch.ops.aten._safe_softmax(each, dim)

    found = levels(run, SOFTMAX)
    assert {name for name, _ in found} == set(SOFTMAX)
    # PyTorch's CPU kernels that round inside, in 16 bits
    rough = {"_log_softmax", "logsumexp", *(("_softmax", "_safe_softmax") if dim == 1 else ())}
    rough = set() if dtype == torch.float32 else rough
    assert {name for (name, _), level in found.items() if level != "fine"} <= rough
    if dtype == torch.bfloat16 and shape == (40, 1000) and scale == 1:
        assert found["_log_softmax", "out"] == found["logsumexp", "out"] == "note"


@pytest.mark.parametrize("dtype", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), *((f, f) for f in FORMATS[1:])])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (100.0, 1.0), (0.0, 1e-6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norms_of_pytorch_are_within_their_bounds(
    dtype: tuple[torch.dtype, torch.dtype], mean: float, scale: float, layout: torch.memory_format
) -> None:
    def run() -> None:
        for rows, C in ((1, 7), (33, 65), (500, 64), (3, 1023)):
            x = draw(rows, C, dtype=dtype[0], scale=scale, mean=mean)
            w, b = draw(C, dtype=dtype[1]), draw(C, dtype=dtype[1])
            backward(F.layer_norm(x, (C,), w, b, 1e-6))
            backward(F.layer_norm(x, (C,)))
        for N, C, H, G in ((2, 6, 5, 3), (4, 16, 15, 4)):
            x = draw(N, C, H, H, dtype=dtype[0], scale=scale, mean=mean).detach().to(memory_format=layout).requires_grad_()
            w, b = draw(C, dtype=dtype[1]), draw(C, dtype=dtype[1])
            backward(F.group_norm(x, G, w, b))
            running = draw(C, dtype=dtype[1]).detach(), draw(C, dtype=dtype[1]).detach().abs() + 0.1
            backward(F.batch_norm(x, *running, w, b, True, 0.1))
            backward(F.batch_norm(x, *running, w, b, False, 0.1))
            F.batch_norm(x, None, None, w, b, True)
        v = draw(7, 300)
        backward(torch._weight_norm(v, draw(7, 1), 0))

    found = levels(run, NORMS)
    assert len({name for name, _ in found}) == 8
    assert {level for (name, _), level in found.items()} <= {"fine", "note"}
    if dtype[0] == torch.float32 and layout is torch.contiguous_format:
        assert set(found.values()) == {"fine"}
    if dtype[0] != torch.float32:  # whatever the format of the weights is
        assert found["native_layer_norm_backward", "out.1"] == "note"
    assert {"running_mean", "running_var"} <= {result for name, result in found if name == "native_batch_norm"}


# ------------------------------------------------------------------------------------------------------------ other kernels


def worst(values: object, result: str, change: Callable[[Tensor], Tensor]) -> str:
    return verdicts(forged(values, result, change))[result].level  # type: ignore[arg-type]


BAD = ("wrong", "worse than it need be")


@pytest.mark.parametrize("dtype", FORMATS)
def test_another_softmax_is_found(dtype: torch.dtype) -> None:
    x = draw(64, 200, dtype=dtype).detach()
    softmax = the("aten._softmax", lambda: x.softmax(-1))
    logarithm = the("aten._log_softmax", lambda: x.log_softmax(-1))
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    e = (x - x.amax(-1, keepdim=True)).to(low).exp()
    in_few_bits = (e / e.sum(-1, keepdim=True)).to(dtype)
    assert worst(softmax, "out", lambda y: moved(y, 200 if dtype == torch.float32 else 2)) == "wrong"
    assert worst(softmax, "out", lambda y: in_few_bits) in BAD
    assert worst(softmax, "out", lambda y: x.softmax(0)) == "wrong"
    assert worst(logarithm, "out", lambda y: moved(y, 200 if dtype == torch.float32 else 4)) == "wrong"
    if dtype == torch.float32:
        assert worst(logarithm, "out", lambda y: in_few_bits.log()) == "wrong"


@pytest.mark.parametrize("dtype", FORMATS)
def test_another_gradient_of_softmax_is_found(dtype: torch.dtype) -> None:
    x = draw(64, 200, dtype=dtype)
    for name, function in (("_softmax", x.softmax), ("_log_softmax", x.log_softmax)):
        values = the(f"aten.{name}_backward_data", lambda function=function: backward(function(-1)))
        assert verdicts(values)["out"].level == "fine"
        assert worst(values, "out", lambda dx: moved(dx, 5000 if dtype == torch.float32 else 2)) == "wrong"
        assert worst(values, "out", lambda dx: dx + dx.abs().amax() / 100) == "wrong"  # the row's sum is off
        if dtype == torch.float32:
            assert worst(values, "out", lambda dx: dx.bfloat16().float()) in BAD


def test_a_gradient_of_log_softmax_with_subnormal_shares_is_fine() -> None:
    y, dy = torch.tensor([[0.0, -96.0]] * 8).log_softmax(-1), torch.tensor([[-128.0, 0.0]] * 8)
    values = the("aten._log_softmax_backward_data", lambda: torch._log_softmax_backward_data(dy, y, 1, torch.float32))
    assert verdicts(values)["out"].level == "fine"
    assert worst(values, "out", lambda dx: dx + 1e-35) == "wrong"


def test_layer_norms_that_are_not_are_found() -> None:
    C = 256
    x, w, b = draw(50, C).detach(), draw(C).detach(), draw(C).detach()
    values = the("aten.native_layer_norm", lambda: F.layer_norm(x, (C,), w, b))
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
    assert {v.level for v in verdicts(values).values()} == {"fine"}
    assert worst(values, "out.0", lambda y: moved(y, 1000)) == "wrong"
    assert worst(values, "out.0", lambda y: (x - mean) / (var + 1e-5).sqrt() * w + b) == "wrong"  # n - 1
    assert worst(values, "out.0", lambda y: (x - mean) / (x.std(-1, correction=0, keepdim=True) + 1e-3) * w + b) == "wrong"
    assert worst(values, "out.0", lambda y: F.layer_norm(x.bfloat16(), (C,), w.bfloat16(), b.bfloat16()).float()) == "wrong"


def test_a_variance_that_cancels_is_found() -> None:
    x = draw(50, 256, mean=3000.0).detach()
    values = the("aten.native_layer_norm", lambda: F.layer_norm(x, (256,)))
    mean, square = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
    rstd = ((square - mean.square()).clamp(min=0) + 1e-5).rsqrt()
    assert {v.level for v in verdicts(values).values()} == {"fine"}
    assert worst(values, "out.0", lambda y: (x - mean) * rstd) == "wrong"
    assert worst(values, "out.2", lambda r: rstd) == "wrong"


def test_gradients_of_layer_norm_that_are_not_are_found() -> None:
    C = 256
    x, w, b = draw(300, C), draw(C), draw(C)
    values = the("aten.native_layer_norm_backward", lambda: backward(F.layer_norm(x, (C,), w, b)))
    dy = values.inputs["grad_out"]
    assert {v.level for v in verdicts(values).values()} == {"fine"}
    assert worst(values, "out.0", lambda dx: dy * w.detach() * values.inputs["rstd"]) == "wrong"  # statistics held constant
    for i in (1, 2):
        assert worst(values, f"out.{i}", lambda dw: moved(dw, 3000)) in BAD
        assert worst(values, f"out.{i}", lambda dw: dw.bfloat16().float()) in BAD
    assert worst(values, "out.2", lambda db: dy.bfloat16().cumsum(0)[-1].float()) == "wrong"


def test_batch_norms_that_are_not_are_found() -> None:
    x, w, b = draw(8, 6, 5, 5), draw(6), draw(6)
    mean, var = torch.zeros(6), torch.ones(6)
    values = the("aten.native_batch_norm", lambda: F.batch_norm(x, mean, var, w, b, True, 0.1))
    assert {v.level for v in verdicts(values).values()} == {"fine"}
    biased = values.inputs["running_var"] * 0.9 + 0.1 * x.detach().var((0, 2, 3), correction=0)
    assert worst(values, "running_var", lambda v: biased) == "wrong"
    assert worst(values, "running_mean", lambda m: values.inputs["running_mean"]) == "wrong"  # not updated
    assert worst(values, "running_mean", lambda m: m.bfloat16().float()) == "wrong"
    given = the("aten.native_batch_norm", lambda: F.batch_norm(x, mean, var, w, b, False, 0.1))
    assert {v.level for v in verdicts(given).values()} == {"fine"}
    assert worst(given, "running_mean", lambda m: m + 1) == "wrong"  # updated in evaluation
    assert worst(given, "out.0", lambda y: values.output[0]) == "wrong"


def test_fused_rms_norm_is_judged() -> None:
    forward, gradient = torch.ops.aten._fused_rms_norm.default, torch.ops.aten._fused_rms_norm_backward.default
    for dtype, eps in ((torch.float32, 1e-6), (torch.bfloat16, None)):
        ulps = 100 if dtype == torch.float32 else 2
        x, dy, w = (draw(*shape, dtype=dtype).detach() for shape in ((20, 65), (20, 65), (65,)))
        z, g, v = x.float(), dy.float(), w.float()
        rstd = (z.square().mean(-1, keepdim=True) + (eps or 2.0**-23)).rsqrt()
        y = as_if(forward, (x, [65], w, eps), ((z * rstd * v).to(dtype), rstd))
        assert {verdict.level for verdict in verdicts(y).values()} == {"fine"}
        assert worst(y, "out.0", lambda y, ulps=ulps: moved(y, ulps)) == "wrong"
        assert worst(y, "out.1", lambda r, z=z: z.std(-1, keepdim=True).reciprocal()) == "wrong"
        h, dh = z * rstd, g * v
        dx = (dh - h * (dh * h).mean(-1, keepdim=True)) * rstd
        values = as_if(gradient, (dy, x, [65], rstd, w, [True, True]), (dx.to(dtype), (g * h).sum(0).to(dtype)))
        assert {verdict.level for verdict in verdicts(values).values()} == {"fine"}
        assert worst(values, "out.0", lambda dx, dh=dh, rstd=rstd, dtype=dtype: (dh * rstd).to(dtype)) == "wrong"
        assert worst(values, "out.1", lambda dw, ulps=ulps: moved(dw, ulps)) in BAD


# --------------------------------------------------------------------------------------------------------- the loss scale


def test_unscaling_and_the_scale_are_judged_to_the_bit() -> None:
    def gradients(bad: bool) -> list[Tensor]:
        found = [draw(5, 3).detach() * 1e4, draw(7).detach()]
        found[0][2, 1] = math.inf if bad else 0
        return found

    for bad in (False, True):
        for inverse in (2.0**-16, 1 / 3, 1.0):
            values = the(
                "aten._amp_foreach_non_finite_check_and_unscale_",
                lambda bad=bad, inverse=inverse: torch._amp_foreach_non_finite_check_and_unscale_(
                    gradients(bad), torch.zeros(1), torch.tensor([inverse])
                ),
            )
            assert {v.level for v in verdicts(values).values()} == {"fine"}
            assert worst(values, "self.1", lambda g: moved(g, 1)) == "wrong"
            assert worst(values, "found_inf", lambda flag, bad=bad: torch.full_like(flag, float(not bad))) == "wrong"
    for found, tracker in ((0.0, 0), (0.0, 1999), (1.0, 7)):
        scale = torch.tensor(3.0)
        values = the(
            "aten._amp_update_scale_",
            lambda scale=scale, found=found, tracker=tracker: torch._amp_update_scale_(
                scale, torch.tensor(tracker, dtype=torch.int32), torch.tensor(found), 2.0, 0.3, 2000
            ),
        )
        assert verdicts(values)["self"].level == "fine" and verdicts(values)["self"].by == "refimpl"
        assert worst(values, "self", lambda s: s * 2) == "wrong"


def test_nothing_is_kept_from_an_operation_that_refimpl_refuses() -> None:
    values = the(
        "aten._amp_update_scale_",
        lambda: torch._amp_update_scale_(
            torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), torch.tensor(0.0), 0.5, 0.5, 2000
        ),
    )
    judge = Judge()
    assert judge(values) == () and next(iter(judge.unjudged)).startswith("a loss scale that refimpl's rule refuses")
