"""What is read of model, optimizers, loss scale and schedulers between two steps, and which objects people wrap them in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.errors import UsageError
from refimpl.parity.audit.roles import local, name_of
from refimpl.parity.audit.step import Border, MasterFacts, OptimizerFacts, ParameterFacts
from refimpl.parity.audit.verdict import ulp

Optimizers = Sequence[torch.optim.Optimizer]
LOW = (torch.float16, torch.bfloat16)


def optimizers_of(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers that are given, one or several, without what accelerate and others wrap them in.

    Errors: UsageError for anything else.
    """
    several = (
        (given,) if isinstance(given, torch.optim.Optimizer) else tuple(given) if isinstance(given, Iterable) else (given,)
    )
    for each in several:
        if not isinstance(each, torch.optim.Optimizer):
            raise UsageError(f"Audit: optimizer must be a torch.optim.Optimizer, or several, not {type(each).__name__}")
    return tuple(inner(each, "optimizer") for each in several)


def checked_optimizers(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers that are given, as `optimizers_of` does. Errors: UsageError also if there is nothing to train."""
    optimizers = optimizers_of(given)
    if not optimizers:
        raise UsageError("Audit: optimizer is empty: give one torch.optim.Optimizer, or several")
    if not any(group["params"] for each in optimizers for group in each.param_groups):
        raise UsageError("Audit: optimizer has no parameters: give the one that trains the model")
    return optimizers


def schedulers_of(given: Any) -> tuple[Any, ...]:
    """Return the schedulers that are given: none, one or several. Errors: UsageError for what has no `last_epoch`."""
    several = tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)
    unwrapped = tuple(inner(each, "scheduler") for each in several)
    for each in unwrapped:
        if not hasattr(each, "last_epoch"):
            raise UsageError(f"Audit: scheduler must be one of torch.optim.lr_scheduler, or several, not {type(each).__name__}")
    return unwrapped


def inner(wrapper: Any, attribute: str) -> Any:
    """Return what is inside wrappers such as accelerate's, which hold it as `attribute` and have the same type or methods."""
    kind = torch.optim.Optimizer if attribute == "optimizer" else torch.optim.lr_scheduler.LRScheduler
    while isinstance(inner := getattr(wrapper, attribute, None), kind):
        wrapper = inner
    return wrapper


def border_of(model: nn.Module, optimizers: Optimizers, scaler: Any, schedulers: Iterable[Any]) -> Border:
    """Return the state of a training between two steps. It reads the scale, for which a GPU must finish its work."""
    scale = tracker = None
    if scaler is not None and scaler.is_enabled():
        scale, tracker = float(scaler.get_scale()), int(scaler._get_growth_tracker())
    names = {id(p): name for name, p in model.named_parameters()}
    facts = tuple(_optimizer_facts(optimizer, names) for optimizer in optimizers)
    epochs = tuple(int(scheduler.last_epoch) for scheduler in schedulers)
    initial = None if scale is None else float(getattr(scaler, "_init_scale", scale))
    return Border(scale, tracker, facts, epochs, initial, dict(masters_of(model, optimizers)))


def masters_of(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple[tuple[str, str], MasterFacts]]:
    """Yield the model's 16-bit weights with the FP32 tensors that may be their masters.

    A weight that an optimizer has may have its master in its state. Of the others, the k-th weight of a shape goes with the
    k-th FP32 tensor of that shape which an optimizer has and the model has not, if there are as many of either.
    """
    weights = {id(p): (name, p) for name, p in model.named_parameters() if p.requires_grad and p.dtype in LOW}
    places = {id(p): name for name, p in model.named_parameters()}
    foreign: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for i, optimizer in enumerate(optimizers if weights else ()):
        for j, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            name, weight = weights.pop(id(p), ("", p))
            if name:
                state = optimizer.state.get(p, {})
                for key, value in state.items() if isinstance(state, Mapping) else ():
                    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.shape == p.shape and p.dim():
                        yield (name, f"{i}.{j}.{key}"), _master_facts(weight, value)
            elif id(p) not in places and p.dtype == torch.float32:
                foreign.setdefault(tuple(p.shape), []).append((f"{i}.{j}", p))
    for shape, masters in foreign.items():
        same = [(name, p) for name, p in weights.values() if tuple(p.shape) == shape]
        for (name, weight), (place, master) in zip(same, masters, strict=True) if len(same) == len(masters) else ():
            yield (name, place), _master_facts(weight, master)


def _master_facts(weight: Tensor, master: Tensor) -> MasterFacts:
    weight, master = local(weight).detach(), local(master).detach()
    rounded = master.to(weight.dtype)
    distance = (weight.double() - rounded.double()).abs() / ulp(weight.double(), weight.dtype)
    # NaN is equal to nothing.
    off = int((weight != rounded).count_nonzero())
    bits = [_sum_of_bits(x, d) for x, d in ((weight, torch.int16), (master, torch.int32))]
    largest = float(distance.nan_to_num(0.0, 0.0, 0.0).max()) if distance.numel() else 0.0
    return MasterFacts(weight.numel(), off, largest, not bool(weight.any()), bits[0], bits[1])


def _sum_of_bits(x: Tensor, of: torch.dtype) -> int:
    """Return the sum of the elements' bits, each times an odd number of its own: opposite changes do not cancel."""
    bits = x.contiguous().view(of).reshape(-1)
    return int((bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum())


def parameters_of(model: nn.Module, optimizers: Optimizers) -> dict[str, ParameterFacts]:
    """Return the model's parameters by name."""
    owners: dict[int, list[int]] = {}
    for i, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for p in group["params"]:
                owners.setdefault(id(p), []).append(i)
    return {
        name: ParameterFacts(tuple(p.shape), name_of(p.dtype), p.requires_grad, tuple(owners.get(id(p), ())))
        for name, p in model.named_parameters()
    }


def compiled_parts(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the modules that torch.compile has compiled, '' for the model itself."""
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            yield path


def compiled_frames() -> int:
    """Return how many functions torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["frames"]["ok"]) if dynamo is not None else 0


def _optimizer_facts(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> OptimizerFacts:
    groups, updates, formats = [], dict[str, float](), dict[tuple[str, str], int]()
    for group in optimizer.param_groups:
        plain = {key: v for key, v in group.items() if key != "params"}
        plain |= {key: float(v) for key, v in plain.items() if isinstance(v, Tensor) and v.numel() == 1}
        groups.append({**plain, "names": tuple(names.get(id(p), "") for p in group["params"])})
    for p, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, Mapping) else ():
            if key == "step" and not isinstance(value, bool):
                updates[names.get(id(p), "")] = float(value)
            elif isinstance(value, Tensor):
                entry = (str(key), name_of(value.dtype))
                formats[entry] = formats.get(entry, 0) + value.numel()
    return OptimizerFacts(type(optimizer).__name__, tuple(groups), updates, formats)
