"""Rules C: sums of gradients, over micro-batches, uses of a weight, and ranks."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from refimpl.parity.audit.factors import Event, history_of, short
from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.judge.again import in_fp64, is_16_bit
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import LOW, finding_at, flow_of, format_of_result
from refimpl.parity.audit.step import Step, View
from refimpl.parity.audit.values import Values, is_float

MEAN_LOSSES = ("nll_loss_forward", "nll_loss2d_forward", "mse_loss", "binary_cross_entropy", "smooth_l1_loss", "huber_loss")
SCATTERS = ("index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "scatter_add", "scatter_add_")
REDUCTIONS = ("c10d.allreduce_", "c10d._reduce_scatter_base_", "c10d.reduce_scatter_", "_c10d_functional.all_reduce",
              "_c10d_functional.reduce_scatter_tensor", "c10d.reduce_")  # fmt: skip
MANY_RANKS = 8
UNEQUAL = 1.05
LARGEST_COUNT = 2.0**24
"""What is larger is not a count: masks are sums of whole numbers too."""
ACCUMULATE = "torch::autograd::AccumulateGrad"


# ------------------------------------------------------------------------------------------------- probes


def gradient_sum(values: Values) -> dict[str, float] | None:
    """Measure a 16-bit sum of gradients: addends that are not 0, and those of them that changed nothing; the relative error."""
    operation = values.operation
    if operation.phase != "backward" or short(operation) not in ("add", "add_"):
        return None
    given = values.inputs
    x: Any = given.get("self")
    y: Any = given.get("other")
    both = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
    if not (both and is_float(values.output) and is_16_bit(values.output)):
        return None
    due = y != 0
    exact = x.double() + y.double()
    error = (values.output.double() - exact).square().sum().sqrt()
    size = exact.square().sum().sqrt()
    lost = int((due & (values.output == x)).sum())
    return {"due": float(due.sum()), "lost": float(lost), "error": float(error / size) if float(size) else 0.0}


def tokens(values: Values) -> float | None:
    """Measure by how many targets, or their weight, a mean cross-entropy divides."""
    if short(values.operation) not in ("nll_loss_forward", "nll_loss2d_forward") or values.inputs.get("reduction") != 1:
        return None
    return float(values.output[1])


def indexed_sum(values: Values) -> dict[str, float] | None:
    """Measure a 16-bit sum at repeated indices: results, those not correctly rounded, and the largest relative error."""
    name = short(values.operation)
    accumulates = name in SCATTERS and (not name.strip("_").endswith(("put", "impl")) or bool(values.inputs.get("accumulate")))
    if not (accumulates or name == "embedding_dense_backward"):
        return None
    result, actual = next(iter(values.results()))
    if not (is_float(actual) and is_16_bit(actual)):
        return None
    exact = in_fp64(values)[result]
    changed = exact != 0
    wrong = changed & (exact.to(actual.dtype) != actual)
    error = ((actual.double() - exact).abs() / exact.abs())[changed]
    return {"of": float(changed.sum()), "wrong": float(wrong.sum()), "error": float(error.max()) if error.numel() else 0.0}


def divided(values: Values) -> dict[str, float] | None:
    """Measure an FP16 division outside the forward pass: numbers that are not 0, and those that became 0."""
    if values.operation.phase == "forward" or short(values.operation) not in ("div", "div_"):
        return None
    result = next((x for _, x in values.results()), None)
    if result is None or result.dtype != torch.float16 or result.numel() < 2:
        return None
    due = values.inputs.get("self", result) != 0
    return {"due": float(due.sum()), "lost": float((due & (result == 0)).sum())}


def counted(values: Values) -> dict[str, float] | None:
    """Measure a 16-bit sum of whole numbers: one that it got wrong, and what it should be."""
    if values.operation.phase == "backward" or short(values.operation) not in ("add", "add_"):
        return None
    x: Any = values.inputs.get("self")
    y: Any = values.inputs.get("other")
    result = next((r for _, r in values.results()), None)
    if not (is_float(x) and is_16_bit(x) and result is not None and result.dtype == x.dtype and result.numel()):
        return None
    largest = 2 / torch.finfo(x.dtype).eps
    exact = x.double() + (y.double() if isinstance(y, Tensor) else float(y or 0)) * float(values.inputs.get("alpha", 1))
    whole = bool((x == x.trunc()).all()) and bool((exact == exact.trunc()).all())
    if not (largest < float(exact.abs().max()) <= LARGEST_COUNT and whole and bool(result.isfinite().all())):
        return None
    wrong = (result.double() - exact).abs()
    at = int(wrong.argmax())
    return {"exact": float(exact.flatten()[at]), "stored": float(result.flatten()[at])} if float(wrong.max()) else None


PROBES: tuple[Probe, ...] = (gradient_sum, tokens, indexed_sum, divided, counted)


# ------------------------------------------------------------------------------------------------- micro-batches


@rule("C1", "loss-not-averaged", steps=2)
def loss_not_divided(view: View) -> Iterator[Finding]:
    """The mean losses of micro-batches are summed, not averaged.

    Seen: several backward passes from one line before an update, each from an undivided mean loss, into the same gradients. A
    clip coefficient near 1/n does not count as a division by n; a factor that the loop computes from a norm itself counts only
    if it is 1/n to the last bits, since it may combine both.
    Not reported: losses that are divided inside; sums over tokens; gradients that are divided afterwards, or zeroed or used in
    an update in between; losses of several lines, as in a GAN.
    Effect: the gradient is n times that of the mean: the clipping threshold is n times too small, and SGD's learning rate n
    times too large.
    Fix: `(loss / n).backward()`.
    Source: huggingface/transformers#35438, karpathy/nanoGPT#206.
    """
    history, calls = history_of(view.step), _backward_calls(view.step)
    n = len(calls)
    if n < 2 or len({call.line for call in calls}) > 1 or len(history.seeds) != n or not _means(view.step):
        return
    undivided = [seed and math.isclose(seed[-1], history.scale, rel_tol=1e-5) for seed in history.seeds]
    after = any(_divides(event, n, history.scale) for event in history.of("multiply"))
    if all(undivided) and not after and _accumulated(view.step) and not _begun_again(view.step):
        number = f"{n} backward passes of undivided mean losses went into one update: the gradient is {n} times their mean's"
        effect = f"clipping is {n} times too strict, and SGD's learning rate {n} times too large"
        first = next(o for o in view.step.operations if o.index >= calls[0].index)
        found = finding_at(view, first, "C1", "loss-not-averaged", "worse than it need be", number=number, effect=effect,
                           fix="divide the loss by the number of micro-batches before backward")  # fmt: skip
        yield _at_line(found, calls[0].line)


@rule("C2", "mean-of-means", steps=2)
def mean_of_means(view: View) -> Iterator[Finding]:
    """Means over micro-batches with different numbers of targets are averaged with equal weights.

    Seen: the backward passes of one update start, with equal weights, from mean cross-entropies over different numbers of
    targets.
    Not reported: numbers within 5 % of each other. If a mean per sequence is intended, ignore the finding.
    Effect: targets of short micro-batches count more than others.
    Fix: sum the losses and divide by the number of all targets of the step.
    Source: huggingface/transformers#34191 (num_items_in_batch).
    """
    calls = _backward_calls(view.step)
    forward = [o for o in view.step.operations if o.phase == "forward" and not o.recomputed]
    counts = [o.probed["tokens"] for o in forward if "tokens" in o.probed]
    if len(calls) < 2 or len(counts) != len(calls) or len({call.line for call in calls}) > 1 or min(counts) <= 0:
        return
    weights = [seed[-1] for seed in history_of(view.step).seeds if seed]
    if len(weights) == len(counts) and max(counts) > UNEQUAL * min(counts) and max(weights) <= 1.001 * min(weights):
        number = f"micro-batches of {min(counts):g} to {max(counts):g} targets have the same weight"
        effect = f"a target of the shortest counts {max(counts) / min(counts):.3g} times one of the longest"
        where = next(o for o in view.step.operations if "tokens" in o.probed)
        yield finding_at(view, where, "C2", "mean-of-means", "worse than it need be", number=number, effect=effect,
                         fix="use reduction='sum' and divide by the number of targets of the whole step")  # fmt: skip


@rule("C3", "accumulate-in-16-bits", steps=2)
def accumulated_in_16_bits(view: View) -> Iterator[Finding]:
    """Gradients of micro-batches are added in 16 bits.

    Seen: AccumulateGrad adds to a 16-bit gradient. With two micro-batches the error is a single rounding, which is a note.
    Effect: contributions below half a unit of the sum are lost, and more of them with every micro-batch.
    Fix: accumulate in FP32: FP32 parameters under autocast, or FP32 main gradients.
    Source: deepspeedai/DeepSpeed, 'BF16 gradient accumulation is not safe numerically'; pytorch/pytorch#106395.
    """
    adds = [o for o in view.step.operations if o.accumulates is not None and "gradient_sum" in o.probed]
    if not adds:
        return
    n = 1 + max(sum(o.accumulates == name for o in adds) for name in {o.accumulates for o in adds})
    lost, due = sum(o.probed["gradient_sum"]["lost"] for o in adds), sum(o.probed["gradient_sum"]["due"] for o in adds)
    share = f"{lost / max(due, 1):.1%} of {due:.0f} addends changed nothing"
    number = f"{n} micro-batches are added in {format_of_result(adds[0])}: {share}"
    yield finding_at(view, adds[0], "C3", "accumulate-in-16-bits", "note" if n <= 2 else "worse than it need be", number=number,
                     effect="small contributions are lost", fix="accumulate gradients in FP32")  # fmt: skip


# ------------------------------------------------------------------------------------------------- uses of a weight


@rule("C4", "shared-weight-in-16-bits")
def shared_weight_in_16_bits(view: View) -> Iterator[Finding]:
    """A weight is used several times, and its gradients are added in 16 bits.

    Seen: an addition in backward whose 16-bit result has a parameter's shape and goes on to that parameter's AccumulateGrad. It
    is a note for two uses in a backward pass, and for a 16-bit weight, such as a recurrent one, whose gradient has 16 bits
    however it is added.
    Not reported: residual connections.
    Effect: the sum over n uses has n - 1 roundings to 16 bits; with an FP32 leaf it would have none.
    Fix: `torch.autocast(..., cache_enabled=False)`, or use the FP32 weight in each place.
    Source: PyTorch, torch.amp (the cache of weight casts).
    """
    flow, uses = flow_of(view.step), dict[str, list[Operation]]()
    passes = [call.index for call in _backward_calls(view.step)]
    for operation in view.step.operations:
        if "gradient_sum" in operation.probed and operation.accumulates is None:
            for name in _reaches(flow, operation):
                uses.setdefault(name, []).append(operation)
    for name, adds in uses.items():
        error = max(o.probed["gradient_sum"]["error"] for o in adds)
        each = max(Counter(bisect_right(passes, o.index) for o in adds).values())
        number = f"{each + 1} uses of {name} are added in {format_of_result(adds[0])}; relative error {error:.2g}"
        in_16_bits = name in view.parameters and view.parameters[name].dtype in LOW
        level = "note" if each == 1 or in_16_bits else "worse than it need be"
        yield finding_at(view, adds[0], "C4", "shared-weight-in-16-bits", level, number=number,
                         effect="the gradient of a shared weight is rounded once per use",
                         fix="turn autocast's cache off: torch.autocast(..., cache_enabled=False)")  # fmt: skip


@rule("C6", "embedding-gradient-in-16-bits")
def embedding_gradient_in_16_bits(view: View) -> Iterator[Finding]:
    """The gradient of an embedding is summed over equal tokens in 16 bits.

    Seen: results of its backward that are not the correctly rounded sums. PyTorch's CPU kernel does this, which is a note.
    Effect: gradients of frequent tokens are too small: in bfloat16 a sum stops growing at 256 equal addends.
    Fix: keep the embedding in FP32.
    Source: tenstorrent/tt-metal#53386.
    """
    names, fix = ("embedding_dense_backward",), "keep the embedding in FP32"
    yield from _scattered(view, names, "C6", "embedding-gradient-in-16-bits", "note", fix)


@rule("C7", "scatter-in-16-bits")
def scatter_in_16_bits(view: View) -> Iterator[Finding]:
    """Values are added at repeated indices in 16 bits.

    Seen: index_add, scatter_add or index_put with accumulate whose 16-bit results are not the correctly rounded sums.
    Not reported: unique indices, where nothing is added twice.
    Effect: sums of many addends stop growing.
    Fix: an FP32 buffer that is rounded once.
    Source: pytorch/pytorch#198199.
    """
    fix = "add into an FP32 tensor, and cast it once"
    yield from _scattered(view, SCATTERS, "C7", "scatter-in-16-bits", "worse than it need be", fix)


@rule("C8", "norm-gradient-in-16-bits")
def norm_gradient_in_16_bits(view: View) -> Iterator[Finding]:
    """The gradients of a layer norm's weight and bias are summed in 16 bits.

    Seen: the share of correctly rounded results is far below that of FP32 sums. PyTorch's CPU kernel does this, which is a
    note.
    Effect: gradients of norm weights are noisy.
    Fix: keep norm weights in FP32.
    Source: PyTorch, native_layer_norm_backward on the CPU.
    """
    for operation in view.step.operations:
        if short(operation) != "native_layer_norm_backward":
            continue
        for v in operation.verdicts:
            if v.result in ("out.1", "out.2") and v.dtype in LOW and v.equal < 0.9:
                number = f"{v.equal:.0%} of the gradients of weight or bias are the correctly rounded sums"
                yield finding_at(view, operation, "C8", "norm-gradient-in-16-bits", "note", number=number,
                                 effect="gradients of norm weights are noisy", fix="keep norm weights in FP32")  # fmt: skip
                return


# ------------------------------------------------------------------------------------------------- ranks, counts


@rule("C9", "reduce-in-16-bits")
def reduced_in_16_bits(view: View) -> Iterator[Finding]:
    """Gradients are summed over ranks in 16 bits.

    Seen: an all-reduce or reduce-scatter of 16-bit numbers over more than one rank. Below 8 ranks it is a note.
    Effect: up to n - 1 roundings per element: (n - 1) 2^-8 of the sum of magnitudes in bfloat16, (n - 1) 2^-11 in float16; runs
    that are stable on few ranks become unstable on more.
    Fix: `reduce_dtype=torch.float32` (FSDP2), or no compression hook (DDP).
    Source: pytorch/pytorch#106395, #91879.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    n = torch.distributed.get_world_size()
    for operation in view.step.operations:
        low = next((t for t in tensors_in(operation.arguments) if t.dtype in LOW), None)
        if n > 1 and low is not None and operation.name.startswith(REDUCTIONS):
            unit = torch.finfo(getattr(torch, low.dtype)).eps / 2
            number = f"{low.dtype} numbers are summed over {n} ranks: an error of up to {(n - 1) * unit:.2g} of their sizes"
            yield finding_at(view, operation, "C9", "reduce-in-16-bits", "note" if n < MANY_RANKS else "worse than it need be",
                             number=number, effect="gradients get noisier with every rank",
                             fix="reduce in FP32: MixedPrecisionPolicy(reduce_dtype=torch.float32)")  # fmt: skip
            return


