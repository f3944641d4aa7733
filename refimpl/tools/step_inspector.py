"""The `inspect_step` command: one element of one parameter in a training step, with every value, its format and its bits.

The step is `step.train_step` itself, run on a tiny model as scripts/train.py would run it. The report shows the states before
and after the step. Intermediate values (1/S, the clip coefficient, Adam's update) are computed from them by the functions
that the step calls; no arithmetic of the step is repeated here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.errors import UsageError, unknown
from refimpl.nn.shape import cast_forward
from refimpl.numerics.arrays import Array
from refimpl.numerics.bits import bit_string
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, digits, format_of, ulp
from refimpl.optim.gradients import check_and_measure, clip_coefficient, inverse_of
from refimpl.optim.state import State
from refimpl.precision.recipes import RECIPES
from refimpl.step import StepResult, forward_backward
from refimpl.tools.scale_remarks import explain
from refimpl.training.columns import whole_table
from refimpl.training.config import Config
from refimpl.training.console import json_text
from refimpl.training.data import sample_batch
from refimpl.training.flags import refuse_unused
from refimpl.training.non_finite import first_non_finite
from refimpl.training.setup import BATCHES, generator, start

PARAMETERS = {"gpt": "transformer.h.0.mlp.c_fc.weight", "llama": "model.layers.0.mlp.gate_proj.weight"}
"""The models -> the parameter that is shown if none is given."""
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4}
SCHEDULE_STEPS = 1000
FOLLOWED = tuple(name for name, recipe in RECIPES.items() if {*recipe.state_encodings().values()} <= {*FORMATS})
"""Recipes whose states are plain numbers of a format, each rounded to nearest."""
PATIENCE = 20
"""If no step is given: the number of skipped steps after which the next one is shown even if it is skipped."""

# ---------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Line:
    """One quantity. Values that are in no array (counts, exact differences, yes or no) have no bits, and no format but '%'."""

    key: str
    quantity: str
    value: float | int | bool
    format: str = ""
    bits: str = ""
    remark: str = ""

    @property
    def text(self) -> str:
        """Return the value as it is printed."""
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        if isinstance(self.value, int):
            return str(self.value)
        return f"{self.value:.1f}" if self.format == "%" else digits(self.value, self.format or "fp32")


@dataclass(frozen=True)
class Block:
    """One of the four numbered parts of a step, with the functions that compute it."""

    title: str
    sources: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Report:
    """One training step, for one element of one parameter."""

    recipe: str
    parameter: str
    index: tuple[int, ...]
    step: int
    skipped: bool
    skipped_before: int  # of the steps before it
    blocks: tuple[Block, ...]

    def __contains__(self, key: str) -> bool:
        return any(line.key == key for block in self.blocks for line in block.lines)

    def __getitem__(self, key: str) -> Line:
        """Return the line with a key."""
        return next(line for block in self.blocks for line in block.lines if line.key == key)


def _of(key: str, quantity: str, x: Array, remark: str = "") -> Line:
    """Return the line of a value in an array."""
    x = np.array(x)
    return Line(key, quantity, float(x), format_of(x), bit_string(x), remark)


def _cite(function: Callable[..., Any]) -> str:
    """Return where a function is defined: 'refimpl/optim/state.py:118 State.weights_down'."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    line = first + next(i for i, text in enumerate(lines) if text.lstrip().startswith("def "))  # decorators come before it
    return f"{function.__module__.replace('.', '/')}.py:{line} {function.__qualname__}"


# ---------------------------------------------------------------------------------------------------- the observed step


@dataclass(frozen=True)
class _Observed:
    """One step: the states before and after it, its result, and the parameter's 16-bit copy under autocast."""

    config: Config
    before: dict[str, Array]  # kind -> the whole parameter before the step; weights as forward and backward read them
    scale_before: Array
    t: int
    autocast_copy: Array | None
    result: StepResult
    state: State  # after the step, and after `weights_down` of the next one
    optimizer: Any
    loss_scale: Any


