"""Rules A: the optimizer, its states, and averages of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from refimpl.parity.audit.factors import history_of, short
from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import LOW, finding_at
from refimpl.parity.audit.rules.masters import copies_of_masters
from refimpl.parity.audit.step import Step, View
from refimpl.parity.audit.values import Values, is_float

STANDS = 0.5
"""The share of elements that an update must leave as they are before a state is said to stand still."""
DECAYS = ("mul_", "lerp_", "_foreach_mul_", "_foreach_lerp_")
ADDITIONS = ("add_", "_foreach_add_")


def stands_still(values: Values) -> dict[str, tuple[float, float]] | None:
    """Measure a decay of 16-bit states or averages in place: elements that it should change, and those that it left.

    By kind of role, state or ema. A value in FP64 is needed to know what should change, so operations that are not judged count
    for nothing.
    """
    operation = values.operation
    if short(operation) not in DECAYS or "self" not in operation.arguments:
        return None
    facts = list(tensors_in(operation.arguments["self"]))
    before = values.inputs["self"]
    found: dict[str, tuple[float, float]] = {}
    for i, (fact, x) in enumerate(zip(facts, before if isinstance(before, list | tuple) else [before], strict=True)):
        twin = values.twins.get("self" if isinstance(before, torch.Tensor) else f"self.{i}")
        if fact.role is None or fact.role.kind not in ("state", "ema") or fact.dtype not in LOW or twin is None:
            continue
        if is_float(x) and x.numel() > 1:
            due = twin.exact != x.double()
            known, left = found.get(fact.role.kind, (0.0, 0.0))
            found[fact.role.kind] = known + float(due.sum()), left + float((due & (twin.actual == x)).sum())
    return found or None


PROBES: tuple[Probe, ...] = (stands_still,)


@rule("A6", "moments-in-16-bits")
def moments_stand_still(view: View) -> Iterator[Finding]:
    """Moments in 16 bits stop changing.

    Seen: an optimizer's 16-bit state is decayed in place, and at least half of the elements that should change stay as they
    are: 0.001 is below half a unit of bfloat16, 2^-9.
    Not reported: kernels that round once from FP32.
    Effect: v stops at about a third of g^2 and cannot fall again, so steps are too small after a large gradient.
    Fix: FP32 states, or stochastic rounding of the states.
    Source: NVIDIA-NeMo/Automodel#2248, Nerogar/OneTrainer#1005.
    """
    yield from _standing(view, "state", "A6", "moments-in-16-bits", "the state cannot decay", "keep moments in FP32")


@rule("A13", "ema-in-16-bits")
def average_stands_still(view: View) -> Iterator[Finding]:
    """An average of the weights is kept in 16 bits and stops changing.

    Seen: a 16-bit average is updated in place, and at least half of the elements that should change stay as they are.
    Effect: the average stays at the first weights.
    Fix: keep the average in FP32.
    Source: d8ahazard/sd_dreambooth_extension#1415.
    """
    yield from _standing(view, "ema", "A13", "ema-in-16-bits", "the average stays as it began", "keep the average in FP32")


@rule("A7", "step-counter-in-16-bits")
def counter_in_16_bits(view: View) -> Iterator[Finding]:
    """The optimizer counts its updates in 16 bits.

    Seen: an addition to a one-element state in float16 or bfloat16.
    Effect: the counter stops at 2048 (float16) or 256 (bfloat16), and Adam's bias correction with it: updates stay too small.
    Fix: count in FP32 or int64.
    Source: pytorch/ao#4915, deepspeedai/DeepSpeed#8496.
    """
    for operation in view.step.operations:
        if short(operation) not in ADDITIONS or "self" not in operation.arguments:
            continue
        for t in tensors_in(operation.arguments["self"]):
            if t.role is not None and t.role.kind == "state" and t.dtype in LOW and math.prod(t.shape) == 1:
                last = 256 if t.dtype == "bfloat16" else 2048
                number = f"the state '{t.role.key}' is a {t.dtype} counter: it stops at {last}"
                yield finding_at(view, operation, "A7", "step-counter-in-16-bits", "wrong", number=number,
                                 effect="bias correction stops there too", fix="count updates in FP32 or int64")  # fmt: skip
                return


@rule("A8", "parameters-without-optimizer")
def parameters_without_optimizer(view: View) -> Iterator[Finding]:
    """Parameters have gradients but belong to no optimizer.

    Seen: backward accumulates gradients for parameters that are in no group of the audited optimizers, and nothing writes to
    these parameters in the step.
    Not reported: frozen parameters; weights that are copies of masters, or that are written by hand.
    Effect: these parameters do not train.
    Fix: create the optimizer after wrapping the model, from the parameters that the model then has.
    Source: huggingface/accelerate#2665, #3256.
    """
    accumulated = {o.accumulates for o in view.step.operations if o.accumulates is not None}
    owned = {name for name, _ in copies_of_masters(view)} | _written(view.step, "parameter")
    without = {n: p for n, p in view.parameters.items() if n in accumulated and not p.groups and n not in owned}
    if without:
        elements = sum(math.prod(p.shape) for p in without.values())
        whole = sum(math.prod(p.shape) for p in view.parameters.values())
        part = f"{elements} elements, {elements / whole:.1%} of the model"
        number = f"{len(without)} parameters with {part}, have gradients but belong to no optimizer"
        first = next(o for o in view.step.operations if o.accumulates in without)
        fix = "create the optimizer from model.parameters() after wrapping"
        yield finding_at(view, first, "A8", "parameters-without-optimizer", "worse than it need be", number=number,
                         effect="they do not train", fix=fix)  # fmt: skip


@rule("A9", "gradients-not-zeroed", steps=2)
def stale_gradient_added(view: View) -> Iterator[Finding]:
    """Gradients of an earlier update are added to those of this one.

    Seen: every backward pass of the step adds to gradients that the previous step's update has read and that nothing has zeroed
    since.
    Not reported: accumulation before an update; gradients in buckets of DistributedDataParallel.
    Effect: the gradient is the sum of all steps so far: momentum without decay.
    Fix: `optimizer.zero_grad()` in each step.
    Source: PaddlePaddle/Paddle#67895.
    """
    before = next((s for s in view.earlier if s.number == view.step.number - 1), None)
    if before is None or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    updates = history_of(before).of("update")
    used = {name for event in updates for name in event.names}
    last = max((e.operation.index for e in updates if e.operation is not None), default=0)
    passes = sum(call.name == "backward" for call in view.step.calls)
    zeroed = _zeroed(before, after=last) | _zeroed(view.step)
    adds: dict[str, list[Operation]] = {}
    for o in view.step.operations:
        if o.accumulates is not None and short(o) in ("add_", "add"):
            adds.setdefault(o.accumulates, []).append(o)
    stale = [name for name, found in adds.items() if name in used - zeroed and len(found) >= passes > 0]
    if stale:
        number = f"the gradients of {len(stale)} parameters were added to those that the last update had used"
        yield finding_at(view, adds[stale[0]][0], "A9", "gradients-not-zeroed", "worse than it need be", number=number,
                         effect="the gradient is the sum of all steps so far", fix="call optimizer.zero_grad()")  # fmt: skip


@rule("A11", "t-advances-on-skip", steps=2)
def counter_advances_on_skip(view: View) -> Iterator[Finding]:
    """The optimizer's count of updates advances in a step that is skipped.

    Seen: found_inf is set, and the step counter is larger after the step.
    Effect: bias correction counts updates that were not made, so the first ones are too small.
    Fix: `scaler.step(optimizer)`, which leaves the counter unchanged; in your own loop, count updates, not steps.
    Source: PyTorch, `GradScaler.step`: a skipped step is not a step of the optimizer.
    """
    before, after = view.step.before, view.step.after
    history = history_of(view.step)
    if after is None or not history.found_inf or any(not update.value > 0 for update in history.of("update")):
        return
    pairs = zip(before.optimizers, after.optimizers, strict=False)
    moved = [(name, t) for old, new in pairs for name, t in new.updates.items() if t > old.updates.get(name, 0.0)]
    if moved:
        number = f"the step was skipped,but the counters of {len(moved)} parameters advanced to {max(t for _, t in moved):g}"
        first = view.step.operations[-1]
        yield finding_at(view, first, "A11", "t-advances-on-skip", "worse than it need be", number=number,
                         effect="bias correction is that of a later update", fix="count updates, not steps")  # fmt: skip


def _standing(view: View, kind: str, code: str, name: str, effect: str, fix: str) -> Iterator[Finding]:
    seen = [(o, o.probed["stands_still"][kind]) for o in view.step.operations if kind in o.probed.get("stands_still", ())]
    for operation, (due, left) in seen:
        if due and left >= STANDS * due:
            number = f"{left / due:.0%} of {due:.0f} elements that should change did not"
            yield finding_at(view, operation, code, name, "worse than it need be", number=number, effect=effect, fix=fix)
            return


def _written(step: Step, kind: str) -> set[str]:
    """Return the names of the parameters that have a tensor of a role written in a step."""
    return {t.role.name for o in step.operations for t in _targets(o) if t.role is not None and t.role.kind == kind}


def _zeroed(step: Step, after: int = -1) -> set[str]:
    zeros = [o for o in step.operations if o.index > after and short(o) in ("zero_", "_foreach_zero_", "fill_", "copy_")]
    return {t.role.name for o in zeros for t in _targets(o) if t.role is not None and t.role.kind == "gradient"}


def _targets(operation: Operation) -> Iterator[TensorFacts]:
    for name in operation.written:
        yield from tensors_in(operation.arguments[name])
