"""The data of a precision report: what every cast of a training run did.

The run is `step.train_step` itself. At the inspected steps a `RoundingMonitor` counts every cast; at all steps the weights
are compared with those before, with masters and as they would be without. At the end backward runs on one batch with many
loss scales, to see which gradients each of them keeps, and each layer is looked at by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError, unknown
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.numerics.rounding_effects import SWEEP, Counts
from refimpl.optim.state import State
from refimpl.parity.mistakes import MISTAKES
from refimpl.parity.trace import batches_of, checked_start, load
from refimpl.parity.trace_checks import checked
from refimpl.parity.trace_settings import config_from
from refimpl.precision.context import Monitor
from refimpl.precision.recipes import Recipe
from refimpl.precision.state_encodings import Plain, Remainder, Stochastic, get_encoding
from refimpl.step import Batch, StepResult, forward_backward
from refimpl.tools.precision_report.counts import RoundingMonitor, kind_of, layer_of
from refimpl.tools.precision_report.layers import Layer, inspect_layers
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import check_run_header
from refimpl.training.config import Config
from refimpl.training.init_from import First
from refimpl.training.non_finite import find_origin
from refimpl.training.progress_bar import ProgressBar
from refimpl.training.run_folder import CHECKPOINT, read_config
from refimpl.training.setup import Training, start
from refimpl.training.stopping import SKIPS_BEFORE_STOP
from refimpl.training.trainer import Trainer

# -- sources of a run --------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A run before its steps, and the batches of these steps."""

    what: str
    config: Config
    training: Training
    batches: Iterable[Sequence[Batch]]
    steps: int


def fresh(config: Config, first: First | None = None) -> Source:
    """Return a new run. first: weights to start from, in place of new ones."""
    training = start(config, faults=MISTAKES, first=first)
    batches = _on_device(batches_of(config, None), training)
    where = "" if first is None else f" from the weights of {first[0].absolute().name}"
    return Source(f"a new run of {_steps(config.steps)}{where}", config, training, batches, config.steps)


def from_trace(path: Path) -> Source:
    """Return the run of a trace: from its initial weights, on its batches, with the configuration in its header.

    Errors: UsageError if it lacks one of them.
    """
    trace = load(path)
    if not trace.config:
        raise UsageError(f"{path} holds no configuration: it must come from `scripts/trace.py record`")
    config = config_from(trace.config)
    config = replace(config, steps=max(config.steps, len(trace.steps)))
    trace, _ = checked(trace, config.make_model())
    training = start(config, faults=MISTAKES)
    training.state.load_weights(checked_start(trace.at(0, "4.master"), training))
    batches = _on_device(batches_of(config, trace), training)
    return Source(f"the {_steps(len(trace.steps))} of the trace {path.name}", config, training, batches, len(trace.steps))


def _steps(n: int) -> str:
    return f"{n} step" + "s" * (n != 1)


def _on_device(steps: Iterable[Sequence[Batch]], training: Training) -> Iterator[list[Batch]]:
    """Return the batches of each step on the run's device."""
    return ([training.model.batch_on(training.state.backend, x, y) for x, y in batches] for batches in steps)


def from_checkpoint(folder: Path, steps: int) -> Source:
    """Return a run of scripts/train.py that continues from its checkpoint for `steps` steps. The folder is only read.

    If these are more steps than the run had planned, its schedule is extended. Errors: UsageError.
    """
    saved, (_, header) = read_config(folder), checkpoint.load(folder / CHECKPOINT)
    check_run_header(folder / CHECKPOINT, header)
    done = header["progress"]["step"]  # perhaps further than planned: a run can be resumed with more steps
    trainer = Trainer(Config.of({**saved, "steps": max(Config.of(saved).steps, done + steps)}), folder, faults=MISTAKES)
    trainer.load_checkpoint()
    batches = (trainer.next_batches() for _ in range(steps))
    what = f"{_steps(steps)} from the checkpoint of {folder.name} at step {done}"
    return Source(what, trainer.config, trainer.training, batches, steps)


# -- counts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRow:
    """One step: its loss and loss scale, and the shares of weights that its update did not move.

    masters_still: FP32 masters that did not change. weights_still: their 16-bit copies that did not.
    alone_still: 16-bit weights that do not change if the same updates are added to them, without masters.
    weights_moved, alone_moved: copies and 16-bit weights that differ from their initial values. None: not in this recipe.
    """

    step: int
    loss: float
    loss_scale: float
    skipped: bool
    masters_still: float | None
    weights_still: float | None
    alone_still: float
    weights_moved: float | None
    alone_moved: float


