"""Rules D12, D13 and D19 to D22: casts too many, missing, or without a gradient, and sums over steps in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import COPIES, LOW, Flow, finding_at, flow_of, format_of_result, forward, is_any
from refimpl.parity.audit.step import Step, View
from refimpl.parity.audit.values import Values, is_float
from refimpl.parity.audit.verdict import ulp

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution")
"""What autocast computes in 16 bits, on every device."""
WORTH_SAYING = 0.01
"""A smaller share of a step's products is not worth a finding."""
STUCK = 0.1
"""Statistics of which fewer channels stand still follow the data well enough."""
BATCH_NORMS = tuple(f"aten.{n}." for n in ("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"))
FEW = 0.01
"""A share of elements that may be flushed to 0 without harm."""


# ------------------------------------------------------------------------------------------------- probes


class Recast(NamedTuple):
    """A cast between the 16-bit formats: how many elements it has, flushed to 0, made infinite, and changed otherwise."""

    elements: int
    flushed: int
    overflowed: int
    changed: int
    source: str
    target: str


def recast(values: Values) -> Recast | None:
    """Count what a cast from one 16-bit format to the other loses."""
    x, out = values.inputs.get("self"), values.output
    if not values.operation.name.startswith("aten._to_copy") or x is None or not (_low(x) and _low(out)):
        return None
    if x.dtype == out.dtype:
        return None
    flushed, overflowed = (out == 0) & (x != 0), out.isinf() & x.isfinite()
    changed = (out.double() != x.double()) & ~flushed & ~overflowed & ~x.isnan()
    zeros, infs, others = (int(c.count_nonzero()) for c in (flushed, overflowed, changed))
    return Recast(out.numel(), zeros, infs, others, name_of(x.dtype), name_of(out.dtype))


class Added(NamedTuple):
    """One 16-bit number that another was added to. spacing: that of the format at the sum."""

    before: float
    added: float
    after: float
    spacing: float


def added(values: Values) -> Added | None:
    """Measure a sum of two numbers in 16 bits, as of a running loss, outside of backward and the optimizer."""
    operation, out = values.operation, values.output
    if operation.phase not in ("forward", "other") or not operation.name.startswith(("aten.add.Tensor", "aten.add_.Tensor")):
        return None
    a, b = values.inputs["self"], values.inputs["other"]
    if not _low(out) or out.numel() != 1 or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    after = out.double().reshape(())
    return Added(float(a), float(b) * float(values.inputs.get("alpha", 1)), float(after), float(ulp(after, out.dtype)))


class Running(NamedTuple):
    """Running statistics of a batch norm in 16 bits. stuck: how many channels' did not move though they should have."""

    channels: int
    stuck: int
    dtype: str
    momentum: float


def running(values: Values) -> Running | None:
    """Count the running means of a batch norm in 16 bits that stand still."""
    if not values.operation.name.startswith(BATCH_NORMS):
        return None
    after, inputs = values.written.get("running_mean"), values.inputs
    if not _low(after) or not isinstance(after, Tensor):
        return None
    before, x = inputs["running_mean"].double(), inputs["input"].double()
    momentum = float(inputs.get("momentum", inputs.get("exponential_average_factor", 0.1)))
    mean = x.transpose(0, 1).flatten(1).mean(1)
    stuck = (after.double() == before) & (momentum * (mean - before) != 0)
    return Running(after.numel(), int(stuck.count_nonzero()), name_of(after.dtype), momentum)


def _low(value: object) -> bool:
    return is_float(value) and isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


PROBES: tuple[Probe, ...] = (recast, added, running)


# ------------------------------------------------------------------------------------------------- casts


