"""Correct training loops as people write them: the audit must find nothing in them, and judge nearly all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from clean_models import FAMILIES, Batch
from clean_optimizers import EightBitAdamW, KahanAdamW, Masters, RemainderAdamW, StochasticAdamW
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ADAMW, SGD, LR = torch.optim.AdamW, torch.optim.SGD, 1e-3


def hugging_face_adafactor(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Adafactor of transformers, with a learning rate of its own."""
    from transformers.optimization import Adafactor

    result = Adafactor(parameters, lr=lr, relative_step=False, scale_parameter=False, warmup_init=False)
    assert isinstance(result, torch.optim.Optimizer)
    return result


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (ADAMW, {"foreach": False, "fused": False}),
    "adamw-foreach": (ADAMW, {"foreach": True}),
    "adamw-fused": (ADAMW, {"fused": True}),
    "sgd": (SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4}),
    "adafactor": (torch.optim.Adafactor, {}),
    "adafactor-hf": (hugging_face_adafactor, {}),
    "masters": (ADAMW, {}),
    "stochastic": (StochasticAdamW, {}),
    "kahan": (KahanAdamW, {}),
    "remainder": (RemainderAdamW, {}),
    "8-bit": (EightBitAdamW, {}),
}
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
IN_16_BITS = {"bf16": ("masters", "stochastic", "kahan", "remainder"), "fp16": ("masters",)}
"""The optimizers for weights in 16 bits; the others are for weights in FP32."""
PRECISIONS = ("fp32", "amp-bf16", "amp-fp16", *IN_16_BITS)
WRAPS = ("", "checkpoint", "lora", "ddp", "fsdp2", "compile")
BATCHES = ("", "accumulate", "per-token")
"""One batch per step, two with their mean loss halved, or two with the sum of their losses over the number of their tokens."""
UNEQUAL = ("qwen2", "bert")
"""Families whose batches have different numbers of targets: the mean of two means is not that of all targets (C2)."""
EXTRAS = ("", "clip", "clip schedule", "clip schedule ema")


@dataclass(frozen=True)
class CleanLoop:
    """A clean loop: one choice of each kind."""

    family: str
    precision: str
    optimizer: str
    wrap: str
    batches: str
    extras: str

    @property
    def choices(self) -> tuple[str, ...]:
        return self.family, self.precision, self.optimizer, self.wrap, self.batches, self.extras

    @property
    def name(self) -> str:
        return " ".join(filter(None, self.choices))

    @property
    def makes_sense(self) -> bool:
        """Whether people combine these."""
        family, whole = FAMILIES[self.family], self.precision not in IN_16_BITS
        if whole == any(self.optimizer in names for names in IN_16_BITS.values()):
            return False
        if not whole and self.optimizer not in IN_16_BITS[self.precision]:
            return False
        if self.batches == "accumulate" and self.family in UNEQUAL:
            return False
        if (self.wrap == "lora" and not (family.lora and whole)) or (self.wrap == "checkpoint" and not family.checkpoints):
            return False
        if self.wrap == "fsdp2" and (not family.blocks or self.precision == "amp-fp16" or not whole):
            return False
        if self.wrap == "fsdp2" and not self.optimizer.startswith(("adamw", "sgd")):
            return False
        if "ema" in self.extras and (not whole or self.wrap not in ("", "checkpoint")):
            return False
        return self.wrap != "compile" or self.optimizer != "masters"

    def make(self) -> Run:
        """Build the model and all that trains it."""
        return Run(self)


