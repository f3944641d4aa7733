"""Train with refimpl and with PyTorch side by side, and report whether and where they differ.

    pip install torch==2.13.0
    python scripts/compare_pytorch.py --recipe fp16 --steps 50      about 15 seconds

With --hf the model is that of a Hugging Face folder, on PyTorch's side as transformers computes it (docs/pytorch.md):

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
from refimpl.parity.pytorch import RECIPES, compare, import_torch, report, steps_of
from refimpl.training.arguments import Parser
from refimpl.training.config import Config, flag
from refimpl.training.flags import add_config_flags, refuse_unused
from refimpl.training.outputs import target
from refimpl.training.progress_bar import ProgressBar

DEFAULTS: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "block_size": 32, "lr": 1e-3}
"""A model that trains in seconds."""
OF_THE_FOLDER = ("model", "n_layer", "n_head", "n_embd", "block_size", "device")
"""Flags that --hf takes the place of."""
START: dict[str, Any] = {"init_scale": 2.0**18, "growth_interval": 8}
"""Settings of the loss scale, if it adapts and they are not given: with these FP16 overflows once or twice."""
CONFIG_FLAGS = (
    "recipe", "model", *DEFAULTS, "steps", "batch_size", "warmup", "seed", "data", "optimizer", *START,
    "backend", "examples", "ignore_index", "weight_decay", "momentum", "beta1", "beta2", "eps", "min_lr", "schedule",
    "growth_factor", "backoff_factor", "attention", "clip", "tokenizer", "activation",
)  # fmt: skip
SAID = {
    **DEFAULTS, "lr": "0.001; with --hf 1e-4", "steps": "50; with --hf 20, and 0 for none", "warmup": "10; with --hf 5",
    "batch_size": "8; 256 for mlp; 1 with --hf", "init_scale": "262144; with --hf 1024", "growth_interval": 8,
}  # fmt: skip
TEXTS = {
    "recipe": f"{', '.join(RECIPES)}; with --hf also pure-bf16 (default: fp16; with --hf fp32)",
    "model": "gpt or mlp (default: gpt)",
    "attention": "unfused, fused or math; with --hf eager or sdpa (default: unfused; with --hf eager)",
}


def parser() -> Parser:
    """Return the parser of the flags: those of train.py that apply here."""
    result = Parser(description=__doc__)
    add = result.add_argument
    add("--hf", type=Path, metavar="DIR", help="a Hugging Face folder: compare with transformers instead")
    tokens = "with --hf: tokens per sequence (default: 64)"
    add("--tokens", type=int, default=argparse.SUPPRESS, metavar="T", help=tokens)
    device = "where PyTorch runs: cpu, or cuda with torch.autocast('cuda') (default: cpu)"
    add("--device", default=argparse.SUPPRESS, metavar="NAME", help=device)
    add("--json", type=Path, metavar="FILE", help="write the figures of the verdict as JSON")
    add("--overwrite", action="store_true", help="replace an existing FILE")
    result.add_quiet()
    add_config_flags(result, CONFIG_FLAGS, said=SAID, texts=TEXTS)
    return result


def run(arguments: dict[str, Any]) -> int:
    """Compare, print the report and write the figures. Return the exit code."""
    path, overwrite, folder, quiet = (arguments.pop(name) for name in ("json", "overwrite", "hf", "quiet"))
    figures = target("--json", path, path, overwrite) if path else None
    refuse_unused(arguments)
    summary, agrees = _compare(arguments, quiet) if folder is None else _compare_folder(folder, arguments, quiet)
    if figures:
        figures.write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if agrees else 1


def _compare(arguments: dict[str, Any], quiet: bool) -> tuple[dict[str, Any], bool]:
    """Compare a model of ours with the same one in PyTorch. Return the figures, and whether they agree."""
    if "tokens" in arguments:
        raise UsageError("--tokens is for --hf: give --block-size")
    device = arguments.pop("device", "cpu")
    others = {"model": "gpt", "recipe": "fp16", "steps": 50, "warmup": 10}
    settings = {**others, **DEFAULTS, "batch_size": 256 if arguments.get("model") == "mlp" else 8, **START, **arguments}
    config = Config.of(settings)
    with ProgressBar(steps_of(config, device), "step", quiet=quiet) as bar:
        result = compare(config, device=device, tick=bar.update)
    print(report(result))
    return result.summary(), result.agrees


def _compare_folder(folder: Path, arguments: dict[str, Any], quiet: bool) -> tuple[dict[str, Any], bool]:
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
    read = ours.Ours.read(folder, arguments, attention)
    with ProgressBar(read.config.steps, "step", quiet=quiet) as bar:
        result = comparison.compare(folder, read, bar.update)
    print(report_of(result))
    return result.summary(), result.agrees


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())), goes_on=True)
