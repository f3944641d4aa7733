"""Rules B: loss scale, unscaling, clipping, and the schedule of skipped steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from refimpl.parity.audit.factors import UPDATE_SCALE, Event, GradientHistory, history_of, scalars, short
from refimpl.parity.audit.finding import Finding
from refimpl.parity.audit.operation import TensorFacts, tensors_in
from refimpl.parity.audit.origins import all_finite, origin_of
from refimpl.parity.audit.rules.entry import Probe, rule
from refimpl.parity.audit.rules.overflow import rule_of
from refimpl.parity.audit.step import Border, Step, View
from refimpl.parity.audit.values import Values, is_float

ENOUGH_FLUSHED = 0.01
"""The share of FP16 gradients flushed to 0 above which a loss scale is missed."""
FP16_MAX = 65504.0
MANY_SKIPS = 10


# ------------------------------------------------------------------------------------------------- probes


def gradient_health(values: Values) -> int | None:
    """Count the elements that are not finite among the gradients that an update reads."""
    operation = values.operation
    if operation.phase not in ("step", "other") or not operation.written:
        return None
    pairs = _paired(tuple(operation.arguments.values()), tuple(values.inputs.values()))
    gradients = [x for facts, x in pairs if facts.role is not None and facts.role.kind == "gradient" and is_float(x)]
    return sum(int((~x.isfinite()).sum()) for x in gradients if not all_finite(x)) if gradients else None


def flushes(values: Values) -> dict[str, Any] | None:
    """Count the FP16 gradients of a backward operation whose value in FP64 is not 0 and that are stored as 0.

    exponents: how many powers of two the largest one lies below the least that FP16 keeps.
    """
    if values.operation.phase != "backward":
        return None
    lost = whole = 0
    below = 0.0
    for twin in values.twins.values():
        if twin.actual.dtype == torch.float16:
            flushed = (twin.actual == 0) & (twin.exact != 0)
            whole += int((twin.exact != 0).sum())
            count = int(flushed.sum())
            lost += count
            if count:
                sizes = twin.exact[flushed].abs()
                below = max(below, -math.log2(float(sizes.median())) - 25)
    return {"flushed": lost, "of": whole, "powers": math.ceil(below)} if whole else None


def norms(values: Values) -> dict[str, float] | None:
    """Measure a norm: the largest input, the result, and the norm in FP64."""
    if short(values.operation) not in ("linalg_vector_norm", "norm") or not is_float(values.output):
        return None
    x: Any = values.inputs.get("self")
    if values.output.numel() != 1 or not is_float(x) or not x.numel():
        return None
    result = float(values.output)
    if math.isfinite(result):
        return None
    return {"largest": float(x.abs().max()), "result": result, "exact": float(x.double().norm())}


PROBES: tuple[Probe, ...] = (scalars, gradient_health, flushes, norms)


# ------------------------------------------------------------------------------------------------- order and factors


@rule("B1", "unscale-after-clip")
def clip_before_unscale(view: View) -> Iterator[Finding]:
    """Gradients are clipped while they still carry the loss scale.

    Seen: a norm of gradients that carry S, a product with a coefficient below 1, and then a division by S, separate or inside a
    fused optimizer.
    Not reported: a norm that is only logged; a check with inv_scale 1; a coefficient of 1; a division of a later update's
    gradients.
    Effect: the threshold is S times too small, so every step is clipped to max_norm / S.
    Fix: `scaler.unscale_(optimizer)` before clipping.
    Source: Lightning-AI/pytorch-lightning#9599, pytorch/examples#1196, milesial/Pytorch-UNet#468.
    """
    history = history_of(view.step)
    unscales = history.unscales()
    for clip in history.of("multiply", "clamp"):
        norm = _before(history, clip, "norm")
        later = [u for u in unscales if _index(u) > _index(clip) and set(u.names) & set(clip.names)]
        later = [u for u in later if not _updated_between(history, clip, u)]
        if later and clip not in unscales and clip.factor < 1 and norm is not None and math.isfinite(norm.value):
            S = history.scale
            seen = f"clipping saw a norm of {norm.value:.3g} = {S:g} x {norm.value / S:.3g}"
            number = f"{seen} and multiplied by {clip.factor:.2g}"
            effect = f"the threshold is {S:g} times too small: updates shrink by as much"
            yield _finding("B1", view, clip, "wrong", number, effect, "call scaler.unscale_(optimizer) before clipping")
            return
        if later and clip.kind == "clamp":
            number = f"values were clipped while they carried the loss scale, {history.scale:g}"
            effect = f"the threshold is {history.scale:g} times too small"
            yield _finding("B1", view, clip, "wrong", number, effect, "call scaler.unscale_(optimizer) before clipping")
            return


@rule("B2", "unscale-twice")
def unscaled_twice(view: View) -> Iterator[Finding]:
    """Gradients are divided by the loss scale twice.

    Seen: the same gradients are divided by S twice between backward and the update, by GradScaler, by hand, or in a fused
    optimizer; or they are divided before the last micro-batch, so that the next one adds scaled gradients to unscaled ones, and
    the sum is divided again or used in the update as it is.
    Not reported: gradients that are cleared or used in an update before more is added, as in a GAN; a backward pass without the
    scale after the division.
    Effect: gradients are S times too small, which Adam hides except for eps; the contributions of the first micro-batches are
    lost.
    Fix: divide once, after the last micro-batch.
    Source: PyTorch, `GradScaler.unscale_`: once per optimizer and step, after all gradients have accumulated.
    """
    history = history_of(view.step)
    S, unscales, fix = history.scale, history.unscales(), "unscale once, after the last backward of the step"
    for mixture in history.mixtures:
        again = history.divides(mixture.end.factor)
        added = "again after the next had been added to them", "scaled gradients were added to them before the update"
        number = f"gradients were divided by {S:g} after a micro-batch, and {added[0 if again else 1]}"
        effect = f"earlier micro-batches count 1/{S:g} of the last one" + ("" if again else f", which is {S:g} times too large")
        yield _finding("B2", view, mixture.end if again else mixture.division, "wrong", number, effect, fix)
        return
    for i, second in enumerate(unscales):
        first = next((u for u in reversed(unscales[:i]) if set(u.names) & set(second.names)), None)
        if first is not None and not _backward_between(history, first, second):
            number = f"gradients were divided by {S:g} twice: {_where(first)} and {_where(second)}"
            effect = f"gradients are {S:g} times too small; Adam hides this, except for eps"
            yield _finding("B2", view, second, "wrong", number, effect, fix)
            return


@rule("B3", "no-unscale")
def never_unscaled(view: View) -> Iterator[Finding]:
    """The optimizer is given gradients that still carry the loss scale.

    Seen: an update reads gradients that are multiplied by S, without `grad_scale`, or by S and the coefficient of PyTorch's
    clipping. It is a note if the scale is applied by hand and gradients are clipped: such a scale may be the weight of a loss,
    which Adam and the clipped norm hide.
    Not reported: fused optimizers that unscale.
    Effect: Adam hides the factor, but eps, SGD's weight decay and every clipping threshold are off by S, and an overflow is not
    skipped.
    Fix: `scaler.step(optimizer)` instead of `optimizer.step()`.
    Source: PyTorch, 'Automatic Mixed Precision examples', working with unscaled gradients.
    """
    history = history_of(view.step)
    if history.scale == 1 or history.unscales():
        return
    S = history.scale
    for update in history.of("update"):
        clips = [clip for clip in _clips(history, update) if clip.factor != 1]
        kept = math.prod(clip.factor for clip in clips)
        if not (kept > 0 and math.isclose(update.carried, S * kept, rel_tol=1e-5)):
            continue
        if update.factor == 1 and not _rescaled(history, update):
            number = f"the update read gradients that carry the loss scale, {S:g}"
            effect = f"gradients are {S:g} times too large: eps, clipping and SGD's rate are off by as much"
            fix = "divide the gradients by the scale before the step" if history.by_hand else "call scaler.step(optimizer)"
            norm = _before(history, clips[0], "norm") if clips else None
            if norm is not None:
                number += f"; clipping saw a norm of {norm.value:.3g} = {S:g} x {norm.value / S:.3g}"
                effect = f"the clipping threshold is {S:g} times too small: small gradients are clipped as if they were large"
                unscale = "call scaler.unscale_(optimizer) before clipping, and scaler.step(optimizer) after it"
                fix = "divide the gradients by the scale before clipping" if history.by_hand else unscale
            yield _finding("B3", view, update, "note" if clips and history.by_hand else "wrong", number, effect, fix)
            return


@rule("B18", "unscale-by-updated-scale")
def unscaled_by_another_scale(view: View) -> Iterator[Finding]:
    """Gradients are divided by another loss scale than they were multiplied by.

    Seen: a division by the scale after `update()`, which differs from the S of the backward pass.
    Effect: whenever the scale changes, one step is twice as large or half as large as it should be.
    Fix: divide before `update()`, or keep the scale of the backward pass.
    Source: deepspeedai/DeepSpeed#8588.
    """
    history, after = history_of(view.step), view.step.after
    new = after.scale if after is not None else None
    if new is None or history.scale == 1 or new == history.scale:
        return
    for event in history.of("multiply"):
        if math.isclose(event.factor * new, 1.0, rel_tol=1e-5):
            number = f"gradients that carry {history.scale:g} were divided by {new:g}"
            effect = f"this step is {history.scale / new:g} times too large"
            yield _finding("B18", view, event, "wrong", number, effect, "unscale before scaler.update()")
            return


@rule("B4", "ignore-inf")
def update_with_non_finite(view: View) -> Iterator[Finding]:
    """The optimizer steps with gradients that are Inf or NaN.

    Seen: an update that reads such elements. It is a note if another rule names their cause (D7 to D11), since skipping would
    not help then.
    Not reported: a fused optimizer that is handed found_inf = 1 and does nothing.
    Effect: moments and weights become NaN and stay NaN.
    Fix: `scaler.step(optimizer)`, or skip the step if a gradient is not finite.
    Source: Micikevicius et al. 2018, section 3.2 (https://arxiv.org/abs/1710.03740).
    """
    for update in history_of(view.step).of("update"):
        operation = update.operation
        bad = operation.probed.get("gradient_health", 0) if operation is not None else 0
        if bad and not update.value > 0:
            number = f"{bad} gradient elements that are Inf or NaN went into the update of {_some(update.names)}"
            effect = "moments and weights become NaN and stay NaN"
            fix = "skip the step, as scaler.step(optimizer) does, or check torch.isfinite of the gradients' norm"
            yield _finding("B4", view, update, "note" if _is_named(view) else "wrong", number, effect, fix)
            return


def _is_named(view: View) -> bool:
    """Return whether another rule (D7 to D11) names what makes Inf or NaN in the step, or it was there before."""
    origin = origin_of(view.step)
    return origin is not None and (origin.operation is None or rule_of(view, origin) != "")


# ------------------------------------------------------------------------------------------------- skipped steps


@rule("B5", "scheduler-steps-on-skip", steps=2)
def scheduler_on_skipped_step(view: View) -> Iterator[Finding]:
    """The learning-rate schedule advances in a step that the loss scale skipped.

    Seen: found_inf is set, there is no update, and a scheduler's `last_epoch` grew; PyTorch then warns about the order of
    calls. It is a note if there is no scheduler but the rate of the next step differs, as in a loop that sets the rate by hand
    from its count of steps.
    Effect: skipped steps shorten the warm-up; they are common at the start, so the first rates are never used.
    Fix: step the scheduler only if the scale has not fallen. A schedule by samples may want this: ignore the finding then.
    Source: pytorch/pytorch#55585, #44511, huggingface/transformers#11144.
    """
    before, after = view.step.before, view.step.after
    number = _rate_went_on(view)
    if number:
        yield _of_step("B5", view, "note", number, "skipped steps use up the warm-up", "count updates, not steps")
    if after is None or not _skipped(view.step):
        return
    moved = [b - a for a, b in zip(before.schedulers, after.schedulers, strict=False)]
    if any(n > 0 for n in moved):
        rates = f"{_rate(before):.3g} to {_rate(after):.3g}"
        number = f"the step was skipped, but the scheduler advanced: lr from {rates}"
        fix = "call scheduler.step() only if scaler.get_scale() has not fallen"
        yield _of_step("B5", view, "worse than it need be", number, "skipped steps use up the warm-up", fix)


@rule("B6", "ema-on-skip", steps=2)
def average_on_skipped_step(view: View) -> Iterator[Finding]:
    """The average of the weights is updated in a step that was skipped.

    Seen: found_inf is set, there is no update, and a later operation writes to the average.
    Effect: the average forgets at every step, although nothing new is added: it is shorter than its decay says.
    Fix: update the average only if the optimizer has stepped.
    Source: PyTorch, `GradScaler.step`: a skipped step changes no weight.
    """
    history = history_of(view.step)
    if not history.found_inf or _updated(history):
        return
    last = max((_index(event) for event in history.of("unscale", "check")), default=0)
    for operation in view.step.operations:
        written = (t for name in operation.written for t in tensors_in(operation.arguments[name]))
        if operation.index > last and any(t.role is not None and t.role.kind == "ema" for t in written):
            number = "the step was skipped, and the EMA was updated with unchanged weights"
            event = Event("ema", (), 1.0, 1.0, math.nan, operation, operation.line)
            fix = "update the EMA only when the optimizer has stepped"
            effect = "the average is shorter than its decay says"
            yield _finding("B6", view, event, "worse than it need be", number, effect, fix)
            return


@rule("B7", "scale-never-backs-off", steps=2)
def scale_stays_after_overflow(view: View) -> Iterator[Finding]:
    """The loss scale does not fall after an overflow.

    Seen: found_inf is set, and the scale is the same after the step.
    Not reported: a fixed scale without a check, which is a choice.
    Effect: the same overflow happens again, and every step from here on is skipped.
    Fix: `scaler.update()` once per step.
    Source: PyTorch, `GradScaler.update`: the scale is multiplied by backoff_factor after a skipped step.
    """
    before, after = view.step.before, view.step.after
    history = history_of(view.step)
    if after is None or before.scale is None or after.scale is None or not history.found_inf:
        return
    if after.scale >= before.scale:
        updates = sum(o.name.startswith(UPDATE_SCALE) for o in view.step.operations)
        why = "scaler.update() was not called" if not updates else "scaler.update() did not lower it"
        number = f"the gradients overflowed at a scale of {before.scale:g}, and {why}"
        fix = "call scaler.update() at the end of each step" if not updates else "give the scaler a backoff_factor below 1"
        yield _of_step("B7", view, "wrong", number, "the next steps overflow and are skipped too", fix)


@rule("B8", "scale-collapse", steps=2)
def scale_collapses(view: View) -> Iterator[Finding]:
    """The loss scale keeps falling.

    Seen: a scale below 1 after an overflow, or more than 10 audited skips in a row. It is a note if another rule names the
    cause of Inf or NaN.
    Number: where Inf or NaN begins, and whether a scale helps.
    Effect: no step is made; below 2^-14, gradients that are not Inf vanish.
    Fix: repair the operation where Inf or NaN begins, which no scale prevents (finding D11 or D9), and set a floor for the
    scale.
    Source: pytorch/pytorch#40497, OpenNMT/OpenNMT-py#1724.
    """
    after = view.step.after
    if after is None or after.scale is None or not history_of(view.step).found_inf:
        return
    skips = 1 + sum(1 for _ in _leading_skips(view))
    if after.scale < 1 or skips > MANY_SKIPS:
        origin = origin_of(view.step)
        why = f": {origin.sentence}; {origin.remedy}" if origin is not None else ""
        number = f"the scale is {after.scale:.3g} after {skips} skipped steps in a row{why}"
        fix = "repair the operation where Inf or NaN begins, if lowering the scale does not help; set a floor of 1"
        yield _of_step("B8", view, "note" if _is_named(view) else "wrong", number, "no further step is made", fix)


def _leading_skips(view: View) -> Iterator[int]:
    for earlier in reversed(view.earlier):
        if not history_of(earlier).found_inf:
            return
        yield earlier.number


# ------------------------------------------------------------------------------------------------- whether a scale is there


@rule("B9", "no-loss-scale")
def fp16_without_scale(view: View) -> Iterator[Finding]:
    """FP16 gradients are computed without a loss scale, and vanish.

    Seen: with S = 1, at least 1 % of the FP16 results of backward that are not 0 in FP64 are 0.
    Effect: weights whose gradients are flushed to zero do not train.
    Fix: `torch.amp.GradScaler`.
    Source: Micikevicius et al. 2018, section 3.2 (https://arxiv.org/abs/1710.03740).
    """
    if history_of(view.step).scale != 1:
        return
    counts = [(o, o.probed["flushes"]) for o in view.step.operations if "flushes" in o.probed]
    lost, whole = sum(c["flushed"] for _, c in counts), sum(c["of"] for _, c in counts)
    if whole and lost > ENOUGH_FLUSHED * whole:
        operation, worst = max(counts, key=lambda pair: pair[1]["flushed"])
        kept = f"a scale of 2^{max(worst['powers'], 1)} would keep half of them"
        number = f"{lost / whole:.1%} of {whole} FP16 gradients became 0; {kept}"
        event = Event("backward", (), 1.0, 1.0, math.nan, operation, operation.line)
        fix = "scale the loss: torch.amp.GradScaler, or train in bfloat16"
        yield _finding("B9", view, event, "wrong", number, "weights whose gradients are flushed to 0 do not train", fix)


@rule("B10", "loss-scale-on-bf16")
def useless_scale(view: View) -> Iterator[Finding]:
    """A loss scale is used although nothing is computed in FP16.

    Seen: an enabled GradScaler in a step without any FP16 tensor.
    Effect: none on the numbers, but it costs a pass over the gradients.
    Fix: leave it out: bfloat16 has FP32's range.
    Source: PyTorch, torch.amp: gradient scaling is for float16.
    """
    if view.step.before.scale is None or not history_of(view.step).events:
        return
    if not any(t.dtype == "float16" for o in view.step.operations for t in tensors_in(o.outputs)):
        number = f"a loss scale of {view.step.before.scale:g}, and no FP16 tensor in the step: 0 gradients flushed"
        yield _of_step("B10", view, "note", number, "none; a pass over the gradients is wasted", "GradScaler(enabled=False)")


@rule("B11", "scale-in-16-bits")
def scaled_loss_overflows(view: View) -> Iterator[Finding]:
    """The scaled loss overflows FP16.

    Seen: a product of one element whose operands are finite and whose FP16 result is Inf.
    Effect: every gradient is Inf or NaN; the scale falls until loss x S < 65504, far below what the gradients need.
    Fix: compute the loss in FP32: `loss.float()` before scaling.
    Source: espnet/espnet#3237.
    """
    for operation in view.step.operations:
        if short(operation) not in ("mul", "mul_", "div", "div_") or operation.phase == "backward":
            continue
        measured = operation.probed.get("scalars", {})
        result = next(tensors_in(operation.outputs), None)
        given = [v for name, v in measured.items() if name in ("self", "other")]
        number_given = operation.arguments.get("other")
        given += [float(number_given)] if isinstance(number_given, int | float) else []
        if result is None or result.dtype != "float16" or result.shape not in ((), (1,)) or len(given) < 2:
            continue
        if math.isinf(measured.get("out", 0.0)) and all(math.isfinite(v) for v in given):
            number = f"loss x S = {given[0]:.4g} x {given[1]:.4g} = {given[0] * given[1]:.4g} > {FP16_MAX:g}: Inf in FP16"
            event = Event("loss", (), 1.0, 1.0, math.nan, operation, operation.line)
            effect = "every gradient is Inf or NaN, whatever its unscaled value"
            yield _finding("B11", view, event, "wrong", number, effect, "scale the loss in FP32: loss.float()")
            return


@rule("B12", "scaler-not-restored")
def scaler_not_restored(view: View) -> Iterator[Finding]:
    """A resumed run starts with a new GradScaler.

    Seen: in the first step, the optimizer has already counted updates, while scale and growth tracker are those of a new
    scaler.
    Effect: the scale that the run had found is lost, so the first steps overflow and are skipped.
    Fix: save and load `scaler.state_dict()` along with the optimizer's.
    Source: huggingface/transformers#34053, accelerate#4289, facebookresearch/metaseq#3.
    """
    before = view.step.before
    updates = max((t for o in before.optimizers for t in o.updates.values()), default=0.0)
    new = before.scale is not None and before.scale == before.initial_scale and before.growth_tracker == 0
    if new and updates > 0 and view.step.number == 1:
        number = f"the optimizer has made {updates:g} updates, and the scaler none: its scale is still {before.scale:g}"
        fix = "save scaler.state_dict() in the checkpoint, and load it"
        yield _of_step("B12", view, "worse than it need be", number, "the first steps may overflow and be skipped", fix)


@rule("B13", "fp16-gradients-to-unscale", unended=True)
def fp16_parameters(view: View) -> Iterator[Finding]:
    """A GradScaler is asked to unscale FP16 gradients.

    Seen: an enabled GradScaler, and an optimizer with trainable FP16 parameters: unscale_ raises ValueError.
    Effect: the step ends with 'Attempting to unscale FP16 gradients.'
    Fix: keep trained parameters in FP32 and let autocast round them: `p.data = p.data.float()` for each of them.
    Source: huggingface/diffusers#6442, peft#341, transformers#30559.
    """
    if view.step.before.scale is None:
        return
    low = {n: p for n, p in view.parameters.items() if p.dtype == "float16" and p.requires_grad and p.groups}
    if low and history_of(view.step).scale != 1:
        elements = sum(math.prod(p.shape) for p in low.values())
        number = f"{len(low)} trained parameters with {elements} elements are FP16: {_some(low)}"
        fix = "keep them in FP32: p.data = p.data.float() for each parameter that is trained"
        yield _of_step("B13", view, "wrong", number, "GradScaler refuses FP16 gradients with a ValueError", fix)


# ------------------------------------------------------------------------------------------------- clipping


@rule("B14", "norm-overflows")
def norm_overflows(view: View) -> Iterator[Finding]:
    """The norm of the gradients overflows although the gradients are finite.

    Seen: a norm of finite elements that is Inf or NaN.
    Effect: the clip coefficient is max_norm / Inf = 0: the update is 0, or NaN where a gradient is Inf.
    Fix: compute the norm in FP32, of unscaled gradients.
    Source: zhuchen03/FreeLB#8, pytorch/pytorch#43211.
    """
    for operation in view.step.operations:
        measured = operation.probed.get("norms") if operation.phase not in ("forward", "backward") else None
        event = Event("norm", (), 1.0, 1.0, math.nan, operation, operation.line)
        if measured is not None and math.isfinite(measured["largest"]) and math.isfinite(measured["exact"]):
            largest, exact = measured["largest"], measured["exact"]
            number = f"the norm of finite gradients (largest {largest:.3g}) is {measured['result']}, and {exact:.4g} in FP64"
            effect = "clipping multiplies by 0, and the step is lost"
            yield _finding("B14", view, event, "wrong", number, effect, "take the norm in FP32, after unscaling")
            return


@rule("B15", "clip-in-parts")
def clipped_in_parts(view: View) -> Iterator[Finding]:
    """Parts of the gradients are clipped by their own norms, or not at all.

    Seen: several coefficients for different parameters in one step, or gradients of the update that no coefficient multiplied.
    Effect: the direction of the update changes, and if each rank clips by itself, the replicas drift apart. Clipping per group
    on purpose is a note.
    Fix: one norm over all parameters (and all ranks).
    Source: bigscience-workshop/Megatron-DeepSpeed, microsoft/DeepSpeed#1801.
    """
    history = history_of(view.step)
    clips = [e for e in history.of("multiply") if e.factor < 1 and e.operation is not None and not history.divides(e.factor)]
    clips = [e for e in clips if _before(history, e, "norm") is not None]
    clipped = {name for e in clips for name in e.names}
    if not clips or history.found_inf:
        return
    factors: dict[str, float] = {}
    for event in clips:
        for name in event.names:
            factors[name] = factors.get(name, 1.0) * event.factor
    spared = [n for n, p in view.parameters.items() if p.groups and p.requires_grad and n not in clipped and _had(history, n)]
    if len({f"{f:.5g}" for f in factors.values()}) > 1 or spared:
        told = f"coefficients from {min(factors.values()):.3g} to {max(factors.values()):.3g}"
        number = f"{told}; {len(spared)} parameters were not clipped" if spared else f"{told} in one step"
        effect = "parts of the update are scaled differently"
        yield _finding("B15", view, clips[0], "note", number, effect, "clip_grad_norm_ once, over all parameters")


@rule("B16", "scale-updated-twice")
def scale_updated_twice(view: View) -> Iterator[Finding]:
    """A loss scale is updated more than once in a step.

    Seen: two updates of the same scale. Two scalers, as in a GAN, have two scales.
    Effect: the growth interval is halved, and after an overflow the second update grows a scale that should not grow.
    Fix: `scaler.update()` once, after all optimizers.
    Source: PyTorch, 'Automatic Mixed Precision examples', multiple models, losses and optimizers.
    """
    seen: dict[int | None, int] = {}
    for operation in view.step.operations:
        if operation.name.startswith(UPDATE_SCALE):
            storage = next(tensors_in(operation.arguments["self"])).storage
            seen[storage] = seen.get(storage, 0) + 1
            if seen[storage] == 2:
                event = Event("update", (), 1.0, 1.0, math.nan, operation, operation.line)
                number = "scaler.update() was called twice for one step"
                effect, fix = "the scale grows twice as often", "call scaler.update() once per step"
                yield _finding("B16", view, event, "worse than it need be", number, effect, fix)
                return


@rule("B17", "backward-in-autocast")
def backward_inside_autocast(view: View) -> Iterator[Finding]:
    """Backward runs inside the autocast context.

    Seen: autocast is on when backward is called.
    Not reported: checkpointing, which turns autocast on to recompute.
    Effect: FP32 operations of backward that have no counterpart in forward are cast to 16 bits.
    Fix: leave `with torch.autocast(...)` before `loss.backward()`.
    Source: PyTorch, torch.amp ('backward passes under autocast are not recommended'); pytorch/pytorch#120376.
    """
    calls = [call for call in view.step.calls if call.name == "backward" and call.autocast]
    if calls:
        times = "once" if len(calls) == 1 else f"{len(calls)} times"
        number = f"backward was called with autocast to {calls[0].autocast} on, {times} in this step"
        event = Event("backward", (), 1.0, 1.0, math.nan, None, calls[0].line)
        effect = "parts of backward and of the optimizer are rounded to 16 bits"
        yield _finding("B17", view, event, "worse than it need be", number, effect, "end the autocast context before backward")


# ------------------------------------------------------------------------------------------------- helpers


def _finding(code: str, view: View, event: Event, level: str, number: str, effect: str, fix: str) -> Finding:
    operation = event.operation
    module = operation.module if operation is not None else None
    index = operation.index if operation is not None else None
    return Finding(code, _NAMES[code], level, view.step.number, module, event.line, number, effect, fix, event.names, index)


def _of_step(code: str, view: View, level: str, number: str, effect: str, fix: str) -> Finding:
    """Return a finding about a whole step, at the line of its update, which runs operations even where it is skipped."""
    update = (o.line for o in reversed(view.step.operations) if o.phase == "step" and o.line)
    line = next(update, next((call.line for call in reversed(view.step.calls)), ""))
    return Finding(code, _NAMES[code], level, view.step.number, None, line, number, effect, fix)


def _index(event: Event) -> int:
    return event.operation.index if event.operation is not None else -1


def _before(history: GradientHistory, event: Event, kind: str) -> Event | None:
    """Return the last event of a kind before another one."""
    earlier = history.events[: next(i for i, e in enumerate(history.events) if e is event)]
    return next((e for e in reversed(earlier) if e.kind == kind and (kind != "norm" or not math.isnan(e.value))), None)


def _backward_between(history: GradientHistory, first: Event, second: Event) -> bool:
    at = [i for i, e in enumerate(history.events) if e is first or e is second]
    return any(e.kind == "backward" for e in history.events[at[0] : at[1]])


def _updated_between(history: GradientHistory, first: Event, second: Event) -> bool:
    """Return whether the gradients of an event were used in an update before another event."""
    updates = (e for e in history.of("update") if _index(first) < _index(e) < _index(second))
    return any(set(e.names) & set(first.names) for e in updates if not history.divides(e.factor))


def _clips(history: GradientHistory, update: Event) -> list[Event]:
    """Return the products of PyTorch's clipping with the first gradient of an update, before it."""
    products = (e for e in history.of("multiply") if e.operation is not None and e.operation.phase == "clip")
    return [e for e in products if update.names[0] in e.names and _index(e) < _index(update)]


def _rescaled(history: GradientHistory, update: Event) -> bool:
    """Return whether the gradients of an update were multiplied by something other than the clip coefficient of a norm."""
    names = set(update.names)
    return any(names & set(e.names) and e.operation is not None and e.operation.phase != "clip" for e in history.of("multiply"))


def _rate_went_on(view: View) -> str:
    """Return how the learning rate has changed after a step that was skipped, where no scheduler sets it; '' if it has not."""
    last, now = view.earlier[-1] if view.earlier else None, view.step.after
    if last is None or last.number != view.step.number - 1 or last.after is None or now is None or now.schedulers:
        return ""
    old, new = _rate(last.after), _rate(now)
    if old == new or not _skipped(last):
        return ""
    return f"step {last.number} was skipped, but the rate changed from {old:.3g} to {new:.3g} in the next one"


def _skipped(step: Step) -> bool:
    """Return whether a step found Inf or NaN, and made no update."""
    history = history_of(step)
    return bool(history.found_inf) and not _updated(history)


def _updated(history: GradientHistory) -> bool:
    """Return whether an update was made, not only called with found_inf."""
    return any(not update.value > 0 for update in history.of("update"))


def _had(history: GradientHistory, name: str) -> bool:
    return any(name in update.names for update in history.of("update"))


def _where(event: Event) -> str:
    return "in the optimizer's kernel" if event.kind == "update" else f"at {event.line.rpartition('/')[2]}"


def _rate(border: Border) -> float:
    return float(next((group["lr"] for o in border.optimizers for group in o.groups), math.nan))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] + (f" and {len(names) - 1} others" if len(names) > 1 else "") if names else "no parameter"


def _paired(facts: Any, value: Any) -> Iterator[tuple[TensorFacts, torch.Tensor]]:
    """Yield the tensors of an operation's arguments with their facts."""
    if isinstance(facts, TensorFacts) and isinstance(value, torch.Tensor):
        yield facts, value
    elif isinstance(facts, tuple) and isinstance(value, list | tuple):
        for fact, part in zip(facts, value, strict=False):
            yield from _paired(fact, part)


_NAMES = {
    each.code: each.name
    for each in (
        clip_before_unscale, unscaled_twice, never_unscaled, unscaled_by_another_scale, update_with_non_finite,
        scheduler_on_skipped_step, average_on_skipped_step, scale_stays_after_overflow, scale_collapses, fp16_without_scale,
        useless_scale, scaled_loss_overflows, scaler_not_restored, fp16_parameters, norm_overflows, clipped_in_parts,
        scale_updated_twice, backward_inside_autocast,
    )
}  # fmt: skip
