"""Which tensor is what: parameter, gradient, optimizer state, buffer, EMA, by the storage that it lives in.

A parameter's views, and a gradient inside a bucket, are other tensors in the same storage. Addresses cannot tell storages
apart, since PyTorch reuses them within a step, so each storage has a number. An output that shares memory with none of the
operation's inputs is a new storage, whatever was at its address before. A storage with a role is held by a weak reference,
which keeps its address from being used again. Not all are: on the CPU what is left of a dead storage cuts the heap into pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from refimpl.parity.audit.operation import Role, TensorFacts

PLAIN = (bool, int, float, complex, str, type(None))


class Roles:
    """The storages of one recorded step and the roles of what lives in them."""

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], ema: nn.Module | None) -> None:
        """ema: a module with averaged weights."""
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._averages = dict(ema.named_parameters()) if ema is not None else {}
        self._optimizers = tuple(optimizers)
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._numbers: dict[int, int] = {}
        self._count = 0
        self._held: dict[int, StorageWeakRef] = {}
        self._ranges: dict[int, dict[int, tuple[int, Role]]] = {}  # storage -> first element -> (elements, role)
        self._states_seen = [(0, 0)] * len(self._optimizers)
        self._label_all("buffer", self._buffers)
        self._label_all("ema", self._averages)
        self.find_parameters()
        self.find_states()

    def name(self, parameter: Tensor) -> str | None:
        """Return the name of a parameter object, None if it is neither the model's nor what a module holds in its place."""
        role = self._facts(parameter).role
        return self._names.get(id(parameter), role.name if role is not None and role.kind == "parameter" else None)

    def find_parameters(self) -> None:
        """Look up where the parameters and gradients are now: backward, and `p.data = ...`, may put them elsewhere."""
        self._label_all("parameter", self._parameters)
        grads = {name: p.grad for name, p in self._parameters.items()}
        self._label_all("gradient", {name: grad for name, grad in grads.items() if grad is not None})

    def find_states(self) -> None:
        """Look up the optimizers' states, which most make in their first step; those seen before are not visited again."""
        for i, optimizer in enumerate(self._optimizers):
            # The last one seen may not have been complete.
            first = max(0, self._states_seen[i][0] - 1)
            self._states_seen[i] = _count(optimizer)
            for parameter, state in islice(list(optimizer.state.items()), first, None):
                name = self._names.get(id(parameter), "") if isinstance(parameter, Tensor) else str(parameter)
                for key, value in state.items() if isinstance(state, Mapping) else ():
                    if isinstance(value, Tensor):
                        self.label(value, Role("state", name, str(key)))

    def states_are_new(self) -> bool:
        """Return whether an optimizer has states that `find_states` has not seen."""
        return self._states_seen != [_count(optimizer) for optimizer in self._optimizers]

    def label(self, tensor: Tensor, role: Role) -> None:
        """Give a tensor's elements a role."""
        tensor = local(tensor)
        number, storage = self._storage(tensor), storage_of(tensor)
        if number is not None and storage is not None:
            if storage._cdata not in self._held:
                self._held[storage._cdata] = StorageWeakRef(storage)
            self._ranges.setdefault(number, {})[int(tensor.storage_offset())] = (tensor.numel(), role)

    def label_module(self, module: nn.Module, path: str) -> None:
        """Give the parameters that a module holds right now their role: FSDP2 exchanges them for gathered ones."""
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is not None and id(parameter) not in self._names and name in self._parameters:
                self.label(parameter, Role("parameter", name))

    def find_new(self, outputs: Iterable[Tensor], inputs: Iterable[TensorFacts]) -> None:
        """Give the storages that an operation has made a number of their own."""
        known = {t.storage for t in inputs}
        for address in {storage._cdata for t in outputs if (storage := storage_of(t)) is not None}:
            if address not in self._held and self._numbers.get(address) not in known:
                self._new(address)

    def facts(self, value: Any) -> Any:
        """Return a value without its elements: tensors as `TensorFacts`, lists as tuples, objects as their type's name."""
        if isinstance(value, Tensor):
            return self._facts(value)
        if isinstance(value, list | tuple):
            return tuple(self.facts(part) for part in value)
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
            return name_of(value)
        return f"<{type(value).__name__}>"

    def _facts(self, tensor: Tensor) -> TensorFacts:
        number = self._storage(tensor)
        offset = int(tensor.storage_offset()) if number is not None else 0
        role = self._role(number, offset) if number is not None else None
        return TensorFacts(tuple(tensor.shape), name_of(tensor.dtype), name_of(tensor.device), number, offset, role)

    def _role(self, number: int, offset: int) -> Role | None:
        ranges = self._ranges.get(number)
        if ranges is None:
            return None
        if offset in ranges:
            return ranges[offset][1]
        return next((role for first, (count, role) in ranges.items() if first <= offset < first + count), None)

    def _label_all(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.label(tensor, Role(kind, name))

    def _storage(self, tensor: Tensor) -> int | None:
        storage = storage_of(tensor)
        if storage is None:
            return None
        address = storage._cdata
        return self._numbers[address] if address in self._numbers else self._new(address)

    def _new(self, address: int) -> int:
        self._numbers[address] = self._count
        self._count += 1
        return self._numbers[address]


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return where a tensor's elements are; None for tensors of other layouts, and for those that torch.func wraps."""
    try:
        return tensor.untyped_storage() if tensor.layout is torch.strided else None
    except NotImplementedError:
        return None


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    part = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(part, Tensor)
    return part


@cache
def name_of(value: torch.dtype | torch.device | torch.layout | torch.memory_format) -> str:
    """Return PyTorch's name of a format, device or layout, without 'torch.' in front."""
    return str(value).removeprefix("torch.")


def _count(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Return how many parameters have a state, and how many tensors and numbers the last of these states has."""
    states = optimizer.state
    return len(states), len(next(reversed(states.values()))) if states else 0
