"""Record what a training run computes, and find where another run departs from it, and why.

    python scripts/trace.py record --recipe fp16 --out ours.safetensors
    python scripts/trace.py record --recipe fp16 --mistake unscale-after-clip --out theirs.safetensors
    python scripts/trace.py diff ours.safetensors theirs.safetensors
    python scripts/trace.py record --recipe fp16 --like theirs.safetensors --out like.safetensors   on their batches

docs/traces.md describes traces, and how a training loop in PyTorch records one.
Exit code of diff: 0 AGREES, 1 DEPARTS, 2 bad usage, 3 PARTLY JUDGED (nothing departs, but not everything could be judged).
"""

from refimpl.training.cli import main as run_program

from pathlib import Path
from typing import Any

from refimpl.parity.coverage import EXIT_CODES
from refimpl.parity.diff import diff_traces
from refimpl.parity.trace import load, record, save
from refimpl.parity.trace_checks import checked
from refimpl.training.arguments import Parser
from refimpl.training.config import Config
from refimpl.training.console import json_text
from refimpl.training.flags import HELP, add_config_flags, refuse_unused
from refimpl.training.outputs import target
from refimpl.training.progress_bar import ProgressBar

DEFAULTS: dict[str, Any] = {
    "n_layer": 2, "n_embd": 64, "block_size": 32, "batch_size": 8, "lr": 1e-3, "steps": 4, "warmup": 1,
}  # fmt: skip
FOR_LONG_RUNS = ("eval_every", "eval_batches", "log_every", "sample_bytes", "keep", "log", "zero", "checkpointing")


def parser() -> Parser:
    """Return the parser of the flags: those of train.py that apply to a small model and a few steps."""
    result = Parser(description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    recording = commands.add_parser(
        "record",
        help="train a few steps and record everything",
        description="Train a few steps, and record everything that they compute in a file.",
    )
    add_config_flags(recording, [name for name in HELP if name not in FOR_LONG_RUNS], DEFAULTS)
    recording.add_argument("--like", type=Path, metavar="TRACE", help="use the initial weights and the batches of TRACE")
    recording.add_argument("--out", type=Path, required=True, metavar="FILE", help="the trace to write")
    recording.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    recording.add_quiet()
    difference = commands.add_parser(
        "diff",
        help="judge trace B by the recipe of trace A",
        description="Replay each step of B by the recipe of A: say where B departs first, and which mistake explains it.",
    )
    difference.add_argument("a", type=Path, metavar="A", help="the trace whose recipe decides")
    difference.add_argument("b", type=Path, metavar="B", help="the trace to judge")
    difference.add_argument("--json", type=Path, metavar="FILE", help="write the verdict as JSON")
    difference.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    difference.add_quiet()
    return result


def run(arguments: dict[str, Any]) -> int:
    """Record a trace, or compare two. Return the exit code."""
    quiet = arguments.pop("quiet")
    if arguments.pop("command") == "diff":
        path = arguments["json"]
        file = target("--json", path, path, arguments["overwrite"]) if path else None
        verdict = diff_traces(load(arguments["a"]), load(arguments["b"]), quiet)
        if file:
            file.write_text(json_text(verdict) + "\n")
        return EXIT_CODES[verdict["verdict"]]
    like, out = arguments.pop("like"), arguments.pop("out")
    file = target("--out", out, out, arguments.pop("overwrite"))
    source = load(like) if like else None
    if source:
        arguments["steps"] = min(arguments["steps"], len(source.steps))
    refuse_unused(arguments)
    config = Config.of(arguments)
    if source:
        source, notes = checked(source, config.make_model())
        print("\n".join(notes), end="\n" if notes else "")
    with ProgressBar(config.steps, "step", quiet=quiet) as bar:
        trace = record(config, source, bar.update)
    save(file.path, trace)
    print(f"{out}: {len(trace.steps)} steps, {len(trace.tensors)} tensors")
    return 0


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())), goes_on=True)