@rule("C10", "divide-underflows")
def divide_underflows(view: View) -> Iterator[Finding]:
    """FP16 gradients are divided by the number of ranks before they are summed, and vanish.

    Seen: an FP16 division, after backward or of a gradient that is ready, that turns at least 1 % more numbers into 0.
    Effect: small gradients are lost before they can add up.
    Fix: divide after the sum, or by the root of n before and after; or sum in FP32.
    Source: facebookresearch/fairscale#565, pytorch/pytorch#123362.
    """
    last = max((call.index for call in _backward_calls(view.step)), default=0)
    for operation in view.step.operations:
        measured = operation.probed.get("divided")
        after = operation.phase != "backward" and operation.index > last
        if measured is not None and (after or operation.node == ACCUMULATE) and measured["lost"] > 0.01 * measured["due"]:
            number = f"{measured['lost']:.0f} of {measured['due']:.0f} FP16 numbers became 0 in a division"
            yield finding_at(view, operation, "C10", "divide-underflows", "wrong", number=number,
                             effect="small gradients are lost", fix="divide after the reduction, or in FP32")  # fmt: skip
            return


@rule("C11", "counts-in-16-bits")
def counts_in_16_bits(view: View) -> Iterator[Finding]:
    """Whole numbers are counted in 16 bits, beyond the range in which the format's values are one apart.

    Seen: a 16-bit sum of whole numbers above 256 (bfloat16) or 2048 (float16) that is wrong.
    Effect: counters stop, and decisions that depend on counts, such as the bias of an expert, go wrong.
    Fix: int64 or FP32 buffers.
    Source: NVIDIA/Megatron-LM#7081.
    """
    for operation in view.step.operations:
        measured = operation.probed.get("counted")
        if measured is not None:
            exact, stored = measured["exact"], measured["stored"]
            number = f"a count of {exact:.0f} is stored as {stored:.0f} in {format_of_result(operation)}"
            yield finding_at(view, operation, "C11", "counts-in-16-bits", "wrong", number=number,
                             effect="counters stop or jump", fix="count in int64 or FP32")  # fmt: skip
            return


