"""Mistakes A, of weights and optimizers, in a Hugging Face model's loop."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hf_loop import HFLoop, injected
from torch import nn


class AdamByHand(torch.optim.Optimizer):
    """Adam with states in a format of one's own, rounded in each operation."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, dtype: torch.dtype, counter: torch.dtype) -> None:
        super().__init__(parameters, {"lr": lr, "dtype": dtype, "counter": counter})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=group["counter"])
                state["v"] = torch.zeros_like(p, dtype=group["dtype"])
            state["step"] += 1
            g = p.grad.to(group["dtype"])
            state["v"].mul_(0.999).addcmul_(g, g, value=0.001)
            p.sub_(p.grad * group["lr"] / (state["v"].float().sqrt() + 1e-4))


class Plain(HFLoop):
    states, counter = torch.float32, torch.float32

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return AdamByHand(parameters, self.lr, self.states, self.counter)


@injected("A6")
class MomentsIn16Bits(Plain):
    states = torch.bfloat16


@injected("A7")
class CountsIn16Bits(Plain):
    counter = torch.bfloat16


@injected("A8")
class ForgetsTheHead(HFLoop):
    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters[:-1], self.lr)


@injected("A9")
class KeepsGradients(HFLoop):
    def zero_grad(self) -> None:
        pass


class Zeros(HFLoop):
    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)


@injected("A9")
class KeepsGradientsInPlace(Zeros):
    def zero_grad(self) -> None:
        pass


class OverflowsLater(HFLoop):
    """A loss scale that is raised after the first update, so that the second step is skipped."""

    def after(self) -> None:
        if self.number == 0:
            self.scaler.update(2.0**30)


@injected("A11", autocast=torch.float16, scale=2.0**10)
class CountsSkippedSteps(OverflowsLater):
    def update(self) -> None:
        super().update()
        for state in self.optimizer.state.values():
            state["step"].fill_(self.number + 1)


class Averaged(HFLoop):
    dtype = torch.float32

    def prepare(self) -> None:
        self.ema: Any = copy.deepcopy(self.model).to(self.dtype).requires_grad_(False)

    def after(self) -> None:
        for average, p in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(p.detach().to(self.dtype), 0.001)


@injected("A13")
class AveragesIn16Bits(Averaged):
    dtype = torch.bfloat16
