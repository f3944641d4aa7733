"""Rules B on small loops: the numbers of their findings, and what they must not mistake for a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="the audit is of PyTorch loops: torch==2.13.0")
import torch
from torch import Tensor, nn

from refimpl.parity.audit.factors import history_of
from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.session import Audit

Step = Callable[["Loop"], None]


class Loop:
    """A network of two layers in FP16 autocast. `train` runs a function for each update."""

    def __init__(self, scale: float | None = 1024.0, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, **options)
        self.scaler: Any = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        self.norms: list[float] = []

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.model(torch.randn(16, 8)).float().square().mean()

    def clip(self, max_norm: float = 0.01) -> float:
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def train(self, step: Step, steps: int = 3, scheduler: Any = None) -> Audit:
        audit = Audit(self.model, self.optimizer, scaler=self.scaler, scheduler=scheduler)
        with audit:
            for _ in range(steps):
                self.optimizer.zero_grad()
                step(self)
                audit.step()
        assert audit.failures == {}
        return audit


def serious(audit: Audit) -> set[str]:
    return {code for code, finding in audit.findings.items() if is_serious(finding.level)}


def right(loop: Loop) -> None:
    loop.scaler.scale(loop.loss()).backward()
    loop.scaler.unscale_(loop.optimizer)
    loop.norms.append(loop.clip())
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def late(loop: Loop) -> None:
    loop.scaler.scale(loop.loss()).backward()
    loop.norms.append(loop.clip())
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


KINDS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_before_unscaling_is_told_with_its_norms(kind: str) -> None:
    loop = Loop(**KINDS[kind])
    audit = loop.train(late)
    assert serious(audit) == {"B1"}
    assert f"a norm of {loop.norms[0]:.3g} = 1024 x {loop.norms[0] / 1024:.3g}" in audit.findings["B1"].number
    assert serious(Loop(**KINDS[kind]).train(right)) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_has_the_factors_of_a_right_step(kind: str) -> None:
    audit = Loop(**KINDS[kind]).train(right)
    history = history_of(audit.steps[0])
    assert history.scale == 1024 and not history.by_hand and len(history.unscales()) == 1
    kinds = [event.kind for event in history.events]
    first = [kinds.index(kind) for kind in ("backward", "unscale", "norm", "multiply", "update")]
    assert first == sorted(first)
    assert {event.carried for event in history.of("norm")} <= {1.0}
    assert all(event.factor < 1 for event in history.of("multiply"))


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_gradients_that_are_added_to_unscaled_ones_are_found(kind: str) -> None:
    def first_only(loop: Loop) -> None:
        for k in range(3):
            loop.scaler.scale(loop.loss() / 3).backward()
            if k == 0:
                loop.scaler.unscale_(loop.optimizer)
        loop.clip()
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()

    audit = Loop(**KINDS[kind]).train(first_only)
    assert serious(audit) == {"B2"}
    assert audit.findings["B2"].level == "wrong"
    assert "divided by 1024 after a micro-batch, and scaled gradients were added" in audit.findings["B2"].number


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_does_not_hide_that_gradients_are_never_unscaled(kind: str) -> None:
    def never(loop: Loop) -> None:
        loop.scaler.scale(loop.loss()).backward()
        loop.norms.append(loop.clip())
        loop.optimizer.step()

    loop = Loop(**KINDS[kind])
    audit = loop.train(never)
    assert serious(audit) == {"B3"}
    finding = audit.findings["B3"]
    assert finding.level == "wrong" and "threshold is 1024 times too small" in finding.effect
    assert f"a norm of {loop.norms[0]:.3g} = 1024 x {loop.norms[0] / 1024:.3g}" in finding.number


def normalized_by_hand(loop: Loop) -> None:
    """Divides by the norm, and by the scale with it."""
    loop.scaler.scale(loop.loss()).backward()
    norm = torch.stack([g.norm() for g in loop.grads()]).norm()
    for g in loop.grads():
        g.mul_(0.1 / norm)
    loop.optimizer.step()


def weighted_and_clipped(loop: Loop) -> None:
    (loop.loss() * 128.0).backward()
    loop.clip()
    loop.optimizer.step()


def logs_the_norm(loop: Loop) -> None:
    loop.scaler.scale(loop.loss()).backward()
    torch.stack([g.norm() for g in loop.grads()]).norm().item()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def large_threshold(loop: Loop) -> None:
    loop.scaler.scale(loop.loss()).backward()
    loop.clip(1e6)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def by_hand(loop: Loop) -> None:
    (loop.loss() * 1024.0).backward()
    for g in loop.grads():
        g.mul_(1 / 1024.0)
    loop.clip()
    loop.optimizer.step()


def replaced_gradients(loop: Loop) -> None:
    (loop.loss() * 1024.0).backward()
    for p in loop.model.parameters():
        p.grad = p.grad / 1024.0 if p.grad is not None else None
    loop.optimizer.step()


def skips_by_hand(loop: Loop) -> None:
    (loop.loss() * 2.0**24).backward()
    torch._foreach_mul_(loop.grads(), 2.0**-24)
    if all(bool(g.isfinite().all()) for g in loop.grads()):
        loop.optimizer.step()


def accumulates(loop: Loop) -> None:
    for _ in range(3):
        loop.scaler.scale(loop.loss() / 3).backward()
    loop.scaler.unscale_(loop.optimizer)
    loop.clip()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def penalty_without_the_scale(loop: Loop) -> None:
    """Adds to unscaled gradients what carries no scale either."""
    loop.scaler.scale(loop.loss()).backward()
    loop.scaler.unscale_(loop.optimizer)
    sum((p.square().sum() for p in loop.model.parameters()), torch.zeros(())).mul(1e-3).backward()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def several_updates(loop: Loop, set_to_none: bool = True) -> None:
    """Several updates in a step, as of a GAN's critic, and a backward pass whose gradients no update reads."""
    for _ in range(3):
        loop.optimizer.zero_grad(set_to_none=set_to_none)
        loop.scaler.scale(loop.loss()).backward()
        loop.scaler.unscale_(loop.optimizer)
        loop.clip()
        loop.scaler.step(loop.optimizer)
        loop.scaler._per_optimizer_states.clear()  # as update() does, without another scale
    loop.scaler.scale(loop.loss()).backward()
    loop.scaler.update(1024.0)


