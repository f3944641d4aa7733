"""Rules D4 to D6 and D23, D24: different numbers that become one in 16 bits: positions, frequencies, scores, features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, TensorFacts, tensors_in
from refimpl.parity.audit.roles import name_of
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import COPIES, LOW, Flow, finding_at, flow_of, forward, is_any
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Values, is_float
from refimpl.parity.audit.verdict import ulp

SAMPLE = 64
"""Elements that are looked at before all are: whether a tensor holds integers only."""
DEEP = 8
"""How many operations a value is followed."""
RADIANS = 0.5
"""Neighboring positions are 1 radian apart at the highest frequency: an error of half of that may exchange them."""
SAFE_ANGLE = 2.0
"""Up to here 16-bit angles have errors of the size of what cos and sin round to themselves."""
FEWEST = 16
"""Rows that a feature's spread is computed over, at least."""
CANCELLED = 2.0**-5
"""A difference this much smaller than its operands has 3 of bfloat16's 8 bits left."""
MANY = 0.1
"""A share of elements that is worth a note."""
PRODUCTS = ("aten.mul", "aten.bmm", "aten.mm", "aten.addmm", "aten.matmul", "aten.outer")


# ------------------------------------------------------------------------------------------------- probes


class Integers(NamedTuple):
    """Integers that were cast to 16 bits. different: how many different ones before and after; changed: how many elements."""

    elements: int
    before: int
    after: int
    changed: int
    example: float
    becomes: float
    dtype: str


def integers(values: Values) -> Integers | None:
    """Count integers, of whatever format, that are cast to 16 bits, or counted up in it."""
    operation, out = values.operation, values.output
    if operation.phase not in ("forward", "other") or not _low(out) or out.numel() < 1:
        return None
    exact: Tensor | None
    if operation.name.startswith("aten.arange"):
        exact = _range(values, out)
    elif operation.name.startswith("aten._to_copy"):
        source = values.inputs["self"]
        exact = source.double() if _of_integers(source, out.dtype) else None
    else:
        return None
    if exact is None:
        return None
    flat, result = exact.flatten(), out.double().flatten()
    changed = flat != result
    count = int(changed.count_nonzero())
    if not count:
        return None
    at = int((flat - result).abs().argmax())
    before, after = (len(torch.unique(x)) for x in (flat, result))
    return Integers(out.numel(), before, after, count, float(flat[at]), float(result[at]), name_of(out.dtype))


def _of_integers(x: Tensor, target: torch.dtype) -> bool:
    if not x.dtype.is_floating_point:
        return x.dtype != torch.bool and not x.dtype.is_complex
    if x.dtype not in (torch.float32, torch.float64):
        return False
    # Above 2^24 every FP32 number is an integer, whatever it counts.
    return all(bool((part == part.round()).all() and (part.abs() <= 2.0**24).all()) for part in (x.flatten()[:SAMPLE], x))


def _range(values: Values, out: Tensor) -> Tensor:
    inputs = values.inputs
    start, step = float(inputs.get("start") or 0), float(inputs.get("step") or 1)
    return start + step * torch.arange(out.numel(), dtype=torch.float64, device=out.device)


class Angles(NamedTuple):
    """What sin or cos was taken of. largest: the largest angle; error: half the spacing of its format there, in radians.

    drift: how far the farthest position's angles are from a geometric progression through them, as the frequencies of rotary
    embeddings are, in radians; None if they are not within 1 % of one.
    """

    largest: float
    error: float
    drift: float | None


def angles(values: Values) -> Angles | None:
    """Measure the arguments of sin and cos."""
    if values.operation.phase not in ("forward", "other") or not values.operation.name.startswith(("aten.cos.", "aten.sin.")):
        return None
    x = values.inputs["self"]
    if not is_float(x) or not x.numel():
        return None
    largest = x.abs().max().double()
    return Angles(float(largest), float(ulp(largest, x.dtype)) / 2, _drift(x))


