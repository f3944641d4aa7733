"""Rules D1 to D3: softmax, losses and norms written as chains of operations that each round to 16 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, TensorFacts
from refimpl.parity.audit.origins import in_fp64
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import LOW, Flow, finding_at, flow_of, format_of_result, forward, is_any, results_of
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Values, is_float
from refimpl.parity.audit.verdict import ulp

ROUNDINGS = 4
"""A gradient whose relative error is above this many unit roundoffs has lost more than its own rounding."""
STATISTICS = ("aten.mean", "aten.sum", "aten.var")
SQUARES = ("aten.pow", "aten.square", "aten.mul")
EPS_OPERATIONS = ("aten.add", "aten.clamp", "aten.clamp_min", "aten.maximum", "aten.div", "aten.mul")
"""What stands between a mean of squares and its root: eps, or a division by their number."""


# ------------------------------------------------------------------------------------------------- probes


class Scaled(NamedTuple):
    """Rows x that were divided by, or multiplied with, one number per row, all in 16 bits.

    off: the largest |sum of a row of the result - 1|. off_once: the same if x were divided by its sum in FP64, and the result
    rounded once. low, high: the smallest and largest root mean square of a row of the result, before its last rounding.
    square: the largest x^2, of which least_mean is the smallest mean over a row.
    """

    off: float
    off_once: float
    low: float
    high: float
    square: float
    least_mean: float


def scaled_rows(values: Values) -> Scaled | None:
    """Measure a 16-bit product or quotient of rows with one number per row."""
    operation = values.operation
    if operation.phase != "forward" or not operation.name.startswith(("aten.div", "aten.mul")):
        return None
    x, by = values.inputs.get("self"), values.inputs.get("other")
    if not (isinstance(x, Tensor) and isinstance(by, Tensor) and x.dim() == by.dim() and _low(x) and _low(by)):
        return None
    if x.numel() < by.numel():
        x, by = by, x
    dims = [d for d in range(x.dim()) if by.shape[d] == 1 and x.shape[d] > 1]
    (_, result), *_ = values.results()
    if not dims or not _low(result) or not by.numel():
        return None
    wide, factor = x.double(), by.double()
    total = wide.sum(dims, keepdim=True)
    once = (wide / total).to(result.dtype).double()
    mean = wide.square().mean(dims, keepdim=True)
    rms = mean.sqrt() * (factor if operation.name.startswith("aten.mul") else 1 / factor).abs()
    return Scaled(
        off=_largest(result.double().sum(dims) - 1), off_once=_largest(once.sum(dims) - 1), low=float(rms.min()),
        high=float(rms.max()), square=_largest(wide.square()), least_mean=float(mean.min()),
    )  # fmt: skip


class LogProbabilities(NamedTuple):
    """16-bit log-probabilities y. error: the L2 norm of exp(y) - p, where p is in FP64. largest: the largest |y|."""

    error: float
    largest: float


def log_probabilities(values: Values) -> LogProbabilities | None:
    """Measure what a 16-bit log-softmax loses of the probabilities that its gradient is made of."""
    if not values.operation.name.startswith("aten._log_softmax.") or not _low(values.output):
        return None
    exact = in_fp64(values, "out")
    if exact is None:
        return None
    lost = values.output.double().exp() - exact.exp()
    return LogProbabilities(float(lost.square().sum().sqrt()), _largest(values.output.double()))


class LogGradient(NamedTuple):
    """The gradient of 16-bit log-probabilities. size: its L2 norm. factor: the root mean square of the rows' sums of dy."""

    size: float
    factor: float


def log_gradient(values: Values) -> LogGradient | None:
    """Measure the gradient dx = dy - exp(y) sum(dy) of a 16-bit log-softmax."""
    if not values.operation.name.startswith("aten._log_softmax_backward_data.") or not _low(values.inputs["output"]):
        return None
    y, dy, dim = values.inputs["output"].double(), values.inputs["grad_output"].double(), values.inputs["dim"]
    total = dy.sum(dim, keepdim=True)
    return LogGradient(float((dy - y.exp() * total).square().sum().sqrt()), float(total.square().mean().sqrt()))


