"""One element of one parameter on its way through a training step: every value, its format and its bits.

The step is `step.train_step` itself, run on a tiny GPT as scripts/train.py would run it. What is shown is what the states
hold before and after it; what lies between (1/S, the clip coefficient, Adam's change) comes from the functions that the
step calls, applied to what it left behind. Nothing of the step is written here a second time.
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
from refimpl.optim.gradients import check_and_measure, clip_coefficient, first_non_finite, inverse_of
from refimpl.optim.scaler_rules import find_scaler
from refimpl.optim.state import State
from refimpl.precision.recipes import RECIPES
from refimpl.step import StepResult, forward_backward
from refimpl.tools.scale_remarks import explain
from refimpl.training.config import Config
from refimpl.training.console import json_text, table
from refimpl.training.data import load_corpus, sample_batch
from refimpl.training.trainer import BATCHES, generator, start

PARAMETER = "transformer.h.0.mlp.c_fc.weight"
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4}
SCHEDULE_STEPS = 1000
FOLLOWED = tuple(name for name, recipe in RECIPES.items() if {*recipe.state_encodings().values()} <= {*FORMATS})
"""Recipes whose states are plain numbers of a format, each rounded to nearest by itself."""
PATIENCE = 20
"""After so many skipped steps the next one is shown, whether skipped or not, where no step was asked for."""

# ---------------------------------------------------------------------------------------------------- what is reported


@dataclass(frozen=True)
class Line:
    """One quantity. What no array holds (counts, exact differences, yes and no) has no bits, and no format but '%'."""

    key: str
    quantity: str
    value: float | int | bool
    format: str = ""
    bits: str = ""
    remark: str = ""

    @property
    def text(self) -> str:
        """The value as it is printed."""
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        if isinstance(self.value, int):
            return str(self.value)
        return f"{self.value:.1f}" if self.format == "%" else digits(self.value, self.format or "fp32")


@dataclass(frozen=True)
class Block:
    """One of the four steps, with the functions that do it."""

    title: str
    sources: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Report:
    """One training step as one element of one parameter went through it."""

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
        """The line with that key."""
        return next(line for block in self.blocks for line in block.lines if line.key == key)


def _of(key: str, quantity: str, x: Array, remark: str = "") -> Line:
    """The line of a value that an array holds."""
    x = np.array(x)
    return Line(key, quantity, float(x), format_of(x), bit_string(x), remark)


def _cite(function: Callable[..., Any]) -> str:
    """Where a function is written: 'refimpl/optim/state.py:118 State.weights_down'."""
    function = inspect.unwrap(function)
    return f"{function.__module__.replace('.', '/')}.py:{function.__code__.co_firstlineno} {function.__qualname__}"


# ---------------------------------------------------------------------------------------------------- the step, watched


@dataclass(frozen=True)
class _Watched:
    """One step: what it found, the 16-bit copy that it made of the parameter under autocast, and what it left."""

    config: Config
    before: dict[str, Array]  # kind -> the whole parameter before the step; the weights as forward and backward read them
    scale_before: Array
    t: int
    autocast_copy: Array | None
    result: StepResult
    state: State  # after the step, and after `weights_down` of the next one
    optimizer: Any
    loss_scale: Any


def inspect_steps(
    recipe: str = "fp16",
    parameter: str = PARAMETER,
    index: Sequence[int] | None = None,
    step: int | None = None,
    steps: int = 1,
    seed: int = 0,
    lr: float = 3e-4,
    loss_scale: str | None = None,
    init_scale: float | None = None,
) -> list[Report]:
    """Train a tiny GPT, and report on `steps` steps in a row.

    index: the element; none given takes (3, 5), or as near as the parameter's shape allows.
    step: the first step to report on, from 1; none given takes the first that is not skipped for an overflow.
    lr: the largest learning rate; 20 updates of warm-up lead to it, as in scripts/train.py.
    loss_scale: a name of `loss_scale.SCALERS`, 'dynamic', 'none' or a number; none given takes the recipe's. init_scale: where
    one that adapts starts.
    Errors: UsageError for an unknown recipe or parameter, an index out of range, impossible numbers, or a recipe that is not in
    FOLLOWED.
    """
    if steps < 1 or (step is not None and step < 1):
        raise UsageError(f"--step is {step} and --steps {steps}: both must be at least 1")
    last = (PATIENCE + 1 if step is None else step) + steps - 1
    given: dict[str, Any] = {"model": "gpt", "recipe": recipe, **SIZES, "seed": seed, "lr": lr}
    given |= {"steps": max(SCHEDULE_STEPS, last), "loss_scale": loss_scale}
    config = Config.of(given if init_scale is None else {**given, "init_scale": init_scale})
    if recipe not in FOLLOWED:
        stored = config.make_recipe().state_encodings()
        odd = ", ".join(f"{kind} as {kept}" for kind, kept in stored.items() if kept not in FORMATS)
        raise UsageError(f"recipe {recipe} keeps {odd}, which cannot be followed here: --help lists the others")
    if init_scale is not None and find_scaler(config.loss_scale or "") is None:
        raise UsageError(f"--init-scale is for a loss scale that adapts, not {config.loss_scale!r}: add --loss-scale dynamic")
    model = config.make_model()
    parameter = model.tied.get(parameter, parameter)
    if parameter not in model.parameters:
        raise UsageError(unknown("parameter", parameter, model.parameters))
    at = _checked_index(parameter, index, model.parameters[parameter].shape)

    reports: list[Report] = []
    skipped = 0
    for number, watched in enumerate(_train(config, parameter), 1):
        element = _Element(watched, parameter, at)
        first = number >= step if step is not None else not element.skipped or number > PATIENCE
        if first or reports:
            reports.append(Report(recipe, parameter, at, number, element.skipped, skipped, element.blocks()))
        if len(reports) == steps:
            break
        skipped += element.skipped
    return reports


def _train(config: Config, parameter: str) -> Iterator[_Watched]:
    """Train, and stop after every step, with all that a report on one parameter needs."""
    assert config.batch_size is not None and config.block_size is not None
    corpus, training = load_corpus(config.data, config.block_size), start(config)
    state, scale = training.state, training.loss_scale
    batches = generator(config.seed, BATCHES)
    copies: list[Array] = []

    def monitor(site: str, x: Array, y: Array) -> None:
        """Keep the 16-bit copy that autocast makes of the parameter: an operation of its own at '<parameter>.<format>'."""
        if site.startswith(f"{parameter}.") and site.endswith(":cast.w"):
            copies.append(y)

    training.watch(monitor)
    while True:
        copies.clear()
        before = {kind: state.layout.views(buffer)[parameter].copy() for kind, buffer in state.buffers.items()}
        scale_before, t = scale.scale.copy(), int(state.t)
        batch = sample_batch(corpus.train, config.batch_size, config.block_size, batches, config.no_target)
        result = training.step([batch])
        if "master" in before:
            before["weights"] = state.weight_views[parameter].copy()  # made by step 1, not touched since
        state.weights_down()  # what the next step begins with, so that the new copy can be seen already
        copy = copies[0] if copies else None
        yield _Watched(config, before, scale_before, t, copy, result, state, training.optimizer, scale)


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
    """One element in a watched step: a block of lines for each of the four steps."""

    def __init__(self, watched: _Watched, parameter: str, at: tuple[int, ...]) -> None:
        self.watched, self.parameter, self.at = watched, parameter, at
        state = watched.state
        self.kind = "master" if "master" in state.formats else "weights"  # what the optimizer updates
        self.word = "master" if self.kind == "master" else "weight"
        self.math = state.math_format
        self.after = {kind: state.layout.views(buffer)[parameter] for kind, buffer in state.buffers.items()}
        self.skipped = bool(watched.result.skipped)
        self.S = float(watched.result.loss_scale)
        self.inverse_scale = inverse_of(watched.result.loss_scale)

    def old(self, kind: str) -> Array:
        """The element before the step."""
        return self.watched.before[kind][(*self.at, ...)]

    def new(self, kind: str) -> Array:
        """The element after the step."""
        return self.after[kind][(*self.at, ...)]

    @np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")
    def blocks(self) -> tuple[Block, ...]:
        """The four steps."""
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
        """Step 2: what forward and backward read, made and rounded."""
        watched, lines, sources = self.watched, [], [_cite(forward_backward)]
        if watched.autocast_copy is not None:
            sources.append(_cite(cast_forward))
            lines = self._copy_lines(self.old(self.kind), watched.autocast_copy[(*self.at, ...)], "copy, by autocast")
        scaled = self.new("grads")
        lines.append(_of("loss", "loss", watched.result.loss, "mean over the batch, nats a byte"))
        remark = "no loss scale: backward starts from 1" if self.S == 1 else "backward starts from it instead of 1"
        lines.append(_of("loss_scale", "loss scale S", watched.result.loss_scale, remark))
        special = _special(float(scaled), format_of(scaled))
        quantity = "gradient of the loss" if self.S == 1 else "gradient of S * loss"
        lines.append(_of("grad", quantity, scaled, special or "as backward leaves it in `grads`"))
        if self.S != 1:
            lines += self._without_scale()
        return Block("2. forward and backward", tuple(sources), tuple(lines))

    def _without_scale(self) -> list[Line]:
        """What the loss scale was good for: the unscaled gradients, rounded to the narrowest format that they passed."""
        grads = self.after["grads"]
        copy = self.watched.autocast_copy
        fmt = format_of(grads) if copy is None else format_of(copy)
        unscaled = widen(grads, self.math) * self.inverse_scale
        rounded = cast(unscaled, fmt)
        magnitude, nonzero = abs(widen(rounded, "fp64")), (unscaled != 0) & np.isfinite(unscaled)
        flushed = int((nonzero & (magnitude == 0)).sum())
        subnormal = int((nonzero & (magnitude > 0) & (magnitude < FORMATS[fmt].smallest_normal)).sum())
        share = f"{subnormal} more subnormal, of {grads.size} in this tensor"
        return [
            _of("without_scale", f"without S, in {fmt}", rounded[(*self.at, ...)], self._fate(unscaled, rounded, fmt)),
            Line("flushed_without_scale", "flushed without S", flushed, remark=share),
        ]

    def _fate(self, unscaled: Array, rounded: Array, fmt: str) -> str:
        """kept, subnormal, or flushed to zero. At best: gradients on the way to this one would be rounded as well."""
        exact, value = float(unscaled[self.at]), float(rounded[self.at])
        if not math.isfinite(exact):
            return "not known: the scaled gradient overflowed"
        if exact == 0:
            return "0 with S as well"
        if value == 0:
            return f"flushed to zero: at most half of {fmt}'s smallest value, {FORMATS[fmt].smallest_subnormal:.4g}"
        if abs(value) < FORMATS[fmt].smallest_normal:
            return f"subnormal: off by {abs(value - exact) / abs(exact):.2%} at best"
        return "kept" if value == exact else f"kept, off by {(value - exact) / ulp(fmt, exact):+.4g} ulp"

    # -- step 3 -----------------------------------------------------------------------------------------------------

    def gradients_up(self) -> Block:
        """Step 3: 16-bit gradients to FP32, checked, unscaled and measured."""
        result, state, stored = self.watched.result, self.watched.state, self.new("grads")
        g = widen(stored, self.math)
        unscaled, coefficient = g * self.inverse_scale, self._coefficient()
        widened = f"exact: {format_of(stored)} -> {self.math}" if format_of(stored) != self.math else "nothing to widen"
        where = f"a gradient of {first_non_finite(state)} is Inf or NaN" if self.skipped else "all gradients are finite"
        kept = "; kept as main_grads" if "main_grads" in self.after else ""
        clipping = f"min(1, {self.watched.config.clip:g} / (norm + 1e-6))" + ": not clipped" * (float(coefficient) == 1)
        unused = "not used: the update is skipped" if self.skipped else ""
        lines = [
            _of("widened", "gradient, widened", g, widened),
            Line("found_inf", "found_inf", self.skipped, remark=where),
            _of("inverse_scale", "1/S", self.inverse_scale),
            _of("unscaled", "gradient, unscaled", unscaled, f"divided by S before anything looks at its size{kept}"),
            _of("norm", "norm", result.grad_norm, f"of all {state.layout.size} unscaled gradients"),
            _of("clip", "clip coefficient", coefficient, clipping),
            _of("clipped", "gradient, clipped", unscaled * coefficient, unused),
        ]
        return Block("3. gradients up", (_cite(inverse_of), _cite(check_and_measure), _cite(clip_coefficient)), tuple(lines))

    def _coefficient(self) -> Array:
        return widen(np.array(clip_coefficient(self.watched.result.grad_norm, self.watched.config.clip or math.inf)), self.math)

    # -- step 4 -----------------------------------------------------------------------------------------------------

    def update(self) -> Block:
        watched = self.watched
        rule, scale = watched.optimizer.rule, type(watched.loss_scale)
        sources = (_cite(watched.optimizer.update), _cite(rule.update_block), _cite(scale.update))
        if self.skipped:
            return Block("4. update: skipped", sources, (*self._unchanged(), self._scale_line()))
        return Block("4. update", sources, (*self._updated(), *self._moved(), self._scale_line()))

    def _unchanged(self) -> list[Line]:
        """A skipped step: what the states hold is compared with what they held."""
        lines = []
        for kind in (kind for kind in self.after if kind not in ("grads", "main_grads")):
            same = self.watched.before[kind].tobytes() == self.after[kind].tobytes()
            remark = "as before, with all of its tensor" if same else "CHANGED, though the update was skipped"
            lines.append(_of(f"{kind}_after", f"{kind} after", self.new(kind), remark))
        same = int(self.watched.state.t) == self.watched.t
        lines.append(Line("t", "updates made, t", int(self.watched.state.t), remark="as before" if same else "CHANGED"))
        return lines

    def _updated(self) -> list[Line]:
        """The update, from what the states held to what they hold now."""
        watched, config = self.watched, self.watched.config
        change, scalars = self._change()
        old, new = self.old(self.kind), self.new(self.kind)
        start = watched.state.layout.slots[self.parameter][0]
        decayed = any(first <= start < last for first, last in watched.state.layout.decayed)
        decay = _of("decay", "decay: weight times", scalars[0], f"1 - lr * {config.weight_decay:g}, before Adam's change")
        lines = [
            Line("t", "update number t", int(watched.state.t)),
            Line("lr", "learning rate", float(watched.result.lr)),
            _of("m_before", "m before", self.old("m")),
            _of("m_after", "m after", self.new("m"), "m + (1 - beta1) (g - m)"),
            _of("v_before", "v before", self.old("v")),
            _of("v_after", "v after", self.new("v"), "v beta2 + (1 - beta2) g g"),
            decay if decayed else Line("decay", "decay", False, remark="biases and norms are not decayed"),
            _of("change", "Adam's change", change, "-lr/(1-beta1^t) m / (sqrt(v)/sqrt(1-beta2^t) + eps)"),
            _of(f"{self.word}_before", f"{self.word} before", old),
            _of(f"{self.word}_after", f"{self.word} after", new),
        ]
        update, copy = float(new) - float(old), watched.autocast_copy
        fmt = watched.state.formats["weights"] if copy is None else format_of(copy)
        unit, what = ulp(fmt, float(old)), f"ulp of {fmt} at the {self.word}"
        remark = f"after - before: {update / unit:+.4g} {what}"
        if update == 0 and float(change) != 0:
            remark = f"rounded away: Adam's change is {float(change) / unit:+.4g} {what}"
        return [*lines, Line("update", "update", update, remark=remark)]

    def _change(self) -> tuple[Array, Array]:
        """Adam's change of this element: its rule, run on a weight of 0 with the gradient and the moments of the step."""
        optimizer, scalars = self.watched.optimizer, cast(self.watched.optimizer.scalars[self.watched.t], self.math)
        g = widen(self.new("grads"), self.math) * self.inverse_scale * self._coefficient()
        moments = [widen(self.old(kind), self.math).reshape(1).copy() for kind in optimizer.rule.moments]
        w = np.zeros_like(moments[0])
        optimizer.rule.update_block(w, np.array(g).reshape(1), moments, scalars, np)
        return w[0], scalars

    def _moved(self) -> list[Line]:
        """Whether the 16-bit copy moved, if there is one, and how much of the tensor did."""
        before, after, lines = self.watched.before, self.after, []
        if self.kind == "master":
            lines = self._copy_moved(before["weights"], after["weights"], "made by step 1 of the next step")
        elif self.watched.autocast_copy is not None:
            copy = self.watched.autocast_copy
            lines = self._copy_moved(copy, cast(after["weights"], format_of(copy)), "as autocast will make it in the next step")
        else:
            lines = [Line("weight_moved", "weight moved", float(self.new(self.kind)) != float(self.old(self.kind)))]
        return [*lines, _share(f"{self.word}s_moved", f"{self.word}s that moved", before[self.kind], after[self.kind])]

    def _copy_moved(self, before: Array, after: Array, made: str) -> list[Line]:
        """before, after: the 16-bit copies of the parameter."""
        fmt, seen = format_of(before), float(before[self.at])
        moved = float(after[self.at]) - seen
        by = f"by {moved / ulp(fmt, seen):+g} ulp" if moved else f"but the {self.word} keeps the change"
        return [
            _of("copy_after", "new copy", after[(*self.at, ...)], made),
            Line("copy_moved", "copy moved", moved != 0, remark=by),
            _share("copies_moved", "copies that moved", before, after),
        ]

    def _scale_line(self) -> Line:
        scale = self.watched.loss_scale
        remark = explain(scale, float(self.watched.scale_before), self.skipped)
        if self.skipped and self.watched.config.loss_scale == "none":
            remark += ": scripts/train.py stops here"
        return _of("scale_after", "S of the next step", scale.scale, remark)