@rule("D12", "cast-twice")
def cast_twice(view: View) -> Iterator[Finding]:
    """A tensor is cast to one 16-bit format and from there to the other, and is left with FP16's range and BF16's precision.

    Seen: casts between FP16 and BF16.
    Number: elements that were flushed to 0, became infinite, or were rounded again.
    Not reported: results in one format that are used in the other without overflow, as in nested autocast regions (a note).
    Effect: BF16's 8 bits in FP16's range: numbers below 2^-25 become 0, and those above 65504 Inf.
    Fix: cast once, from FP32; or use one of the formats throughout.
    Source: refimpl's known mistake of this name; PyTorch's autocast recipe names one format per region.
    """
    flow = flow_of(view.step)
    for o in forward(view):
        lost: Recast | None = o.probed.get("recast")
        if lost is None:
            continue
        maker = flow.source(o, "self")
        from_fp32 = maker is not None and is_any(maker, ("aten._to_copy",)) and _dtype(maker, "self") == "float32"
        serious = from_fp32 or lost.overflowed or lost.flushed > FEW * lost.elements
        twice = f"from float32 to {lost.source} to {lost.target}" if from_fp32 else f"from {lost.source} to {lost.target}"
        yield finding_at(
            view, o, "D12", cast_twice.name, "worse than it need be" if serious else "note",
            number=f"cast {twice}: of {lost.elements:,} elements {lost.flushed:,} become 0, {lost.overflowed:,} Inf, and"
            f" {lost.changed:,} are rounded again",
            effect="the numbers have only BF16's precision and only FP16's range",
            fix="cast once, from float32, or use one 16-bit format throughout",
        )  # fmt: skip


@rule("D13", "missing-cast")
def missing_cast(view: View) -> Iterator[Finding]:
    """Products run in FP32 although autocast is on.

    Seen: a matrix product or convolution with FP32 operands and a gradient, between entering and leaving autocast.
    Number: the share of these products in the multiplications that the step's autocast regions do in forward.
    Not reported: regions with autocast(enabled=False), as around rotary angles; FP64; products of activations that were cast up
    first, as in attention where PyTorch computes it from its parts; products inside an operation that autocast's lists keep.
    Effect: results are more exact than the recipe's, but slower, and kernels, memory and gradients are not those that were
    intended.
    Fix: report it to the authors of the operation that ignores autocast, or cast its inputs.
    Source: Lightning-AI/lightning-thunder#725 (autocast not applied to some functions).
    """
    flow = flow_of(view.step)
    products = [o for o in forward(view) if is_any(o, PRODUCTS) and _autocast(view.step, o.index)]
    missed = [o for o in products if o.sequence is not None and set(_formats(o)) == {"float32"} and not _widened(flow, o)]
    total, part = sum(map(multiplications, products)), sum(map(multiplications, missed))
    if not missed or part <= WORTH_SAYING * total:
        return
    for o in missed:
        yield finding_at(
            view, o, "D13", missing_cast.name, "worse than it need be",
            number=f"{part / total:.0%} of the multiplications in autocast's regions are of float32 numbers ({len(missed)} of"
            f" {len(products)} products)",
            effect="they are slower, and not in the requested precision",
            fix="cast the operands, or find out why autocast does not reach this operation (a scripted or compiled function?)",
        )  # fmt: skip


def _autocast(step: Step, index: int) -> str:
    """Return the format of the autocast region that an operation runs in, '' outside."""
    entered = [call.autocast for call in step.calls if call.name == "autocast" and call.index <= index]
    return entered[-1] if entered else ""


def _widened(flow: Flow, operation: Operation) -> bool:
    """Return whether an operand was cast up from 16 bits, and none is a parameter: as PyTorch does in attention."""
    if any(t.role is not None and t.role.kind == "parameter" for t in tensors_in(operation.arguments)):
        return False
    through = (*COPIES, "aten.mul", "aten.div")
    sources = (flow.source(operation, name, through) for name in operation.arguments)
    return any(o is not None and is_any(o, ("aten._to_copy",)) and _dtype(o, "self") in LOW for o in sources)


def _formats(operation: Operation) -> list[str]:
    return [t.dtype for t in tensors_in(operation.arguments)]


