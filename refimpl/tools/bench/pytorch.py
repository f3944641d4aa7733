"""The GPT in PyTorch, written for speed: fused attention, fused AdamW, and autocast or a 16-bit model."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.parity.pytorch import import_torch

torch = import_torch()
F, nn = torch.nn.functional, torch.nn

_LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}


def variants(recipe: str) -> list[str]:
    """Return the ways to run a recipe in PyTorch, of which the fastest counts. Errors: UsageError if there is none."""
    if recipe in ("amp-fp16-cpu", "amp-bf16-cpu"):
        return ["autocast"]
    if recipe not in (*_LOW, "fp32"):
        raise UsageError(f"recipe {recipe} is not timed in PyTorch: choose fp32, fp16, bf16, amp-fp16-cpu or amp-bf16-cpu")
    return ["autocast", "half model, FP32 masters"] if recipe in _LOW else ["plain"]


class Block(nn.Module):  # type: ignore[misc, name-defined]
    """A transformer layer."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj, self.up, self.down = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Any) -> Any:
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.H, C // self.H).transpose(1, 2) for z in self.qkv(self.ln_1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Model(nn.Module):  # type: ignore[misc, name-defined]
    """GPT-2 with the output layer tied to the token embedding; returns the loss."""

    def __init__(self, sizes: dict[str, int], vocab_size: int = 256) -> None:
        super().__init__()
        C = sizes["n_embd"]
        self.wte, self.wpe = nn.Embedding(vocab_size, C), nn.Embedding(sizes["block_size"], C)
        self.blocks = nn.ModuleList([Block(C, sizes["n_head"]) for _ in range(sizes["n_layer"])])
        self.ln_f = nn.LayerNorm(C)

    def forward(self, tokens: Any, targets: Any) -> Any:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Theirs:
    """A run in PyTorch that makes one step at a time: clipping, fused AdamW, and a GradScaler for FP16 recipes."""

    def __init__(
        self, sizes: dict[str, int], recipe: str, variant: str, batch: tuple[np.ndarray, np.ndarray], device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.device = device
        self.low = _LOW.get(recipe.removeprefix("amp-").removesuffix("-cpu"))
        self.autocast = variant == "autocast"
        self.model = Model(sizes).to(device)
        self.masters = None
        if variant == "half model, FP32 masters":
            self.masters = [p.detach().clone() for p in self.model.parameters()]
            self.model = self.model.to(self.low)
        trained = self.masters or list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=self.low == torch.float16)
        self.tokens, self.targets = (torch.from_numpy(np.ascontiguousarray(x)).long().to(device) for x in batch)

    def step(self) -> float:
        """Make one training step on the batch and return the loss."""
        if self.autocast:
            with torch.autocast(self.device, dtype=self.low):
                loss = self.model(self.tokens, self.targets)
        else:
            loss = self.model(self.tokens, self.targets)
        self.scaler.scale(loss).backward()
        if self.masters is not None:
            for master, p in zip(self.masters, self.model.parameters(), strict=True):
                master.grad = p.grad.float()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.masters or self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.masters is not None:
            self.model.zero_grad()
            with torch.no_grad():
                for master, p in zip(self.masters, self.model.parameters(), strict=True):
                    p.copy_(master)
        value: float = loss.item()
        return value
