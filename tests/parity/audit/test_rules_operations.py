"""Rules D, single operations: each loop with a mistake gives its name and no other; without it, nothing above a note."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from audit_nets import HALF, LOW, ROWS, N, Net, Then, audited, hidden, serious, squares, the_one
from torch import Tensor, nn

from refimpl.parity.audit import Audit


def numbers(text: str) -> list[float]:
    """Return the numbers in a sentence."""
    return [float(part.replace(",", "")) for part in re.findall(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?", text)]


# ------------------------------------------------------------------------------------------------- D1 softmax


def softmax_by_hand(x: Tensor) -> Tensor:
    e = (3 * x - (3 * x).amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def softmax_by_reciprocal(x: Tensor) -> Tensor:
    e = (3 * x).exp()
    return e * e.sum(-1, keepdim=True).reciprocal()


def softmax_in_place(x: Tensor) -> Tensor:
    with torch.no_grad():
        e = (3 * x).exp()
        e.div_(e.sum(-1, keepdim=True))
    return e


@pytest.mark.parametrize("then", [softmax_by_hand, softmax_by_reciprocal, softmax_in_place])
@pytest.mark.parametrize("dtype", [LOW, HALF])
def test_a_softmax_by_hand_in_16_bits_has_the_error_of_its_rows(then: Then, dtype: torch.dtype) -> None:
    finding = the_one(audited(then, dtype), "D1")
    off = (then(hidden(dtype)).double().sum(-1) - 1).abs().max().item()
    assert finding.name == "softmax-in-16-bits" and f"within {off:.2g} in" in finding.number
    assert numbers(finding.number)[-1] < off


@pytest.mark.parametrize(
    "then",
    [
        lambda x: F.softmax(3 * x, -1),
        lambda x: softmax_by_hand(x.float()).to(x.dtype),
        lambda x: x / x.abs().sum(-1, keepdim=True),
        lambda x: x.exp() / (1 + x.abs().sum(-1, keepdim=True)),
    ],
    ids=["aten._softmax", "in FP32", "no exp", "another sum"],
)
def test_a_softmax_that_is_rounded_once_is_none_by_hand(then: Then) -> None:
    assert serious(audited(then)) == set()


# ------------------------------------------------------------------------------------------------- D2 loss


def divergence(logits: Tensor, noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return log-probabilities in a format, and those of a teacher that are close to them."""
    generator = torch.Generator().manual_seed(1)
    teacher = logits.detach().double() + noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return F.log_softmax(logits.to(dtype), -1), F.log_softmax(teacher, -1).to(dtype)


def kl(dtype: torch.dtype, noise: float = 0.05) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        p, q = divergence(logits, noise, dtype)
        return F.kl_div(p, q, log_target=True, reduction="batchmean")

    return loss


def test_a_divergence_of_16_bit_log_probabilities_says_what_its_gradient_loses() -> None:
    finding = the_one(audited(lambda x: x, loss=kl(LOW)), "D2")
    torch.manual_seed(0)
    logits = Net(lambda x: x).to(LOW)(torch.randn(ROWS, N).to(LOW)).detach()
    # The gradient of the same divergence, from the same teacher, with the log-probabilities' rounding and without.
    y, q = divergence(logits, 0.05, LOW)
    exact = logits.double().log_softmax(-1)
    dy = -q.double().exp() / ROWS
    rounded, true = (dy - p.exp() * dy.sum(-1, keepdim=True) for p in (y.double(), exact))
    share = ((rounded - true).norm() / true.norm()).item()
    (said,) = [n for n in numbers(finding.number) if f"{n:.2f}%" in finding.number]
    assert share > 0.03 and said / 100 == pytest.approx(share, rel=0.1)


def test_log_of_a_16_bit_softmax_has_the_spacing_of_its_format() -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return -F.softmax(logits, -1).log().gather(-1, target[:, None]).float().mean()

    finding = the_one(audited(lambda x: x, loss=loss), "D2")
    largest, spacing = numbers(finding.number.replace("bfloat16", ""))
    assert finding.name == "loss-in-16-bits" and spacing == pytest.approx(2.0 ** (math.floor(math.log2(largest)) - 7), rel=0.02)


def test_a_cross_entropy_by_hand_in_16_bits_is_found() -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return (logits.exp().sum(-1).log() - logits.gather(-1, target[:, None])[:, 0]).float().mean()

    the_one(audited(lambda x: x, loss=loss), "D2")


