"""The table of docs/traces.md: which known mistakes the judge finds and names, in which settings.

Each mistake is made in a small run with settings of its own, with one and with three micro-batches, with our betas and with
PyTorch's. Its trace is judged with all activations, without the one in which the mistake shows first, and without any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from refimpl.parity.coverage import coverage_of, verdict
from refimpl.parity.judge import Judge, explanations
from refimpl.parity.mistakes import MISTAKES, inject
from refimpl.parity.replay_start import start_from
from refimpl.parity.trace import BY_PLACE, Recorder, Trace, key, parse_key, record, split_batch, write_down
from refimpl.training.config import Config
from refimpl.training.progress_bar import Tick, no_tick

SIZES: dict[str, Any] = {
    "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "lr": 1e-3, "steps": 2, "warmup": 1,
    "recipe": "fp16",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "norm-in-16-bits": {"recipe": "amp-bf16"},
    "rope-frequencies-in-16-bits": {"model": "llama"},
    "rope-angles-in-16-bits": {"model": "llama"},
    "gradients-not-zeroed": {"recipe": "amp-bf16"},  # with a loss scale, leftovers are 65536 times smaller than new gradients
    "mean-of-means": {"examples": "lines"},
    "unscale-by-updated-scale": {"init_scale": 256, "growth_interval": 1},
    "ignore-inf": {"init_scale": 2**24},
    "scale-never-backs-off": {"init_scale": 2**24},
    "t-advances-on-skip": {"init_scale": 2**24},
    "scheduler-steps-on-skip": {"init_scale": 2**24},
    "scaler-not-restored": {"init_scale": 2**20},
}
"""Settings beside SIZES in which a mistake shows: a recipe, a scale that overflows or grows, unequal micro-batches."""

MICRO_BATCHES = (1, 3)
BETAS: tuple[dict[str, Any], ...] = ({}, {"beta2": 0.999})
"""Ours are (0.9, 0.95), PyTorch's (0.9, 0.999)."""

NEEDS_SEVERAL = ("accumulate-in-16-bits", "loss-not-averaged", "mean-of-means", "unscale-each-micro-batch")


def config_for(name: str, **more: Any) -> Config:
    """Return the configuration of a run in which a mistake shows."""
    return Config.of({**SIZES, **SETTINGS.get(name, {}), **more})


def trace_with(name: str, **more: Any) -> Trace:
    """Return the trace of a run with the mistake in it."""
    wrong = config_for(name, **more, mistake=name)
    return resumed(wrong) if name == "scaler-not-restored" else record(wrong)


def resumed(config: Config, after: int = 1) -> Trace:
    """Return the trace of a run that is resumed, with the mistake, from a checkpoint after step `after`.

    Step 0 holds the states of the checkpoint: masters, moments, number of updates, and the loss scale with its counters.
    """
    right = record(replace(config, mistake="none"))
    start = {key(0, point, name): x for k, x in right.tensors.items() for step, point, name in [parse_key(k)]
             if step == after and point.startswith("4.") and point not in ("4.clip", "4.lr")}  # fmt: skip
    training, trace = config.make_training(config.make_backend()), Trace(asdict(config), dict(start))
    recorder = Recorder(training, trace)
    inject(config.mistake, training)
    start_from(trace, training)
    for kind in ("m", "v", "master"):
        for name, view in training.state.layout.views(training.state.buffers[kind]).items():
            view[...] = start[key(0, f"4.{kind}", name)]
    write_down(recorder, training, (right.inputs(step) or [] for step in right.steps if step > after))
    return trace


def without(trace: Trace, places: Iterable[str] | None) -> Trace:
    """Return a trace without the activations, and their gradients, of some places; of all places if None."""

    def kept(text: str) -> bool:
        _, point, name = parse_key(text)
        return point not in BY_PLACE or (places is not None and split_batch(name)[0] not in places)

    return Trace(trace.config, {k: x for k, x in trace.tensors.items() if kept(k)}, trace.settings)


def outcome(config: Config, trace: Trace, name: str) -> tuple[str, str]:
    """Return 'named', 'found' or 'not judged', and the place of the first departure ('' if that is not an activation).

    'named': the judge explains the departure by this mistake and no other. 'AGREES' would be a failure of the judge.
    """
    judge = Judge(config, trace)
    findings = list(judge.findings())
    first = next((finding for finding in findings if finding.departs), None)
    if first is None:
        said = verdict(findings, coverage_of(trace, findings, judge.reasons))
        return {"PARTLY JUDGED": "not judged"}.get(said, said), ""
    place = split_batch(first.name)[0] if first.point in BY_PLACE else ""
    return "named" if explanations(config, judge.theirs, first) == [name] else "found", place


def batches_for(name: str) -> tuple[int, ...]:
    """Return the numbers of micro-batches in which a mistake can be made."""
    return MICRO_BATCHES[1:] if name in NEEDS_SEVERAL else MICRO_BATCHES


def count(names: Iterable[str]) -> int:
    """Return the number of runs that the rows of some mistakes take."""
    return sum(len(batches_for(name)) * len(BETAS) for name in names)


def row(name: str, tick: Tick = no_tick) -> list[str]:
    """Return a mistake's row of the table: settings, then the outcome for each number of micro-batches and each trace.

    tick: callback after each run.
    """
    cells = [f"`{name}`", flags(SETTINGS.get(name, {}))]
    for n in MICRO_BATCHES:
        if n not in batches_for(name):
            cells += ["-"] * 3
            continue
        both = []
        for betas in BETAS:
            both.append(outcomes(name, {"grad_accum": n, **betas}))
            tick()
        cells += [ours if ours == torchs else f"{ours}; {torchs}" for ours, torchs in zip(*both, strict=True)]
    return cells


def outcomes(name: str, more: dict[str, Any]) -> list[str]:
    """Return the outcomes with all activations, without the one in which the mistake shows first, and without any."""
    config, trace = config_for(name, **more), trace_with(name, **more)
    whole, place = outcome(config, trace, name)
    others = (without(trace, [place or "transformer.wpe"]), without(trace, None))
    return [whole, *(outcome(config, other, name)[0] for other in others)]


def flags(settings: dict[str, Any]) -> str:
    """Return settings as flags of `scripts/trace.py record`."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


HEADER = ("mistake", "settings", "1: all", "but one", "none", "3: all", "but one", "none")


def table(
    names: Iterable[str] = MISTAKES,
    done: Callable[[str], object] = lambda line: None,
    tick: Tick = no_tick,
) -> str:
    """Return the table in Markdown. done: callback with each line as soon as it is computed. tick: after each run."""
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    for text in lines:
        done(text)
    for name in names:
        lines.append(_line(row(name, tick)))
        done(lines[-1])
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