def several_updates_with_zeros(loop: Loop) -> None:
    several_updates(loop, set_to_none=False)


def unscales_to_look(loop: Loop) -> None:
    """Looks at the unscaled gradients of one batch, and trains with those of the next."""
    for _ in range(2):
        loop.optimizer.zero_grad(set_to_none=False)
        loop.scaler.scale(loop.loss()).backward()
        for g in loop.grads():
            g.div_(loop.scaler.get_scale())
        torch.stack([g.norm() for g in loop.grads()]).norm().item()
    loop.optimizer.step()
    loop.scaler.update(loop.scaler.get_scale())


def weighted(loop: Loop) -> None:
    (loop.loss() * 100.0).backward()
    loop.optimizer.step()


GUARDS: dict[str, tuple[Step, dict[str, Any]]] = {
    "a norm that is only logged": (logs_the_norm, {}),
    "a coefficient of 1": (large_threshold, {"fused": True}),
    "a scale by hand": (by_hand, {"scale": None}),
    "gradients that are replaced": (replaced_gradients, {"scale": None}),
    "overflows that the loop skips": (skips_by_hand, {"scale": None}),
    "overflows that a fused kernel skips": (right, {"scale": 2.0**30, "fused": True}),
    "overflows that GradScaler skips": (right, {"scale": 2.0**30}),
    "micro-batches": (accumulates, {}),
    "gradients of a norm that the loop sets": (normalized_by_hand, {}),
    "a weight of the loss, and clipping": (weighted_and_clipped, {"scale": None}),
    "a penalty without the scale, after the division": (penalty_without_the_scale, {}),
    "several updates": (several_updates, {}),
    "several updates of gradients that are set to 0": (several_updates_with_zeros, {}),
    "several updates by a fused kernel": (several_updates, {"fused": True}),
    "gradients that are unscaled to look at them": (unscales_to_look, {}),
    "a weight of the loss": (weighted, {"scale": None}),
    "a disabled GradScaler": (right, {"scale": None}),
}


@pytest.mark.parametrize("name", GUARDS)
def test_a_right_loop_is_not_blamed(name: str) -> None:
    step, options = GUARDS[name]
    audit = Loop(**options).train(step)
    assert serious(audit) == set(), {code: finding.number for code, finding in audit.findings.items()}


def test_fp16_parameters_raise_in_gradscaler_and_the_finding_stays() -> None:
    loop = Loop(dtype=torch.float16)
    audit = Audit(loop.model, loop.optimizer, scaler=loop.scaler)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"), audit:
        right(loop)
    assert "B13" in serious(audit) and "4 trained parameters with 108 elements" in audit.findings["B13"].number
    assert "B13" not in Loop().train(right).findings


def test_flushed_gradients_are_counted() -> None:
    def tiny(loop: Loop) -> None:
        (loop.loss() * 2.0**-20).backward()
        loop.optimizer.step()

    audit = Loop(scale=None).train(tiny)
    assert serious(audit) == {"B9"} and "FP16 gradients became 0" in audit.findings["B9"].number
