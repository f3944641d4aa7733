"""Rules D7 to D11: where Inf and NaN come from. Each step's first origin has one of these names, or that of a loss scale's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, tensors_in
from refimpl.parity.audit.origins import Origin, found, nonfinite, origin_of
from refimpl.parity.audit.rules.chains import norms_by_hand
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import finding_at, flow_of, forward, is_any, results_of
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Values, is_float

SUMS = ("aten.sum", "aten.mean", "aten.cumsum", "aten.dot", "aten.linalg_vector_norm", "aten.var")
FIXES = (
    ("LogBackward", "log has no derivative at 0: add eps inside it, or use log_softmax or logsigmoid"),
    ("aten.log", "log of 0 is -Inf: add eps inside it, or use log_softmax or logsigmoid"),
    ("SqrtBackward", "the derivative of sqrt is infinite at 0: use sqrt(x + eps)"),
    ("NormBackward", "a norm has no derivative at 0: add eps inside its root, or leave zero vectors out"),
    ("RsqrtBackward", "rsqrt is infinite at 0: use rsqrt(x + eps)"),
    ("PowBackward", "the derivative of a power below 1 is infinite at 0: add eps to its base"),
    ("aten.sqrt", "sqrt of a negative number is NaN: clamp it first, and before torch.where, whose gradient is NaN otherwise"),
    ("aten.rsqrt", "rsqrt of 0 is Inf: use rsqrt(x + eps)"),
    ("aten.div", "division by 0: clamp the divisor, or select before dividing (torch.where after it does not help backward)"),
    ("aten.reciprocal", "division by 0: clamp the divisor"),
    ("aten.exp", "exp overflows above 88 in FP32 and bf16, 11 in fp16: subtract the maximum, or use softmax or logsumexp"),
    ("aten.pow", "compute the power in FP32, or bound its base"),
)  # fmt: skip
"""(autograd node or operation that it is born in, what to do about it)."""


def largest(values: Values) -> float | None:
    """Return the largest magnitude of an FP16 result of the forward pass that is finite."""
    if values.operation.phase != "forward":
        return None
    _, out = next(values.results(), ("", None))
    if not isinstance(out, Tensor) or not is_float(out) or str(out.dtype) != "torch.float16" or out.numel() < 2:
        return None
    size = float(out.abs().max())
    return size if math.isfinite(size) else None


PROBES: tuple[Probe, ...] = (nonfinite, largest)


@rule("D7", "mask-overflows")
def mask_overflows(view: View) -> Iterator[Finding]:
    """Two finite masks, or a mask and a score, add up to -Inf.

    Seen: a sum of finite numbers that is -Inf, where one of them is the lowest number of its format, below -1e30, or a round
    number, as masks are.
    Number: how many such sums there are, and the operands of one.
    Not reported: masks that are -Inf on purpose; sums whose overflow does no harm, because no row is fully masked (a note).
    Effect: fully masked rows become NaN in the softmax, where a finite mask would have given a mean.
    Fix: one mask by torch.where or masked_fill instead of a sum of two.
    Source: NVIDIA-NeMo/Automodel#2658 (finfo.min + finfo.min).
    """
    origin = origin_of(view.step)
    for o in view.step.operations:
        if o.recomputed or not _is_masked_sum(o):
            continue
        bad = found(o)
        assert bad is not None
        at, operands = list(bad.position), ", ".join(f"{k} = {v}" for k, v in (bad.operands or {}).items())
        harmful = origin is not None and origin.operation is o
        yield finding_at(
            view, o, "D7", mask_overflows.name, "wrong" if harmful else "note",
            number=f"{bad.finite_exact:,} sums of finite numbers are -Inf in {bad.dtype}: {operands} at {at}",
            effect="fully masked rows become NaN, and so do all gradients that they reach",
            fix="combine masks as booleans and apply them once, by masked_fill or torch.where",
        )  # fmt: skip


def _is_masked_sum(operation: Operation) -> bool:
    bad = found(operation)
    if bad is None or not bad.overflow or bad.value > 0 or not is_any(operation, ("aten.add", "aten.sub")):
        return False
    return any(_is_mask(value, bad.limit) for key, text in (bad.operands or {}).items() if (value := _number(text)) is not None)


def _is_mask(value: float, limit: float) -> bool:
    return math.isclose(value, -limit, rel_tol=1e-4) or value < -1e30 or (value <= -1e4 and value % 500 == 0)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@rule("D8", "row-masked-out")
def row_masked_out(view: View) -> Iterator[Finding]:
    """A row of a softmax is masked entirely with -Inf, and its result is NaN.

    Seen: a softmax with NaN in its result and none in its input, which reaches the loss or a gradient.
    Number: how many rows.
    Not reported: scaled_dot_product_attention, which returns 0 for such rows; rows whose NaN reaches nothing.
    Effect: NaN in the gradients of the whole model, from one padded row.
    Fix: F.scaled_dot_product_attention, or leave one position of each row unmasked.
    Source: pytorch/pytorch#131060, #41508, #103749, #103963.
    """
    origin = origin_of(view.step)
    if origin is None or origin.operation is None or origin.found is None or not origin.found.masked_rows:
        return
    shape = next(results_of(origin.operation)).shape
    yield finding_at(
        view, origin.operation, "D8", row_masked_out.name, "wrong",
        number=f"{origin.found.masked_rows:,} of {math.prod(shape) // max(1, shape[-1]):,} rows of the softmax are fully"
        " masked, which makes them NaN",
        effect="one such row makes the gradients of all layers below it NaN",
        fix="use F.scaled_dot_product_attention, which returns 0 there, or leave one position of every row unmasked",
    )  # fmt: skip


@rule("D9", "overflow-in-forward")
def overflow_in_forward(view: View) -> Iterator[Finding]:
    """A result of the forward pass is too large for FP16.

    Seen: in a step whose loss or gradients are not finite, the first Inf is an FP16 result of the forward pass that is finite
    in FP64.
    Number: its size in FP64 beside 65504, and the largest finite FP16 number before it.
    Not reported: an Inf that reaches neither loss nor gradients, for instance because the model clamps it; sums (D10), masks
    (D7), squares in a norm that is written out (D3), the scaled loss (B11).
    Effect: no loss scale helps: every step is skipped, and the scale falls to 0.
    Fix: use bf16, compute this layer in FP32, or make its input smaller.
    Source: huggingface/transformers#5651 (66246 in T5's wo), #9295, #10956.
    """
    origin = origin_of(view.step)
    if origin is None or rule_of(view, origin) != "D9" or origin.operation is None:
        return
    earlier = [(o.probed["largest"], o) for o in forward(view) if o.index < origin.operation.index and "largest" in o.probed]
    size, before = max(earlier, key=lambda pair: pair[0], default=(0.0, None))
    room = f"; the largest before it is {size:.5g}" + (f" in {before.module}" if before.module else "") if before else ""
    yield finding_at(
        view, origin.operation, "D9", overflow_in_forward.name, "wrong", number=f"{origin.sentence}{room}",
        effect="the loss or the gradients are not finite whatever the loss scale: every step is skipped, and S falls to 0",
        fix="compute this layer in FP32 or bf16, or scale its input down",
    )  # fmt: skip


@rule("D10", "sum-overflows")
def sum_overflows(view: View) -> Iterator[Finding]:
    """A sum, or the number that it is divided by, is too large for FP16.

    Seen: in a step whose loss or gradients are not finite, the first Inf is an FP16 sum, mean or norm; or an integer becomes
    Inf when it is cast to FP16, and something is divided by it.
    Number: the sum in FP64.
    Not reported: a mean of FP16 numbers, which PyTorch sums in FP32.
    Effect: the loss is Inf, or 0 if the divisor is Inf.
    Fix: sum and divide in FP32: x.float().sum(), x.sum(dtype=torch.float32).
    Source: coreylowman/dfdx#748.
    """
    fix = "sum and divide in FP32: x.sum(dtype=torch.float32)"
    origin = origin_of(view.step)
    if origin is not None and rule_of(view, origin) == "D10" and origin.operation is not None:
        yield finding_at(
            view, origin.operation, "D10", sum_overflows.name, "wrong", number=origin.sentence,
            effect="the loss or the gradients are not finite whatever the loss scale", fix=fix,
        )  # fmt: skip
    flow = flow_of(view.step)
    for o in forward(view):
        bad = found(o)
        if bad is None or not bad.overflow or bad.dtype != "float16" or not is_any(o, ("aten._to_copy",)):
            continue
        divides = (r for r in flow.readers(o) if is_any(r, ("aten.div",)) and flow.source(r, "other") is o)
        if next(tensors_in(o.arguments)).shape == () and any(divides):
            yield finding_at(
                view, o, "D10", sum_overflows.name, "wrong", number=f"the divisor {bad.exact:.10g} is Inf in float16",
                effect="what is divided by it is 0", fix=fix,
            )  # fmt: skip


@rule("D11", "not-finite")
def not_finite(view: View) -> Iterator[Finding]:
    """Inf or NaN in the loss or the gradients begins at an operation that no other rule names.

    Seen: the first operation with finite inputs and a result that is not finite and reaches the loss, a gradient or the update.
    Number: the operation, its operands there, what FP64 gives, and whether a loss scale would have helped.
    Not reported: Inf that reaches none of these; FP16 gradients that overflow, for which the step is skipped (B4 if it is not).
    Effect: the step is lost, or, if it is not skipped, the weights are.
    Fix: depending on the operation: eps inside roots, logarithms and divisors; selecting before computing instead of
    torch.where after it.
    Source: Shuheng5454/OpenTau#300 (final_norm.backward makes Inf, residuals 0 * Inf), MzeroMiko/VMamba#78, Parskatt/RoMa#43.
    """
    origin = origin_of(view.step)
    if origin is None or rule_of(view, origin) != "D11":
        return
    shown = origin.operation or next(o for o in view.step.operations if found(o) is not None)
    finding = finding_at(
        view, shown, "D11", not_finite.name, "wrong", number=f"{origin.sentence}; {origin.remedy}",
        effect="the step is lost if it is skipped, and the weights if it is not", fix=_fix(origin),
    )  # fmt: skip
    yield finding if origin.operation is not None else replace(finding, operation=None)


def rule_of(view: View, origin: Origin) -> str:
    """Return the code of the rule that an origin belongs to, '' if it belongs to none of these."""
    o, bad = origin.operation, origin.found
    if o is None or bad is None:
        computed = (earlier for step in view.earlier for earlier in step.operations if earlier.phase != "other")
        known = any(found(earlier) is not None for earlier in computed)
        return "" if known else "D11"
    if _is_masked_sum(o):
        return "D7"
    if bad.masked_rows:
        return "D8"
    if not origin.forward:
        return "" if _is_scales(view, origin) or o.phase == "clip" else "D11"
    if not bad.overflow or bad.dtype != "float16":
        return "D11"
    if is_any(o, SUMS):
        return "D10"
    by_hand = any(square is o for _, square, _ in norms_by_hand(view))
    return "" if by_hand or _scales_loss(o) else "D9"


def _is_scales(view: View, origin: Origin) -> bool:
    """Return whether a FP16 gradient overflows, in which a loss scale decides: the step is to be skipped (B4 if it is not)."""
    assert origin.found is not None
    unknown = origin.found.exact is None and view.step.before.scale is not None
    return unknown or (origin.found.overflow and origin.found.dtype == "float16")


def _scales_loss(operation: Operation) -> bool:
    """Return whether an operation multiplies one number by a power of two, as a loss scale is."""
    out = next(results_of(operation), None)
    by = _number((found(operation).operands or {}).get("other", "")) if found(operation) is not None else None  # type: ignore[union-attr]
    one = out is not None and math.prod(out.shape) == 1 and is_any(operation, ("aten.mul",))
    return one and by is not None and by >= 2 and math.log2(by).is_integer()


def _fix(origin: Origin) -> str:
    if origin.operation is None:
        return "look at the data, or audit the step in which the weights became NaN"
    node, name = origin.operation.node or "", origin.operation.name
    for key, fix in FIXES:
        if key in node if not key.startswith("aten.") else name.startswith(key):
            return fix
    return "look at the operands: keep them away from where the operation is not finite"
