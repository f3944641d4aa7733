"""`HFLoop`: a training loop of a tiny Hugging Face model, whose parts a mistake overrides; `injected` keeps such mistakes.

    @injected("B1", scale=2.0**16)
    class ClipsBeforeUnscale(HFLoop):
        def update(self) -> None:
            self.clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()

The decorator adds the mistake to `MISTAKES` by its code: a loop with it, and the same loop without it, which is the class that
the mistake derives from, with the same options (`HFLoop(scale=2.0**16)`). test_injected_mistakes.py asks of each that the
audit of the first finds its code and no other, and of the second nothing above a note. A mistake that needs another optimizer,
or another model, than PyTorch's AdamW and a Llama sets them in a class between, so that both loops have them:

    class SumsByHand(HFLoop):
        def make_optimizer(self, parameters): ...

    @injected("A6")
    class MomentsIn16Bits(SumsByHand): ...

The mistakes of each group of the catalogue are in a file of their own; audit_mistakes.py has all of them in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from refimpl.parity.audit.finding import is_serious
from refimpl.parity.audit.session import Audit

VOCAB, LENGTH, SEQUENCES = 61, 16, 4


def llama(**options: Any) -> nn.Module:
    """A Llama of 15 thousand parameters, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "use_cache": False, **options}))


def gpt2(**options: Any) -> nn.Module:
    """A GPT-2 of 30 thousand parameters, with random weights, a tied embedding, and no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **dropout, "eos_token_id": 0, "use_cache": False, **options}))


class HFLoop:
    """A training loop. `train(audit)` runs its steps; what a mistake changes is a method, or an option.

    Options: see `__init__`. After it: model, optimizer, scaler (disabled without `scale`), scheduler and ema (None, unless
    `prepare` makes them; the audit is given them), number (of the step, from 0), generator (of the batches).
    """

    def __init__(
        self,
        *,
        model: Callable[..., nn.Module] = llama,
        config: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        scale: float | None = None,
        lr: float = 1e-3,
        micro_batches: int = 1,
        max_norm: float | None = 1.0,
        steps: int = 3,
    ) -> None:
        """config: changes to the model's. dtype: of the weights. scale: the GradScaler's first, None for no GradScaler."""
        torch.manual_seed(3)
        self.autocast, self.lr, self.micro_batches, self.max_norm, self.steps = autocast, lr, micro_batches, max_norm, steps
        self.number, self.generator = 0, torch.Generator().manual_seed(4)
        self.scheduler: Any = None
        self.ema: nn.Module | None = None
        self.model: Any = model(**(config or {})).to(dtype)
        self.edit()
        self.optimizer = self.make_optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.scaler: Any = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        self.prepare()

    # ------------------------------------------------------------------------------------------------- once

    def edit(self) -> None:
        """Change the model before the optimizer is made."""

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.AdamW(parameters, self.lr)

    def prepare(self) -> None:
        """Change anything, or make a scheduler or an EMA, when all is made."""

    # ------------------------------------------------------------------------------------------------- each step

    def step(self) -> None:
        """One step: backward for each micro-batch, the update, and what follows."""
        for _ in range(self.micro_batches):
            loss = self.loss(self.batch())
            self.backward(loss)
        self.update()
        self.zero_grad()
        self.after()

    def batch(self) -> dict[str, Tensor]:
        """Draw the arguments of the model."""
        tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=self.generator)
        return {"input_ids": tokens, "labels": tokens.clone()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a micro-batch, which `backward` is given."""
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            loss = self.model(**batch).loss
        assert isinstance(loss, Tensor)
        return self.average(loss)

    def average(self, loss: Tensor) -> Tensor:
        """Divide the mean loss of a micro-batch by their number."""
        return loss / self.micro_batches

    def backward(self, loss: Tensor) -> None:
        """Run backward from the scaled loss."""
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """Unscale, clip, update or skip, and adapt the scale."""
        self.scaler.unscale_(self.optimizer)
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def clip(self) -> None:
        """Clip the gradients' norm."""
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def zero_grad(self) -> None:
        """Remove the gradients."""
        self.optimizer.zero_grad()

    def after(self) -> None:
        """Do what follows a step: schedule, EMA."""

    # ------------------------------------------------------------------------------------------------- under the audit

    @property
    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        """The optimizers that the audit is given."""
        return [self.optimizer]

    def train(self) -> Audit:
        """Train under the audit, and return it. The audit itself must not have failed."""
        audit = Audit(self.model, self.optimizers, scaler=self.scaler, scheduler=self.scheduler, ema=self.ema)
        with audit:
            while self.number < self.steps:
                self.step()
                audit.step()
                self.number += 1
        assert audit.failures == {}, audit.failures
        return audit


class Injected(NamedTuple):
    """A mistake in a Hugging Face model's loop. faulty, clean: make the loop with it, and the same without it.

    also: the code of the mistake that is its cause, and is found beside it.
    """

    code: str
    faulty: Callable[[], HFLoop]
    clean: Callable[[], HFLoop]
    also: str = ""


MISTAKES: dict[str, Injected] = {}
"""By code; a second loop with the same mistake is 'A1 as its class is called'."""
Kind = TypeVar("Kind", bound=type[HFLoop])


def injected(code: str, also: str = "", **options: Any) -> Callable[[Kind], Kind]:
    """Return a decorator that adds a loop with a mistake to MISTAKES. options: of both loops."""

    def add(kind: Kind) -> Kind:
        clean = kind.__bases__[0]
        name = code if code not in MISTAKES else f"{code} {kind.__name__}"
        MISTAKES[name] = Injected(code, lambda: kind(**options), lambda: clean(**options), also)
        return kind

    return add


def serious(audit: Audit) -> set[str]:
    """Return the codes of an audit's findings above a note."""
    return {code for code, finding in audit.findings.items() if is_serious(finding.level)}
