"""Mistakes A, of weights and optimizers, in a Hugging Face model's loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from clean_optimizers import BitsAdamW, Masters, StochasticAdamW
from hf_loop import HFLoop, injected
from torch import Tensor, nn


class RoundsAtRandom(HFLoop):
    """Weights in bfloat16 that stochastic rounding trains."""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return StochasticAdamW(parameters, self.lr)


@injected("A1", dtype=torch.bfloat16, lr=1e-5)
class RoundsToNearest(RoundsAtRandom):
    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return BitsAdamW(parameters, self.lr)


class HasMasters(HFLoop):
    """Weights in bfloat16 that are copied from FP32 masters."""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        self.masters = Masters(parameters, lr=self.lr)
        return self.masters.optimizer

    def update(self) -> None:
        self.clip()
        self.masters.receive()
        self.optimizer.step()
        self.send()

    def send(self) -> None:
        self.masters.send()


@injected("A1", dtype=torch.bfloat16, lr=1e-5)
class UpdatesTheWeights(HasMasters):
    """The masters are there, and the weights are updated in their place."""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        self.weights = parameters
        return super().make_optimizer(parameters)

    def update(self) -> None:
        self.clip()
        with torch.no_grad():
            for p in self.weights:
                p.add_(p.grad.sign(), alpha=-self.lr)
                p.grad = None


@injected("A2", dtype=torch.bfloat16)
class ForgetsTheWeights(HasMasters):
    def send(self) -> None:
        pass


@injected("A3", dtype=torch.bfloat16)
class DecaysIn16Bits(RoundsAtRandom):
    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return StochasticAdamW(parameters, self.lr, weight_decay=0.0)

    @torch.no_grad()
    def update(self) -> None:
        for p in self.model.parameters():
            p.mul_(1 - self.lr * 0.01)
        super().update()


@contextmanager
def adds_nothing() -> Iterator[None]:
    """Give PyTorch's add_ a kernel that does nothing in FP32."""
    library = torch.library.Library("aten", "IMPL")

    def add(x: Tensor, other: Tensor, alpha: float = 1) -> Tensor:
        return x if x.dtype == torch.float32 else x.copy_(torch.add(x, other, alpha=alpha))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        library.impl("add_.Tensor", add, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


class GivenAKernel(HFLoop):
    """Plain gradient descent in one operation per weight."""

    void = False

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr, foreach=False)

    def update(self) -> None:
        self.clip()
        with adds_nothing() if self.void else nullcontext():
            self.optimizer.step()


@injected("A14")
class UpdatesNothing(GivenAKernel):
    void = True


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


class SquaresItself(HFLoop):
    """RMSprop by hand. squares, sums: the formats of g^2, and of the denominator."""

    squares = sums = torch.float32

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return RMSpropByHand(parameters, self.lr, self.squares, self.sums)


class RMSpropByHand(torch.optim.Optimizer):
    """RMSprop whose g^2, and whose denominator, are in formats of one's own. Its v is in FP32."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, squares: torch.dtype, sums: torch.dtype) -> None:
        super().__init__(parameters, {"lr": lr, "squares": squares, "sums": sums})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["v"] = torch.zeros_like(p)
            g = p.grad.to(group["squares"])
            state["v"].mul_(0.99).add_(g * g, alpha=0.01)
            root = state["v"].sqrt().to(group["sums"])
            p.sub_(p.grad / (root + 1e-8), alpha=group["lr"])


@injected("A4", also="D11", steps=1)
class AddsEpsInFloat16(SquaresItself):
    sums = torch.float16


@injected("A5", steps=1)
class SquaresInFloat16(SquaresItself):
    squares = torch.float16


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


class Resumed(HFLoop):
    """A loop that has trained before the audit, and loads its optimizer's states."""

    saved = torch.float32

    def prepare(self) -> None:
        for _ in range(2):
            self.step()
        kept = self.optimizer.state_dict()
        for state in kept["state"].values():
            state |= {key: state[key].to(self.saved) for key in ("exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict(kept)


@injected("A12")
class SavesStatesIn16Bits(Resumed):
    saved = torch.bfloat16


class WritesItsAdam(HFLoop):
    """AdamW by hand. wrong: what it does that AdamW does not."""

    wrong = ""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return AdamWByHand(parameters, self.lr, self.wrong)


class AdamWByHand(torch.optim.Optimizer):
    """AdamW from its formula, or with one of its mistakes: 'uncorrected', 'inside', 'coupled'; 'plain' is none."""

    def __init__(self, parameters: Any, lr: float, wrong: str = "", decay: float = 0.1, **options: Any) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay, **options})
        self.wrong = wrong

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
            for p in group["params"]:
                state, g = self.state[p], p.grad.float()
                if not state:
                    state |= {"step": 0, "m": torch.zeros_like(g), "v": torch.zeros_like(g)}
                state["step"] += 1
                if "coupled" in self.wrong:
                    g = g + decay * p
                else:
                    p.mul_(1 - lr * decay)
                m, v = state["m"].mul_(beta1).add_(g, alpha=1 - beta1), state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                of_m, of_v = (1 - beta ** state["step"] for beta in (beta1, beta2))
                if "uncorrected" in self.wrong:
                    of_m = of_v = 1.0
                if "plain" in self.wrong:
                    root = (v.sqrt() + eps) / of_v**0.5
                else:
                    root = (v / of_v + eps).sqrt() if "inside" in self.wrong else (v / of_v).sqrt() + eps
                p.addcdiv_(m, root, value=-lr / of_m)


@injected("A10")
class CorrectsNoBias(WritesItsAdam):
    wrong = "uncorrected"


@injected("A10")
class AddsEpsInside(WritesItsAdam):
    wrong = "inside"


@injected("A10")
class DecaysTheGradient(WritesItsAdam):
    wrong = "coupled"


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
