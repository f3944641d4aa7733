"""Optimizers for training without FP32 weights, and with small states, as careful people write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class BitsAdamW(torch.optim.Optimizer):
    """AdamW in FP32 arithmetic on weights of any format; `write` says how the new weights are stored."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group, self.state[p])

    def update(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        grad = p.grad.float()
        if not state:
            state["step"] = 0
            self.begin(p, state)
        state["step"] += 1
        (beta1, beta2), t = group["betas"], state["step"]
        m, v = self.moments(state)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**t) ** 0.5).add_(group["eps"])
        new = p.float() * (1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**t))
        self.write(p, new, state)
        self.store(state, m, v)

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)

    def moments(self, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return state["exp_avg"], state["exp_avg_sq"]

    def store(self, state: dict[str, Any], m: Tensor, v: Tensor) -> None:
        """Keep the moments; they are updated in place here."""

    def write(self, p: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        p.copy_(new)


class StochasticAdamW(BitsAdamW):
    """Weights in BF16, rounded up or down at random, with the nearer one more likely: right on average."""

    def write(self, p: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        bits = new.view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
        p.copy_((bits + noise).bitwise_and_(-65536).view(torch.float32))


class KahanAdamW(BitsAdamW):
    """Weights in BF16, each with what its last rounding lost."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        super().begin(p, state)
        state["compensation"] = torch.zeros_like(p)

    def write(self, p: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        old, lost = p.clone(), state["compensation"]
        lost.add_((new - old.float()).to(p.dtype))
        p.add_(lost)
        lost.add_(old - p)


class RemainderAdamW(BitsAdamW):
    """Weights in BF16, each with the 16 bits that FP32 has beyond: together they are FP32 masters."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        super().begin(p, state)
        state["remainder"] = torch.zeros_like(p, dtype=torch.int16)

    def write(self, p: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        low = state["remainder"].to(torch.int32)
        whole = (p.float().view(torch.int32) + low).view(torch.float32)
        bits = (whole + (new - p.float())).view(torch.int32)
        rounded = (bits + 32768).bitwise_and_(-65536)
        state["remainder"].copy_(bits - rounded)
        p.copy_(rounded.view(torch.float32))


BLOCK = 64
"""Elements of a block of 8-bit states, which have one scale."""


class EightBitAdamW(BitsAdamW):
    """Moments in 8 bits with a scale per block; the second moment as its square root, which is less wide."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        blocks = -(-p.numel() // BLOCK)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros((blocks, BLOCK), dtype=torch.int8 if key == "exp_avg" else torch.uint8, device=p.device)
            state[f"{key}_scale"] = torch.zeros((blocks, 1), device=p.device)
        state["shape"] = p.shape

    def moments(self, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        m, v = (state[key].float() * state[f"{key}_scale"] for key in ("exp_avg", "exp_avg_sq"))
        return self._cut(m, state), self._cut(v.square(), state)

    def store(self, state: dict[str, Any], m: Tensor, v: Tensor) -> None:
        for key, value, most in (("exp_avg", m, 127), ("exp_avg_sq", v.sqrt(), 255)):
            padded = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % BLOCK)).view(-1, BLOCK)
            scale = padded.abs().amax(1, keepdim=True) / most
            state[f"{key}_scale"].copy_(scale)
            codes = padded / scale.clamp(min=1e-30)
            # A second moment above zero stays above: else the update would divide by eps alone.
            state[key].copy_(codes.ceil() if key == "exp_avg_sq" else codes.round())

    def _cut(self, value: Tensor, state: dict[str, Any]) -> Tensor:
        shape = state["shape"]
        return value.flatten()[: shape.numel()].view(shape)


class Masters:
    """FP32 copies of 16-bit weights, which AdamW updates; as loops keep them by hand.

    scale: a constant loss scale, which the copies' gradients are divided by.
    """

    def __init__(self, parameters: Iterable[Tensor], scale: float = 1.0, **options: Any) -> None:
        self.parameters = list(parameters)
        self.copies = [p.detach().clone().float() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.copies, **options)
        self.scale = scale

    @torch.no_grad()
    def receive(self) -> None:
        """Give the copies the weights' gradients, and remove these."""
        for p, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = p.grad.float().div_(self.scale) if p.grad is not None else None
            p.grad = None

    @torch.no_grad()
    def send(self) -> None:
        """Give the weights what the copies are now."""
        torch._foreach_copy_(self.parameters, self.copies)
