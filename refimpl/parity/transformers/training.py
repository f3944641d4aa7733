"""A training run of a model of transformers, with PyTorch's optimizer and scaler, step by step like `PyTorchTraining`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refimpl.nn.models.model import Model
from refimpl.parity.operations import operations_of
from refimpl.parity.pytorch_model import Casts, PyTorchTraining
from refimpl.parity.trace import BY_PARAMETER, BY_PLACE, Trace
from refimpl.parity.transformers.places import in_our_shape, seen
from refimpl.training.config import Config


def load(folder: Path, attention: str) -> nn.Module:
    """Return the model of a folder in FP32, in eval mode, where dropout does nothing. attention: 'eager' or 'sdpa'."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.eval()


class TransformersTraining(PyTorchTraining):
    """A training of the model of a folder. Tensors are read by our names and in our shapes."""

    def __init__(self, config: Config, folder: Path, attention: str = "eager") -> None:
        self.folder, self.attention = folder, attention
        self.ours: Model = config.make_model()
        self.operations = operations_of(self.ours)
        super().__init__(config, {})
        self.transposed = {f"{path}.weight" for path, module in self.model.named_modules() if type(module).__name__ == "Conv1D"}

    def _make_model(self, weights: Mapping[str, np.ndarray]) -> nn.Module:
        return load(self.folder, self.attention)

    def _round_weights(self, low: torch.dtype) -> None:
        """Round the parameters alone: `model.to(low)` would round the frequencies of RoPE too, which are a buffer."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(low)

    def _casts(self) -> Casts:
        return Casts()

    @property
    def _autocast(self) -> bool:
        return self.amp

    def _loss(self, tokens: Tensor, targets: Tensor, casts: Casts) -> Tensor:
        if casts.seen is None:
            return self._own_loss(tokens, targets)
        with seen(self.model, self.operations, casts.see):
            return self._own_loss(tokens, targets)

    def _own_loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = self.model(input_ids=tokens, use_cache=False).logits
        ignored = self.config.ignore_index
        loss: Tensor = ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=targets, ignore_index=ignored)
        return loss

    def _clip(self) -> Tensor:
        """Clip with a norm in FP32: `clip_grad_norm_` rounds the norm of 16-bit gradients to 16 bits."""
        grads = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g.float() for g in grads])
        torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), self.config.clip or math.inf, norm)
        return norm

    def _array(self, point: str, name: str, array: np.ndarray) -> np.ndarray:
        if point in BY_PLACE:
            return in_our_shape(name, array)
        return array.T if point in BY_PARAMETER and name in self.transposed else array

    def forward_backward(self, tokens: np.ndarray, targets: np.ndarray, S: float, trace: Trace | None = None) -> float:
        """Run forward, and backward from S, without an update, and return the loss.

        trace: where outputs, their gradients and those of parameters are recorded, as of step 1.
        """
        self.model.zero_grad(set_to_none=True)
        casts = self._casts()
        casts.seen = None if trace is None else {}
        with torch.autocast("cpu", dtype=self.low, enabled=self._autocast):
            loss = self._loss(torch.from_numpy(tokens), torch.from_numpy(targets), casts)
        (loss * S).backward()
        if trace is not None:
            outputs = casts.seen or {}
            gradients: dict[str, Any] = {name: y.grad for name, y in outputs.items()}
            for point, tensors in (("2.activations", outputs), ("2.activation_grads", gradients)):
                for name, array in self._read(point, tensors).items():
                    trace.put(1, point, name, array)
            for name, array in self.gradients().items():
                trace.put(1, "2.grads", name, array)
        return loss.item()

    def gradients(self) -> dict[str, np.ndarray]:
        """Return the gradients of parameters that the latest pass has left."""
        return self._read("2.grads", {name: p.grad for name, p in self.model.named_parameters()})
