"""Rule A10: which formula an update of Adam's family follows, from what it read and wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.judge.again import U
from refimpl.parity.audit.judge.roundings import unit
from refimpl.parity.audit.operation import Operation, Role, TensorFacts
from refimpl.parity.audit.origins import named_tensors, result_facts
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import finding_at
from refimpl.parity.audit.rules.update_probes import Samples
from refimpl.parity.audit.step import OptimizerFacts, View

TINY = 2.0**-149
RIGHT = ("right",)
Moment = tuple[Tensor, Tensor]
"""A state before and after."""
MARGIN = 8.0
"""A formula is wrong where an element is this many times its tolerance away."""
WRONG = {
    "no bias correction": "the first update is (1 - beta1) / sqrt(1 - beta2) times what it should be, 3.2 for 0.9 and 0.999",
    "eps inside the root": "eps is a floor of sqrt(eps) under the root of v, 1e-4 for 1e-8",
    "weight decay added to the gradient": "the decay is divided by sqrt(v), so that weights with large gradients hardly decay",
}
"""What the formulas do that are wrong."""

PROBES: tuple[Probe, ...] = ()


class Tensors(NamedTuple):
    """What an optimizer read and wrote of one parameter, some elements each, in FP64: before and after.

    operation: the last one that wrote the parameter. unit: the unit roundoff of the parameter.
    """

    operation: Operation
    unit: float
    p: tuple[Tensor, Tensor]
    g: Tensor
    states: dict[str, Moment]


class Numbers(NamedTuple):
    """What an update multiplies with; decay: that of the weights; time: of this update, from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    time: float


class Formula(NamedTuple):
    """One way to update. uncorrected, inside, coupled: whether it makes each mistake of WRONG.

    plain: whether eps stands beside sqrt(v), as in the paper's shorter form, and not beside the corrected root.
    """

    uncorrected: bool
    inside: bool
    coupled: bool
    plain: bool

    def wrong(self, coupled_is_wrong: bool) -> tuple[str, ...]:
        """Return the mistakes that it makes."""
        does = (self.uncorrected, self.inside, self.coupled and coupled_is_wrong)
        return tuple(text for text, is_so in zip(WRONG, does, strict=True) if is_so)


FORMULAS = tuple(Formula(*choice) for choice in product((False, True), repeat=4) if not (choice[0] and choice[3]))
"""Without correction eps stands beside sqrt(v) anyway."""


@rule("A10", "wrong-update-formula")
def wrong_formula(view: View) -> Iterator[Finding]:
    """An Adam update leaves out bias correction, adds eps inside the root, or adds weight decay to the gradient.

    Seen: for an optimizer with first and second moments of the gradient in FP32, and 'lr', 'eps' and 'betas' in its groups,
    some elements of p, g, m and v before and after the step are compared with formulas: the right one (in both its forms, eps
    beside the corrected root or beside the plain one), and those with one or more mistakes. A mistake is found if the right
    formulas miss by more than 8 times what rounding can do, 4 u |p| + 32 u |change|, and a wrong one is within that everywhere.
    Decay in the gradient is a mistake only if the optimizer is called AdamW. It is a note if its groups say 'correct_bias':
    False.
    Not judged: fused kernels, which the judge of operations covers; other optimizers; moments in 16 bits.
    Effect: without bias correction the first updates are up to 3.2 times too large, as if there were no warm-up; with eps
    inside the root, small gradients make small updates; decay in the gradient is divided by sqrt(v) as well.
    Fix: m / (1 - beta1^t) and v / (1 - beta2^t), sqrt(v) + eps, and a separate p - lr x decay x p.
    Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
    """
    if view.step.after is None:
        return
    tensors = _tensors(view)
    for before, after in zip(view.step.before.optimizers, view.step.after.optimizers, strict=False):
        found: dict[tuple[str, ...], list[str]] = {}
        for old, new in zip(before.groups, after.groups, strict=False):
            for name in new["names"]:
                if name in tensors:
                    found.setdefault(_mistakes(tensors[name], (old, new), name, after), []).append(name)
        found.pop((), None)
        # Where some parameters are updated as they should be, the others may be so on purpose, or by another rule.
        if len(found) == 1 and RIGHT not in found:
            yield from _told(view, *next(iter(found.items())), tensors, after)


def _told(
    view: View, wrong: tuple[str, ...], names: list[str], tensors: dict[str, Tensors], optimizer: OptimizerFacts
) -> Iterator[Finding]:
    chosen = any(group.get(key) is False for group in optimizer.groups for key in ("correct_bias", "bias_correction"))
    level = "note" if chosen and wrong == ("no bias correction",) else "worse than it need be"
    number = f"the updates of {len(names)} parameters are those of Adam with {' and '.join(wrong)}, and not those of Adam"
    found = finding_at(
        view, tensors[names[0]].operation, "A10", "wrong-update-formula", level, number=number,
        effect="; ".join(WRONG[text] for text in wrong),
        fix="divide by the corrected root, sqrt(v / (1 - beta2^t)) + eps, and decay the weights separately",
    )  # fmt: skip
    yield replace(found, parameters=tuple(names))


