"""Measure what the audit costs: time and memory of audited and unaudited steps beside those of plain ones.

    python scripts/audit_cost.py                  FP32 and autocast BF16; exit code 1 if a number is over its limit
    python scripts/audit_cost.py --profile fp32   the functions in which an audited step spends its time

The training is that of a Hugging Face Llama with 10 M parameters (8 layers, 320 wide), 4 sequences of 128 tokens, AdamW,
clipping. Times are medians of rounds; in each round a plain step, two unaudited ones, a plain and an audited one follow one
another, so that what else the machine does meets all three. Memory is what a fresh process adds, at its peak, to what it has
before the model.

What an unaudited step costs is measured twice. The ratio of unaudited to plain steps, the median of those of each round, is
printed with its standard error, and is over its limit where it is by more than two of these: two runs of the same step differ
by a few percent on most machines. And nothing of the audit runs in an unaudited step but `audit.step()` at its end, which is
timed alone: a plain step with that call may not take more than the limit either.

What the audit does between operations runs on one thread, so the ratio is larger the more threads a plain step has; and smaller
where products take long, as those of BF16 on processors without instructions for them.
"""

from __future__ import annotations

from refimpl.training.cli import main  # first: Ctrl-C is answered from here on

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from refimpl.errors import UsageError
from refimpl.parity.pytorch import import_torch
from refimpl.tools.memory.measure import process_memory
from refimpl.training.arguments import Parser
from refimpl.training.columns import table
from refimpl.training.progress_bar import ProgressBar, Tick

PRECISIONS = ("fp32", "amp-bf16")
LIMITS = {"time": 12.0, "memory": 3.0, "unaudited": 1.01, "call": 1.01}
"""The most that an audited step may take, its process may hold, an unaudited step may take, and a plain step with the call of
`audit.step()` that ends an unaudited one, per plain one's."""
PLAIN, UNAUDITED, AUDITED = "plain", "unaudited", "audited"
CALLS = 1000
"""How many calls of `audit.step()` are timed together."""
Table = dict[str, dict[str, float]]


@dataclass
class Training:
    """A model in training; `step` is a step of it."""

    model: Any
    optimizer: Any
    step: Callable[[], None]


def training(precision: str) -> Training:
    """Return the training in FP32 or under autocast."""
    torch = import_torch()
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UsageError("scripts/audit_cost.py trains a model of transformers: pip install transformers==5.24.0") from None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=320, intermediate_size=768, num_hidden_layers=8, num_attention_heads=5, use_cache=False
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(2048, (4, 128))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp-bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, optimizer, step)


def seconds(of: Training, kind: str) -> float:
    """Return how long one step takes: plain, or the first or second of an audit that audits the first."""
    from refimpl.parity.audit import Audit

    if kind == PLAIN:
        begun = time.perf_counter()
        of.step()
        return time.perf_counter() - begun
    with Audit(of.model, of.optimizer, steps=1 if kind == AUDITED else 0, every=10**9) as audit:
        begun = time.perf_counter()
        of.step()
        audit.step()
        return time.perf_counter() - begun


def call_seconds(of: Training) -> float:
    """Return how long `audit.step()` takes at the end of an unaudited step."""
    from refimpl.parity.audit import Audit

    with Audit(of.model, of.optimizer, steps=0, every=10**9) as audit:
        begun = time.perf_counter()
        for _ in range(CALLS):
            audit.step()
        return (time.perf_counter() - begun) / CALLS


def times(of: Training, rounds: int, tick: Tick) -> dict[str, list[float]]:
    """Return the times of steps of each kind: one audited per round, and two plain and two unaudited ones, which are cheap.

    tick: callback after each round.
    """
    measured: dict[str, list[float]] = {kind: [] for kind in (PLAIN, UNAUDITED, AUDITED)}
    for kind in measured:
        seconds(of, kind)
    for i in range(rounds):
        first, second = (PLAIN, UNAUDITED) if i % 2 else (UNAUDITED, PLAIN)
        for kind in (first, second, second, first, AUDITED):
            measured[kind].append(seconds(of, kind))
        tick()
    return measured


def paired(measured: dict[str, list[float]]) -> tuple[float, float]:
    """Return the ratio of unaudited to plain steps, the median over the rounds, and the standard error of that median.

    The spread of the rounds is estimated from their quartiles, which a few disturbed rounds do not widen.
    """
    plain, other = measured[PLAIN], measured[UNAUDITED]
    ratios = [sum(other[i : i + 2]) / sum(plain[i : i + 2]) for i in range(0, len(plain), 2)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return middle, 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5


def memory(precision: str, kind: str) -> int:
    """Return the bytes that a training adds to this process at its peak, over two steps, both audited or neither."""
    from refimpl.parity.audit import Audit  # noqa: F401 (as large as it is, it is no part of either)

    import_torch()
    import transformers.models.llama.modeling_llama  # noqa: F401

    before = process_memory()
    of = training(precision)
    for _ in range(2):
        seconds(of, kind)
    after = process_memory()
    if before is None or after is None:
        raise UsageError("the memory of a process cannot be read on this system")
    return after[1] - before[0]


def memory_apart(precision: str, kind: str) -> int:
    """Return `memory` as a process of its own measures it."""
    call = [sys.executable, os.path.abspath(__file__), "--memory", precision, kind]
    return int(json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout))


