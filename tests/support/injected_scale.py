"""Mistakes B, of loss scale, clipping and schedule, in a Hugging Face model's loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from hf_loop import HFLoop, injected
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

FP16: dict[str, Any] = {"autocast": torch.float16, "scale": 2.0**10, "max_norm": 0.05}
OVERFLOWS: dict[str, Any] = {"autocast": torch.float16, "scale": 2.0**24, "steps": 4}


@injected("B1", **FP16)
class ClipsBeforeUnscaling(HFLoop):
    def update(self) -> None:
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Fused(HFLoop):
    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, self.lr, fused=True)


@injected("B1", **FP16)
class ClipsBeforeTheFusedKernelUnscales(Fused):
    def update(self) -> None:
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@injected("B2", **FP16)
class UnscalesByHandToo(HFLoop):
    def clip(self) -> None:
        for p in self.model.parameters():
            p.grad.div_(self.scaler.get_scale())


@injected("B2", micro_batches=2, **FP16)
class UnscalesEachMicroBatch(HFLoop):
    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        for p in self.model.parameters():
            p.grad.div_(self.scaler.get_scale())

    def update(self) -> None:
        self.optimizer.step()
        self.scaler.update(self.scaler.get_scale())


@injected("B2", micro_batches=3, **FP16)
class UnscalesTheFirstMicroBatch(HFLoop):
    unscaled = False

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        if not self.unscaled:
            self.scaler.unscale_(self.optimizer)
            self.unscaled = True

    def update(self) -> None:
        self.unscaled = False
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@injected("B3", **FP16)
class NeverUnscales(HFLoop):
    def update(self) -> None:
        self.optimizer.step()
        self.scaler.update(self.scaler.get_scale())


@injected("B3", **FP16)
class ClipsAndNeverUnscales(HFLoop):
    def update(self) -> None:
        self.clip()
        self.optimizer.step()
        self.scaler.update(self.scaler.get_scale())


class ByHand(HFLoop):
    """A fixed loss scale without GradScaler."""

    S = 2.0**10

    def backward(self, loss: Tensor) -> None:
        (loss * self.S).backward()

    def update(self) -> None:
        for p in self.model.parameters():
            p.grad /= self.S
        self.clip()
        self.optimizer.step()


@injected("B3", autocast=torch.float16)
class NeverUnscalesByHand(ByHand):
    def update(self) -> None:
        self.optimizer.step()


@injected("B1", autocast=torch.float16, max_norm=0.05)
class ClipsBeforeUnscalingByHand(ByHand):
    def update(self) -> None:
        self.clip()
        for p in self.model.parameters():
            p.grad /= self.S
        self.optimizer.step()


class FoundInfByHand(HFLoop):
    """Overflows in the first steps, which a test of the gradients skips."""

    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@injected("B4", **OVERFLOWS)
class UpdatesWithInf(FoundInfByHand):
    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        self.optimizer.step()
        self.scaler.update()


class Scheduled(HFLoop):
    def prepare(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: (t + 1) / 10)

    def after(self) -> None:
        if self.scaler.get_scale() >= self.last:
            self.scheduler.step()

    def update(self) -> None:
        self.last = self.scaler.get_scale()
        super().update()


@injected("B5", **OVERFLOWS)
class SchedulesSkippedSteps(Scheduled):
    def after(self) -> None:
        self.optimizer._opt_called = True  # else PyTorch warns once, which the tests make an error
        self.scheduler.step()


class Averaged(HFLoop):
    def prepare(self) -> None:
        self.ema: Any = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.updates = 0

    def update(self) -> None:
        self.last = self.scaler.get_scale()
        super().update()

    def after(self) -> None:
        if self.scaler.get_scale() >= self.last:
            self.ema.update_parameters(self.model)


@injected("B6", **OVERFLOWS)
class AveragesSkippedSteps(Averaged):
    def after(self) -> None:
        self.ema.update_parameters(self.model)


@injected("B7", **OVERFLOWS)
class KeepsTheScale(HFLoop):
    def update(self) -> None:
        scale = self.scaler.get_scale()
        super().update()
        self.scaler.update(scale)


@injected("B8", also="D11", autocast=torch.float16, scale=1.5, steps=2)
class LossIsInf(HFLoop):
    def average(self, loss: Tensor) -> Tensor:
        return loss * math.inf  # as a weight in somebody's data


@injected("B9", autocast=torch.float16, scale=2.0**10)
class TrainsFP16WithoutScale(HFLoop):
    def average(self, loss: Tensor) -> Tensor:
        return loss * 2.0**-14

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.clip()
        self.optimizer.step()


@injected("B10", autocast=torch.bfloat16)
class ScalesBF16(HFLoop):
    def prepare(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


@injected("B11", autocast=torch.float16, scale=2.0**15, steps=2)
class ScalesInFP16(HFLoop):
    def average(self, loss: Tensor) -> Tensor:
        return loss.half()

    def backward(self, loss: Tensor) -> None:
        (loss * self.scaler.scale(torch.ones(())).half()).backward()


class Resumed(HFLoop):
    """A run of a few updates, saved and resumed."""

    def prepare(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(2):
            self.step()
        saved = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.restore(saved)

    def restore(self, saved: dict[str, Any]) -> None:
        self.scaler.load_state_dict(saved)


@injected("B12", autocast=torch.float16)
class ResumesWithANewScaler(Resumed):
    def restore(self, saved: dict[str, Any]) -> None:
        pass


@injected("B14", autocast=torch.float16, scale=2.0**10)
class NormInFP16(HFLoop):
    def clip(self) -> None:
        whole = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        (whole / whole.abs().max() * 30000).half().norm()
        super().clip()


@injected("B15", **FP16)
class ClipsInParts(HFLoop):
    def clip(self) -> None:
        for p in self.model.parameters():
            nn.utils.clip_grad_norm_([p], 1e-4)


class TwoOptimizers(HFLoop):
    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        self.second = torch.optim.AdamW(parameters[:3], self.lr)
        return torch.optim.AdamW(parameters[3:], self.lr)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer, self.second]

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.step(self.second)
        self.scaler.update()


@injected("B16", **FP16)
class UpdatesTheScaleTwice(TwoOptimizers):
    def update(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            self.scaler.update()


@injected("B17", **FP16)
class BackwardInsideAutocast(HFLoop):
    def backward(self, loss: Tensor) -> None:
        with torch.autocast("cpu", torch.float16):
            super().backward(loss)


class DividesByHand(HFLoop):
    def update(self) -> None:
        S = self.scaler.get_scale()
        for p in self.model.parameters():
            p.grad.div_(S)
        self.optimizer.step()
        self.scaler.update(2 * S)


@injected("B18", autocast=torch.float16, scale=2.0**10)
class DividesByTheNewScale(DividesByHand):
    def update(self) -> None:
        self.scaler.update(2 * self.scaler.get_scale())
        for p in self.model.parameters():
            p.grad.div_(self.scaler.get_scale())
        self.optimizer.step()