def multiplications(operation: Operation) -> int:
    """Return how many products of two numbers a matrix product or convolution computes."""
    tensors = list(tensors_in(operation.arguments))
    out = math.prod(next(tensors_in(operation.outputs)).shape)
    if is_any(operation, ("aten.convolution",)):
        return out * math.prod(tensors[1].shape[1:])
    return out * tensors[-1].shape[-2]


def _dtype(operation: Operation, name: str) -> str:
    tensor = operation.arguments.get(name)
    return tensor.dtype if isinstance(tensor, TensorFacts) else ""


@rule("D19", "cast-without-gradient")
def cast_without_gradient(view: View) -> Iterator[Finding]:
    """A weight's 16-bit copy is made where gradients are off and used where they are on, so the weight gets no gradient.

    Seen: a trainable parameter whose cast was not recorded for backward and whose copy is read first without gradients and
    later with them, in a step whose backward adds to no gradient of that parameter.
    Number: how many parameters.
    Not reported: frozen parameters; copies that are only used without gradients; parameters that get a gradient in another way.
    Effect: these weights do not learn, and no error says so.
    Fix: torch.clear_autocast_cache() after the part under no_grad, autocast(cache_enabled=False), or a separate region for each
    part.
    Source: pytorch/pytorch#65766, #105211, #112583, #158232 (fixed in #165068 for autocast's own cache).
    """
    flow = flow_of(view.step)
    learning = {o.accumulates for o in view.step.operations}
    if learning == {None}:
        return
    cut: dict[str, Operation] = {}
    for o in forward(view):
        role = next((t.role for t in tensors_in(o.arguments)), None)
        if not is_any(o, ("aten._to_copy",)) or o.sequence is not None or role is None or role.kind != "parameter":
            continue
        facts = view.parameters.get(role.name)
        if format_of_result(o) not in LOW or facts is None or not facts.requires_grad or role.name in learning:
            continue
        readers = sorted((r for r in flow.readers(o) if is_any(r, PRODUCTS)), key=lambda r: r.index)
        if readers and readers[0].sequence is None and any(r.sequence is not None for r in readers[1:]):
            cut.setdefault(role.name, o)
    for name, o in cut.items():
        yield finding_at(
            view, o, "D19", cast_without_gradient.name, "wrong",
            number=f"{len(cut)} parameters get no gradient, {name} first: their 16-bit copies were made under no_grad and used"
            " again with gradients on",
            effect="these weights do not learn", fix="torch.clear_autocast_cache() after the part under no_grad, or"
            " autocast(cache_enabled=False)",
        )  # fmt: skip


@rule("D20", "backward-in-another-format")
def backward_in_another_format(view: View) -> Iterator[Finding]:
    """A custom autograd.Function multiplies in other formats in backward than in forward.

    Seen: matrix products under a node of the user's own whose operands have other formats than those of its forward pass.
    Number: both formats.
    Not reported: PyTorch's own nodes; functions without products in forward or backward; 16-bit products with FP32 results.
    Effect: autocast casts what `forward` computes but nothing in `backward`: gradients are those of another function, or
    slower.
    Fix: @torch.amp.custom_fwd(device_type=...) on forward and @torch.amp.custom_bwd(device_type=...) on backward.
    Source: PyTorch's torch.amp documentation, 'Functions with multiple inputs or autocastable ops'.
    """
    ahead = _products_by_node(view)
    for o in view.step.operations:
        if o.phase != "backward" or not is_any(o, PRODUCTS) or o.sequence not in ahead or not _is_users(o.node):
            continue
        before, now = ahead[o.sequence], _widest(o)
        if now not in before:
            yield finding_at(
                view, o, "D20", backward_in_another_format.name, "worse than it need be",
                number=f"{o.node} multiplies {now} numbers, and {' and '.join(sorted(before))} ones in its forward pass",
                effect="autocast casts what forward computes and nothing in backward: its gradients have another precision",
                fix="torch.amp.custom_fwd on its forward and torch.amp.custom_bwd on its backward",
            )  # fmt: skip
            return