def inspect_steps(
    recipe: str = "fp16",
    parameter: str | None = None,
    index: Sequence[int] | None = None,
    step: int | None = None,
    steps: int = 1,
    seed: int = 0,
    lr: float = 3e-4,
    loss_scale: str | None = None,
    init_scale: float | None = None,
    model: str = "gpt",
) -> list[Report]:
    """Train a tiny model, and report on `steps` consecutive steps.

    model: one of PARAMETERS, which has the parameter by default.
    index: the element; by default (3, 5), or as near as the parameter's shape allows.
    step: the first step to report on, from 1; by default the first that is not skipped for an overflow.
    lr: the largest learning rate, reached after 20 updates of warm-up as in scripts/train.py.
    loss_scale: a key of `loss_scalers.SCALER_RULES`, 'dynamic', 'none' or a number; by default the recipe's. init_scale: the
    initial value of a dynamic one.
    Errors: UsageError for an unknown recipe, model or parameter, an index out of range, invalid numbers, or a recipe that is
    not in FOLLOWED.
    """
    for flag, value in (("--step", step), ("--steps", steps)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}: it must be at least 1")
    if model not in PARAMETERS:
        raise UsageError(unknown("model", model, PARAMETERS))
    last = (PATIENCE + 1 if step is None else step) + steps - 1
    given: dict[str, Any] = {"model": model, "recipe": recipe, "backend": "reference", **SIZES, "seed": seed, "lr": lr}
    given |= {"steps": max(SCHEDULE_STEPS, last), "loss_scale": loss_scale}
    if init_scale is not None:
        given["init_scale"] = init_scale
    refuse_unused(given)
    config = Config.of(given)
    if recipe not in FOLLOWED:
        stored = config.make_recipe().state_encodings()
        odd = ", ".join(f"{kind} as {kept}" for kind, kept in stored.items() if kept not in FORMATS)
        raise UsageError(f"recipe {recipe} stores {odd}, which this command cannot show: --help lists the recipes that it can")
    made, parameter = config.make_model(), PARAMETERS[model] if parameter is None else parameter
    parameter = made.tied.get(parameter, parameter)
    if parameter not in made.parameters:
        raise UsageError(unknown("parameter", parameter, made.parameters))
    at = _checked_index(parameter, index, made.parameters[parameter].shape)

    reports: list[Report] = []
    skipped = 0
    for number, observed in enumerate(_train(config, parameter), 1):
        element = _Element(observed, parameter, at)
        first = number >= step if step is not None else not element.skipped or number > PATIENCE
        if first or reports:
            reports.append(Report(recipe, parameter, at, number, element.skipped, skipped, element.blocks()))
        if len(reports) == steps:
            break
        skipped += element.skipped
    return reports


def _train(config: Config, parameter: str) -> Iterator[_Observed]:
    """Train, and yield after every step the data of a report on one parameter."""
    corpus, training = config.make_corpus(), start(config)
    state, scale = training.state, training.loss_scale
    batches = generator(config.seed, BATCHES)
    copies: list[Array] = []

    def monitor(site: str, x: Array, y: Array) -> None:
        """Keep the 16-bit copy that autocast makes of the parameter, by the operation at '<parameter>.<format>'."""
        if site.startswith(f"{parameter}.") and site.endswith(":cast.w"):
            copies.append(y)

    training.set_monitor(monitor)
    while True:
        copies.clear()
        before = {kind: state.layout.views(buffer)[parameter].copy() for kind, buffer in state.buffers.items()}
        scale_before, t = scale.scale.copy(), int(state.t)
        batch = sample_batch(corpus.train, config.batch_size, config.block_size, batches, config.no_target)
        result = training.step([batch])
        if "master" in before:
            before["weights"] = state.weight_views[parameter].copy()  # written by step 1, unchanged since
        state.weights_down()  # the next step begins with this; it makes the new copy available
        copy = copies[0] if copies else None
        yield _Observed(config, before, scale_before, t, copy, result, state, training.optimizer, scale)