class Single(NamedTuple):
    """A 16-bit number, and the spacing of its format there."""

    value: float
    spacing: float


def single(values: Values) -> Single | None:
    """Measure a result that is one 16-bit number, as a loss is."""
    if values.operation.phase != "forward":
        return None
    _, out = next(values.results(), ("", None))
    if not isinstance(out, Tensor) or out.numel() != 1 or not _low(out):
        return None
    value = out.double().reshape(())
    return Single(float(value), float(ulp(value, out.dtype)))


class Logarithms(NamedTuple):
    """16-bit logarithms: the largest |log x|, and the spacing of their format there."""

    largest: float
    spacing: float


def logarithms(values: Values) -> Logarithms | None:
    """Measure 16-bit logarithms of the forward pass."""
    if values.operation.phase != "forward" or not values.operation.name.startswith(("aten.log.", "aten.logsumexp")):
        return None
    out = values.output
    if not _low(out) or not out.numel():
        return None
    largest = out.double().nan_to_num(0.0, 0.0, 0.0).abs().max()
    return Logarithms(float(largest), float(ulp(largest, out.dtype)))


def _low(value: object) -> bool:
    return is_float(value) and isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


PROBES: tuple[Probe, ...] = (scaled_rows, log_probabilities, log_gradient, single, logarithms)


# ------------------------------------------------------------------------------------------------- rules


@rule("D1", "softmax-in-16-bits")
def softmax_in_16_bits(view: View) -> Iterator[Finding]:
    """A softmax is written out, and its exp, sum and quotient are each rounded to 16 bits.

    Seen: exp, sum and division in a chain, all with 16-bit results.
    Number: how far rows are from adding up to 1, and how far they would be if only the result were rounded.
    Not reported: aten::_softmax of 16-bit scores, which computes in FP32 inside and rounds once.
    Effect: probabilities have the errors of three roundings and do not add up to 1, so attention scales its values.
    Fix: torch.softmax(x, -1), or dtype=torch.float32 in it.
    Source: Micikevicius et al. 2018, section 3.3 (https://arxiv.org/abs/1710.03740): softmax in FP32.
    """
    flow = flow_of(view.step)
    for o in _low_results(view, ("aten.div", "aten.mul")):
        exp, total = flow.source(o, "self"), flow.source(o, "other")
        if total is not None and is_any(total, ("aten.reciprocal",)) and _is_low(total):
            total = flow.source(total, "self")
        if exp is None or total is None or not (_is_low(exp) and _is_low(total)):
            continue
        rows: Scaled | None = o.probed.get("scaled_rows")
        if is_any(exp, ("aten.exp",)) and is_any(total, ("aten.sum",)) and flow.source(total, "self") is exp and rows:
            yield finding_at(
                view, o, "D1", softmax_in_16_bits.name, "worse than it need be",
                number=f"rows of probabilities add up to 1 within {rows.off:.2g} in {_dtype(o)}; rounded once from FP32, within"
                f" {rows.off_once:.2g}",
                effect="exp, sum and quotient are each rounded, where a softmax is rounded once: attention scales its values",
                fix="torch.softmax(x, dim, dtype=torch.float32)",
            )  # fmt: skip


