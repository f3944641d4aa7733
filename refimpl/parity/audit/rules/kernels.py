"""Rules D14 to D18: kernels that do not compute what they could, by the judge's verdicts, and the settings that explain it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import Operation, tensors_in
from refimpl.parity.audit.origins import found
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.flow import LOW, finding_at, is_any
from refimpl.parity.audit.step import View
from refimpl.parity.audit.values import Values, is_float
from refimpl.parity.audit.verdict import LEAST_BITS, LEVELS, Verdict, ulp

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.mv", "aten.addmv", "aten.dot")
CONVOLUTIONS = ("aten.convolution", "aten.convolution_backward", "aten.mkldnn_convolution", "aten.cudnn_convolution")
SUMS_OF_GRADIENTS = (
    "aten.embedding_dense_backward", "aten.index_add", "aten.index_put", "aten.scatter_add", "aten._foreach_norm",
    "aten.native_layer_norm_backward", "aten._fused_rms_norm_backward", "aten.native_group_norm_backward",
    "aten.linalg_vector_norm",
)  # fmt: skip
"""What rules B14 and C6 to C8 are about."""
ROUNDED = 0.9
"""A kernel that rounds has a larger share of correctly rounded results than this."""
ALMOST_ALL = 0.99
FEWEST = 16
"""Results that are looked at for truncation, at least: of so many, half are truncated by no accident."""


class Truncation(NamedTuple):
    """Results of an operation that are not the correctly rounded ones, although a rounding is all that is between them.

    cut: the share that are the exact results with the surplus bits cut off. equal: the share that are the correctly rounded
    ones. outward: mean of |result| - |correctly rounded| in units in the last place.
    """

    elements: int
    cut: float
    equal: float
    outward: float


def truncation(values: Values) -> Truncation | None:
    """Measure whether 16-bit results are truncated; of unknown operations those that are casts or sums of their arguments."""
    verdicts = values.operation.verdicts
    if any(v.equal < ROUNDED and v.dtype in LOW for v in verdicts):
        twins = [(twin.actual, twin.exact) for twin in values.twins.values()]
    elif not verdicts and getattr(values.operation.overload, "namespace", "aten") not in ("aten", "c10d", "prims"):
        twins = list(_candidates(values))
    else:
        return None
    for actual, exact in twins:
        if actual.dtype in (torch.float16, torch.bfloat16) and actual.numel() >= FEWEST:
            measured = _truncation(actual, exact)
            if measured.cut > ALMOST_ALL and measured.equal < ROUNDED:
                return measured
    return None


def _candidates(values: Values) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the 16-bit results of an unknown operation, and what they may be of: an FP32 argument, or two 16-bit ones' sum."""
    given = [x for x in values.inputs.values() if is_float(x)]
    for _, result in values.results():
        if is_float(result) and result.dtype in (torch.float16, torch.bfloat16):
            like = [x for x in given if x.shape == result.shape and x is not result]
            yield from ((result, x.double()) for x in like if x.dtype == torch.float32)
            low = [x.double() for x in like if x.dtype == result.dtype]
            yield from ((result, a + b) for i, a in enumerate(low) for b in low[i + 1 :])


def _truncation(actual: Tensor, exact: Tensor) -> Truncation:
    nearest = exact.to(actual.dtype)
    # In sign and magnitude, the next number toward zero has a bit pattern one less.
    away = (nearest.double().abs() > exact.abs()) & nearest.isfinite()
    cut = (nearest.view(torch.int16) - away.to(torch.int16)).view(actual.dtype)
    spacing = ulp(exact.nan_to_num(0.0, 0.0, 0.0), actual.dtype)
    outward = ((actual.double().abs() - nearest.double().abs()) / spacing).nan_to_num(0.0, 0.0, 0.0)
    n = actual.numel()
    return Truncation(n, int((cut == actual).sum()) / n, int((nearest == actual).sum()) / n, float(outward.mean()))


PROBES: tuple[Probe, ...] = (truncation,)


# ------------------------------------------------------------------------------------------------- rules