@dataclass
class Inspection:
    """The results of an inspection. Counts are sums over the steps in `sampled`."""

    what: str
    config: Config
    low: str  # the 16-bit format in which weights are compared
    what_if: tuple[str, ...]
    rows: list[StepRow] = field(default_factory=list)
    sampled: list[dict[str, Any]] = field(default_factory=list)  # step, loss_scale, and site -> counts as plain numbers
    sites: dict[str, Counts] = field(default_factory=dict)
    unscaled: dict[str, Counts] = field(default_factory=dict)  # gradients divided by the loss scale of their step
    others: dict[str, dict[str, Counts]] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    scale: float = 1.0  # the loss scale after the last step, with which the layers were inspected
    non_finite: str = ""  # a sentence on the origin of the first loss that was not finite

    def add(self, step: int, scale: float, sites: Mapping[str, Counts], others: Mapping[str, Mapping[str, Counts]]) -> None:
        """Add the counts of one step."""
        self.sampled.append({"step": step, "loss_scale": scale, "sites": {site: c.plain() for site, c in sites.items()}})
        _add_all(self.sites, sites)
        for fmt, counts in others.items():
            _add_all(self.others.setdefault(fmt, {}), counts)
        gradients = {site: c for site, c in sites.items() if kind_of(site).endswith("gradients") and not has_own_scale(c)}
        _add_all(self.unscaled, {site: c.divided_by(scale) for site, c in gradients.items()})


def _add_all(totals: dict[str, Counts], counts: Mapping[str, Counts]) -> None:
    for site, c in counts.items():
        totals.setdefault(site, Counts(c.fmt))
        totals[site] += c


def has_own_scale(counts: Counts) -> bool:
    """Return whether values had a scale of their own when they were rounded, as all formats of 8 bits and fewer have."""
    return FORMATS[counts.fmt].bits <= 8


def uncounted(config: Config) -> dict[str, str]:
    """Return the kinds of state whose roundings are not reported to monitors: kind -> encoding."""
    stored = config.make_recipe().state_encodings(config.make_rule().moments, config.grad_accum)
    reported = (Plain, Stochastic, Remainder)
    return {kind: name for kind, name in stored.items() if type(get_encoding(name)) not in reported}


def _named(monitor: Monitor, state: State) -> Monitor:
    """Return a monitor for which the upper half of a split master, written by the update, has the site of the weight."""
    if not isinstance(state.encodings["weights"], Remainder):
        return monitor
    return lambda site, x, y: monitor(site.replace(":update.weights", ":weights_down"), x, y)


def inspect(source: Source, every: int = 10, what_if: Sequence[str] = (), bar: ProgressBar | None = None) -> Inspection:
    """Train for the steps of `source`; inspect the first, every `every`-th, and the last.

    A run that skips as many consecutive steps as would end scripts/train.py ends here too.
    what_if: formats to which the same tensors are also rounded, for comparison. bar: shows the steps.
    Errors: UsageError for an unknown format, or `every` < 1.
    """
    if every < 1:
        raise UsageError(f"--every is {every}: it must be at least 1")
    for fmt in what_if:
        if fmt not in FORMATS or fmt in ("fp64", "e8m0"):
            raise UsageError("--what-if: " + unknown("format", fmt, [name for name in FORMATS if name not in ("fp64", "e8m0")]))
    training, low = source.training, low_format(source.config.make_recipe(), what_if)
    result = Inspection(source.what, source.config, low, tuple(what_if))
    unreported = {f"update.{kind}" for kind in uncounted(source.config)}
    monitor = RoundingMonitor(what_if, training.state.backend.to_host, lambda site: site.partition(":")[2] not in unreported)
    movement = Movement(training.state, low)
    batches: Sequence[Batch] = ()
    for step, batches in enumerate(source.batches, 1):
        inspected = step % every == 0 or step in (1, source.steps)
        training.set_monitor(_named(monitor, training.state) if inspected else None)
        outcome = training.step(batches)
        training.set_monitor(None)
        if inspected:
            result.add(step, float(outcome.loss_scale), *monitor.take())
        if not result.non_finite and not np.isfinite(float(outcome.loss)):
            result.non_finite = f"At step {step}: {find_origin(training, batches, outcome.loss_scale).text}."
        result.rows.append(movement.row(step, outcome, training.state))
        if bar is not None:
            bar.update(1)
        if step >= SKIPS_BEFORE_STOP and all(row.skipped for row in result.rows[-SKIPS_BEFORE_STOP:]):
            result.what += f", ended at step {step} because the last {SKIPS_BEFORE_STOP} were all skipped"
            break
    result.sweep = sweep_scales(training, batches)
    result.layers, result.scale = inspect_layers(training, batches), float(training.loss_scale.scale)
    return result