# ------------------------------------------------------------------------------------------------- helpers


def _backward_calls(step: Step) -> list[Any]:
    return [call for call in step.calls if call.name == "backward"]


def _means(step: Step) -> bool:
    """Return whether the loss is a mean."""
    losses = [o for o in step.operations if o.phase == "forward" and short(o) in MEAN_LOSSES]
    if losses:
        return all(o.arguments.get("reduction", 1) == 1 for o in losses)
    return any(short(o) == "mean" and next(tensors_in(o.outputs), _SHAPED).shape == () for o in step.operations)


def _accumulated(step: Step) -> bool:
    return any(o.accumulates is not None and short(o) in ("add_", "add") for o in step.operations)


def _divides(event: Event, n: int, scale: float) -> bool:
    """Return whether a factor is 1/n, or 1 / (n S), by choice and not by a norm's chance."""
    if event.operation is not None and event.operation.phase == "clip":
        return False
    error = 4 * torch.finfo(torch.float32).eps if event.by_norm else 1e-4
    return any(math.isclose(event.factor * n * s, 1.0, rel_tol=error) for s in (1.0, scale))


def _begun_again(step: Step) -> bool:
    """Return whether gradients are set to 0, or used in an update, between the backward passes of a step."""
    calls = _backward_calls(step)
    zeros = [o for o in step.operations if short(o) in ("zero_", "_foreach_zero_") and o.phase != "backward"]
    cleared = [o for o in zeros if any(t.role is not None and t.role.kind == "gradient" for t in tensors_in(o.arguments))]
    used = [e.operation for e in history_of(step).of("update") if e.operation is not None]
    return any(calls[0].index < o.index < calls[-1].index for o in (*cleared, *used))


