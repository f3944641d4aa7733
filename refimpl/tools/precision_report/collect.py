"""What every rounding of a training run did, counted: the data behind scripts/inspect_precision.py.

The run is `step.train_step` itself. At the steps that are looked at, a `RoundingMonitor` counts every cast; at all steps
the weights are held against those before, with masters and as they would be without. At the end one batch goes backward
at many loss scales, to see what each of them would have kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.errors import UsageError
from refimpl.numerics.casts import cast, widen
from refimpl.numerics.formats import FORMATS, format_of
from refimpl.optim.state import State
from refimpl.parity.trace import batches_of, checked_start, load
from refimpl.parity.trace_checks import checked
from refimpl.parity.trace_settings import config_from
from refimpl.precision.context import Monitor
from refimpl.precision.recipes import Recipe
from refimpl.precision.state_encodings import Plain, Remainder, Stochastic, get_encoding
from refimpl.step import Batch, StepResult, forward_backward
from refimpl.tools.precision_report.counts import Counts, RoundingMonitor, kind_of
from refimpl.training import checkpoint
from refimpl.training.checkpoint_states import check_run_header
from refimpl.training.config import Config
from refimpl.training.non_finite import find_origin
from refimpl.training.run_folder import CHECKPOINT, read_config
from refimpl.training.setup import Training
from refimpl.training.trainer import SKIPS_BEFORE_STOP, Trainer, start

SWEEP = range(0, 26, 2)
"""Exponents of the loss scales that one batch is sent backward with at the end: 2^0 to 2^24."""


# -- where the run comes from ------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A run that is about to take its steps, and the batches that it will take them on."""

    what: str
    config: Config
    training: Training
    batches: Iterable[Sequence[Batch]]
    steps: int


def fresh(config: Config) -> Source:
    """A run from its beginning."""
    assert config.steps is not None
    training = start(config)
    batches = _on_device(batches_of(config, None), training)
    return Source(f"a fresh run of {_steps(config.steps)}", config, training, batches, config.steps)


def from_trace(path: Path) -> Source:
    """The run of a trace once more: from its start, on its batches, with the configuration that its header holds.

    Errors: UsageError when it lacks one of them.
    """
    trace = load(path)
    if not trace.config:
        raise UsageError(f"{path} does not say how it was made: it must come from `scripts/trace.py record`")
    config = config_from(trace.config)
    assert config.steps is not None
    config = replace(config, steps=max(config.steps, len(trace.steps)))
    trace, _ = checked(trace, config.make_model())
    training = start(config)
    training.state.load_weights(checked_start(trace.at(0, "4.master"), training))
    batches = _on_device(batches_of(config, trace), training)
    return Source(f"the {_steps(len(trace.steps))} of the trace {path.name}", config, training, batches, len(trace.steps))


def _steps(n: int) -> str:
    return f"{n} step" + "s" * (n != 1)


def _on_device(steps: Iterable[Sequence[Batch]], training: Training) -> Iterator[list[Batch]]:
    """The batches of each step, where the run computes."""
    return ([training.model.batch_on(training.state.backend, x, y) for x, y in batches] for batches in steps)


def from_checkpoint(folder: Path, steps: int) -> Source:
    """A run of scripts/train.py, from its checkpoint on, for `steps` more steps. The folder is only read.

    Where the run had planned fewer steps, its learning rate is planned anew. Errors: UsageError.
    """
    saved, (_, header) = read_config(folder), checkpoint.load(folder / CHECKPOINT)
    check_run_header(folder / CHECKPOINT, header)
    done = header["progress"]["step"]  # perhaps further than planned: a run can be resumed with more steps
    trainer = Trainer(Config.of({**saved, "steps": max(Config.of(saved).steps or 0, done + steps)}), folder)
    trainer.load_checkpoint()
    batches = (trainer.next_batches() for _ in range(steps))
    what = f"{_steps(steps)} from the checkpoint of {folder.name} at step {done}"
    return Source(what, trainer.config, trainer.training, batches, steps)