def _drift(x: Tensor) -> float | None:
    """Return the largest distance of a row of angles from the geometric progression through its first that fits it best.

    The first frequency of rotary embeddings is 1, which every format holds.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    row = rows[int(rows.sum(-1).argmax())].double()
    row = row[: len(row) // 2] if len(row) % 2 == 0 and torch.equal(row[: len(row) // 2], row[len(row) // 2 :]) else row
    if len(row) < 4 or not bool((row > 0).all()):
        return None
    places, logs = torch.arange(len(row), dtype=torch.float64, device=row.device), (row / row[0]).log()
    off = logs - places * ((places * logs).sum() / places.square().sum())
    return float((row * off.expm1()).abs().max()) if float(off.abs().max()) < 0.01 else None


class Choices(NamedTuple):
    """Rows of 16-bit scores of which the k largest are chosen. ties: rows where the last one in and the first one out are
    equal; close: where they differ by at most the spacing of the format, so that roundings chose.
    """

    rows: int
    ties: int
    close: int
    k: int
    of: int


def choices(values: Values) -> Choices | None:
    """Measure how close a choice of the largest 16-bit scores is."""
    if not values.operation.name.startswith("aten.topk.") or values.operation.phase != "forward":
        return None
    inputs = values.inputs
    x, k, dim = inputs["self"], int(inputs["k"]), int(inputs.get("dim", -1))
    if not _low(x) or not x.dim() or not 0 < k < x.shape[dim]:
        return None
    ordered = x.double().sort(dim, descending=inputs.get("largest", True)).values
    inside, outside = ordered.select(dim, k - 1), ordered.select(dim, k)
    gap = (inside - outside).abs()
    return Choices(gap.numel(), int((gap == 0).sum()), int((gap <= ulp(inside, x.dtype)).sum()), k, x.shape[dim])


class Feature(NamedTuple):
    """The feature of a batch that a cast loses most of. deviation: its standard deviation; spacing: the format's there."""

    place: int
    features: int
    mean: float
    deviation: float
    spacing: float
    before: int
    after: int


def features(values: Values) -> Feature | None:
    """Measure the casts of data, which needs no gradient, to 16 bits: the worst feature's deviation beside its spacing."""
    operation, out = values.operation, values.output
    if not operation.name.startswith("aten._to_copy") or operation.sequence is not None or not _low(out):
        return None
    if operation.phase not in ("forward", "other") or not 2 <= out.dim() <= 5:
        return None
    x, role = values.inputs["self"], operation.arguments["self"].role
    if role is not None or not x.dtype.is_floating_point or x.dtype.itemsize < 4:
        return None
    dim = -1 if x.dim() < 4 else 1
    wide = x.double().movedim(dim, -1).flatten(0, -2)
    if len(wide) < FEWEST or not wide.isfinite().all():
        return None
    mean, deviation = wide.mean(0), wide.std(0)
    spacing = ulp(mean, out.dtype)
    rounded = (out.double().movedim(dim, -1).flatten(0, -2) != wide).any(0)
    worst = int(torch.where(rounded & (deviation > 0), spacing / deviation.clamp_min(1e-300), 0.0).argmax())
    if not rounded[worst] or not 0 < deviation[worst] < spacing[worst]:
        return None
    column = wide[:, worst]
    before, after = len(torch.unique(column)), len(torch.unique(column.to(out.dtype)))
    return Feature(worst, x.shape[dim], float(mean[worst]), float(deviation[worst]), float(spacing[worst]), before, after)


class Cancelled(NamedTuple):
    """How many differences of 16-bit numbers are small beside their operands, and how many there are."""

    cancelled: int
    elements: int


def cancelled(values: Values) -> Cancelled | None:
    """Count the differences that keep at most 3 bits, among the first 4096 of a sum or difference of 16-bit tensors."""
    operation = values.operation
    if operation.phase != "forward" or not operation.name.startswith(("aten.sub.Tensor", "aten.add.Tensor")):
        return None
    a, b = values.inputs["self"], values.inputs["other"]
    if not (_low(a) and _low(b) and a.shape == b.shape) or values.inputs.get("alpha", 1) != 1:
        return None
    x, y = (t.reshape(-1)[:4096].double() for t in (a, b))
    result = x - y if operation.name.startswith("aten.sub") else x + y
    small = (result != 0) & result.isfinite() & (result.abs() <= CANCELLED * torch.maximum(x.abs(), y.abs()))
    return Cancelled(int(small.sum()), x.numel())


def _low(value: object) -> bool:
    return is_float(value) and isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


PROBES: tuple[Probe, ...] = (integers, angles, choices, features, cancelled)


# ------------------------------------------------------------------------------------------------- rules


