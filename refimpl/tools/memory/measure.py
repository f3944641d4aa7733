"""Predicted and measured memory, for `scripts/memory.py --measure`.

A model trains for a few steps on real text. Then the arrays of all model states are measured, and the memory of all arrays
that the tape holds between forward and backward: `tape.py`. The predictions are `Recipe.buffers` for the states, and
`training/activation_memory/`. Memory without a formula (the process, temporary buffers) is only measured.

Bytes are those of arrays. Three 0-d numbers of a run (loss scale, its counter, the update count) are left out.
"""

from __future__ import annotations

import re
import sys
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.nn.models.gpt import GPTConfig
from refimpl.nn.models.model import Model
from refimpl.nn.models.registry import SIZES, Sizes
from refimpl.parity.trace import batches_of
from refimpl.step import Batch
from refimpl.tools.memory.report import paper_text
from refimpl.tools.memory.tape import computed_again, forward, owned_bytes, tape_memory
from refimpl.training.activation_memory import Row, Term, against_paper, moments, nbytes, weight_copies
from refimpl.training.columns import table
from refimpl.training.config import Config
from refimpl.training.console import json_text
from refimpl.training.progress_bar import ProgressBar, Tick, no_tick
from refimpl.training.setup import Training, start

STEPS = 3
"""The default number of training steps before the measurement."""


@dataclass(frozen=True)
class Line:
    """A prediction and a measurement, in bytes."""

    what: str
    formula: str
    predicted: int
    measured: int

    @property
    def verdict(self) -> str:
        """Return 'equal', or the difference."""
        return "equal" if self.predicted == self.measured else f"differs by {self.measured - self.predicted:+,} bytes"


@dataclass(frozen=True)
class Measurement:
    """All predictions and measurements of a run. `measured_only`: (what, bytes, remark)."""

    config: Config
    model: Model
    sections: Mapping[str, Sequence[Line]]
    measured_only: Sequence[tuple[str, int, str]]

    @property
    def wrong(self) -> list[str]:
        """Return the names of lines whose prediction differs from the measurement."""
        return [f"{name}: {line.what}" for name, lines in self.sections.items() for line in lines if line.verdict != "equal"]


def measure_model(given: dict[str, Any], as_json: bool, quiet: bool = False) -> int:
    """Train, measure and print. given: fields of `Config`. quiet: show no progress.

    Return 0 if every prediction is equal to the byte, else 1.

    Errors: UsageError for fields that `Config.of` refuses, and for another backend than numpy.
    """
    config = Config.of({"steps": STEPS, **given})
    if config.backend != "numpy":
        raise UsageError(f"--backend {config.backend}: only numpy can be measured, whose arrays are in the process's memory")
    with ProgressBar(config.steps + 2, "step", quiet=quiet) as bar:
        result = measure_run(config, bar.update)
    print(json_text(_data(result)) if as_json else _text(result))
    return 1 if result.wrong else 0


# ------------------------------------------------------------------------------------------------------------- measuring


def measure_run(config: Config, tick: Tick = no_tick) -> Measurement:
    """Train for `config.steps` steps, then measure the states and a tape, and the peak memory of a step of a new run.

    tick: callback after each step, after the tape, and after the step of the new run.
    """
    steps = list(batches_of(config, None))
    before = process_memory()
    training = start(config)
    for batches in steps:
        training.step(batches)
        tick()
    after = process_memory()
    sections = {"model states": state_lines(config, training), **tape_lines(config, training, steps[-1][0])}
    tick()
    held = {name: sum(line.measured for line in lines) for name, lines in sections.items()}
    measured = held["model states"] + held["copies of weights"] + max(held["activations"], held.get(AGAIN, 0))
    traced = traced_peak(config, steps[-1])
    tick()
    only = [
        ("peak memory of one step", traced, "arrays and Python objects of a second run, counted by tracemalloc"),
        ("temporary buffers", traced - measured, "this peak minus all of the above; includes Python objects"),
    ]
    if before and after:
        only += [
            ("peak of the process", after[1], "resident memory of the whole process, interpreter and libraries included"),
            ("peak minus start", after[1] - before[0], "this peak minus the resident memory before training"),
        ]
    return Measurement(config, training.model, sections, only)


def state_lines(config: Config, training: Training) -> list[Line]:
    """Return one line per kind of model state: predicted from the recipe and the number of parameters, and measured."""
    predicted = config.make_recipe().buffers(config.make_rule().moments, config.grad_accum, training.state.layout.embeddings)
    n, measured, seen = training.model.n_params, {}, set[int]()
    for name, buffer in training.state.buffers.items():
        measured[name] = owned_bytes([buffer], seen)
    lines = []
    for name in {**predicted, **measured}:
        size, formula = 0, f"0 x {n:,} not in the recipe"
        if name in predicted:
            part = predicted[name]
            size = part.size(n) * part.dtype.itemsize
            shared = f" / {part.values}, rounded up" if part.values > 1 else ""
            count = f"{n:,}" if part.first is None else f"{part.first:,} of embeddings"
            formula = f"{part.dtype.itemsize} x {count}{shared} {part.dtype.name}"
        lines.append(Line(name, formula, size, measured.get(name, 0)))
    return lines