def _products_by_node(view: View) -> dict[int | None, set[str]]:
    """Return the formats of the forward pass's products by the node that they are part of, those inside of it included.

    Inside of an autograd.Function no operation makes a node: those in the same file that follow the node's first are its own.
    """
    formats: dict[int | None, set[str]] = {}
    first: Operation | None = None
    for o in forward(view):
        first = o if o.sequence is not None else first
        if first is not None and is_any(o, PRODUCTS) and (o.module, _file(o)) == (first.module, _file(first)):
            formats.setdefault(first.sequence, set()).add(_widest(o))
    return formats


def _file(operation: Operation) -> str:
    return operation.code_line.rpartition(":")[0]


def _is_users(node: str | None) -> bool:
    """Return whether a node is of a class in Python: PyTorch's own end in a digit, or are in a namespace."""
    return node is not None and "::" not in node and node.endswith("Backward") and node != "CheckpointFunctionBackward"


def _widest(operation: Operation) -> str:
    return "float32" if "float32" in _formats(operation) else _formats(operation)[0]


# ------------------------------------------------------------------------------------------------- sums that go on


@rule("D21", "running-sum-in-16-bits", steps=2)
def running_sum_in_16_bits(view: View) -> Iterator[Finding]:
    """A number that accumulates over the steps, such as a running loss, is summed in 16 bits.

    Seen: a 16-bit number that enters an addition with the value that the same line left in the previous audited step.
    Number: what was added, and by how much the sum changed.
    Not reported: a sum that starts anew in each step; sums in FP32; numbers to which nothing is added.
    Effect: once the sum is 256 (BF16) or 2048 (FP16) times what is added, it no longer changes.
    Fix: add loss.item() to a Python number, or use an FP32 tensor.
    Source: PyTorch's own optimizers keep such counters in FP32 (pytorch/ao#4915 is one that did not).
    """
    if not view.earlier or view.earlier[-1].number != view.step.number - 1:
        return
    left = {o.line: o.probed["added"] for o in view.earlier[-1].operations if "added" in o.probed}
    for o in view.step.operations:
        now: Added | None = o.probed.get("added")
        then: Added | None = left.get(o.line)
        if now is not None and then is not None and now.before == then.after and then.added and now.added:
            yield finding_at(
                view, o, "D21", running_sum_in_16_bits.name, "worse than it need be",
                number=f"adding {now.added:.6g} to {now.before:.6g} changes it by {now.after - now.before:.6g};"
                f" {format_of_result(o)} has steps of {now.spacing:.3g} there",
                effect="the sum is off, and stops growing in the end", fix="sum loss.item(), or use a float32 tensor",
            )  # fmt: skip


@rule("D22", "batch-norm-statistics-in-16-bits")
def statistics_in_16_bits(view: View) -> Iterator[Finding]:
    """The running statistics of a batch norm are kept in 16 bits, in which small changes are lost.

    Seen: a batch norm that writes 16-bit running means.
    Number: channels whose running mean did not change although it should.
    Not reported: statistics of which less than a tenth did not change (a note), as in the first steps, which are large.
    Effect: with momentum 0.1 a running mean stops 5 spacings away from the data's, in BF16 up to 4 %: evaluation is off.
    Fix: keep batch norm in FP32: model.to(torch.bfloat16), then norm.float().
    Source: Micikevicius et al. 2018 (https://arxiv.org/abs/1710.03740), section 3.3; apex's keep_batchnorm_fp32.
    """
    for o in forward(view):
        moved: Running | None = o.probed.get("running")
        if moved is not None:
            yield finding_at(
                view, o, "D22", statistics_in_16_bits.name,
                "worse than it need be" if moved.stuck >= STUCK * moved.channels else "note",
                number=f"running means are in {moved.dtype}: {moved.stuck:,} of {moved.channels:,} did not move, at momentum"
                f" {moved.momentum:g}",
                effect="running statistics stop short of the data's, and evaluation uses them",
                fix="keep batch norm in float32: norm.float() after model.to()",
            )  # fmt: skip