def costs(precision: str, rounds: int, tick: Tick) -> Table:
    """Return what is measured in one precision: 'steps' in seconds, 'bytes', the 'ratios' that have limits, their 'errors'.

    tick: callback after each round of steps, and after the memory.
    """
    of = training(precision)
    measured = times(of, rounds, tick)
    steps = {kind: median(found) for kind, found in measured.items()}
    steps["call"] = call_seconds(of)
    held = {kind: float(memory_apart(precision, kind)) for kind in (PLAIN, AUDITED)}
    tick()
    unaudited, error = paired(measured)
    ratios = {
        "time": steps[AUDITED] / steps[PLAIN], "memory": held[AUDITED] / held[PLAIN],
        "unaudited": unaudited, "call": 1 + steps["call"] / steps[PLAIN],
    }  # fmt: skip
    return {"steps": steps, "bytes": held, "ratios": ratios, "errors": {"unaudited": error}}


def over(found: Table) -> list[str]:
    """Return the ratios that are over their limits, by more than twice their standard error where they have one."""
    return [kind for kind, limit in LIMITS.items() if found["ratios"][kind] - 2 * found["errors"].get(kind, 0.0) > limit]


def rows(precision: str, found: Table) -> list[list[str]]:
    """Return the lines of the table for one precision."""
    steps, held = found["steps"], found["bytes"]
    numbers = {
        "time": ("audited step", f"{steps[PLAIN]:.3f} s", f"{steps[AUDITED]:.3f} s"),
        "unaudited": ("unaudited step", f"{steps[PLAIN]:.3f} s", f"{steps[UNAUDITED]:.3f} s"),
        "call": ("its audit.step()", "", f"{1e6 * steps['call']:.1f} us"),
        "memory": ("peak memory", f"{held[PLAIN] / 1e6:.0f} MB", f"{held[AUDITED] / 1e6:.0f} MB"),
    }
    lines = []
    for kind, cells in numbers.items():
        error = f" +- {found['errors'][kind]:.3f}" if kind in found["errors"] else ""
        digits = ".3f" if LIMITS[kind] < 2 else ".2f"
        lines.append([precision, *cells, f"{found['ratios'][kind]:{digits}}{error}", f"{LIMITS[kind]:g}"])
    return lines


def profile(precision: str) -> None:
    """Print in which functions an audited step spends its time."""
    import cProfile
    import pstats

    of = training(precision)
    seconds(of, AUDITED)
    with cProfile.Profile() as profiler:
        seconds(of, AUDITED)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    kind = result.add_mutually_exclusive_group()
    kind.add_argument("--profile", choices=PRECISIONS, help="print the functions in which an audited step spends its time")
    added = "print the bytes that two steps of a KIND add to this process"
    kind.add_argument("--memory", nargs=2, metavar=("PRECISION", "KIND"), help=added)
    result.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of steps, at least 3 (default: 7)")
    result.add_argument("--threads", type=int, default=2, metavar="N", help="threads of PyTorch (default: 2)")
    result.add_quiet()
    return result


def run() -> int:
    """Measure what the flags ask for. Return 1 if a number is over its limit."""
    flags = parser().parse_args()
    if flags.rounds < 3:
        raise UsageError(f"--rounds {flags.rounds}: at least 3")
    import_torch().set_num_threads(flags.threads)
    if flags.memory:
        print(memory(*flags.memory))
        return 0
    if flags.profile:
        profile(flags.profile)
        return 0
    with ProgressBar(len(PRECISIONS) * (flags.rounds + 1), "round", quiet=flags.quiet) as bar:
        found = {precision: costs(precision, flags.rounds, bar.update) for precision in PRECISIONS}
    lines = [line for precision, cost in found.items() for line in rows(precision, cost)]
    print(table(["precision", "what", "plain", "under the audit", "ratio", "limit"], lines))
    wrong = [f"{precision}: {kind}" for precision, cost in found.items() for kind in over(cost)]
    print(f"OVER THE LIMIT: {', '.join(wrong)}" if wrong else "all within their limits")
    return int(bool(wrong))


if __name__ == "__main__":
    main(run)