@rule("D2", "loss-in-16-bits")
def loss_in_16_bits(view: View) -> Iterator[Finding]:
    """The loss, or the log-probabilities from which it is computed, are rounded to 16 bits.

    Seen: log-softmax with 16-bit results; log of a 16-bit softmax; exp, sum and log in a chain; a 16-bit loss.
    Number: the spacing of the format at the loss; for log-softmax, the relative error that its rounding makes in the gradient
    of the logits, from the error of exp(y) in forward and the sums of dy in backward.
    Not reported: cross-entropy, whose gradient p - onehot does not cancel: it is a note while its error is below 4 unit
    roundoffs. Gradients of KL and TV divergences are differences of nearly equal probabilities and lose percents.
    Effect: the loss moves in steps (0.031 at 5 in bf16); where probabilities cancel, gradients are noise.
    Fix: F.cross_entropy(logits.float(), ...), log_softmax(x, -1, dtype=torch.float32).
    Source: vllm-project/speculators#788 (gradient errors of KL of 3 to 31 %), huggingface/transformers#29285.
    """
    flow = flow_of(view.step)
    fix = "compute the loss from logits.float(), or use log_softmax(x, -1, dtype=torch.float32)"
    for o in view.step.operations:
        gradient: LogGradient | None = o.probed.get("log_gradient")
        y = o.arguments.get("output")
        maker = flow.maker(y, o.index) if gradient is not None and isinstance(y, TensorFacts) else None
        if gradient is not None and maker is not None and (made := maker.probed.get("log_probabilities")) is not None:
            share = gradient.factor * made.error / gradient.size if gradient.size else 0.0
            limit = ROUNDINGS * torch.finfo(getattr(torch, _dtype(maker))).eps / 2
            yield finding_at(
                view, maker, "D2", loss_in_16_bits.name, "worse than it need be" if share > limit else "note",
                number=f"log-probabilities in {_dtype(maker)}, down to -{made.largest:.3g}, put an error of {share:.2%} on the"
                " gradient of the logits",
                effect="where probabilities cancel in the gradient, as in a divergence, what is left is noise", fix=fix,
            )  # fmt: skip
    for o in _low_results(view, ("aten.log", "aten.logsumexp")):
        logs: Logarithms | None = o.probed.get("logarithms")
        if logs is not None and _is_normalizer(flow, o):
            yield finding_at(
                view, o, "D2", loss_in_16_bits.name, "worse than it need be",
                number=f"the logarithm of {_dtype(o)} probabilities or of their sum is up to {logs.largest:.3g}, where"
                f" {_dtype(o)} has steps of {logs.spacing:.2g}",
                effect="a log-softmax in several 16-bit roundings: gradients are off by their sum, small probabilities are 0",
                fix=fix,
            )  # fmt: skip
    for loss in _losses(view, flow):
        value: Single = loss.probed["single"]
        yield finding_at(
            view, loss, "D2", loss_in_16_bits.name, "note",
            number=f"the loss is {value.value:.5g} in {_dtype(loss)}, which has steps of {value.spacing:.2g} there",
            effect="what is logged moves in these steps; the gradient of the loss does not depend on its value", fix=fix,
        )  # fmt: skip


def _is_normalizer(flow: Flow, log: Operation) -> bool:
    """Return whether a logarithm is of probabilities, or of a sum of exponentials that scores are subtracted from."""
    if is_any(log, ("aten.logsumexp",)):
        return any(r.phase == "forward" and is_any(r, ("aten.sub", "aten.rsub")) for r in flow.readers(log))
    of = flow.source(log, "self")
    if of is not None and is_any(of, ("aten.sum",)):
        of = flow.source(of, "self")
        return of is not None and is_any(of, ("aten.exp",)) and _is_low(of)
    quotient = of is not None and is_any(of, ("aten.div",)) and (flow.source(of, "self") or of).name.startswith("aten.exp.")
    return of is not None and _is_low(of) and (quotient or is_any(of, ("aten._softmax",)))


def _losses(view: View, flow: Flow) -> Iterator[Operation]:
    """Yield the 16-bit numbers that backward begins from, or that are only scaled and cast before it does."""
    for call in view.step.calls:
        if call.name != "backward":
            continue
        numbers = [o for o in view.step.operations if o.index < call.index and o.phase == "forward" and _is_single(o)]
        loss: Operation | None = numbers[-1] if numbers else None
        while loss is not None and "single" not in loss.probed and is_any(loss, ("aten.mul", "aten.div", "aten._to_copy")):
            loss = flow.source(loss, "self")
        if loss is not None and "single" in loss.probed:
            yield loss