def _checked_index(parameter: str, index: Sequence[int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    ranges = ", ".join(f"0..{n - 1}" for n in shape)
    if index is None:
        return tuple(min(i, n - 1) for i, n in zip((3, 5), shape, strict=False))
    if len(index) != len(shape):
        raise UsageError(f"--index has {len(index)} numbers: {parameter} has the shape {shape}, give {ranges}")
    if not all(0 <= i < n for i, n in zip(index, shape, strict=True)):
        given = ",".join(map(str, index))
        raise UsageError(f"--index {given} is out of range: {parameter} has the shape {shape}, give {ranges}")
    return tuple(index)


class _Element:
    """One element in an observed step: one block of lines per numbered part."""

    def __init__(self, observed: _Observed, parameter: str, at: tuple[int, ...]) -> None:
        self.observed, self.parameter, self.at = observed, parameter, at
        state = observed.state
        self.kind = "master" if "master" in state.formats else "weights"  # what the optimizer updates
        self.word = "master" if self.kind == "master" else "weight"
        self.math = state.math_format
        self.after = {kind: state.layout.views(buffer)[parameter] for kind, buffer in state.buffers.items()}
        self.skipped = bool(observed.result.skipped)
        self.S = float(observed.result.loss_scale)
        self.inverse_scale = inverse_of(observed.result.loss_scale)

    def old(self, kind: str) -> Array:
        """Return the element before the step."""
        return self.observed.before[kind][(*self.at, ...)]

    def new(self, kind: str) -> Array:
        """Return the element after the step."""
        return self.after[kind][(*self.at, ...)]

    @np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")
    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks of the four parts."""
        return self.weights_down(), self.forward_backward(), self.gradients_up(), self.update()

    # -- step 1 -----------------------------------------------------------------------------------------------------

    def weights_down(self) -> Block:
        old = self.old(self.kind)
        if self.kind == "master":
            lines = [_of("master", "master", old), *self._copy_lines(old, self.old("weights"), "copy")]
        else:
            lines = [_of("weight", "weight", old, "the weights are their own masters: nothing is rounded in this step")]
        return Block("1. weights down", (_cite(State.weights_down), _cite(cast)), tuple(lines))

    def _copy_lines(self, master: Array, copy: Array, quantity: str) -> list[Line]:
        fmt, exact = format_of(copy), float(master)
        lost, unit = float(copy) - exact, ulp(fmt, exact)
        remark = f"{lost / unit:+.4g} ulp, where 1 ulp of {fmt} at the {self.word} is {unit:.4g}"
        return [
            _of("copy", quantity, copy, _special(float(copy), fmt)),
            Line("rounding", "lost by rounding", lost, remark=remark if math.isfinite(lost) else "all: the value overflowed"),
        ]

    # -- step 2 -----------------------------------------------------------------------------------------------------

    def forward_backward(self) -> Block:
        """Return the block of part 2: the weight that forward reads, the loss, and the gradient."""
        observed, lines, sources = self.observed, [], [_cite(forward_backward)]
        if observed.autocast_copy is not None:
            sources.append(_cite(cast_forward))
            lines = self._copy_lines(self.old(self.kind), observed.autocast_copy[(*self.at, ...)], "copy, by autocast")
        scaled = self.new("grads")
        lines.append(_of("loss", "loss", observed.result.loss, "mean over the batch, nats per byte"))
        remark = "no loss scale: backward starts from 1" if self.S == 1 else "backward starts from S instead of 1"
        lines.append(_of("loss_scale", "loss scale S", observed.result.loss_scale, remark))
        special = _special(float(scaled), format_of(scaled))
        quantity = "gradient of the loss" if self.S == 1 else "gradient of S * loss"
        lines.append(_of("grad", quantity, scaled, special or "as backward leaves it in `grads`"))
        if self.S != 1:
            lines += self._without_scale()
        return Block("2. forward and backward", tuple(sources), tuple(lines))

    def _without_scale(self) -> list[Line]:
        """Return lines on the effect of the loss scale: the unscaled gradients rounded to the format of backward."""
        grads = self.after["grads"]
        copy = self.observed.autocast_copy
        fmt = format_of(grads) if copy is None else format_of(copy)
        unscaled = widen(grads, self.math) * self.inverse_scale
        rounded = cast(unscaled, fmt)
        magnitude, nonzero = abs(widen(rounded, "fp64")), (unscaled != 0) & np.isfinite(unscaled)
        flushed = int((nonzero & (magnitude == 0)).sum())
        subnormal = int((nonzero & (magnitude > 0) & (magnitude < FORMATS[fmt].smallest_normal)).sum())
        share = f"{subnormal} others become subnormal, of {grads.size} in this tensor"
        return [
            _of("without_scale", f"without S, in {fmt}", rounded[(*self.at, ...)], self._fate(unscaled, rounded, fmt)),
            Line("flushed_without_scale", "flushed without S", flushed, remark=share),
        ]

    def _fate(self, unscaled: Array, rounded: Array, fmt: str) -> str:
        """Return what would happen to the gradient without S; at best, since gradients before it would be rounded too."""
        exact, value = float(unscaled[self.at]), float(rounded[self.at])
        if not math.isfinite(exact):
            return "not known: the scaled gradient overflowed"
        if exact == 0:
            return "0 with S too"
        if value == 0:
            return f"flushed to zero: at most half of {fmt}'s smallest value, {FORMATS[fmt].smallest_subnormal:.4g}"
        if abs(value) < FORMATS[fmt].smallest_normal:
            return f"subnormal: off by {abs(value - exact) / abs(exact):.2%} at best"
        return "kept" if value == exact else f"kept, off by {(value - exact) / ulp(fmt, exact):+.4g} ulp"

    # -- step 3 -----------------------------------------------------------------------------------------------------

    def gradients_up(self) -> Block:
        """Return the block of part 3: gradients widened to FP32, checked, unscaled, and their norm."""
        result, state, stored = self.observed.result, self.observed.state, self.new("grads")
        g = widen(stored, self.math)
        widened = f"exact: {format_of(stored)} -> {self.math}" if format_of(stored) != self.math else "nothing to widen"
        where = f"a gradient of {first_non_finite(state)} is Inf or NaN" if self.skipped else "all gradients are finite"
        kept = "; stored in main_grads" if "main_grads" in self.after else ""
        lines = [
            _of("widened", "gradient, widened", g, widened),
            Line("found_inf", "found_inf", self.skipped, remark=where),
            _of("inverse_scale", "1/S", self.inverse_scale),
            _of("unscaled", "gradient, unscaled", g * self.inverse_scale, f"divided by S before the norm is computed{kept}"),
            _of("norm", "norm", result.grad_norm, f"of all {state.layout.size} unscaled gradients"),
        ]
        return Block("3. gradients up", (_cite(inverse_of), _cite(check_and_measure)), tuple(lines))

    # -- step 4 -----------------------------------------------------------------------------------------------------

    def update(self) -> Block:
        observed = self.observed
        rule, scale = observed.optimizer.rule, type(observed.loss_scale)
        sources = (clip_coefficient, observed.optimizer.update, rule.update_block, scale.update)
        title, lines = ("4. update: skipped", self._unchanged()) if self.skipped else ("4. update", self._updated())
        return Block(title, tuple(map(_cite, sources)), (*self._clipped(), *lines, self._scale_line()))

    def _coefficient(self) -> Array:
        max_norm = self.observed.config.clip or math.inf
        return widen(np.array(clip_coefficient(self.observed.result.grad_norm, max_norm)), self.math)

    def _clipped_gradient(self) -> Array:
        """Return the gradient as the update takes it: widened, divided by S and clipped."""
        return widen(self.new("grads"), self.math) * self.inverse_scale * self._coefficient()

    def _clipped(self) -> list[Line]:
        """Return lines on clipping, which a skipped step computes too."""
        coefficient = self._coefficient()
        clipping = f"min(1, {self.observed.config.clip:g} / (norm + 1e-6))" + ": not clipped" * (float(coefficient) == 1)
        unused = "not used: the update is skipped" if self.skipped else ""
        return [
            _of("clip", "clip coefficient", coefficient, clipping),
            _of("clipped", "gradient, clipped", self._clipped_gradient(), unused),
        ]

    def _unchanged(self) -> list[Line]:
        """Return lines on a skipped step: whether the states are as before."""
        lines = []
        for kind in (kind for kind in self.after if kind not in ("grads", "main_grads")):
            same = self.observed.before[kind].tobytes() == self.after[kind].tobytes()
            remark = "as before, like the whole tensor" if same else "CHANGED, though the update was skipped"
            lines.append(_of(f"{kind}_after", f"{kind} after", self.new(kind), remark))
        same = int(self.observed.state.t) == self.observed.t
        lines.append(Line("t", "updates made, t", int(self.observed.state.t), remark="as before" if same else "CHANGED"))
        return lines

    def _updated(self) -> list[Line]:
        """Return lines on the update: states before and after it, and what moved."""
        observed, config = self.observed, self.observed.config
        change, scalars = self._change()
        old, new = self.old(self.kind), self.new(self.kind)
        start = observed.state.layout.slots[self.parameter][0]
        decayed = any(first <= start < last for first, last in observed.state.layout.decayed)
        decay = _of("decay", "decay: weight times", scalars[0], f"1 - lr * {config.weight_decay:g}, before Adam's update")
        lines = [
            Line("t", "update number t", int(observed.state.t)),
            Line("lr", "learning rate", float(observed.result.lr)),
            _of("m_before", "m before", self.old("m")),
            _of("m_after", "m after", self.new("m"), "m + (1 - beta1) (g - m)"),
            _of("v_before", "v before", self.old("v")),
            _of("v_after", "v after", self.new("v"), "v beta2 + (1 - beta2) g g"),
            decay if decayed else Line("decay", "decay", False, remark="biases and norms are not decayed"),
            _of("change", "Adam's update", change, "-lr/(1-beta1^t) m / (sqrt(v)/sqrt(1-beta2^t) + eps)"),
            _of(f"{self.word}_before", f"{self.word} before", old),
            _of(f"{self.word}_after", f"{self.word} after", new),
        ]
        update, copy = float(new) - float(old), observed.autocast_copy
        fmt = observed.state.formats["weights"] if copy is None else format_of(copy)
        unit, what = ulp(fmt, float(old)), f"ulp of {fmt} at the {self.word}"
        remark = f"after - before: {update / unit:+.4g} {what}"
        if update == 0 and float(change) != 0:
            remark = f"rounded away: Adam's update is {float(change) / unit:+.4g} {what}"
        return [*lines, Line("update", "change", update, remark=remark), *self._moved()]

    def _change(self) -> tuple[Array, Array]:
        """Return Adam's update of this element, by its rule for a weight of 0 and the step's gradient and moments."""
        optimizer, scalars = self.observed.optimizer, cast(self.observed.optimizer.scalars[self.observed.t], self.math)
        moments = [widen(self.old(kind), self.math).reshape(1).copy() for kind in optimizer.rule.moments]
        w = np.zeros_like(moments[0])
        optimizer.rule.update_block(w, np.array(self._clipped_gradient()).reshape(1), moments, scalars, np)
        return w[0], scalars

    def _moved(self) -> list[Line]:
        """Return lines on whether the weight, or its 16-bit copy, changed, and how much of the tensor did."""
        before, after, lines = self.observed.before, self.after, []
        if self.kind == "master":
            lines = self._copy_moved(before["weights"], after["weights"], "written by the next step")
        elif self.observed.autocast_copy is not None:
            copy = self.observed.autocast_copy
            lines = self._copy_moved(copy, cast(after["weights"], format_of(copy)), "as autocast will cast it in the next step")
        else:
            lines = [Line("weight_moved", "weight moved", float(self.new(self.kind)) != float(self.old(self.kind)))]
        return [*lines, _share(f"{self.word}s_moved", f"{self.word}s that moved", before[self.kind], after[self.kind])]

    def _copy_moved(self, before: Array, after: Array, made: str) -> list[Line]:
        """Return lines on the change of the parameter's 16-bit copy. made: a remark on the new copy."""
        fmt, seen = format_of(before), float(before[self.at])
        moved = float(after[self.at]) - seen
        by = f"by {moved / ulp(fmt, seen):+g} ulp" if moved else f"but the {self.word} keeps the update"
        return [
            _of("copy_after", "new copy", after[(*self.at, ...)], made),
            Line("copy_moved", "copy moved", moved != 0, remark=by),
            _share("copies_moved", "copies that moved", before, after),
        ]

    def _scale_line(self) -> Line:
        scale = self.observed.loss_scale
        remark = explain(scale, float(self.observed.scale_before), self.skipped)
        if self.skipped and self.observed.config.loss_scale == "none":
            remark += ": scripts/train.py stops here"
        return _of("scale_after", "S of the next step", scale.scale, remark)


def _share(key: str, quantity: str, before: Array, after: Array) -> Line:
    moved = int((widen(before, "fp64") != widen(after, "fp64")).sum())
    return Line(key, quantity, 100 * moved / before.size, "%", remark=f"{moved} of {before.size} in this tensor")


def _special(value: float, fmt: str) -> str:
    """Return a remark on a value that is not a normal number of its format, else ''."""
    row = FORMATS[fmt]
    if math.isnan(value):
        return "NaN: from Inf - Inf or 0 * Inf"
    if math.isinf(value):
        return f"overflow: beyond {row.max:g}, the largest {fmt}; {row.max + ulp(fmt, row.max) / 2:g} and above become Inf"
    if value == 0:
        return "zero"
    return f"subnormal: below {row.smallest_normal:.4g}" if abs(value) < row.smallest_normal else ""


# ---------------------------------------------------------------------------------------------------- printing


def report_data(report: Report) -> dict[str, Any]:
    """Return a report as plain data."""
    return {
        "recipe": report.recipe,
        "parameter": report.parameter,
        "index": list(report.index),
        "step": report.step,
        "skipped": report.skipped,
        "skipped_before": report.skipped_before,
        "blocks": [
            {"title": block.title, "sources": list(block.sources), "lines": [vars(line) for line in block.lines]}
            for block in report.blocks
        ],
    }


def report_text(report: Report) -> str:
    """Return a report as text: one table per numbered part, with columns aligned across them."""
    where = ",".join(map(str, report.index))
    head = f"recipe {report.recipe}, training step {report.step}: {report.parameter}[{where}]   (bits: sign|exponent|fraction)"
    if report.skipped_before:
        skipped = f"{report.skipped_before} of {report.step - 1}"
        head += f"\n(steps skipped before it for Inf or NaN in the gradients: {skipped}; --step 1 shows the first step)"
    parts = [head]
    rows = [[x.quantity, x.format, x.text, x.bits, x.remark] for block in report.blocks for x in block.lines]
    lines = iter(whole_table((), rows, " ").splitlines())
    for block in report.blocks:
        body = [next(lines) for _ in block.lines]
        parts.append("\n".join([f"{block.title}   [{'; '.join(block.sources)}]", *body]))
    return "\n\n".join(parts)


def inspect_step(as_json: bool = False, **options: Any) -> None:
    """Print the reports of `inspect_steps`."""
    reports = inspect_steps(**options)
    if as_json:
        print(json_text([report_data(report) for report in reports]))
    else:
        print("\n\n\n".join([report_text(report) for report in reports]))
