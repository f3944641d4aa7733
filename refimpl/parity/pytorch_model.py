"""The models and the training of refimpl in PyTorch, built independently: torch.nn, torch.optim and torch.amp alone.

`scripts/compare_pytorch.py` compares refimpl with it. Attention is written out, so that both sides round at the same places,
unless --attention asks for one of PyTorch's kernels. The op lists of CPU autocast are torch.autocast's own; those of CUDA
autocast are applied on the CPU by explicit casts, so that no GPU is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from refimpl.parity.trace import Trace
from refimpl.training.config import Config

LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}
KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
"""Ways to compute attention that are PyTorch's own kernels."""


class Casts:
    """Operations with the casts that they need: none here, for plain models and for torch.autocast, which casts by itself.

    `seen` collects the outputs of all operations by refimpl's names, for a trace; with None nothing is kept.
    """

    seen: dict[str, Tensor] | None = None
    ignore_index = -100

    def __init__(self) -> None:
        self.branches: dict[str, np.ndarray] = {}  # where the input of each ReLU is positive

    def see(self, name: str, y: Tensor) -> Tensor:
        """Keep an output, and its gradient once backward has run."""
        if self.seen is not None:
            y.retain_grad()
            self.seen[name] = y
        return y

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return layer(x)

    def embedding(self, index: Tensor, layer: nn.Embedding) -> Tensor:
        return layer(index)

    def softmax(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    def cube(self, x: Tensor) -> Tensor:
        return torch.pow(x, 3.0)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=self.ignore_index)


class HalfModel(Casts):
    """A 16-bit model whose two sums over rows that PyTorch's CPU kernels compute in 16 bits are computed in FP32, as on CUDA.

    On the CPU the gradients of a 16-bit layer norm's weight and bias and of a 16-bit embedding are rounded after every row,
    and the row statistics are rounded before backward. That is a property of those kernels, not of the algorithm.
    """

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        y = F.layer_norm(x.float(), layer.normalized_shape, layer.weight.float(), bias, layer.eps)
        return y.to(x.dtype)

    def embedding(self, index: Tensor, layer: nn.Embedding) -> Tensor:
        return F.embedding(index, layer.weight.float()).to(layer.weight.dtype)


class CudaAutocast(Casts):
    """The lists of torch.autocast('cuda') as explicit casts: products in 16 bits; norms, softmax and loss in FP32."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.low = low
        self.cache: dict[int, Tensor] = {}

    def cached(self, w: Tensor) -> Tensor:
        """Return a parameter in 16 bits; it is cast once per step, and its uses share the copy."""
        return self.cache.setdefault(id(w), w.to(self.low))

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        bias = None if layer.bias is None else self.cached(layer.bias)
        return F.linear(x.to(self.low), self.cached(layer.weight), bias)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a.to(self.low) @ b.to(self.low)

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x.float(), layer.normalized_shape, layer.weight, layer.bias, layer.eps)

    def softmax(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1, dtype=torch.float32)

    def cube(self, x: Tensor) -> Tensor:
        return torch.pow(x.float(), 3.0)


class Attention(nn.Module):
    """Causal self-attention, one operation per line, or by one of PyTorch's own kernels."""

    def __init__(self, width: int, n_head: int, bias: bool, kind: str = "unfused") -> None:
        """Create the layer. kind: one of `policy_variants.ATTENTION`."""
        super().__init__()
        self.n_head, self.kernel = n_head, KERNELS.get(kind)
        self.c_attn = nn.Linear(width, 3 * width, bias)
        self.c_proj = nn.Linear(width, width, bias)

    def forward(self, x: Tensor, casts: Casts, name: str) -> Tensor:
        B, T, C = x.shape
        qkv = casts.see(f"{name}.c_attn", casts.linear(x, self.c_attn))
        q, k, v = (h.view(B, T, self.n_head, -1).transpose(1, 2) for h in qkv.split(C, dim=2))
        if self.kernel is not None:
            with sdpa_kernel(self.kernel):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = casts.see(name, y.transpose(1, 2).reshape(B, T, C))
            return casts.see(f"{name}.c_proj", casts.linear(y, self.c_proj))
        scores = casts.product(q, k.transpose(-2, -1)) * (1.0 / math.sqrt(C // self.n_head))
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = casts.softmax(scores.masked_fill(hidden, -math.inf))
        y = casts.see(name, casts.product(weights, v).transpose(1, 2).reshape(B, T, C))
        return casts.see(f"{name}.c_proj", casts.linear(y, self.c_proj))


class MLP(nn.Module):
    """Two linear layers with GELU (tanh) between them: PyTorch's kernel, or step by step as transformers' GPT-2."""

    def __init__(self, width: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, 4 * width, bias)
        self.c_proj = nn.Linear(4 * width, width, bias)

    def forward(self, x: Tensor, casts: Casts, name: str) -> Tensor:
        x = casts.see(f"{name}.c_fc", casts.linear(x, self.c_fc))
        if self.activation == "gelu_new":
            x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * casts.cube(x))))
        else:
            x = F.gelu(x, approximate="tanh")
        x = casts.see(f"{name}.gelu", x)
        return casts.see(f"{name}.c_proj", casts.linear(x, self.c_proj))