def _is_single(operation: Operation) -> bool:
    made = list(results_of(operation))
    return operation.sequence is not None and bool(made) and math.prod(made[0].shape) == 1


@rule("D3", "norm-in-16-bits")
def norm_in_16_bits(view: View) -> Iterator[Finding]:
    """A norm is written out, and each of its statistics is rounded to 16 bits.

    Seen: square, mean (or variance) and root in a chain in the forward pass, all with 16-bit results.
    Number: the largest square beside the largest number of the format, and how far the root mean squares of rows are from 1.
    Not reported: native_layer_norm and rms_norm, which compute in FP32 inside; statistics of x.float().
    Effect: in FP16, |x| > 255.9 has an infinite square: the mean is Inf, its reciprocal 0, and the row is silently lost.
    Otherwise the scale of each row is off by up to a percent.
    Fix: x.float() before the square, and back after the multiplication; or F.rms_norm or F.layer_norm.
    Source: Shuheng5454/OpenTau#300, nntrainer/nntrainer#3935.
    """
    for o, _, rows in norms_by_hand(view):
        limit = torch.finfo(getattr(torch, _dtype(o))).max
        lost = rows.square > limit
        room = f", {rows.square / limit:.2g} times the largest float16" if _dtype(o) == "float16" else ""
        yield finding_at(
            view, o, "D3", norm_in_16_bits.name, "wrong" if lost else "worse than it need be",
            number=f"the statistics are in {_dtype(o)}: the largest square is {rows.square:.5g}{room}; rows have root mean"
            f" squares of {rows.low:.4f} to {rows.high:.4f}",
            effect="the mean of the squares is Inf, and the row becomes 0" if lost else "each row is scaled by the error of its"
            " statistics, which are rounded three times",
            fix="compute the statistics from x.float(), or use F.rms_norm or F.layer_norm",
        )  # fmt: skip


def norms_by_hand(view: View) -> Iterator[tuple[Operation, Operation, Scaled]]:
    """Yield the root, the square (or the variance) and the scaled rows of norms whose statistics are in 16 bits."""
    flow = flow_of(view.step)
    for o in _low_results(view, ("aten.rsqrt", "aten.sqrt")):
        statistic = flow.source(o, "self", through=("aten.clone", *EPS_OPERATIONS))
        if statistic is None or not (_is_low(statistic) and is_any(statistic, STATISTICS)):
            continue
        square = statistic if is_any(statistic, ("aten.var",)) else flow.source(statistic, "self")
        rows = _scaled_by(flow, o)
        if square is not None and rows is not None and (square is statistic or _is_square(square)):
            yield o, square, rows


def _scaled_by(flow: Flow, root: Operation) -> Scaled | None:
    """Return what was measured where rows are scaled by a root, or by its reciprocal, or the root with eps."""
    first = list(flow.readers(root))
    second = [r for o in first if is_any(o, ("aten.reciprocal", "aten.add")) for r in flow.readers(o)]
    return next((o.probed["scaled_rows"] for o in (*first, *second) if "scaled_rows" in o.probed), None)


def _is_square(o: Operation) -> bool:
    """Return whether an operation squares a tensor with a 16-bit result."""
    if not (_is_low(o) and is_any(o, SQUARES)):
        return False
    by = o.arguments.get("exponent", 2) if is_any(o, ("aten.pow",)) else 2
    twice = not is_any(o, ("aten.mul",)) or o.arguments["self"] == o.arguments["other"]
    return by == 2 and twice


def _low_results(view: View, names: tuple[str, ...]) -> Iterator[Operation]:
    """Yield the operations of these names in modules and the loss, with 16-bit results."""
    return (o for o in forward(view) if o.phase == "forward" and is_any(o, names) and _is_low(o))


def _is_low(operation: Operation) -> bool:
    return format_of_result(operation) in LOW


def _dtype(operation: Operation) -> str:
    return format_of_result(operation)