def test_cross_entropy_in_16_bits_is_a_note_with_the_step_of_its_value() -> None:
    audit = audited(lambda x: x, loss=F.cross_entropy)
    assert serious(audit) == set() and audit.findings["D2"].level == "note" and audit.findings["D2"].places == 2
    gradient = [o for o in audit.steps[0].operations if "single" in o.probed]
    assert gradient[0].probed["single"].spacing == 2.0**-5  # of bf16 between 4 and 8


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: F.cross_entropy(y.float(), t),
        kl(torch.float32),
        lambda y, t: (y.float().logsumexp(-1) - y.float().gather(-1, t[:, None])[:, 0]).mean(),
        lambda y, t: (1 + y.square()).log().float().mean(),
    ],
    ids=["cross entropy", "divergence", "by hand", "another log"],
)
def test_losses_in_fp32_are_not_found(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "D2" not in audited(lambda x: x, loss=loss).findings


# ------------------------------------------------------------------------------------------------- D3 norm


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer_norm(x: Tensor) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    return y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6)


def by_sum(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / N + 1e-6)


@pytest.mark.parametrize("then", [rms_norm, layer_norm, by_sum])
@pytest.mark.parametrize("dtype", [LOW, HALF])
def test_a_norm_by_hand_in_16_bits_has_its_largest_square_and_the_rows_error(then: Then, dtype: torch.dtype) -> None:
    finding = the_one(audited(then, dtype), "D3")
    x = hidden(dtype)
    y = x - x.mean(-1, keepdim=True) if then is layer_norm else x
    assert finding.name == "norm-in-16-bits" and finding.level == "worse than it need be"
    assert f"largest square is {y.double().square().max().item():.5g}" in finding.number


def test_a_norm_whose_squares_overflow_is_wrong() -> None:
    finding = the_one(audited(lambda x: rms_norm(200 * x), HALF), "D3")
    assert finding.level == "wrong" and "root mean squares of 0.0000 to" in finding.number


@pytest.mark.parametrize(
    "then",
    [
        lambda x: F.rms_norm(x, (N,)),
        lambda x: F.layer_norm(x, (N,)),
        lambda x: rms_norm(x.float()).to(x.dtype),
        lambda x: x * x.abs().sqrt().mean(-1, keepdim=True).rsqrt(),
        lambda x: x / x.norm(dim=-1, keepdim=True),
    ],
    ids=["rms_norm", "layer_norm", "in FP32", "no squares", "vector norm"],
)
def test_norms_with_fp32_statistics_are_not_found(then: Then) -> None:
    assert serious(audited(then)) == set()


# ------------------------------------------------------------------------------------------------- D4, D5 positions

LENGTH = 600


def rotary(positions: torch.dtype, frequencies: torch.dtype, length: int = LENGTH) -> Then:
    """Return an embedding of positions in formats: angles are of the wider one, cos is cast last."""
    inverse = (10000 ** (-torch.arange(0, N, 2) / N)).to(frequencies)

    def then(x: Tensor) -> Tensor:
        angle = torch.arange(length).to(positions)[:, None] * inverse
        return x + torch.cat([angle.cos(), angle.sin()], -1)[: len(x)].to(x.dtype)

    return then


def test_positions_that_16_bits_cannot_tell_apart_are_counted() -> None:
    finding = the_one(audited(rotary(LOW, torch.float32)), "D4")
    left = len({float(n) for n in torch.arange(LENGTH).to(LOW)})
    assert f"{LENGTH} different integers become {left} in bfloat16" in finding.number and left == 257 + 128 + 22


def test_positions_that_are_counted_in_16_bits_are_found() -> None:
    then = lambda x: x + (torch.arange(LENGTH, dtype=LOW)[: len(x), None] / 1000)  # noqa: E731
    assert f"{LENGTH} different integers" in the_one(audited(then), "D4").number


def test_positions_in_fp32_that_autocast_rounds_are_found() -> None:
    """The rotary embedding of transformers before it left autocast: a product of FP32 positions and frequencies."""
    inverse = 10000 ** (-torch.arange(0, N, 2) / N)

    def then(x: Tensor) -> Tensor:
        angle = torch.arange(LENGTH).float()[:, None] @ inverse[None]
        return x + torch.cat([angle.cos(), angle.sin()], -1)[: len(x)].to(x.dtype)

    finding = the_one(audited(then, torch.float32, autocast=LOW), "D4")
    assert "integers become" in finding.number and finding.level == "wrong"


