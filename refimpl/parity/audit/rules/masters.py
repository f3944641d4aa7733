"""Rules A1 to A3 and A14: updates that leave the weights as they were."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, TensorFacts
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import LOW, finding_at
from refimpl.parity.audit.rules.update_probes import Samples, Written, made_in, sampled, samples, written
from refimpl.parity.audit.step import Border, View

FEW = 0.01
"""Weights without masters of which fewer than this stand still are a note."""
MOST = 0.5
"""A decay that leaves at least this share of the weights as they were is lost."""
TO_NEAREST = 0.9
"""Updates of which fewer results than this are the correctly rounded ones round otherwise, as at random."""
FEWEST = 4
"""A compensation must have caught this many losses before it is taken for one."""
MATCHING = 0.75
"""The share of the losses that a compensation holds, at least."""
BITS = {"bfloat16": 8, "float16": 11}

PROBES: tuple[Probe, ...] = (written, samples)


@rule("A1", "no-masters")
def no_masters(view: View) -> Iterator[Finding]:
    """16-bit weights are updated in place, without masters that would keep what rounding loses.

    Seen: an operation that writes 16-bit parameters and leaves unchanged some elements that the same update in FP64 changes. It
    is a note if fewer than 1 % of them stay unchanged.
    Not reported: copies of FP32 masters that are older than the step; stochastic rounding, whose results are not always the
    nearest values; a compensation (Kahan summation) or a 16-bit remainder that holds what was lost; a decay by a factor (A3).
    Effect: an update below half a unit in the last place, 2^-9 to 2^-8 of a bfloat16 weight, is lost every time: as the
    learning rate falls, learning slows down and stops.
    Fix: keep the weights in FP32 and use autocast, or FP32 masters, stochastic rounding, or Kahan summation.
    Source: pytorch/torchtune#2254, pytorch/pytorch#120376, pytorch/ao#1124.
    """
    rounded = [(o, w) for o, w in _weights(view) if _rounds_to_nearest(view, w)]
    found = [(o, w) for o, w in rounded if not _is_kept(view, o, w)]
    due, left = sum(w.due for _, w in found), sum(w.left for _, w in found)
    # An optimizer that keeps what most weights lose does so for the small ones too, that show too few losses to tell.
    if not left or 2 * due <= sum(w.due for _, w in rounded):
        return
    worst, first = max(found, key=lambda pair: pair[1].left / pair[1].due)
    names = tuple(dict.fromkeys(w.facts.role.name for _, w in found if w.facts.role is not None))
    number = f"{share(left, due)} of {due} {first.facts.dtype} weights did not move although the FP64 update is not 0"
    found_here = finding_at(
        view, worst, "A1", "no-masters", "worse than it need be" if left > FEW * due else "note", number=number,
        effect="updates below half a unit in the last place of the weight are lost in every step",
        fix="keep FP32 weights and use torch.autocast, or FP32 masters, stochastic rounding, or Kahan summation",
    )  # fmt: skip
    yield replace(found_here, parameters=names)


@rule("A2", "stale-weights", steps=2)
def stale_weights(view: View) -> Iterator[Finding]:
    """The masters are updated, but the weights that the model computes with are not copied from them.

    Seen: FP32 tensors of an optimizer of which 16-bit weights of the model were rounded copies: the tensors change in two
    steps, and no bit of the weights does.
    Not reported: skipped steps, weights that are copied at the start of the next step, and masters that have not yet moved by
    half a unit of the weights.
    Effect: the model does not train; the loss stays where it began.
    Fix: copy the masters to the weights after each update: `torch._foreach_copy_(weights, masters)`.
    Source: NVIDIA/apex, amp O2, `_master_params_to_model_params`.
    """
    last = view.earlier[-1] if view.earlier else None
    if last is None or last.number != view.step.number - 1 or view.step.after is None:
        return
    borders = (last.before, view.step.before, view.step.after)
    stale = [pair for pair, trivial in copies_of_masters(view).items() if not trivial and _is_stale(pair, borders)]
    if stale:
        after = view.step.after.masters
        off, elements = (sum(getattr(after[n], key) for n in stale) for key in ("off", "elements"))
        ulps, before = max(after[n].ulps for n in stale), max(view.step.before.masters[n].ulps for n in stale)
        where = next((o for o in reversed(view.step.operations) if o.phase == "step"), view.step.operations[-1])
        number = f"{len(stale)} weights did not change in two steps while their FP32 masters did: {share(off, elements)} of "
        number += (
            f"{elements} are not the rounded masters, by up to {ulps:.3g} units in the last place ({before:.3g} before)"
        )
        found = finding_at(
            view, where, "A2", "stale-weights", "wrong", number=number, effect="the model computes with its first weights",
            fix="copy the masters to the weights after optimizer.step()",
        )  # fmt: skip
        yield replace(found, parameters=tuple(name for name, _ in stale))


@rule("A3", "decay-lost-in-16-bits")
def decay_lost(view: View) -> Iterator[Finding]:
    """Weight decay multiplies 16-bit weights by a factor so near to 1 that rounding undoes it.

    Seen: a separate operation multiplies 16-bit parameters by a number just below 1, and at least half of the elements that
    should change stay as they are.
    Not reported: decay inside a fused update, which rounds once.
    Effect: there is no weight decay: 1 - lr x decay differs from 1 by less than half a unit in the last place, 2^-9 for
    bfloat16.
    Fix: decay FP32 masters, or decay in FP32 within the update.
    Source: Nerogar/OneTrainer#996.
    """
    decays = [(o, w) for o, w in _weights(view, decays=True) if 0.5 < w.factor < 1 and w.due]
    lost = [(o, w) for o, w in decays if w.left >= MOST * w.due]
    if lost:
        due, left = sum(w.due for _, w in lost), sum(w.left for _, w in lost)
        first, w = lost[0]
        number = f"the decay by 1 - {1 - w.factor:.3g} left {share(left, due)} of {due} {w.facts.dtype} weights as they were; "
        number += f"a factor moves them from 1 - 2^-{BITS[w.facts.dtype] + 1} downwards"
        names = tuple(dict.fromkeys(w.facts.role.name for _, w in lost if w.facts.role is not None))
        found = finding_at(
            view, first, "A3", "decay-lost-in-16-bits", "worse than it need be", number=number,
            effect="there is no weight decay", fix="decay FP32 masters, or decay in FP32 within the update",
        )  # fmt: skip
        yield replace(found, parameters=names)


@rule("A14", "update-void")
def update_void(view: View) -> Iterator[Finding]:
    """An operation of the update ran but changed nothing.

    Seen: an FP32 parameter or state of which no element has changed, although FP64 changes some by more than a unit in the last
    place.
    Not reported: a fused update that found_inf tells to do nothing.
    Effect: the parameter does not train, or its state never changes, although the gradients are right.
    Fix: report it to the authors of the kernel; until it is fixed, make the tensor contiguous or use another implementation
    (`foreach=False`, `fused=False`).
    Source: OrderLab/TrainCheck (addcmul_ and addcdiv_ on non-contiguous tensors, MPS); pytorch/pytorch#115607.
    """
    for operation in view.step.operations:
        for w in operation.probed.get("written", ()):
            role = w.facts.role
            if w.facts.dtype == "float32" and role is not None and w.beyond and w.left == w.due:
                what = role.name if role.kind == "parameter" else f"{role.key} of {role.name}"
                number = f"{operation.name} left all {w.elements} elements of {what} as they were; FP64 changes {w.beyond}"
                yield finding_at(
                    view, operation, "A14", "update-void", "wrong", number=number, effect="this tensor is not trained",
                    fix="make it contiguous, or use foreach=False or fused=False; report the kernel",
                )  # fmt: skip


def _weights(view: View, decays: bool = False) -> Iterator[tuple[Operation, Written]]:
    """Yield what is written to 16-bit parameters: multiplications by a number, or all else."""
    for operation in view.step.operations:
        for w in operation.probed.get("written", ()):
            role = w.facts.role
            if role is not None and role.kind == "parameter" and w.facts.dtype in LOW and math.isnan(w.factor) != decays:
                yield operation, w


def _rounds_to_nearest(view: View, w: Written) -> bool:
    """Return whether an update rounds results of FP32 to nearest, into weights that have no masters."""
    if w.source is None:
        return w.due > 0 and w.nearest >= TO_NEAREST
    # A copy: of masters, unless its source was made in this step. Masters are made in an optimizer's first step.
    temporary = w.source.storage in made_in(view.step) and bool(view.earlier)
    return w.due > 0 and w.source.dtype not in LOW and temporary


def _is_kept(view: View, operation: Operation, w: Written) -> bool:
    """Return whether a tensor of the weights' shape holds what was lost: a compensation, or the low bits of masters."""
    lost = torch.tensor(w.rest, dtype=torch.float64)
    some = lost != 0
    losses = int(some.count_nonzero())
    if losses < FEWEST:
        return False
    now = torch.tensor(_after(operation, w), dtype=torch.float64)
    for fact, elements in _kept_of(view, operation, w):
        held = torch.tensor(elements, dtype=torch.float64)
        if fact.dtype == "int16":
            low = (now + lost).float().view(torch.int32) - now.float().view(torch.int32)
            if torch.equal(low, held.to(torch.int32)):
                return True
        # A compensation in 16 bits has been rounded once or twice, and is another where the update is larger than the weight.
        matches = [int(((sign * held - lost).abs() <= 2.0**-7 * lost.abs())[some].count_nonzero()) for sign in (1, -1)]
        if max(matches) >= MATCHING * losses:
            return True
    return False