# -- what is counted ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRow:
    """One step: its loss and loss scale, and how many weights its update did not move, as shares of all.

    masters_still: FP32 masters that stayed the same. weights_still: their 16-bit copies that did.
    alone_still: 16-bit weights that stay the same when the same updates are added to them, without masters.
    weights_moved, alone_moved: those of the two that are no longer where they started. None: not kept by this recipe.
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
    """All that was seen of a run. Counts are sums over the steps in `sampled`."""

    what: str
    config: Config
    low: str  # the 16-bit format that weights are held against
    what_if: tuple[str, ...]
    rows: list[StepRow] = field(default_factory=list)
    sampled: list[dict[str, Any]] = field(default_factory=list)  # step, loss_scale, and site -> counts as plain numbers
    sites: dict[str, Counts] = field(default_factory=dict)
    unscaled: dict[str, Counts] = field(default_factory=dict)  # gradients divided by the loss scale of their step
    others: dict[str, dict[str, Counts]] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    non_finite: str = ""  # where the first loss that was not finite came from, in a sentence

    def add(self, step: int, scale: float, sites: Mapping[str, Counts], others: Mapping[str, Mapping[str, Counts]]) -> None:
        """Add the counts of one step."""
        self.sampled.append({"step": step, "loss_scale": scale, "sites": {site: plain(c) for site, c in sites.items()}})
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
    """Whether values were divided by a scale of their own before they were rounded: those of 8 bits and fewer always are."""
    return FORMATS[counts.fmt].bits <= 8


def uncounted(config: Config) -> dict[str, str]:
    """The kinds of state that a recipe keeps in a way whose roundings no monitor is told of: kind -> storage."""
    stored = config.make_recipe().state_encodings(config.make_rule().moments, config.grad_accum)
    told = (Plain, Stochastic, Remainder)
    return {kind: name for kind, name in stored.items() if type(get_encoding(name)) not in told}


def _named(monitor: Monitor, state: State) -> Monitor:
    """A monitor that is told of the upper half of a master as of the weight that it is, though it is made by the update."""
    if not isinstance(state.encodings["weights"], Remainder):
        return monitor
    return lambda site, x, y: monitor(site.replace(":update.weights", ":weights_down"), x, y)


def plain(counts: Counts) -> dict[str, Any]:
    """Counts as plain data: without the binades, with the ratio in dB and the range of exponents used."""
    data = {k: v for k, v in asdict(counts).items() if k not in ("binades", "signal", "noise")}
    return {**data, "snr_db": counts.snr, "exponents": counts.exponents}


def inspect(source: Source, every: int = 10, what_if: Sequence[str] = (), bar: Any = None) -> Inspection:
    """Take the steps of `source`; look at the first, at every `every`-th, and at the last.

    A run that skips as many steps in a row as would end one of scripts/train.py ends here too, with what was seen of it.
    what_if: formats of which is counted what they would have done to the same tensors. bar: a tqdm bar.
    Errors: UsageError for an unknown format or a senseless `every`.
    """
    if every < 1:
        raise UsageError(f"--every is {every}: it must be at least 1")
    for fmt in what_if:
        if fmt not in FORMATS or fmt in ("fp64", "e8m0"):
            raise UsageError(f"--what-if {fmt!r}: choose from {', '.join(f for f in FORMATS if f not in ('fp64', 'e8m0'))}")
    training, low = source.training, low_format(source.config.make_recipe(), what_if)
    result = Inspection(source.what, source.config, low, tuple(what_if))
    untold = {f"update.{kind}" for kind in uncounted(source.config)}
    monitor = RoundingMonitor(what_if, training.state.backend.to_host, lambda site: site.partition(":")[2] not in untold)
    movement = Movement(training.state, low)
    batches: Sequence[Batch] = ()
    for step, batches in enumerate(source.batches, 1):
        looked_at = step % every == 0 or step in (1, source.steps)
        training.set_monitor(_named(monitor, training.state) if looked_at else None)
        outcome = training.step(batches)
        training.set_monitor(None)
        if looked_at:
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
    return result


def low_format(recipe: Recipe, what_if: Sequence[str] = ()) -> str:
    """The 16-bit format that a recipe's weights are read in: kept so, or cast so by its policy.

    A recipe without one is held against the first 16-bit format of `what_if`, or against bf16.
    """
    candidates = [get_encoding(recipe.state["weights"]).fmt, recipe.policy.row("linear.y").input("w"), *what_if, "bf16"]
    return next(fmt for fmt in candidates if fmt in FORMATS and FORMATS[fmt].bits == 16)


class Movement:
    """How many weights an update moves: the masters, their 16-bit copies, and 16-bit weights that have no masters.

    The last are imagined where the recipe has FP32 masters: the difference that each update makes to the masters is added
    to weights that are kept in 16 bits only.  w16 = R(w16 + (master_after - master_before)).
    """

    def __init__(self, state: State, low: str) -> None:
        self.low, self.with_masters = low, FORMATS[format_of(state.values(state.master_kind))].bits > 16
        self.master = self._host(state)
        self.start = self.weights = self.alone = self._copies(state, self.master)

    def _host(self, state: State) -> np.ndarray:
        return np.array(widen(state.backend.to_host(state.values(state.master_kind)), state.math_format))

    def _copies(self, state: State, master: np.ndarray) -> np.ndarray:
        """The 16-bit weights: kept so, or as step 1 makes them."""
        kept: np.ndarray = state.backend.to_host(state.buffers[state.master_kind])
        return kept.copy() if format_of(kept) == self.low else cast(master, self.low)

    def row(self, step: int, outcome: StepResult, state: State) -> StepRow:
        """The row of a step that has just been taken."""
        master = self._host(state)
        weights = self._copies(state, master)
        with np.errstate(invalid="ignore", over="ignore"):  # of weights that have become infinite
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
    """Send the same batches backward at each loss scale of SWEEP, with the weights as they are, and count by layer.

    Returns a row a scale: its exponent, and layer -> (share of nonzero gradients flushed to zero, number overflowed).
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
            if not has_own_scale(counts):  # where values have, no loss scale matters
                _add_all(layers, {layer_of(site): counts})
        rows.append({"exponent": exponent, "layers": {k: (c.share("flushed"), c.overflowed) for k, c in layers.items()}})
    training.set_monitor(None)
    return rows


def layer_of(site: str) -> str:
    """'transformer.h.3.mlp.c_fc:linear.dw.dw' is in 'block 3'; what comes before or after all blocks, 'embedding' or 'head'."""
    place = site.partition(":")[0]
    block = re.search(r"\bh\.(\d+)\.", place)
    if block:
        return f"block {block[1]}"
    return "embedding" if re.search(r"\b(wte|wpe|embedding|join)\b", place) else "head"