@rule("D4", "positions-in-16-bits")
def positions_in_16_bits(view: View) -> Iterator[Finding]:
    """Positions or time steps, or the angles computed from them, are rounded to 16 bits.

    Seen: integers that are cast to 16 bits or counted in them, so that different ones become equal, or change on their way to
    sin and cos; sin or cos of a 16-bit angle above 2.
    Number: how many different integers are left, or half the spacing of the format at the largest angle, in radians.
    Not reported: integers that 16 bits can represent (up to 256 in bf16, 2048 in fp16); angles in FP32 whose cos and sin are
    cast.
    Effect: BF16 has 384 different positions below 512 and 768 below 4096: neighbors get the same embedding, or phases that are
    off by radians.
    Fix: compute positions, angles, cos and sin in FP32 (torch.autocast(enabled=False) around them), and cast last.
    Source: EleutherAI/gpt-neox#1003, huggingface/transformers#25681, #29285, #29496, huggingface/diffusers#9405.
    """
    flow = flow_of(view.step)
    fix = "keep positions and angles in FP32 until after cos and sin, outside autocast"
    for o in forward(view):
        whole: Integers | None = o.probed.get("integers")
        if whole is not None and whole.elements > 1 and (whole.after < whole.before or _reaches_angles(flow, o)):
            what = (
                f"{whole.before:,} different integers become {whole.after:,} in {whole.dtype}"
                if whole.after < whole.before
                else f"{whole.changed:,} of {whole.elements:,} integers change in {whole.dtype}"
            )
            yield finding_at(
                view, o, "D4", positions_in_16_bits.name, "wrong",
                number=f"{what}: {whole.example:.10g} becomes {whole.becomes:.10g}",
                effect="different positions or time steps look the same to the model", fix=fix,
            )  # fmt: skip
        angle: Angles | None = o.probed.get("angles")
        if angle is not None and next(tensors_in(o.arguments)).dtype in LOW and angle.largest > SAFE_ANGLE:
            yield finding_at(
                view, o, "D4", positions_in_16_bits.name, "worse than it need be" if angle.error < RADIANS else "wrong",
                number=f"{o.name.split('.')[1]} is taken of {next(tensors_in(o.arguments)).dtype} angles of up to"
                f" {angle.largest:.5g}, where phases are off by up to {angle.error:.3g} radians",
                effect="distant positions have the phases of other positions", fix=fix,
            )  # fmt: skip


def _reaches_angles(flow: Flow, operation: Operation, depth: int = DEEP) -> bool:
    """Return whether sin or cos reads what an operation made, within a few operations."""
    frontier, seen = [operation], set[int]()
    for _ in range(depth):
        following = [r for o in frontier for r in flow.readers(o) if r.index not in seen]
        if any(is_any(r, ("aten.cos", "aten.sin")) for r in following):
            return True
        frontier = [r for r in following if is_any(r, (*PRODUCTS, *COPIES, "aten._to_copy", "aten.div", "aten.add"))]
        seen |= {r.index for r in following}
    return False


@rule("D5", "frequencies-in-16-bits")
def frequencies_in_16_bits(view: View) -> Iterator[Finding]:
    """The frequencies of rotary or sinusoidal embeddings are stored in 16 bits, although angles are computed in FP32.

    Seen: sin or cos of a product with a 16-bit buffer, whether it is cast up or not.
    Number: the largest phase error at this length, relative to the geometric progression that the frequencies follow; if they
    follow none, at most a unit roundoff of the largest angle.
    Not reported: frequencies that are parameters; few positions, where the error is below half a radian (a note); 16-bit angles
    (D4).
    Effect: phases drift with the position, at 4096 by up to 2 radians in BF16. Weights that were trained with other
    frequencies, and runs in FP32, see other positions.
    Fix: keep the buffer in FP32: model.to(torch.bfloat16) casts it. Load with dtype=torch.bfloat16, or set it again after .to.
    Source: meta-llama/llama-recipes#6, NVIDIA/Megatron-LM#744, modalities#462.
    """
    flow = flow_of(view.step)
    for o in forward(view):
        angle: Angles | None = o.probed.get("angles")
        if angle is None or next(tensors_in(o.arguments)).dtype in LOW:
            continue
        low = _kept_frequencies(flow, o)
        if low is None:
            continue
        most = angle.largest * torch.finfo(getattr(torch, low.dtype)).eps / 2
        error = most if angle.drift is None else min(angle.drift, most)
        name = f"the buffer {low.role.name}" if low.role is not None else "a tensor made before the step"
        yield finding_at(
            view, o, "D5", frequencies_in_16_bits.name, "worse than it need be" if error > RADIANS else "note",
            number=f"frequencies are in {low.dtype} ({name}): phases, up to {angle.largest:.5g}, are off by up"
            f" to {error:.2g} radians",
            effect="phases drift with the position, and differ from those of FP32 frequencies", fix="keep the frequencies in"
            " FP32: model.to() casts buffers; create the model with dtype=, or set them again after .to()",
        )  # fmt: skip


