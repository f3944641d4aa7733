"""A training loop in PyTorch under autocast, as people write it, with one slip or one setting of its own at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.parity.pytorch_model import GPT, Attention, Casts
from refimpl.parity.trace import Trace, in_batch
from refimpl.training.config import Config

LOW = {"amp-fp16-cpu": torch.float16, "amp-bf16-cpu": torch.bfloat16}


def fused_attention(self: Attention, x: Tensor, casts: Casts, name: str) -> Tensor:
    """What nanoGPT calls: PyTorch chooses the kernel."""
    B, T, C = x.shape
    qkv = casts.see(f"{name}.c_attn", casts.linear(x, self.c_attn))
    q, k, v = (h.view(B, T, self.n_head, -1).transpose(1, 2) for h in qkv.split(C, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = casts.see(name, y.transpose(1, 2).reshape(B, T, C))
    return casts.see(f"{name}.c_proj", casts.linear(y, self.c_proj))


class Loop:
    """Model, optimizer and scaler, from the start of a trace of refimpl and on its batches.

    lr: number of the step from 0, and of the updates -> its learning rate (default: the trace's). The flags are the slips.
    """

    def __init__(
        self, ours: Trace, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        lr: Callable[[int, int], float] | None = None, sdpa: bool = False, late: bool = False, summed: bool = False,
        keep_grads: bool = False, decay_all: bool = False, activations: bool = True, settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.ours, self.config, self.casts = ours, Config.of(ours.config), Casts()
        self.lr, self.late, self.summed, self.keep_grads, self.activations = lr, late, summed, keep_grads, activations
        self.model = GPT(self.config)
        if sdpa:
            for module in self.model.modules():
                if isinstance(module, Attention):
                    module.forward = functools.partial(fused_attention, module)  # type: ignore[method-assign]
        self.model.load_state_dict({n: torch.from_numpy(w.copy()) for n, w in ours.at(0, "4.master").items()}, strict=False)
        self.named = dict(self.model.named_parameters())
        decayed = [p for p in self.named.values() if p.dim() >= 2 or decay_all]
        others = [p for p in self.named.values() if p.dim() < 2 and not decay_all]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", self.config.init_scale, growth_interval=self.config.growth_interval,
                                           enabled=self.config.loss_scale == "dynamic")  # fmt: skip
        self.trace = Trace({}, {}, settings or {})

    def run(self) -> Trace:
        """Train for as many steps as the trace has; return what was computed."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._put_all(0, "4.master", self.named)
            updates = 0
            for i, step in enumerate(self.ours.steps):
                given = float(self.ours.tensors[f"{step}/4.lr"])
                updates += self._step(step, self.lr(i, updates) if self.lr else given)
        finally:
            torch.set_num_threads(threads)
        return self.trace

    def _put(self, step: int, point: str, x: Any, name: str = "") -> None:
        x = x.detach().float().numpy() if isinstance(x, Tensor) else x
        self.trace.put(step, point, name, x)

    def _put_all(self, step: int, point: str, tensors: dict[str, Any]) -> None:
        for name, x in tensors.items():
            if x is not None:
                self._put(step, point, x, name)

    def _step(self, step: int, lr: float) -> bool:
        """One step; returns whether there was an update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.keep_grads:
            self.optimizer.zero_grad()
        for point in ("0.tokens", "0.targets"):
            self._put(step, point, self.ours.tensors[f"{step}/{point}"])
        self._put(step, "2.loss_scale", np.float32(self.scaler.get_scale()))
        self._put(step, "4.lr", np.float64(lr))
        self._put_all(step, "1.weights", self.named)
        self._through(step)
        grads = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}
        self._put_all(step, "2.grads", grads)
        finite = all(bool(g.isfinite().all()) for g in grads.values())
        if self.late:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.scaler.unscale_(self.optimizer)
        self._put_all(step, "3.unscaled", {name: p.grad for name, p in self.named.items()})
        if not self.late:
            self._put(step, "3.norm", torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._put(step, "3.found_inf", np.uint8(not finite))
        self._put_all(step, "4.master", self.named)
        for kind, key in (("4.m", "exp_avg"), ("4.v", "exp_avg_sq")):
            self._put_all(step, kind, {n: self.optimizer.state[p].get(key, torch.zeros_like(p)) for n, p in self.named.items()})
        self._put(step, "4.scale", np.float32(self.scaler.get_scale()))
        return finite

    def _through(self, step: int) -> None:
        batches, loss = self.ours.inputs(step), 0.0
        assert batches is not None
        for i, batch in enumerate(batches, 1):
            tokens, targets = (torch.from_numpy(x.copy()) for x in batch)
            self.casts.seen = {}
            with torch.autocast("cpu", dtype=LOW[self.config.recipe]):
                part = self.model(tokens, targets, self.casts)
            self.scaler.scale(part if self.summed else part / len(batches)).backward()
            loss += float(part.detach()) / len(batches)
            if self.activations:
                named = {in_batch(name, i): y for name, y in self.casts.seen.items()}
                self._put_all(step, "2.activations", named)
                self._put_all(step, "2.activation_grads", {name: y.grad for name, y in named.items()})
        self._put(step, "2.loss", np.float32(loss))