@rule("D14", "truncation")
def truncated_results(view: View) -> Iterator[Finding]:
    """A kernel truncates instead of rounding to nearest.

    Seen: results that are the exact ones truncated; or, over at least 1000 results, a mean signed excess over correct rounding
    above a tenth of a unit in the last place.
    Number: both.
    Not reported: the excess that correct results have themselves: the comparison is with correct rounding, not with the exact
    value.
    Effect: half a unit per operation, always toward zero, which adds up over layers where rounding errors would cancel; every
    tolerance lets it pass.
    Fix: set the compiler's rounding mode for conversions, or use another kernel.
    Source: ROCm/aiter#5151 (a residual stream shrunk by 8.98 % after 36 layers), ROCm/flash-attention#78.
    """
    for o in _first_runs(view):
        cut: Truncation | None = o.probed.get("truncation")
        worst = next((v for v in o.verdicts if v.level == "biased"), None)
        if cut is not None:
            number = (
                f"{cut.cut:.1%} of {cut.elements:,} results are truncated, {cut.equal:.1%} correctly rounded: on average"
                f" {cut.outward:+.2f} units in the last place"
            )
        elif worst is not None and _rule_of(o, worst) == "D14":
            number = f"results are {worst.excess:+.2f} units in the last place beyond correct rounding on average"
        else:
            continue
        yield finding_at(
            view, o, "D14", truncated_results.name, "biased", number=f"{_short(o)}: {number}",
            effect="errors of one sign add up over layers and steps, where roundings to nearest cancel",
            fix="use a kernel that rounds to nearest: a compiler flag, or another backend",
        )  # fmt: skip


@rule("D15", "reduced-fp32-products")
def reduced_fp32_products(view: View) -> Iterator[Finding]:
    """Products of FP32 numbers have fewer bits than FP32: TF32, or one BF16 product.

    Seen: products with FP32 results of at most 18 effective bits, -log2(rms error / rms(|A||B| / sqrt K)).
    Number: these bits: FP32 products have 21 to 22 whatever K is, TF32 11.1, one BF16 product 8.1.
    Level: a note if a setting in force asks for it; the note names the setting.
    Effect: products have only TF32's or BF16's precision although all tensors are FP32.
    Fix: torch.set_float32_matmul_precision('highest'); torch.backends.cudnn.conv.fp32_precision = 'ieee'.
    Source: pytorch/pytorch#67384 (TF32 by default), #53635, #61890, #79270, jax-ml/jax#14022.
    """
    for o in _first_runs(view):
        for verdict in o.verdicts:
            if verdict.dtype == "float32" and verdict.bits is not None and verdict.bits <= LEAST_BITS:
                because = settings_for(o, FP32_PRODUCTS)
                yield finding_at(
                    view, o, "D15", reduced_fp32_products.name, "note" if because else "worse than it need be",
                    number=f"{_short(o)} of float32 numbers has {verdict.bits:.1f} effective bits (float32 21 to 22, TF32"
                    f" 11.1, one bfloat16 product 8.1){_because(because)}",
                    effect="products are less precise than their format says; this is fast, and may be intended",
                    fix="torch.set_float32_matmul_precision('highest'), torch.backends.cudnn.allow_tf32 = False",
                )  # fmt: skip


@rule("D16", "reduced-precision-reduction")
def reduced_reductions(view: View) -> Iterator[Finding]:
    """Sums inside 16-bit products are rounded to 16 bits on the way: split-K with 16-bit parts, or 16-bit accumulation.

    Seen: products with 16-bit results of which far fewer are correctly rounded than with FP32 sums, or that are outside their
    bound.
    Number: that share: FP32 sums leave 99.7 %, two 16-bit parts 63 %, four 50 %.
    Level: a note if a setting in force allows it, as PyTorch does by default on CUDA, or if a kernel of PyTorch is known for
    it.
    Effect: a product loses as many bits as it has 16-bit partial sums, at any K.
    Fix: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False (and allow_bf16_...).
    Source: PyTorch's documentation, notes/numerical_accuracy, 'Reduced Precision Reduction for FP16 and BF16 GEMMs'.
    """
    for o in _first_runs(view):
        worst = _worst(o, LOW)
        if worst is not None and _rule_of(o, worst) == "D16":
            because = settings_for(o, REDUCTIONS)
            expected = f", where FP32 sums leave {worst.expected:.1%}" if worst.expected is not None else ""
            yield finding_at(
                view, o, "D16", reduced_reductions.name, "note" if because else worst.level,
                number=f"{worst.equal:.1%} of the results of {_short(o)} ({worst.dtype}) are correctly rounded{expected}"
                f"{_because(because)}{_known(worst)}",
                effect="partial sums are rounded to 16 bits, which costs bits at any length",
                fix="torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False, and allow_bf16_...",
            )  # fmt: skip