def tape_lines(config: Config, training: Training, batch: Batch) -> dict[str, list[Line]]:
    """Return lines on the tape of one micro-batch: activations by place after forward, and copies of weights.

    With checkpointing, also the activations when backward has computed the last block again.
    """
    terms, tape = predicted_activations(config), forward(training, batch)
    activations, copies = tape_memory(tape)
    sections = {"activations": activation_lines(terms[0], activations)}
    predicted = weight_copies(sizes_of(config), config.make_recipe())
    sections["copies of weights"] = [Line("16-bit weight copies", _formula(predicted), nbytes(predicted), copies)]
    if len(terms) > 1:
        sections[AGAIN] = activation_lines(terms[1], computed_again(training, tape))
    return sections


AGAIN = "activations in backward, when the last block has been computed again"


def activation_lines(terms: Iterable[Term], measured: Mapping[str, int]) -> list[Line]:
    """Return lines by place. measured: place -> bytes."""
    predicted: dict[str, list[Term]] = {}
    for term in terms:
        predicted.setdefault(term.place, []).append(term)
    lines = []
    for place in {**dict.fromkeys(predicted), **measured}:
        here = predicted.get(place, [])
        names = ", ".join(term.name for term in here) or f"{place}: not in the formula"
        lines.append(Line(names, _formula(here), nbytes(here), measured.get(place, 0)))
    return lines


def predicted_activations(config: Config) -> list[list[Term]]:
    """Return the terms of the formula for a run's activations, at each moment."""
    recipe, batch = config.make_recipe(), (config.batch_size, config.block_size)
    return moments(sizes_of(config), recipe, *batch, config.checkpointing)


def sizes_of(config: Config) -> Sizes:
    """Return the sizes of a run's model."""
    return SIZES[config.model](**config.make_model().config)


def _formula(terms: Sequence[Term]) -> str:
    return ", ".join(f"{term.shape} {term.fmt}" for term in terms) or "-"


def traced_peak(config: Config, batches: Sequence[Batch]) -> int:
    """Return the peak memory of the first step of a new run: arrays and Python objects, as counted by tracemalloc.

    Interpreter, modules and the corpus are not counted.
    """
    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        training, own = start(config), [(tokens.copy(), targets.copy()) for tokens, targets in batches]
        tracemalloc.reset_peak()
        training.step(own)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()


def process_memory() -> tuple[int, int] | None:
    """Return the resident memory of this process, now and at its peak, in bytes; None if the system has no such call.

    On Linux it is read from /proc, since the peak of getrusage, in a child, includes that of the process that started it. On
    macOS both numbers are getrusage's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kib = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE))
        return 1024 * int(kib["VmRSS"]), 1024 * int(kib["VmHWM"])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def forget_peak() -> bool:
    """Begin a new peak of `process_memory` with the memory of now. Return whether the system could, as Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- showing


LETTERS = {
    "n_layer": "L", "batch_size": "B", "block_size": "T", "n_embd": "C", "n_head": "H", "n_kv_head": "K", "head_dim": "D",
    "ffn_dim": "F", "vocab_size": "V",
}  # fmt: skip
"""The sizes by the letters of the formulas."""


def _text(result: Measurement) -> str:
    config, model = result.config, result.model
    of = {**asdict(sizes_of(config)), "batch_size": config.batch_size, "block_size": config.block_size}
    sizes = ", ".join(f"{letter} {of[name]}" for name, letter in LETTERS.items() if name in of)
    parts = [
        f"{model.name}, {model.n_params:,} parameters, recipe {config.recipe}, {config.optimizer}, after {config.steps} steps\n"
        f"{sizes}. Numbers are bytes; h.i and layers.i stand for the sum over all layers."
    ]
    parts += [f"{name}\n{_section(lines)}" for name, lines in result.sections.items()]
    whats, numbers, remarks = zip(*result.measured_only, strict=True)
    rows = list(zip(whats, _column(numbers), remarks, strict=True))
    parts.append(f"measured only\n{table([], rows, '  ')}")
    parts.append(f"NOT as predicted: {'; '.join(result.wrong)}" if result.wrong else "All predictions are equal to the byte.")
    own = sizes_of(config)
    if isinstance(own, GPTConfig):
        parts.append(paper_text(own, config.make_recipe(), config.batch_size, own.block_size))
    return "\n\n".join(parts)


def _section(lines: Sequence[Line]) -> str:
    total = Line("total", "", sum(line.predicted for line in lines), sum(line.measured for line in lines))
    lines = [*lines, *([total] if len(lines) > 1 else [])]
    predicted = _column([line.predicted for line in lines])
    measured = _column([line.measured for line in lines])
    rows = [[line.what, line.formula, p, m, line.verdict] for line, p, m in zip(lines, predicted, measured, strict=True)]
    return table(["", "formula", "predicted", "measured", ""], rows, "  ")


def _column(numbers: Sequence[int]) -> list[str]:
    """Return numbers as text, right-aligned."""
    cells = [f"{number:,}" for number in numbers]
    return [cell.rjust(max(map(len, cells))) for cell in cells]


def paper_rows(config: Config) -> list[Row]:
    """Return `against_paper` for a run of the GPT, else []."""
    sizes = sizes_of(config)
    if not isinstance(sizes, GPTConfig):
        return []
    return against_paper(sizes, config.make_recipe(), config.batch_size, sizes.block_size)


def _data(result: Measurement) -> dict[str, Any]:
    config = result.config
    return {
        "config": asdict(config),
        "parameters": result.model.n_params,
        "predicted": {
            name: [asdict(line) | {"equal": line.verdict == "equal"} for line in lines]
            for name, lines in result.sections.items()
        },
        "measured_only": {what: nbytes for what, nbytes, _ in result.measured_only},
        "against_paper": [asdict(row) for row in paper_rows(config)],
        "equal": not result.wrong,
    }