def test_16_bit_angles_have_the_error_of_half_their_spacing() -> None:
    finding = the_one(audited(rotary(LOW, LOW, 200)), "D4")  # all positions are exact
    assert "cos is taken of bfloat16 angles of up to 199, where phases are off by up to 0.5 radians" in finding.number


def test_time_steps_that_change_on_their_way_to_an_embedding_are_found() -> None:
    """huggingface/diffusers#9405: 751 becomes 752; no two steps of the batch become equal."""
    time = torch.tensor([751, 12, 300, 999])

    def then(dtype: torch.dtype) -> Then:
        return lambda x: x + (time.to(dtype).float()[:, None] * torch.linspace(0.001, 1, N)).cos().mean(0).to(x.dtype)

    assert "2 of 4 integers change in bfloat16" in the_one(audited(then(LOW)), "D4").number
    assert serious(audited(then(torch.float32))) == set()


@pytest.mark.parametrize(
    "then",
    [
        rotary(torch.float32, torch.float32),
        rotary(LOW, torch.float32, 257),
        lambda x: x + torch.randint(2, (len(x), N)).to(x.dtype),
        lambda x: x + (torch.arange(len(x)).to(x.dtype)[:, None] / 8).cos(),
        lambda x: x.cos(),
    ],
    ids=["FP32", "exact integers", "mask", "exact angles up to 4", "small angles"],
)
def test_positions_that_keep_their_values_are_not_found(then: Then) -> None:
    assert serious(audited(then)) <= {"D4"} and "integers" not in getattr(audited(then).findings.get("D4"), "number", "")


class Rotary(nn.Module):
    """Frequencies in a buffer, which `model.to(torch.bfloat16)` casts, and angles in FP32."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0, N, 2) / N), persistent=False)
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(self.length).float()[:, None] * self.inv_freq.float()
        return x + torch.cat([angle.cos(), angle.sin()], -1)[: len(x)].to(x.dtype)


def test_frequencies_in_a_16_bit_buffer_have_the_phase_error_of_the_last_position() -> None:
    finding = the_one(audited(Rotary(4096)), "D5")
    exact = 10000 ** (-torch.arange(0, N, 2).double() / N)
    error = ((exact.float().to(LOW).double() - exact).abs() * 4095).max().item()
    said = numbers(finding.number.replace("bfloat16", ""))[-1]
    assert "the buffer then.inv_freq" in finding.number and error > 1 and said == pytest.approx(error, rel=0.25)


def test_frequencies_of_few_positions_are_a_note_and_those_in_fp32_nothing() -> None:
    assert {c: f.level for c, f in audited(Rotary(32)).findings.items()} == {"D5": "note"}
    keep = lambda net: net.then.float()  # noqa: E731
    assert audited(Rotary(4096), prepare=keep).findings == {}


# ------------------------------------------------------------------------------------------------- D6 router


def routed(router: torch.dtype) -> Then:
    def then(x: Tensor) -> Tensor:
        scores = (x[:, :16] / 8 + 1).to(router)
        weights, chosen = scores.topk(2, -1)
        return x * weights.sum(-1, keepdim=True).to(x.dtype) + F.one_hot(chosen, N).sum(1).to(x.dtype)

    return then


def test_ties_of_a_router_in_16_bits_are_counted() -> None:
    finding = the_one(audited(routed(LOW)), "D6")
    scores = (hidden()[:, :16] / 8 + 1).sort(-1, descending=True).values
    ties = int((scores[:, 1] == scores[:, 2]).sum())
    assert 0 < ties < ROWS and f"of {ROWS} rows, {ties} tie at the choice" in finding.number


def test_a_router_in_fp32_and_the_choices_of_a_metric_are_not_found() -> None:
    assert audited(routed(torch.float32), torch.float32).findings == {}

    def loss(y: Tensor, target: Tensor) -> Tensor:
        (y.detach().round()).topk(5, -1)
        return squares(y, target)

    assert audited(lambda x: x, loss=loss).findings == {}


# ------------------------------------------------------------------------------------------------- D23, D24 features


def years(spread: float = 3.0, mean: float = 2015.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, N, generator=generator)
    x[:, 5] = mean + spread * x[:, 5]
    return x


def scaled_down(net: Net) -> None:
    with torch.no_grad():
        net.first.weight[:, 5] = 0


def test_a_feature_that_is_too_large_for_16_bits_says_what_is_left_of_it() -> None:
    finding = the_one(audited(lambda x: x, batch=years(), prepare=scaled_down), "D23")
    column = years()[:, 5].double()
    left = len(column.to(LOW).unique())
    assert f"feature 5 of {N}" in finding.number and f"{column.std() / 8:.2g} of the spacing 8" in finding.number
    assert f"{len(column.unique())} different values become {left}" in finding.number


def test_features_that_16_bits_resolve_and_tables_of_cosines_are_not_found() -> None:
    assert audited(lambda x: x, batch=years(mean=0.0), prepare=scaled_down).findings == {}
    assert audited(rotary(torch.float32, torch.float32)).findings == {}


def test_cancellation_is_a_note_with_its_share() -> None:
    def then(x: Tensor) -> Tensor:
        return (x + 100) - (x * 1.5 + 100)

    finding = audited(then).findings["D24"]
    x = hidden()
    a, b = x + 100, x * 1.5 + 100
    small = (a != b) & ((a - b).abs() <= torch.maximum(a.abs(), b.abs()) / 32)
    assert finding.level == "note" and f"{small.double().mean().item():.0%} of the results" in finding.number
    assert "D24" not in audited(lambda x: x + x).findings


# ------------------------------------------------------------------------------------------------- D7 to D11 Inf and NaN


def attention(mask: Callable[[int, torch.dtype], Tensor]) -> Then:
    return lambda x: F.softmax(x @ x.T + mask(len(x), x.dtype), -1) @ x


def least_twice(n: int, dtype: torch.dtype) -> Tensor:
    """A causal mask and a padding mask, both of the least number; the first key, which the first row needs, is padding."""
    least = torch.finfo(dtype).min
    return torch.full((n, n), least, dtype=dtype).triu(1) + (torch.arange(n) < 2) * least


@pytest.mark.parametrize("dtype", [torch.float32, LOW, HALF])
def test_masks_that_add_up_to_minus_inf_are_named_where_they_do(dtype: torch.dtype) -> None:
    """NVIDIA-NeMo/Automodel#2658, with a row that has nothing else."""
    only = lambda n, dtype: torch.full((n, n), torch.finfo(dtype).min, dtype=dtype) * 1.0  # noqa: E731
    finding = the_one(audited(attention(lambda n, d: only(n, d) + only(n, d)), dtype), "D7")
    assert f"{ROWS * ROWS:,} sums of finite numbers are -Inf" in finding.number and finding.level == "wrong"