def _reaches(flow: Any, operation: Operation) -> list[str]:
    """Return the parameters to whose gradients a result goes on, through casts and copies."""
    result = next(tensors_in(operation.outputs), None)
    found, waiting = list[str](), [operation]
    while waiting and result is not None:
        for reader in flow.readers(waiting.pop()):
            shape = next((t.shape for t in tensors_in(reader.outputs)), None)
            if reader.accumulates is not None:
                found.append(reader.accumulates)
            elif short(reader) in ("_to_copy", "add") and reader.phase == "backward" and shape == result.shape:
                waiting.append(reader)
    return list(dict.fromkeys(found))


def _scattered(view: View, names: tuple[str, ...], code: str, name: str, level: str, fix: str) -> Iterator[Finding]:
    for operation in view.step.operations:
        measured = operation.probed.get("indexed_sum")
        if measured is not None and short(operation) in names and measured["wrong"] > 0.01 * measured["of"]:
            number = f"{measured['wrong'] / measured['of']:.1%} of {measured['of']:.0f} sums in {format_of_result(operation)}"
            number += f" are not the correctly rounded ones; the largest relative error is {measured['error']:.2g}"
            effect = "sums of many addends stop growing"
            yield finding_at(view, operation, code, name, level, number=number, effect=effect, fix=fix)
            return


def _at_line(finding: Finding, line: str) -> Finding:
    return Finding(**{**{f: getattr(finding, f) for f in Finding.__slots__}, "line": line, "module": None})


_SHAPED = TensorFacts((1,), "", "", None, 0, None)