class Run:
    """A clean loop with its model, optimizer and what else it has; `train` is the loop."""

    def __init__(self, loop: CleanLoop) -> None:
        torch.manual_seed(11)
        self.loop, family = loop, FAMILIES[loop.family]
        self.family = family
        self.generator = torch.Generator().manual_seed(5)
        self.outputs: list[Tensor] = []
        model = family.make(FORMATS.get(loop.precision, torch.float32))
        self.model: Any = self._wrapped(model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        make, options = OPTIMIZERS[loop.optimizer]
        self.masters = None
        if loop.optimizer == "masters":
            self.masters = Masters(trained, 1024.0 if loop.precision == "fp16" else 1.0, lr=LR, **options)
        self.optimizer = self.masters.optimizer if self.masters else make(trained, **{"lr": LR, **options})
        self.scaler = torch.amp.GradScaler("cpu", enabled=loop.precision == "amp-fp16")
        self.scheduler = None
        if "schedule" in loop.extras:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: min(1.0, (t + 1) / 4))
        self.ema = None
        if "ema" in loop.extras:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

    def _wrapped(self, model: Any) -> Any:
        wrap, family = self.loop.wrap, self.family
        if wrap == "checkpoint":
            model.activation_checkpointing_enable()  # gradient_checkpointing_enable, before transformers 5
        if wrap == "lora":
            from peft import LoraConfig, get_peft_model

            fan = self.loop.family == "gpt2"  # its Conv1D has its weight transposed
            config = LoraConfig(r=4, lora_alpha=8, target_modules=list(family.lora), fan_in_fan_out=fan)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that are going to go
                return get_peft_model(model, config)
        if wrap == "ddp":
            return DistributedDataParallel(model)
        if wrap == "fsdp2":
            mesh, half = init_device_mesh("cpu", (1,)), self.loop.precision == "amp-bf16"
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
            for name, module in model.named_modules():
                if name.rpartition(".")[2] in family.blocks:
                    for block in module.children():
                        fully_shard(block, mesh=mesh, mp_policy=policy)
            return fully_shard(model, mesh=mesh, mp_policy=policy)
        if wrap == "compile":
            return torch.compile(model, backend="aot_eager")
        return model

    # ------------------------------------------------------------------------------------------------- the loop

    def train(self, around: Callable[[], AbstractContextManager[Any]] = nullcontext, steps: int = 3) -> Run:
        """Train; each step inside `around()`."""
        with warnings.catch_warnings():
            # Dynamo reads the `grad` of all tensors that it takes over from where the graph broke; FSDP says that outputs that
            # are views must not be written to.
            for beginning in ("The .grad attribute of a Tensor that is not a leaf", "FSDP2-wrapped module"):
                warnings.filterwarnings("ignore", beginning, UserWarning)
            for _ in range(steps):
                with around():
                    self.step()
        return self

    def step(self) -> None:
        """One step of the loop."""
        parts = 1 if not self.loop.batches else 2
        batches = [self.family.batch(self.generator, 4) for _ in range(parts)]
        tokens = sum(int(self._labels(batch).ne(-100).sum()) for batch in batches)
        for batch in batches:
            loss = self._loss(batch, tokens) if self.loop.batches == "per-token" else self._loss(batch, None) / parts
            self.outputs.append(loss.detach().clone())
            self._scaled(loss).backward()
        self._update()

    def _scaled(self, loss: Tensor) -> Tensor:
        if self.masters is not None:
            return loss * self.masters.scale if self.masters.scale != 1.0 else loss
        scaled = self.scaler.scale(loss)
        assert isinstance(scaled, Tensor)
        return scaled

    def _update(self) -> None:
        if self.masters is not None:
            self.masters.receive()
        if "clip" in self.loop.extras:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.masters.copies if self.masters else self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        if self.scheduler is not None and self.scaler.get_scale() >= before:
            self.scheduler.step()
        if self.masters is not None:
            self.masters.send()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _labels(self, batch: Batch) -> Tensor:
        """What the loss is taken of: a language model has no loss at the first token."""
        labels = batch["labels"]
        return labels[:, 1:] if self.loop.family in ("llama", "qwen2", "gpt2") else labels

    def _loss(self, batch: Batch, tokens: int | None) -> Tensor:
        """The mean loss over a batch, or the sum over `tokens`."""
        dtype = torch.float16 if self.loop.precision == "amp-fp16" else torch.bfloat16
        inputs = dict(batch)
        if "pixel_values" in inputs and self.loop.precision in FORMATS:
            inputs["pixel_values"] = inputs["pixel_values"].to(FORMATS[self.loop.precision])
        whole = not self.loop.precision.startswith("amp") or self.loop.wrap == "fsdp2"
        with torch.autocast("cpu", dtype, enabled=not whole):
            if self.loop.family in ("bert", "vit"):  # their models take no num_items_in_batch, and return the mean
                loss = self.model(**inputs).loss
                loss = loss if tokens is None else loss * (int(self._labels(batch).ne(-100).sum()) / tokens)
            elif self.family.loss is None:
                extra = {} if tokens is None else {"num_items_in_batch": torch.tensor(tokens)}
                loss = self.model(**inputs, **extra).loss
            else:
                labels = inputs.pop("labels")
                logits = self.model(**inputs)
                loss = self.family.loss(logits, {"labels": labels}, "mean" if tokens is None else "sum")
                loss = loss if tokens is None else loss / tokens
        assert isinstance(loss, Tensor)
        return loss

    def bits(self) -> dict[str, Tensor]:
        """What the steps left, as bytes: weights, states, averages, losses, scale and random numbers."""
        found: dict[str, Any] = dict(self.model.state_dict())
        for i, state in enumerate(self.optimizer.state.values()):
            found |= {f"state {i} {key}": value for key, value in state.items() if isinstance(value, Tensor)}
        found |= {f"ema {key}": value for key, value in self.ema.state_dict().items()} if self.ema is not None else {}
        found |= {f"loss {i}": value for i, value in enumerate(self.outputs)}
        found |= {"scale": torch.tensor(self.scaler.get_scale()), "rng": torch.get_rng_state()}
        plain = {key: getattr(value, "_local_tensor", value).detach() for key, value in found.items()}
        return {key: value.contiguous().reshape(-1).view(torch.uint8) for key, value in plain.items() if value.numel()}


