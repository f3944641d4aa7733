"""Train with refimpl and with PyTorch side by side, and report whether and where they differ.

    pip install torch==2.13.0
    python scripts/compare_pytorch.py --recipe fp16 --steps 50

With --hf the model is that of a folder of Hugging Face, on PyTorch's side as transformers computes it (docs/pytorch.md):

    pip install torch==2.13.0 transformers==5.24.0
    python scripts/compare_pytorch.py --hf FOLDER --recipe pure-bf16 --attention eager --tokens 64 --batch-size 1

Exit code: 0 if everything is within its bound, 1 if not.
"""

from refimpl.training.cli import main as run_program

import argparse
import json
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.parity.pytorch import RECIPES, compare, import_torch, report
from refimpl.training.arguments import Parser
from refimpl.training.config import Config, flag
from refimpl.training.flags import add_config_flags, refuse_unused
from refimpl.training.outputs import target

DEFAULTS: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "lr": 1e-3}
"""A model that trains in seconds."""
OF_THE_FOLDER = ("model", "n_layer", "n_head", "n_embd", "block_size", "device")
"""Flags that --hf takes the place of."""
START: dict[str, Any] = {"init_scale": 2.0**18, "growth_interval": 8}
"""Settings of the loss scale, if it adapts and they are not given: with these FP16 overflows once or twice."""
CONFIG_FLAGS = (
    "backend", "examples", "ignore_index", "weight_decay", "momentum", "beta1", "beta2", "eps", "min_lr", "schedule",
    "growth_factor", "backoff_factor", "attention", "clip", "tokenizer", "activation",
)  # fmt: skip


def parser() -> Parser:
    """Return the parser of the flags: those of train.py that apply here."""
    result = Parser(description=__doc__)
    add = result.add_argument
    add("--hf", type=Path, metavar="DIR", help="a folder of Hugging Face: compare with transformers instead")
    add("--recipe", default=argparse.SUPPRESS, help=f"{', '.join(RECIPES)} (fp16); with --hf also pure-bf16 (fp32)")
    add("--model", default=argparse.SUPPRESS, help="gpt or mlp")
    add("--steps", type=int, default=argparse.SUPPRESS, help="50; with --hf 20, and 0 for none")
    add("--tokens", type=int, default=argparse.SUPPRESS, metavar="T", help="with --hf: tokens per sequence (64)")
    add("--seed", type=int, default=0)
    for name, value in DEFAULTS.items():
        more = "; with --hf 1e-4" if name == "lr" else ""
        add(flag(name), type=type(value), default=argparse.SUPPRESS, help=f"{value}{more}")
    add("--batch-size", type=int, default=argparse.SUPPRESS, help="8; 256 for mlp; 1 with --hf")
    add("--warmup", type=int, default=argparse.SUPPRESS, help="10; with --hf 5")
    add("--optimizer", default="adamw", help="adamw or sgd")
    add_config_flags(result, [name for name in CONFIG_FLAGS if name != "attention"])
    add("--attention", default=argparse.SUPPRESS, help="unfused, fused or math (unfused); with --hf eager or sdpa (eager)")
    for name, value in START.items():
        more = ", 1024 with --hf" if name == "init_scale" else ""
        add(flag(name), type=type(value), default=argparse.SUPPRESS, help=f"{value:g}{more}; for a loss scale that adapts")
    add("--data", default=argparse.SUPPRESS, help="pydoc, stdlib or a file (pydoc)")
    add("--device", default=argparse.SUPPRESS, help="where PyTorch runs: cpu, or cuda with torch.autocast('cuda')")
    add("--json", type=Path, metavar="FILE", help="write the figures of the verdict")
    add("--overwrite", action="store_true", help="replace an existing FILE")
    return result


def run(arguments: dict[str, Any]) -> int:
    """Compare, print the report and write the figures. Return the exit code."""
    path, overwrite, folder = arguments.pop("json"), arguments.pop("overwrite"), arguments.pop("hf")
    figures = target("--json", path, path, overwrite) if path else None
    refuse_unused(arguments)
    summary, agrees = (_compare(arguments) if folder is None else _compare_folder(folder, arguments))
    if figures:
        figures.write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if agrees else 1


def _compare(arguments: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Compare a model of ours with the same one in PyTorch. Return the figures, and whether they agree."""
    if "tokens" in arguments:
        raise UsageError("--tokens is for --hf: give --block-size")
    device = arguments.pop("device", "cpu")
    others = {"model": "gpt", "recipe": "fp16", "steps": 50, "warmup": 10}
    settings = {**others, **DEFAULTS, "batch_size": 256 if arguments.get("model") == "mlp" else 8, **START, **arguments}
    result = compare(Config.of(settings), device=device)
    print(report(result))
    return result.summary(), result.agrees


def _compare_folder(folder: Path, arguments: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Compare transformers' model of a folder with ours. Return the figures, and whether they agree."""
    given = next((name for name in OF_THE_FOLDER if name in arguments), None)
    if given is not None:
        more = "; --tokens is the length of a sequence" if given == "block_size" else ""
        raise UsageError(f"{flag(given)} is not for --hf: the folder has the model, which runs on the CPU{more}")
    import_torch()
    from refimpl.parity.transformers import comparison, ours
    from refimpl.parity.transformers.printed import report as report_of

    comparison.require_packages()
    attention = arguments.pop("attention", "eager")
    if "tokens" in arguments:
        arguments["block_size"] = arguments.pop("tokens")
    result = comparison.compare(folder, ours.Ours.read(folder, arguments, attention))
    print(report_of(result))
    return result.summary(), result.agrees


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())), goes_on=True)