def _kept_frequencies(flow: Flow, operation: Operation) -> TensorFacts | None:
    """Return the 16-bit buffer that the argument of sin or cos is a product with, None if there is none."""
    frontier = [(operation, t) for t in tensors_in(operation.arguments)]
    for _ in range(DEEP):
        following = []
        for reader, tensor in frontier:
            maker = flow.maker(tensor, reader.index)
            if maker is None:
                owned = tensor.role is not None and tensor.role.kind == "buffer"
                vector = tensor.role is None and sum(n > 1 for n in tensor.shape) == 1
                if tensor.dtype in LOW and reader is not operation and (owned or vector):
                    return tensor
            elif is_any(maker, (*PRODUCTS, *COPIES, "aten._to_copy")):
                following += [(maker, t) for t in tensors_in(maker.arguments)]
        frontier = following
    return None


@rule("D6", "router-in-16-bits")
def router_in_16_bits(view: View) -> Iterator[Finding]:
    """Experts are chosen by 16-bit scores that tie.

    Seen: topk of 16-bit scores in a module's forward pass.
    Number: rows in which the last expert chosen and the first one left out have equal scores, and rows in which they differ by
    at most one spacing of the format.
    Not reported: scores with neither ties nor close calls; topk outside of modules, as in a metric.
    Level: a note if there are close calls but no ties.
    Effect: which expert is chosen depends on the order of ties, and differs between kernels, ranks, training and inference.
    Fix: compute the router's product and softmax in FP32.
    Source: stanford-futuredata/megablocks#91, NVIDIA/Megatron-LM#2741, AI-Hypercomputer/maxtext#5293.
    """
    for o in forward(view):
        rows: Choices | None = o.probed.get("choices")
        if rows is not None and o.module is not None:
            yield finding_at(
                view, o, "D6", router_in_16_bits.name, "worse than it need be" if rows.ties else "note",
                number=f"of {rows.rows:,} rows, {rows.ties:,} tie at the choice ({rows.k} of {rows.of}), and in"
                f" {rows.close:,} rounding may have decided",
                effect="the choice of experts depends on the order of ties, and differs between kernels and ranks",
                fix="compute the router's logits and scores in FP32",
            )  # fmt: skip


@rule("D23", "features-too-large")
def features_too_large(view: View) -> Iterator[Finding]:
    """A feature of the data is cast to a 16-bit format that is too coarse for it: its mean is large compared with its spread.

    Seen: casts of data that no operation of the step has computed.
    Number: the feature's standard deviation in spacings of the format at its mean, and how many different values are left.
    Not reported: constant features, and features that the format represents exactly.
    Effect: the model sees a few values where the data has many.
    Fix: normalize the feature in FP32 (subtract its mean) before the cast.
    Source: torch.amp keeps inputs in FP32 until the first product casts them.
    """
    flow = flow_of(view.step)
    for o in forward(view):
        feature: Feature | None = o.probed.get("features")
        if feature is not None and "integers" not in o.probed and _is_data(flow, o):
            yield finding_at(
                view, o, "D23", features_too_large.name, "worse than it need be",
                number=f"feature {feature.place} of {feature.features} has mean {feature.mean:.6g} and standard deviation"
                f" {feature.deviation:.3g}, {feature.deviation / feature.spacing:.2g} of the spacing {feature.spacing:.3g}"
                f" there: {feature.before:,} different values become {feature.after:,}",
                effect="most of this feature's variation is rounded away", fix="subtract its mean and scale it in FP32",
            )  # fmt: skip


def _is_data(flow: Flow, cast: Operation) -> bool:
    """Return whether no operation computed what is cast: batches are copied, gathered, or drawn."""
    maker = flow.source(cast, "self", through=(*COPIES, "aten.index", "aten.index_select", "aten.gather"))
    return maker is None or is_any(maker, ("aten.lift_fresh", "aten.randn", "aten.rand", "aten.normal", "aten.uniform"))


@rule("D24", "cancellation")
def cancellation(view: View) -> Iterator[Finding]:
    """Differences of 16-bit numbers are small compared with their operands, so few of their bits are known.

    Seen: sums and differences of 16-bit tensors, of which at least a tenth is 1/32 of its operands or less.
    Number: that share.
    Level: always a note: the difference itself is exact, but its operands were rounded before.
    Effect: 3 of BF16's 8 bits are left.
    Fix: keep the operands in FP32 until they are subtracted.
    Source: FPChecker's class 'cancellation' (LLNL/FPChecker).
    """
    for o in forward(view):
        counts: Cancelled | None = o.probed.get("cancelled")
        if counts is not None and counts.elements >= FEWEST and counts.cancelled > MANY * counts.elements:
            yield finding_at(
                view, o, "D24", cancellation.name, "note",
                number=f"{counts.cancelled / counts.elements:.0%} of the results are 1/32 of their operands or less",
                effect="at most 3 of bfloat16's 8 bits, or 6 of float16's 11, are left of what was rounded before",
                fix="keep the operands in FP32 until they are subtracted",
            )  # fmt: skip