def test_masks_that_overflow_and_harm_nothing_are_a_note() -> None:
    audit = audited(attention(least_twice), torch.float32)
    assert serious(audit) == set() and audit.findings["D7"].level == "note" and "-3.40282e+38" in audit.findings["D7"].number


def minus_inf(diagonal: int) -> Callable[[int, torch.dtype], Tensor]:
    return lambda n, dtype: torch.full((n, n), -math.inf, dtype=dtype).triu(diagonal)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_rows_that_are_masked_out_entirely_are_counted(dtype: torch.dtype) -> None:
    finding = the_one(audited(attention(minus_inf(-2)), dtype), "D8")
    assert f"3 of {ROWS} rows" in finding.number  # rows 0 to 2 are masked from the diagonal below the main one on


@pytest.mark.parametrize(
    "then",
    [
        attention(minus_inf(1)),
        attention(lambda n, dtype: torch.zeros(n, n, dtype=dtype).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)),
        attention(lambda n, dtype: torch.full((n, n), torch.finfo(dtype).min, dtype=dtype).triu(1)),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], torch.zeros(len(x), len(x)).bool())[0],
        lambda x: torch.where(x > 0, x, -math.inf).clamp_min(-1),
    ],
    ids=["-inf", "masked_fill", "finfo.min", "SDPA of masked rows", "clamped"],
)
def test_an_inf_that_is_meant_is_not_found(then: Then) -> None:
    for dtype in (torch.float32, LOW):
        assert audited(then, dtype).findings == {}


def test_an_overflow_of_fp16_in_forward_says_how_far_it_is_above_the_largest_number() -> None:
    finding = the_one(audited(lambda x: 40000 * x - 1, HALF), "D9")
    worst, said = 40000 * hidden(HALF).double().abs().max().item(), finding.number.replace("gives -", "gives ")
    assert f"FP64 gives {worst:.6g}, {worst / 65504:.3g} times the largest float16" in said
    assert "forward pass of then" not in finding.number and "in first" in finding.number