def low_format(recipe: Recipe, what_if: Sequence[str] = ()) -> str:
    """Return the 16-bit format of a recipe's weights, or that to which its policy casts them.

    For a recipe without one it is the first 16-bit format of `what_if`, or bf16.
    """
    candidates = [get_encoding(recipe.state["weights"]).fmt, recipe.policy.row("linear.y").input("w"), *what_if, "bf16"]
    return next(fmt for fmt in candidates if fmt in FORMATS and FORMATS[fmt].bits == 16)


class Movement:
    """Counts the weights that an update moves: masters, their 16-bit copies, and 16-bit weights without masters.

    If the recipe has FP32 masters, the last are simulated: each update's difference of the masters is added to weights in
    16 bits,  w16 = R(w16 + (master_after - master_before)).
    """

    def __init__(self, state: State, low: str) -> None:
        self.low, self.with_masters = low, FORMATS[format_of(state.values(state.master_kind))].bits > 16
        self.master = self._host(state)
        self.start = self.weights = self.alone = self._copies(state, self.master)

    def _host(self, state: State) -> np.ndarray:
        return np.array(widen(state.backend.to_host(state.values(state.master_kind)), state.math_format))

    def _copies(self, state: State, master: np.ndarray) -> np.ndarray:
        """Return the weights in 16 bits: as stored, or as step 1 casts them."""
        kept: np.ndarray = state.backend.to_host(state.buffers[state.master_kind])
        return kept.copy() if format_of(kept) == self.low else cast(master, self.low)

    def row(self, step: int, outcome: StepResult, state: State) -> StepRow:
        """Return the row of the step just made."""
        master = self._host(state)
        weights = self._copies(state, master)
        with np.errstate(invalid="ignore", over="ignore"):  # for weights that have become infinite
            updated = widen(self.alone, state.math_format) + (master - self.master)
        alone = cast(updated, self.low) if self.with_masters else weights
        row = StepRow(
            step,
            float(outcome.loss),
            float(outcome.loss_scale),
            bool(outcome.skipped),
            _share(master == self.master) if self.with_masters else None,
            _share(weights == self.weights) if self.with_masters else None,
            _share(alone == self.alone),
            _share(weights != self.start) if self.with_masters else None,
            _share(alone != self.start),
        )
        self.master, self.weights, self.alone = master, weights, alone
        return row


def _share(mask: np.ndarray) -> float:
    return float(np.count_nonzero(mask)) / mask.size


def sweep_scales(training: Training, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Run backward on the same batches and weights with each loss scale of SWEEP, and count by layer.

    Return one row per scale: its exponent, and layer -> (share of nonzero gradients flushed to zero, number overflowed).
    The gradients in the state are overwritten; nothing else changes.
    """
    monitor = RoundingMonitor(to_host=training.state.backend.to_host, only=lambda site: kind_of(site).endswith("gradients"))
    training.state.weights_down()
    training.set_monitor(monitor)
    run, rows = training.run.frozen(), []
    for exponent in SWEEP:
        scale = training.state.backend.xp.asarray(np.array(2.0**exponent, np.float32))
        with np.errstate(all="ignore"):
            forward_backward(training.model, batches, training.state, scale, run)
        layers: dict[str, Counts] = {}
        for site, counts in monitor.take()[0].items():
            if not has_own_scale(counts):  # otherwise the loss scale makes no difference
                _add_all(layers, {layer_of(site): counts})
        rows.append({"exponent": exponent, "layers": {k: (c.share("flushed"), c.overflowed) for k, c in layers.items()}})
    training.set_monitor(None)
    return rows
