"""PyTorch training loops with what people's loops have in them: for the tests of the audit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, HEADS, LENGTH = 29, 12, 2, 7


class LoRALinear(nn.Module):
    """A frozen linear layer and a trained product of two thin ones."""

    def __init__(self, inputs: int, outputs: int, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inputs) * 0.1)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Block(nn.Module):
    """Attention by PyTorch's kernel on views of one product, dropout, and an MLP with operations in place."""

    def __init__(self, dropout: float, lora: bool) -> None:
        super().__init__()
        linear = LoRALinear if lora else nn.Linear
        self.dropout = dropout
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = linear(WIDTH, 3 * WIDTH)
        self.proj = linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 31)
        self.down = nn.Linear(31, WIDTH)

    def forward(self, *, hidden: Tensor) -> Tensor:  # by keyword, as Hugging Face's layers are called
        B, T, C = hidden.shape
        q, k, v = (x.view(B, T, HEADS, C // HEADS).transpose(1, 2) for x in self.qkv(self.norm(hidden)).split(C, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        hidden = hidden + F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)
        y = F.relu(self.up(hidden).mul_(0.5), inplace=True)
        return hidden + self.down(y)


class Net(nn.Module):
    """A language model with a tied embedding; checkpointing: none, 'reentrant' or 'new'."""

    def __init__(self, dropout: float = 0.1, checkpointing: str = "", lora: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(dropout, lora) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.embed(tokens)
        for layer in self.layers:
            if self.checkpointing:
                hidden = checkpoint(lambda x, f=layer: f(hidden=x), hidden, use_reentrant=self.checkpointing == "reentrant")
            else:
                hidden = layer(hidden=hidden)
        return self.head(self.norm(hidden))


class Images(nn.Module):
    """Convolution, batch norm with running statistics, an activation in place, pooling, and an LSTM over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.lstm = nn.LSTM(32, 6, batch_first=True)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.one_hot(tokens % 8, 8).float()[:, None, :, :].expand(-1, 3, -1, -1)  # (B, 3, LENGTH, 8)
        x = F.avg_pool2d(self.relu(self.norm(self.conv(x))), (1, 2))  # (B, 8, LENGTH, 4)
        y, _ = self.lstm(x.permute(0, 2, 1, 3).flatten(2))
        return self.head(y)


@dataclass
class Loop:
    """A training loop. `run(around)` trains; `around(step)` is a context manager for each step, as a recorder is."""

    make: Callable[[], nn.Module] = Net
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    options: dict[str, Any] = field(default_factory=dict)  # of the optimizer
    autocast: torch.dtype | None = None
    scale: float | None = None  # of a GradScaler
    micro_batches: int = 1
    averaged: bool = False
    dtype: torch.dtype = torch.float32
    wrap: str = ""  # 'ddp' or 'fsdp'
    style: str = "plain"  # or 'closure', 'in backward', 'penalty', 'evaluates'
    outputs: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(7)
        self.model: Any = self.make().to(self.dtype)
        if self.wrap == "ddp":
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if self.wrap == "fsdp":
            mesh, policy = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(self.model, mesh=mesh, mp_policy=policy)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = [self.optimizer(trained, **{"lr": 1e-2, **self.options})]
        if self.style == "in backward":
            self.optimizers = [self.optimizer([p], **{"lr": 1e-2, **self.options}) for p in trained]
            for p, optimizer in zip(trained, self.optimizers, strict=True):
                p.register_post_accumulate_grad_hook(lambda p, own=optimizer: (own.step(), own.zero_grad())[0])
        scaled = self.scale is not None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale or 1.0, growth_interval=1, enabled=scaled)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if self.averaged else None

    def run(self, around: Callable[[int], AbstractContextManager] = lambda step: nullcontext(), steps: int = 3) -> Loop:
        for step in range(steps):
            with around(step):
                self.step()
        return self

    def step(self) -> None:
        """One step of the user's loop."""
        self.model.train()
        if self.style == "closure":
            self.optimizers[0].step(self.closure)
            return
        for _ in range(self.micro_batches):
            loss = self.loss() / self.micro_batches
            self.scaler.scale(loss).backward()
        if self.style != "in backward":
            self.scaler.unscale_(self.optimizers[0])
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.scaler.step(self.optimizers[0])
            self.scaler.update()
            self.outputs += [p.grad.detach().clone() for p in self.model.parameters() if p.grad is not None]
            self.optimizers[0].zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        if self.style == "evaluates":
            self.model.eval()
            with torch.no_grad():
                self.outputs.append(self.loss())

    def closure(self) -> Tensor:
        self.optimizers[0].zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def loss(self) -> Tensor:
        tokens = torch.randint(VOCAB, (3, LENGTH + 1))
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            logits = self.model(tokens[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        if self.style == "penalty":
            grads = torch.autograd.grad(loss, list(self.model.parameters()), create_graph=True, materialize_grads=True)
            loss = loss + sum((g * g).sum() for g in grads)
        self.outputs.append(logits.detach().clone())
        return loss

    def bits(self) -> dict[str, Tensor]:
        """What the steps left, as bytes: parameters, buffers, states, averages, logits, gradients, scale, random numbers."""
        found: dict[str, Any] = dict(self.model.state_dict())
        for i, optimizer in enumerate(self.optimizers):
            for j, state in enumerate(optimizer.state.values()):
                found |= {f"state {i} {j} {key}": value for key, value in state.items() if isinstance(value, Tensor)}
        found |= {f"ema {key}": value for key, value in self.ema.state_dict().items()} if self.ema is not None else {}
        found |= {f"output {i}": value for i, value in enumerate(self.outputs)}
        found |= {"scale": torch.tensor(self.scaler.get_scale()), "rng": torch.get_rng_state()}
        plain = {key: getattr(value, "_local_tensor", value).detach() for key, value in found.items()}
        return {key: value.contiguous().reshape(-1).view(torch.uint8) for key, value in plain.items() if value.numel()}


IMPLEMENTATIONS = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
AMP = {"autocast": torch.bfloat16}
FP16 = {"autocast": torch.float16, "scale": 2.0**18}  # the first two steps overflow
SGD = {"optimizer": torch.optim.SGD}


def _no_dropout() -> Net:
    return Net(dropout=0.0)


LOOPS: dict[str, Callable[[], Loop]] = {
    **{f"adamw {name}": lambda o=options: Loop(options=o) for name, options in IMPLEMENTATIONS.items()},
    **{f"sgd {name}": lambda o=opts: Loop(**SGD, options=o | {"momentum": 0.9}) for name, opts in IMPLEMENTATIONS.items()},
    **{f"fp16 scaler {name}": lambda o=options: Loop(**FP16, options=o) for name, options in IMPLEMENTATIONS.items()},
    "flash attention": lambda: Loop(_no_dropout, **AMP),
    "autocast, tied weight cached": lambda: Loop(**AMP),
    "pure bf16": lambda: Loop(dtype=torch.bfloat16),
    "checkpoint new": lambda: Loop(lambda: Net(checkpointing="new"), **AMP),
    "checkpoint reentrant": lambda: Loop(lambda: Net(checkpointing="reentrant"), **AMP),
    "lora": lambda: Loop(lambda: Net(lora=True), **AMP),
    "images, lstm": lambda: Loop(Images),
    "accumulation, ema": lambda: Loop(micro_batches=2, averaged=True),
    "closure": lambda: Loop(**SGD, style="closure"),
    "optimizer in backward": lambda: Loop(style="in backward"),
    "second derivatives": lambda: Loop(lambda: nn.Sequential(nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB)), style="penalty"),
    "evaluates": lambda: Loop(style="evaluates"),
    "ddp": lambda: Loop(wrap="ddp", **AMP),
    "fsdp2": lambda: Loop(_no_dropout, wrap="fsdp", options={"foreach": True}),
}  # fmt: skip


class OneRank:
    """A process group of this process alone."""

    def __enter__(self) -> None:
        self.hook = sys.excepthook  # PyTorch puts one of its own there, for good
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()
        sys.excepthook = self.hook