class Block(nn.Module):
    """A transformer block, layer norm first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, bias = config.n_embd, config.bias
        self.ln_1, self.attn = nn.LayerNorm(width, bias=bias), Attention(width, config.n_head, bias, config.attention)
        self.ln_2, self.mlp = nn.LayerNorm(width, bias=bias), MLP(width, bias, config.activation)

    def forward(self, x: Tensor, casts: Casts, name: str) -> Tensor:
        h = casts.see(f"{name}.ln_1", casts.norm(x, self.ln_1))
        x = casts.see(f"{name}.residual_1", x + self.attn(h, casts, f"{name}.attn"))
        h = casts.see(f"{name}.ln_2", casts.norm(x, self.ln_2))
        return casts.see(f"{name}.residual_2", x + self.mlp(h, casts, f"{name}.mlp"))


class GPT(nn.Module):
    """GPT-2 with nanoGPT's names and a tied output layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, bias = config.n_embd, config.bias
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, width),
                "wpe": nn.Embedding(config.block_size, width),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.lm_head.weight = cast(Any, self.transformer["wte"]).weight

    def forward(self, tokens: Tensor, targets: Tensor, casts: Casts) -> Tensor:
        parts: Any = self.transformer
        x = casts.see("transformer.wte", casts.embedding(tokens, parts["wte"]))
        e = casts.see("transformer.wpe", casts.embedding(torch.arange(tokens.shape[1], device=tokens.device), parts["wpe"]))
        x = casts.see("transformer.embedding", x + e)
        for i, block in enumerate(parts["h"]):
            x = block(x, casts, f"transformer.h.{i}")
        x = casts.see("transformer.ln_f", casts.norm(x, parts["ln_f"]))
        return casts.loss(casts.see("lm_head", casts.linear(x, self.lm_head)), targets)


class Hidden(nn.Module):
    """A hidden layer of the MLP language model."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(n_in, n_out)


class ByteMLP(nn.Module):
    """The model of Bengio et al. 2003: the embeddings of a block of bytes, joined, then hidden layers with ReLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = 4 * config.n_embd
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        sizes = [config.block_size * config.n_embd] + [width] * config.n_layer
        self.h: Any = nn.ModuleList(Hidden(a, b) for a, b in itertools.pairwise(sizes))
        self.lm_head = nn.Linear(width, config.vocab_size)

    def forward(self, tokens: Tensor, targets: Tensor, casts: Casts) -> Tensor:
        x = casts.see("wte", casts.embedding(tokens, self.wte))
        x = casts.see("join", x.flatten(1))
        for i, layer in enumerate(self.h):
            x = casts.see(f"h.{i}.fc", casts.linear(x, layer.fc))
            casts.branches[f"h.{i}.relu"] = (x > 0).cpu().numpy()
            x = casts.see(f"h.{i}.relu", torch.relu(x))
        return casts.loss(casts.see("lm_head", casts.linear(x, self.lm_head)), targets[:, -1])