def _mistakes(
    t: Tensors, groups: tuple[Mapping[str, Any], Mapping[str, Any]], name: str, optimizer: OptimizerFacts
) -> tuple[str, ...]:
    """Return the mistakes of the formula that a parameter was updated by; 'right', or nothing where it cannot be told."""
    group = groups[0]
    betas, eps, decay = group.get("betas"), group.get("eps"), group.get("weight_decay", 0.0)
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and _are_numbers(*betas, eps, decay)):
        return ()
    rates = {float(g["lr"]) for g in groups if _are_numbers(g.get("lr"))}
    (beta1, beta2), eps = betas, float(eps or 0.0)
    is_adamw = "adamw" in optimizer.kind.lower()
    misses: dict[Formula, float] = {}
    for coupled in (False, True) if decay else (False,):
        g = t.g + decay * t.p[0] if coupled else t.g
        moments = _moments(t, t.g.abs() + abs(decay * t.p[0]), g, beta1, beta2)
        if moments is None:
            continue
        time = optimizer.updates.get(name) or _first_step(moments)
        if time is None:
            return ()
        numbers = [Numbers(lr, beta1, beta2, eps, 0.0 if coupled else decay, time) for lr in rates]
        for formula in FORMULAS:
            if formula.coupled == coupled:
                misses[formula] = min((_miss(t, formula, moments, each) for each in numbers), default=math.inf)
    right = min((miss for f, miss in misses.items() if not f.wrong(is_adamw)), default=math.inf)
    wrong = [f.wrong(is_adamw) for f, miss in misses.items() if miss <= 1 and f.wrong(is_adamw)]
    if right <= 1:
        # Where a wrong formula gives the same, as without a gradient, neither is shown.
        return () if wrong else RIGHT
    return min(wrong, key=len) if wrong and right > MARGIN else ()


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _moments(t: Tensors, size: Tensor, g: Tensor, beta1: float, beta2: float) -> tuple[Moment, Moment] | None:
    """Return m and v, the states that have become the averages of g and g^2. size: of the terms of g."""
    averages = ((beta1, g, size), (beta2, g * g, 2 * size * size))
    found = [next((s for s in t.states.values() if _is_average(s, *average)), None) for average in averages]
    m, v = found
    return (m, v) if m is not None and v is not None else None


def _is_average(state: Moment, beta: float, x: Tensor, size: Tensor) -> bool:
    """Return whether a state was multiplied by beta, and x added: 8 u of the sizes, for the roundings of both forms."""
    before, after = state
    exact = beta * before + (1 - beta) * x
    return bool(((after - exact).abs() <= 8 * U * (before.abs() + (1 - beta) * size) + TINY).all())


def _first_step(moments: tuple[Moment, Moment]) -> float | None:
    """Return 1 where the moments began at 0 in this step, and None where nobody knows."""
    return None if any(bool(before.any()) for before, _ in moments) else 1.0


def _miss(t: Tensors, formula: Formula, moments: tuple[Moment, Moment], n: Numbers) -> float:
    """Return the largest distance of an element from what a formula gives, in units of what rounding can do."""
    (_, m), (_, v) = moments
    of_m, of_v = (1.0, 1.0) if formula.uncorrected else (1 - n.beta1**n.time, 1 - n.beta2**n.time)
    if formula.plain:
        root = ((v + n.eps).sqrt() if formula.inside else v.sqrt() + n.eps) / math.sqrt(of_v)
    else:
        root = (v / of_v + n.eps).sqrt() if formula.inside else (v / of_v).sqrt() + n.eps
    change = n.lr / of_m * m / root
    before, after = t.p
    miss = (before * (1 - n.lr * n.decay) - change - after).abs()
    allowed = (3 * U + t.unit) * torch.maximum(before.abs(), after.abs()) + 32 * U * change.abs() + TINY
    return float((miss / allowed).nan_to_num(math.inf).max())


def _tensors(view: View) -> dict[str, Tensors]:
    """Return what the optimizers read and wrote in the step, by the parameter's name; not of fused kernels."""
    first: dict[Role, tuple[float, ...]] = {}
    last: dict[Role, tuple[float, ...]] = {}
    writers: dict[str, tuple[Operation, str]] = {}
    for operation in view.step.operations:
        elements: Samples | None = operation.probed.get("samples")
        if operation.phase != "step" or elements is None or operation.name.startswith("aten._fused_"):
            continue
        for name, t in named_tensors(operation.arguments):
            if isinstance(t, TensorFacts) and t.role is not None and name in elements.before:
                first.setdefault(t.role, elements.before[name])
        for name, t in result_facts(operation):
            if t.role is not None and name in elements.after:
                last[t.role] = elements.after[name]
                if t.role.kind == "parameter":
                    writers[t.role.name] = (operation, t.dtype)
    wide = {role: (_wide(x), _wide(last[role])) for role, x in first.items() if role in last}
    found = {}
    for name, (operation, dtype) in writers.items():
        p, g = wide.get(Role("parameter", name)), first.get(Role("gradient", name))
        states = {r.key: pair for r, pair in wide.items() if r.kind == "state" and r.name == name}
        if p is not None and g is not None and len(g) == len(p[0]):
            fitting = {key: pair for key, pair in states.items() if len(pair[0]) == len(p[0])}
            found[name] = Tensors(operation, unit(getattr(torch, dtype)), p, _wide(g), fitting)
    return found


def _wide(elements: tuple[float, ...]) -> Tensor:
    return torch.tensor(elements, dtype=torch.float64)