def _share(key: str, quantity: str, before: Array, after: Array) -> Line:
    moved = int((widen(before, "fp64") != widen(after, "fp64")).sum())
    return Line(key, quantity, 100 * moved / before.size, "%", remark=f"{moved} of {before.size} in this tensor")


def _special(value: float, fmt: str) -> str:
    """What is special about a value in its format; '' for a normal number."""
    row = FORMATS[fmt]
    if math.isnan(value):
        return "NaN: Inf - Inf or 0 * Inf on the way"
    if math.isinf(value):
        return f"overflow: beyond {row.max:g}, the largest {fmt}; {row.max + ulp(fmt, row.max) / 2:g} and above become Inf"
    if value == 0:
        return "zero"
    return f"subnormal: below {row.smallest_normal:.4g}" if abs(value) < row.smallest_normal else ""


# ---------------------------------------------------------------------------------------------------- printing


def report_data(report: Report) -> dict[str, Any]:
    """A report as plain data."""
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
    """A report for a person: a table for each of the four steps, its columns under each other."""
    where = ",".join(map(str, report.index))
    head = f"recipe {report.recipe}, training step {report.step}: {report.parameter}[{where}]   (bits: sign|exponent|fraction)"
    if report.skipped_before:
        skipped = f"{report.skipped_before} of {report.step - 1}"
        head += f"\n(skipped before it, for Inf or NaN in the gradients: {skipped}; --step 1 shows the first step)"
    parts = [head]
    rows = [[x.quantity, x.format, x.bits, x.text, x.remark] for block in report.blocks for x in block.lines]
    lines = iter(table((), rows, "   ").splitlines())
    for block in report.blocks:
        body = [next(lines) for _ in block.lines]
        parts.append("\n".join([f"{block.title}   [{'; '.join(block.sources)}]", *body]))
    return "\n\n".join(parts)


def inspect_step(as_json: bool = False, **options: Any) -> None:
    """What scripts/inspect_step.py does: print the reports of `inspect_steps`."""
    reports = inspect_steps(**options)
    if as_json:
        print(json_text([report_data(report) for report in reports]))
    else:
        print("\n\n\n".join([report_text(report) for report in reports]))
