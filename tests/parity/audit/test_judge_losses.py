"""Losses and embeddings before the judge: PyTorch's own, and others that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
import torch.nn.functional as F
from judged import FORMATS, forged, moved, observed, the, unjudged, verdicts
from torch import Tensor

from refimpl.parity.audit.values import Values
from refimpl.parity.audit.verdict import LEVELS

BAD = ("wrong", "worse than it need be")
NAMES = (
    "embedding", "embedding_dense_backward",
    "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward",
    "binary_cross_entropy", "binary_cross_entropy_backward", "binary_cross_entropy_with_logits",
)  # fmt: skip


def levels(function: Callable[[], object]) -> dict[tuple[str, str], str]:
    """Return operation and result -> worst level, for the operations in NAMES; all of them are judged."""
    found = dict[tuple[str, str], str]()

    def judge(values: Values) -> None:
        name = values.operation.name.split(".")[1]
        for verdict in verdicts(values).values() if name in NAMES else ():
            found[name, verdict.result] = min(found.get((name, verdict.result), "fine"), verdict.level, key=LEVELS.index)
            assert verdict.ratio <= 1, (name, verdict)

    observed(function, judge)
    return found


def worst(values: Values, result: str, change: Callable[[Tensor], Tensor]) -> str:
    return verdicts(forged(values, result, change))[result].level


def draws(dtype: torch.dtype) -> Iterator[Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield lambda *shape: torch.rand(*shape, generator=generator).to(dtype)


def backward(loss: Tensor, scale: float = 1000.0) -> None:
    loss.backward(torch.full_like(loss, scale))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_likelihoods_of_pytorch_are_within_their_bounds(dtype: torch.dtype, reduction: str) -> None:
    rand = next(draws(dtype))
    for shape in ((1, 3), (70, 5), (3000, 11), (2, 5, 9, 8), (3, 5, 50, 40)):
        x = (rand(*shape) * -3).requires_grad_()
        targets = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
        targets[..., 1::5] = -100
        for weight in (None, rand(shape[1]) + 0.5):
            dims = "2d" if len(shape) == 4 else ""

            def run(x: Tensor = x, targets: Tensor = targets, weight: Tensor | None = weight) -> None:
                backward(F.nll_loss(x, targets, weight, reduction=reduction))

            found = levels(run)
            assert set(found) == {(f"nll_loss{dims}_forward", "out.0"), (f"nll_loss{dims}_forward", "out.1"),
                                  (f"nll_loss{dims}_backward", "out")}  # fmt: skip
            assert set(found.values()) <= ({"fine"} if dtype == torch.float32 else {"fine", "note"})


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_binary_cross_entropies_of_pytorch_are_within_their_bounds(dtype: torch.dtype, reduction: str, scale: float) -> None:
    rand = next(draws(dtype))
    for shape in ((1,), (7, 3), (300, 20)):
        x, y, hard = (rand(*shape) * 2 - 1) * scale, rand(*shape), rand(*shape).round()
        for target in (y, hard):
            for weight, positive in ((None, None), (rand(*shape) + 0.5, rand(shape[-1]) * 3)):

                def run(x: Tensor = x, y: Tensor = target, w: Tensor | None = weight, p: Tensor | None = positive) -> None:
                    x = x.detach().requires_grad_()
                    backward(F.binary_cross_entropy(x.sigmoid(), y, w, reduction=reduction), 8.0)
                    backward(F.binary_cross_entropy_with_logits(x, y, w, pos_weight=p, reduction=reduction), 8.0)

                found = levels(run)
                assert {name for name, _ in found} == set(NAMES[-3:])
                assert set(found.values()) <= ({"fine"} if dtype == torch.float32 else {"fine", "note"})


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scaled", [False, True])
def test_embeddings_of_pytorch_are_within_their_bounds(dtype: torch.dtype, scaled: bool) -> None:
    w = torch.randn(50, 24, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    for tokens in (
        torch.arange(50),
        torch.randint(0, 50, (3, 700), generator=torch.Generator().manual_seed(3)),
        torch.zeros(9).long(),
    ):

        def run(tokens: Tensor = tokens) -> None:
            y = F.embedding(tokens, w, padding_idx=4, scale_grad_by_freq=scaled)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype))

        found = levels(run)
        assert set(found) == {("embedding", "out"), ("embedding_dense_backward", "out")}
        assert found["embedding", "out"] == "fine"
        assert set(found.values()) <= ({"fine"} if dtype == torch.float32 else {"fine", "note"})


# --------------------------------------------------------------------------------------------------------------- others


def likelihood(reduction: str, dtype: torch.dtype = torch.float32, n: int = 400) -> tuple[Tensor, Tensor, Tensor, list[Values]]:
    rand = next(draws(dtype))
    x, w = (rand(n, 5) * -3).requires_grad_(), rand(5) + 0.5
    targets = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(1))
    targets[::3] = -100
    run = lambda: backward(F.nll_loss(x, targets, w, reduction=reduction))  # noqa: E731
    return x.detach(), targets, w, [the(f"aten.nll_loss_{way}", run) for way in ("forward", "backward")]


def test_another_likelihood_is_found() -> None:
    x, targets, w, (forward, gradient) = likelihood("mean")
    counts, last = targets >= 0, targets.clamp(min=0)
    terms = -(w[last] * x[torch.arange(400), last])[counts]
    assert verdicts(forward)["out.0"].level == "fine"
    assert worst(forward, "out.0", lambda y: terms.double().sum().float() / w[targets[counts]].sum()) == "fine"
    assert worst(forward, "out.0", lambda y: terms.mean()) == "wrong"  # by the number, not by the weights
    assert worst(forward, "out.0", lambda y: terms.sum() / w[last].sum()) == "wrong"  # ignored targets count
    assert worst(forward, "out.0", lambda y: moved(y, 300)) in BAD
    assert worst(forward, "out.1", lambda s: moved(s, 1000)) == "wrong"
    assert worst(gradient, "out", lambda dx: dx * 2) == "wrong"
    assert worst(gradient, "out", lambda dx: moved(dx, 4)) == "wrong"
    assert worst(gradient, "out", lambda dx: dx + (dx == 0) * 1e-20) == "wrong"
    _, _, _, (each, _) = likelihood("none")
    assert worst(each, "out.0", lambda y: moved(y, 2)) == "wrong"


@pytest.mark.parametrize("dtype", FORMATS[1:])
def test_a_likelihood_in_16_bits_is_held_to_them(dtype: torch.dtype) -> None:
    _, _, _, (forward, gradient) = likelihood("mean", dtype)
    assert worst(forward, "out.0", lambda y: y * 2) == "wrong"
    assert worst(gradient, "out", lambda dx: moved(dx, 4)) == "wrong"


def test_negative_weights_are_not_judged() -> None:
    x, w = torch.rand(6, 3), torch.tensor([1.0, -1.0, 0.5])
    values = the("aten.nll_loss_forward", lambda: F.nll_loss(x, torch.tensor([0, 1, 2, 0, 1, 2]), w))
    assert "negative weight" in unjudged(values)


def test_another_binary_cross_entropy_is_found() -> None:
    rand = next(draws(torch.float32))
    x, y = (rand(300, 4) * 0.98 + 0.01).requires_grad_(), rand(300, 4)
    run = lambda: backward(F.binary_cross_entropy(x, y, reduction="none").sum())  # noqa: E731
    forward, gradient = the("aten.binary_cross_entropy", run), the("aten.binary_cross_entropy_backward", run)
    z = x.detach()
    assert worst(forward, "out", lambda r: -(y * (z + 1e-6).log() + (1 - y) * (1 - z + 1e-6).log())) == "wrong"
    assert worst(forward, "out", lambda r: moved(r, 16)) == "wrong"
    assert worst(gradient, "out", lambda g: moved(g, 8)) == "wrong"
    assert worst(gradient, "out", lambda g: g.bfloat16().float()) == "wrong"

    def logits() -> Tensor:
        return F.binary_cross_entropy_with_logits(10 * z - 5, y, pos_weight=torch.full((4,), 3.0), reduction="none")

    values = the("aten.binary_cross_entropy_with_logits", logits)
    p = (10 * z - 5).sigmoid()
    assert worst(values, "out", lambda r: -(y * p.log() + (1 - y) * (1 - p).log())) == "wrong"  # positives are weighted
    assert worst(values, "out", lambda r: moved(r, 40)) == "wrong"
    assert worst(values, "out", lambda r: r.bfloat16().float()) == "wrong"


def test_a_division_by_zero_in_fp16_is_not_judged() -> None:
    x = torch.tensor([0.0, 0.5], dtype=torch.float16, requires_grad=True)
    values = the("aten.binary_cross_entropy_backward", lambda: F.binary_cross_entropy(x, x.detach()).backward())
    assert "divides by 0" in unjudged(values)


def test_an_overflow_in_fp16_before_the_weight_is_no_error() -> None:
    x, w = torch.full((4,), 0.5, dtype=torch.float16, requires_grad=True), torch.full((4,), 1e-3, dtype=torch.float16)

    def run() -> None:
        backward(F.binary_cross_entropy(x, torch.zeros_like(x), w, reduction="none").sum(), 40000.0)

    values = the("aten.binary_cross_entropy_backward", run)
    assert not values.output.isfinite().any() and verdicts(values)["out"].level == "note"


@pytest.mark.parametrize("dtype", FORMATS)
def test_another_embedding_is_found(dtype: torch.dtype) -> None:
    w = torch.randn(20, 8, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    tokens = torch.randint(0, 20, (400,), generator=torch.Generator().manual_seed(3))
    tokens[7], tokens[tokens == 11] = 11, 12
    dy = torch.randn(400, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    run: Any = lambda: F.embedding(tokens, w, padding_idx=2).backward(dy)  # noqa: E731
    forward, gradient = the("aten.embedding", run), the("aten.embedding_dense_backward", run)
    assert worst(forward, "out", lambda y: moved(y, 1)) == "wrong"
    assert worst(forward, "out", lambda y: y.roll(1, 0)) == "wrong"
    last = torch.zeros_like(w.detach()).index_copy_(0, tokens, dy)
    assert worst(gradient, "out", lambda dw: last) == "wrong"  # a token's last row only
    every = torch.zeros(20, 8).index_add_(0, tokens, dy.float()).to(dtype)
    assert worst(gradient, "out", lambda dw: every) == "wrong"  # and the padding's
    if dtype == torch.float32:
        assert worst(gradient, "out", lambda dw: moved(dw, 200)) == "wrong"
        low = torch.zeros(20, 8, dtype=torch.bfloat16).index_add_(0, tokens[tokens != 2], dy[tokens != 2].bfloat16())
        assert worst(gradient, "out", lambda dw: low.float()) == "wrong"