def _kept_of(view: View, operation: Operation, w: Written) -> Iterator[tuple[TensorFacts, tuple[float, ...]]]:
    """Yield the tensors of a weight's shape that are written with or after it and outlive the step, as they are left."""
    last = {}
    for index, fact, elements in sampled(view.step).get(w.facts.shape, ()):
        if index >= operation.index and len(elements) == len(w.rest):
            last[fact.storage, fact.offset] = (fact, elements)
    made = made_in(view.step) if view.earlier else frozenset()
    for fact, elements in last.values():
        if fact.storage not in made or (fact.role is not None and fact.role.kind == "state"):
            yield fact, elements


def _after(operation: Operation, w: Written) -> tuple[float, ...]:
    elements: Samples | None = operation.probed.get("samples")
    return elements.after.get(w.result, w.rest) if elements is not None else w.rest


def copies_of_masters(view: View) -> dict[tuple[str, str], bool]:
    """Return the weights and masters of which the weights were once the rounded copies, and whether both were only ever 0."""
    found: dict[tuple[str, str], bool] = {}
    for border in view.borders.values():
        for pair, m in border.masters.items():
            if not m.off:
                found[pair] = m.trivial and found.get(pair, True)
    return found


def _is_stale(pair: tuple[str, str], borders: tuple[Border, ...]) -> bool:
    """Return whether masters moved in every step, and weights did not, though at the last border but one they should have."""
    facts = [border.masters.get(pair) for border in borders]
    known = [m for m in facts if m is not None]
    if len(known) < len(facts):
        return False
    moved = all(a.master_bits != b.master_bits for a, b in pairwise(known))
    return moved and len({m.weight_bits for m in known}) == 1 and known[-2].off > 0 and known[-1].off > 0


def share(part: int, whole: int) -> str:
    """Return a share in percent, all of them only if they are."""
    percent = 100 * part / max(whole, 1)
    return f"{percent:.3g} %" if part in (0, whole) or 0.05 <= percent < 99.95 else f"{percent:.4f} %"