def everything() -> Iterator[CleanLoop]:
    """Yield all combinations that make sense."""
    kinds = [list(kind) for kind in (FAMILIES, PRECISIONS, OPTIMIZERS, WRAPS, BATCHES, EXTRAS)]
    for places in product(*(range(len(kind)) for kind in kinds)):
        # Each kind is turned by the others' places, so that the first of equally good loops are not all alike.
        turned = [kind[sum(places[: i + 1]) % len(kind)] for i, kind in enumerate(kinds)]
        loop = CleanLoop(*turned)
        if loop.makes_sense:
            yield loop


def covering(loops: list[CleanLoop], together: Iterable[tuple[int, ...]], least: int = 1) -> list[CleanLoop]:
    """Choose loops in which choices that make sense together are together at least once.

    together: which kinds of choice, by their places among `choices`. The next loop is always the one with the most new
    combinations; those that would bring fewer than `least` are left out.
    """
    numbers: dict[tuple[tuple[int, str], ...], int] = {}
    masks = [0] * len(loops)
    for kinds in together:
        for i, loop in enumerate(loops):
            masks[i] |= 1 << numbers.setdefault(tuple((kind, loop.choices[kind]) for kind in kinds), len(numbers))
    missing, chosen = (1 << len(numbers)) - 1, []
    while True:
        best = max(range(len(loops)), key=lambda i: (masks[i] & missing).bit_count())
        if (masks[best] & missing).bit_count() < least:
            return chosen
        missing &= ~masks[best]
        chosen.append(loops[best])


EVERYTHING = list(everything())
LOOPS = {loop.name: loop for loop in covering(EVERYTHING, combinations(range(6), 2), 4)}
"""The clean loops that are tried at each change, by name."""
MORE_LOOPS = {loop.name: loop for loop in covering(EVERYTHING, [(0, 1, 2), (0, 1, 3), (0, 2), (2, 3), (3, 4, 5)])}
"""Those that are tried with -m slow: each family in each precision with each optimizer, and with each wrap."""