@rule("D17", "attention-kernel")
def attention_kernel(view: View) -> Iterator[Finding]:
    """An attention kernel has errors beyond its bound, or errors of one sign.

    Seen: a verdict above 'fine' for fused attention, forward or backward.
    Number: the error relative to its bound, and the mean signed excess.
    Not reported: what PyTorch's kernels are known for, such as the CPU's fast exp in 16 bits (a note).
    Effect: errors of one sign in P V, or in dQ, add up over steps until the loss diverges.
    Fix: try another backend, torch.nn.attention.sdpa_kernel(SDPBackend.MATH), to see whether the error disappears.
    Source: arXiv 2510.04212 (biased rounding in flash attention with bf16), Dao-AILab/flash-attention#2151, #2721.
    """
    for o in _first_runs(view):
        worst = _worst(o)
        if worst is not None and _rule_of(o, worst) == "D17":
            yield finding_at(
                view, o, "D17", attention_kernel.name, worst.level,
                number=f"{_short(o)}: {worst.reason}; on average {worst.excess:+.2f} units in the last place"
                f" beyond correct rounding{_known(worst)}",
                effect="attention and its gradients are off in one direction, which adds up over steps",
                fix="try another backend: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
            )  # fmt: skip


@rule("D18", "kernel-rounds-inside")
def kernel_rounds_inside(view: View) -> Iterator[Finding]:
    """A kernel's result is outside the bound of one rounding: the kernel rounds to 16 bits inside, or is wrong.

    Seen: a verdict above 'fine' for an operation that is neither a product nor attention.
    Number: the error relative to its bound, and the share of correctly rounded results.
    Not reported: PyTorch kernels that are known for it (a note that says what they do): on the CPU, pow(x, 3) and sums with a
    number in bf16, square roots in FP32. Sums of gradients have rules of their own (C6 to C8, B14), and so have updates (A).
    Effect: an operation has two 16-bit roundings instead of one; if it is proved wrong and nothing explains it, it may be a bug
    in the kernel.
    Fix: compute it in FP32, or with other operations (x * x * x in FP32).
    Source: measured with PyTorch 2.13 on the CPU; elanapearl.github.io on MPS's addcmul_, for a kernel that was wrong.
    """
    noted: dict[tuple[str, str], tuple[Operation, Verdict]] = {}
    count = 0
    for o in _first_runs(view):
        worst = _worst(o)
        if worst is None or _rule_of(o, worst) != "D18":
            continue
        if worst.level == "note":
            noted.setdefault((_short(o), worst.dtype), (o, worst))
            count += 1
            continue
        yield finding_at(
            view, o, "D18", kernel_rounds_inside.name, worst.level,
            number=f"{_short(o)} ({worst.dtype}): error {worst.ratio:.3g} times its bound, {worst.equal:.1%} correctly rounded"
            f"{_known(worst)}",
            effect="the result has a larger error than its format and one rounding explain",
            fix="compute it in float32, or with other operations; report it if nothing explains it",
        )  # fmt: skip
    if noted:
        o, _ = next(iter(noted.values()))
        kernels = (f"{name} ({dtype}), {v.equal:.1%} correctly rounded: {v.note}" for (name, dtype), (_, v) in noted.items())
        note = finding_at(
            view, o, "D18", kernel_rounds_inside.name, "note", number="; ".join(kernels),
            effect="known of these kernels of PyTorch: an operation costs more than one rounding",
            fix=f"compute it in {_wider(dtype for _, dtype in noted)}, or with other operations, if it matters",
        )  # fmt: skip
        yield replace(note, places=count)


# ------------------------------------------------------------------------------------------------- verdicts and settings


def _first_runs(view: View) -> Iterator[Operation]:
    """Yield the operations with verdicts or measured truncation; not recomputed ones, nor those with Inf or NaN (D7 to D11)."""
    for o in view.step.operations:
        if not o.recomputed and found(o) is None and (o.verdicts or "truncation" in o.probed):
            yield o