def test_an_overflow_under_autocast_is_of_the_product_that_makes_it() -> None:
    finding = the_one(audited(lambda x: 1e5 * x.float(), torch.float32, autocast=HALF, scale=2.0**16), "D9")
    assert "first appears in the forward pass of second: aten._to_copy (float16)" in finding.number
    assert "S falls to 0" in finding.effect


def test_an_overflow_that_the_model_clamps_is_not_found() -> None:
    assert serious(audited(lambda x: (40000 * x).clamp(-6e4, 6e4) / 1e5, HALF)) <= {"B9"}  # the clamp cuts gradients off


def summed(y: Tensor, target: Tensor) -> Tensor:
    return (200 * y).abs().sum().float() / 1e4


def test_a_sum_that_overflows_fp16_has_its_value_in_fp64() -> None:
    finding = the_one(audited(lambda x: x, HALF, loss=summed), "D10")
    torch.manual_seed(0)
    y = Net(lambda x: x).to(HALF)(torch.randn(ROWS, N).to(HALF)).detach()
    assert f"FP64 gives {(200 * y).abs().double().sum().item():.6g}" in finding.number
    assert serious(audited(lambda x: x, torch.float32, loss=summed)) == set()


def test_a_divisor_that_is_infinite_in_fp16_is_found() -> None:
    def loss(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda y, target: (y.abs().sum() / torch.tensor(70000).to(dtype)).float()

    finding = the_one(audited(lambda x: x, HALF, loss=loss(HALF)), "D10")
    assert "the divisor 70000 is Inf" in finding.number
    assert serious(audited(lambda x: x, HALF, loss=loss(torch.float32))) == set()


@pytest.mark.parametrize(
    ("then", "operation", "fix"),
    [
        (lambda x: (x * 0).square().sum(-1, keepdim=True).sqrt() + x, "the backward pass", "sqrt(x + eps)"),
        (lambda x: torch.where(x > 0, x.sqrt(), x), "aten.sqrt", "clamp it first"),
        (lambda x: (x.relu() * 0).log() * 0 + x, "aten.log", "add eps"),
        (lambda x: x / (x.relu() * 0), "aten.div", "clamp the divisor"),
        (lambda x: (x.abs() * 1000).exp().log() + x, "aten.exp", "subtract the maximum"),
    ],
    ids=["sqrt'(0)", "where", "log 0", "0 / 0", "exp"],
)
@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_what_is_not_finite_is_named_where_it_begins(then: Then, operation: str, fix: str, scale: float | None) -> None:
    finding = the_one(audited(then, torch.float32, scale=scale), "D11")
    assert operation in finding.number and fix in finding.fix and "no loss scale helps" in finding.number


def test_fp16_gradients_that_overflow_are_the_loss_scales() -> None:
    def loss(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda y, target: factor * y.float().square().sum()

    audit = audited(lambda x: x, torch.float32, loss=loss(100.0), scale=2.0**16, autocast=HALF)
    assert serious(audit) == set() and audit.steps[0].after.scale == 2.0**15
    assert set(serious(audited(lambda x: x, HALF, loss=loss(1e5)))) == {"B4"}


def test_large_weights_are_no_positions() -> None:
    assert serious(audited(lambda x: (x.float() * 1e30).to(LOW).float() * 1e-30, torch.float32, autocast=LOW)) == set()


def test_weights_that_are_nan_after_an_overflow_are_not_found_again() -> None:
    audit = audited(lambda x: 40000 * x - 1, HALF, steps=3)
    assert serious(audit) == {"D9"} and audit.findings["D9"].step == 1


def test_weights_that_the_loop_fills_with_nan_are_found() -> None:
    model = torch.nn.Linear(N, N)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Audit(model, optimizer) as audit:
        for step in range(3):
            model(torch.randn(ROWS, N)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                model.weight.data.fill_(math.nan)
            audit.step()
    assert serious(audit) == {"D11"} and "the parameter weight is not finite before the step" in audit.findings["D11"].number


def test_nan_in_the_data_is_said_to_be_there_before() -> None:
    batch = torch.randn(ROWS, N)
    batch[3, 4] = math.nan
    assert "not finite before the step" in the_one(audited(lambda x: x, torch.float32, batch=batch), "D11").number
