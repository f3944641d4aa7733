"""Train with refimpl and with PyTorch side by side, and report whether and where they differ.

    pip install torch==2.13.0
    python scripts/compare_pytorch.py --recipe fp16 --steps 50

Exit code: 0 if everything is within its bound, 1 if not.
"""

from refimpl.training.cli import main as run_program

import argparse
import json
from pathlib import Path
from typing import Any

from refimpl.parity.pytorch import RECIPES, compare, report
from refimpl.training.arguments import Parser
from refimpl.training.config import Config
from refimpl.training.flags import add_config_flags, refuse_unused
from refimpl.training.outputs import target

DEFAULTS: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "lr": 1e-3}
"""A model that trains in seconds."""
START: dict[str, Any] = {"init_scale": 2.0**18, "growth_interval": 8}
"""Settings of the loss scale, if it adapts and they are not given: with these FP16 overflows once or twice."""
CONFIG_FLAGS = (
    "backend", "examples", "ignore_index", "weight_decay", "momentum", "beta1", "beta2", "eps", "min_lr", "schedule",
    "growth_factor", "backoff_factor", "attention", "clip", "tokenizer",
)  # fmt: skip


def parser() -> Parser:
    """Return the parser of the flags: those of train.py that apply here."""
    result = Parser(description=__doc__)
    add = result.add_argument
    add("--recipe", default="fp16", help=", ".join(RECIPES))
    add("--model", default="gpt", help="gpt or mlp")
    add("--steps", type=int, default=50)
    add("--seed", type=int, default=0)
    for name, value in DEFAULTS.items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value)
    add("--batch-size", type=int, default=argparse.SUPPRESS, help="8 for gpt, 256 for mlp: 256 predictions per step")
    add("--warmup", type=int, default=10)
    add("--optimizer", default="adamw", help="adamw or sgd")
    add_config_flags(result, CONFIG_FLAGS)
    for name, value in START.items():
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=type(value), default=argparse.SUPPRESS, help=f"{value}; for a loss scale that adapts")
    add("--data", default="pydoc")
    add("--device", default="cpu", help="where PyTorch runs: cpu, or cuda with torch.autocast('cuda')")
    add("--json", type=Path, metavar="FILE", help="write the figures of the verdict")
    add("--overwrite", action="store_true", help="replace an existing FILE")
    return result


def run(arguments: dict[str, Any]) -> int:
    """Compare, print the report and write the figures. Return the exit code."""
    path, overwrite, device = arguments.pop("json"), arguments.pop("overwrite"), arguments.pop("device")
    figures = target("--json", path, path, overwrite) if path else None
    arguments.setdefault("batch_size", 256 if arguments["model"] == "mlp" else 8)
    refuse_unused(arguments)
    result = compare(Config.of({**START, **arguments}), device=device)
    print(report(result))
    if figures:
        figures.write_text(json.dumps(result.summary(), indent=2) + "\n")
    return 0 if result.agrees else 1


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())), goes_on=True)