def _worst(operation: Operation, formats: tuple[str, ...] = ()) -> Verdict | None:
    """Return the worst verdict over an operation's results that is not fine."""
    verdicts = [v for v in operation.verdicts if v.level != "fine" and (not formats or v.dtype in formats)]
    return min(verdicts, key=lambda v: (LEVELS.index(v.level), -v.ratio), default=None)


def _rule_of(operation: Operation, verdict: Verdict) -> str:
    """Return the code of the rule that a verdict which is not fine belongs to, '' if it is one of another group."""
    if "attention" in operation.name:
        return "D17"
    if "truncation" in operation.probed or verdict.level == "biased":
        return "D14"
    if verdict.dtype == "float32" and verdict.bits is not None and verdict.bits <= LEAST_BITS:
        return "D15"
    if verdict.dtype in LOW and is_any(operation, (*PRODUCTS, *CONVOLUTIONS)):
        return "D16"
    return "" if is_any(operation, SUMS_OF_GRADIENTS) or _updates(operation) else "D18"


def _short(operation: Operation) -> str:
    return operation.name.rpartition(".")[0]


def _updates(operation: Operation) -> bool:
    """Return whether an operation of the optimizer writes parameters, which is rules A's."""
    written = (t for name in operation.written for t in tensors_in(operation.arguments[name]))
    return operation.phase == "step" and any(t.role is not None and t.role.kind == "parameter" for t in written)


def _wider(formats: Iterable[str]) -> str:
    """Return the format in which an operation of these formats would have no error that matters."""
    return "float32" if any(dtype in LOW for dtype in formats) else "float64"


def _known(verdict: Verdict) -> str:
    return f"; {verdict.note}" if verdict.note else ""


def _because(settings: list[str]) -> str:
    return f"; allowed by {', '.join(settings)}" if settings else ""


Setting = tuple[str, str, Callable[[], bool]]
"""(device it is for, how it is written, whether it is on)."""


def _cuda() -> object:
    return torch.backends.cuda.matmul


FP32_PRODUCTS: tuple[Setting, ...] = (
    ("cuda", "float32_matmul_precision", lambda: torch.get_float32_matmul_precision() != "highest"),
    ("cpu", "float32_matmul_precision", lambda: torch.get_float32_matmul_precision() == "medium"),
    ("cuda", "backends.cuda.matmul.fp32_precision", lambda: getattr(_cuda(), "fp32_precision", "") == "tf32"),
    ("cuda", "backends.cudnn.allow_tf32", lambda: bool(torch.backends.cudnn.allow_tf32)),
    ("cpu", "backends.mkldnn.matmul.fp32_precision", lambda: _mkldnn() in ("bf16", "tf32")),
    ("cpu", "ONEDNN_DEFAULT_FPMATH_MODE", lambda: os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT").upper() != "STRICT"),
    ("cuda", "NVIDIA_TF32_OVERRIDE", lambda: os.environ.get("NVIDIA_TF32_OVERRIDE") == "1"),
)  # fmt: skip
REDUCTIONS: tuple[Setting, ...] = (
    ("cuda", "allow_fp16_reduced_precision_reduction", lambda: bool(_cuda().allow_fp16_reduced_precision_reduction)),  # type: ignore[attr-defined]
    ("cuda", "allow_bf16_reduced_precision_reduction", lambda: bool(_cuda().allow_bf16_reduced_precision_reduction)),  # type: ignore[attr-defined]
    ("cuda", "allow_fp16_accumulation", lambda: bool(_cuda().allow_fp16_accumulation)),  # type: ignore[attr-defined]
)  # fmt: skip


def _mkldnn() -> str:
    return str(getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", ""))


def settings_for(operation: Operation, settings: tuple[Setting, ...]) -> list[str]:
    """Return the settings in force that allow an operation on its device to be less precise."""
    device = next((t.device.partition(":")[0] for t in tensors_in(operation.outputs)), "")
    convolution = is_any(operation, CONVOLUTIONS)
    return [
        name for where, name, is_on in settings
        if where == device and ("cudnn" not in name or convolution) and _reads(is_on)
    ]  # fmt: skip


def _reads(is_on: Callable[[], bool]) -> bool:
    try:
        return is_on()
    except (RuntimeError, AttributeError):  # PyTorch refuses to read a setting that was set in the other of its two ways
        return False
