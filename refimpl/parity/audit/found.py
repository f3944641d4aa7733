"""The model, optimizers, loss scale and schedulers of a running program, found among the objects that are alive."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from refimpl.parity.audit.borders import inner, optimizers_of

KINDS = (torch.optim.Optimizer, LRScheduler, torch.amp.GradScaler, AveragedModel)


@dataclass(frozen=True)
class Found:
    """What trains in a program. model: one module that has all others, where several train."""

    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    scaler: Any
    schedulers: tuple[LRScheduler, ...]
    ema: nn.Module | None

    @property
    def text(self) -> str:
        """Return what was found, in words."""
        others = [self.scaler, *self.schedulers, self.ema]
        names = [type(each).__name__ for each in (self.model, *self.optimizers, *others) if each is not None]
        size = sum(p.numel() for p in self.model.parameters())
        return f"{names[0]} ({size:,} parameters), {', '.join(names[1:])}"


def objects_alive() -> WeakSet[Any]:
    """Return the optimizers, loss scales, schedulers and averaged models that are alive."""
    alive = gc.get_objects()
    return WeakSet(each for kind in KINDS for each in _instances(alive, kind))


def training_objects(earlier: WeakSet[Any], called: nn.Module | None = None) -> Found | None:
    """Return what trains, None if no optimizer has a parameter of a module.

    earlier: what is not the program's, since it was alive before. called: the module that the program calls; it is the model if
    it has all parameters that are trained.
    """
    alive = [each for each in gc.get_objects() if not (issubclass(type(each), KINDS) and each in earlier)]
    optimizers = optimizers_of(list(_instances(alive, torch.optim.Optimizer)))
    optimizers = tuple({id(each): each for each in optimizers if each.param_groups}.values())
    owned = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    averages = list(_instances(alive, AveragedModel))
    inside = {id(module) for average in averages for module in average.modules()}
    modules = [module for module in _instances(alive, nn.Module) if id(module) not in inside]
    model = _model(modules, owned, called)
    if model is None:
        return None
    used = {id(each) for each in optimizers}
    schedulers = [each for each in _instances(alive, LRScheduler) if id(inner(each.optimizer, "optimizer")) in used]
    parts = {id(part) for each in schedulers for part in getattr(each, "_schedulers", ())}  # of SequentialLR and its like
    scalers = [each for each in _instances(alive, torch.amp.GradScaler) if each.is_enabled()]
    return Found(
        model,
        optimizers,
        scalers[-1] if scalers else None,
        tuple(each for each in schedulers if id(each) not in parts),
        averages[-1] if averages else None,
    )


def _instances(alive: Iterable[Any], kind: Any) -> Iterator[Any]:
    """Yield the objects of a class; by their type, since some objects do things when they are asked for their class."""
    return (each for each in alive if issubclass(type(each), kind))


def _model(modules: list[nn.Module], owned: set[int], called: nn.Module | None) -> nn.Module | None:
    """Return the smallest module, or a new one around several, that has all owned parameters which modules have."""
    inside = {id(child) for module in modules for child in module._modules.values()}
    roots = [module for module in modules if id(module) not in inside or module is called]
    has = {id(root): {id(p) for p in root.parameters()} & owned for root in roots}
    left = set[int]().union(*has.values())
    if called is not None and left and has.get(id(called)) == left:
        return called
    chosen: list[nn.Module] = []
    while left:
        best = max(roots, key=lambda root: (len(has[id(root)] & left), -sum(1 for _ in root.modules())))
        chosen.append(best)
        left -= has[id(best)]
    return chosen[0] if len(chosen) == 1 else _together(chosen) if chosen else None


def _together(modules: list[nn.Module]) -> nn.Module:
    """Return a module that has several, by the names of the program's variables where they have one."""
    variables = vars(sys.modules["__main__"])
    several = Models()
    for module in modules:
        name = next((name for name, value in variables.items() if value is module), type(module).__name__)
        several.add_module(name if name not in several._modules else f"{name}_{len(several._modules)}", module)
    return several


class Models(nn.Module):
    """The models of a program that trains several."""