class PyTorchTraining:
    """A training run in PyTorch. `step` makes a step and returns its figures; tensors are read by name between steps.

    The fp16 and bf16 recipes are a 16-bit model beside FP32 masters that the optimizer owns; the others train the model's
    own FP32 weights.
    """

    def __init__(self, config: Config, weights: Mapping[str, np.ndarray], device: str = "cpu") -> None:
        self.config, self.device = config, device
        self.model: nn.Module = self._make_model(weights)
        self.model.to(device)
        if device == "cuda":  # by default PyTorch may reduce products in 16 bits there; the recipes sum in FP32
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.low = LOW.get(config.recipe.removeprefix("amp-").removeprefix("pure-").removesuffix("-cpu"))
        self.amp, pure = config.recipe.startswith("amp-"), config.recipe.startswith("pure-")
        self.masters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if self.low is not None and not self.amp:
            self._round_weights(self.low)
        if self.low is None or self.amp or pure:
            self.masters = dict(self.model.named_parameters())
        for master in self.masters.values():
            master.requires_grad_(True)
        self.optimizer = self._make_optimizer()
        self.updates = 0
        self.branches: dict[str, np.ndarray] = {}  # of the latest step
        self.watch: Callable[[str, str, Tensor], None] | None = None  # is told of each tensor that a trace takes down
        dynamic = config.loss_scale == "dynamic"
        self.scaler = torch.amp.GradScaler(
            device, config.init_scale, config.growth_factor or 2.0, config.backoff_factor or 0.5, config.growth_interval,
            enabled=dynamic,
        )  # fmt: skip

    def _make_model(self, weights: Mapping[str, np.ndarray]) -> nn.Module:
        """Return the model, with these weights."""
        model: nn.Module = GPT(self.config) if self.config.model == "gpt" else ByteMLP(self.config)
        model.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()}, strict=False)
        return model

    def _round_weights(self, low: torch.dtype) -> None:
        """Make a 16-bit model of the FP32 one."""
        self.model.to(low)

    def _loss(self, tokens: Tensor, targets: Tensor, casts: Casts) -> Tensor:
        """Return the mean loss of a batch."""
        loss: Tensor = self.model(tokens, targets, casts)
        return loss

    def _clip(self) -> Tensor:
        """Clip the unscaled gradients, and return their norm before that."""
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.config.clip or math.inf)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        groups = [
            {"params": [p for p in self.masters.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.masters.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, config.lr, momentum=config.momentum)
        return torch.optim.AdamW(groups, config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

    def _lr(self) -> float:
        """Return the learning rate after `updates` updates: linear warm-up, then constant, or linear or cosine decay."""
        c, t = self.config, self.updates
        if t < c.warmup:
            return c.lr * (t + 1) / (c.warmup + 1)
        if c.schedule == "constant":
            return c.lr
        x = min(1.0, (t - c.warmup) / max(1, c.steps - c.warmup))
        if c.schedule == "linear":
            return c.lr * (1 - x) + c.min_lr * x
        return c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * x)) / 2

    @property
    def _autocast(self) -> bool:
        """Return whether torch.autocast casts: if the op lists of its device are the recipe's."""
        return self.amp and self.config.recipe.endswith("-cpu") == (self.device == "cpu")

    def _casts(self) -> Casts:
        if self.low is None or self._autocast:
            return Casts()
        return CudaAutocast(self.low) if self.amp else HalfModel()

    def step(
        self, tokens: np.ndarray, targets: np.ndarray, overflow: bool = False, trace: Trace | None = None
    ) -> dict[str, Any]:
        """Train for one step and return its figures. overflow: put an Inf into the first parameter's gradient.

        trace: where to record the step, without activations and gradients if overflow is set: no operation computed the Inf.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        model_parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, master in self.masters.items():
                if model_parameters[name] is not master:
                    model_parameters[name].copy_(master)
        self.model.zero_grad(set_to_none=True)
        casts = self._casts()
        casts.seen, casts.ignore_index = None if trace is None else {}, self.config.ignore_index
        x, y = (torch.from_numpy(part).to(self.device) for part in (tokens, targets))
        with torch.autocast(self.device, dtype=self.low, enabled=self._autocast):
            loss = self._loss(x, y, casts)
        self.branches = casts.branches
        scale = float(self.scaler.get_scale())
        self.scaler.scale(loss).backward()
        grads = {name: cast(Tensor, p.grad) for name, p in model_parameters.items()}
        if overflow:
            next(iter(grads.values())).view(-1)[0] = math.inf
        scaled = self._read("2.grads", grads) if trace else {}  # FP32 ones are unscaled in place
        finite = all(bool(g.isfinite().all()) for g in grads.values())
        for name, master in self.masters.items():
            master.grad = grads[name].to(master.dtype)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        unscaled = self._read("3.unscaled", {name: p.grad for name, p in self.masters.items()}) if trace else {}
        weights = self._read("1.weights", model_parameters) if trace else {}
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        result = {"loss": loss.item(), "loss_scale": scale, "skipped": not finite, "grad_norm": norm.item()}
        if trace is not None:
            step = len(trace.steps) + 1
            self._read("2.loss", {"": loss})
            self._write_down(trace, step, (tokens, targets), result, weights)
            if not overflow:
                self._write_gradients(trace, step, casts.seen or {}, scaled, unscaled, norm)
        self.updates += finite
        return result

    def _write_down(
        self, trace: Trace, step: int, batch: tuple[np.ndarray, np.ndarray], result: dict[str, Any], weights: dict[str, Any]
    ) -> None:
        """Record a step without its activations and gradients."""
        for point, x in (("0.tokens", batch[0]), ("0.targets", batch[1]), ("2.loss", np.float32(result["loss"])),
                         ("2.loss_scale", np.float32(result["loss_scale"])), ("3.found_inf", np.uint8(result["skipped"])),
                         ("4.lr", np.float64(self._lr()))):  # fmt: skip
            trace.put(step, point, "", x)
        for name, w in weights.items():
            trace.put(step, "1.weights", name, w)
        self.write_states(trace, step)

    def write_states(self, trace: Trace, step: int) -> None:
        """Record the present masters, moments and loss scale."""
        for kind, tensors in (*self.moments().items(), ("master", self.weights())):
            for name, x in tensors.items():
                trace.put(step, f"4.{kind}", name, x)
        trace.put(step, "4.scale", "", np.float32(self.scaler.get_scale()))

    def _write_gradients(
        self, trace: Trace, step: int, seen: dict[str, Tensor], scaled: dict[str, Any], unscaled: dict[str, Any], norm: Tensor
    ) -> None:
        for name, y in self._read("2.activations", seen).items():
            trace.put(step, "2.activations", name, y)
        for name, g in self._read("2.activation_grads", {name: y.grad for name, y in reversed(seen.items())}).items():
            trace.put(step, "2.activation_grads", name, g)
        for name, g in scaled.items():
            trace.put(step, "2.grads", name, g)
            trace.put(step, "3.unscaled", name, unscaled[name])
        trace.put(step, "3.norm", "", self._read("3.norm", {"": norm})[""])

    def _read(self, point: str, tensors: Mapping[str, Tensor | None]) -> dict[str, np.ndarray]:
        """Return copies of the tensors of a point."""
        if self.watch is not None:
            for name, tensor in tensors.items():
                self.watch(point, name, cast(Tensor, tensor))
        return {name: self._array(point, name, _numpy(tensor)) for name, tensor in tensors.items()}

    def _array(self, point: str, name: str, array: np.ndarray) -> np.ndarray:
        """Return a tensor of a point in refimpl's shape."""
        return array

    def weights(self) -> dict[str, np.ndarray]:
        """Return the FP32 weights (the masters) by name."""
        return self._read("4.master", self.masters)

    def moments(self) -> dict[str, dict[str, np.ndarray]]:
        """Return m and v (for SGD m) by parameter name."""
        kinds: Callable[[str], str] = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "m"}.get  # type: ignore[assignment]
        found: dict[str, dict[str, Tensor]] = {"m": {}, "v": {}}
        for name, p in self.masters.items():
            for key, value in self.optimizer.state[p].items():
                if kinds(key):
                    found[kinds(key)][name] = value
        return {kind: self._read(f"4.{kind}", tensors) for kind, tensors in found.items()}


def _numpy(x: Any) -> np.ndarray:
    """Return a copy in FP32, which holds every 16-bit value."""
    return np.array(x.detach().float().cpu().numpy())
