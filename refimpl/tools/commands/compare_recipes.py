"""Train the same model from the same weights on the same batches under several recipes, and compare them.

    python scripts/compare_recipes.py                                ten recipes, in a table and runs/recipes.html: five minutes
    python scripts/compare_recipes.py --recipes all                  all without emulated accumulators: about three minutes
    python scripts/compare_recipes.py --recipes bf16,fp8,fp8-delayed --steps 500 --lr 1e-3
    python scripts/compare_recipes.py --init-from DIR --batch-size 1   fine-tune a Hugging Face model, 20 steps under each
    python scripts/compare_recipes.py --init-from DIR --inference --prompt "Gravity is"   no training: losses and texts

`python scripts/recipes.py` describes the recipes. The page is one HTML file and needs matplotlib.
"""

from refimpl.training.cli import main as run_program

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.precision.recipes import RECIPES
from refimpl.tools.compare_recipes.inference import FORMATS_COMPARED, TOKENS, compare_inference
from refimpl.tools.compare_recipes.page import PAGE, STEPS, STEPS_FROM, STEPS_OF_ALL, WARMUP, compare_recipes
from refimpl.tools.compare_recipes.runs import DEFAULT, PERTURBATIONS
from refimpl.training.arguments import Parser, some_of
from refimpl.training.config import LLAMA
from refimpl.training.flags import add_config_flags, refuse_unused
from refimpl.training.program import as_called

CONFIG_FLAGS = (
    "model", "data", "tokenizer", "examples", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "bias",
    *LLAMA, "optimizer", "momentum", "beta1", "beta2", "eps", "lr", "min_lr", "schedule", "weight_decay", "clip", "grad_accum",
    "seed", "eval_batches", "steps", "warmup",
)  # fmt: skip
SEEDS = 3
OWN_FLAGS = ("init_from", "recipes", "seeds", "perturbations", "out", "no_page", "json_file", "overwrite", "quiet")


def parser() -> Parser:
    """Return the parser of the flags: fields of Config, and those of this command."""
    result = Parser(description=__doc__)
    usual = f"{', '.join(DEFAULT)}; with --inference {', '.join(FORMATS_COMPARED)}"
    names = f"all, or names with commas between them (default: {usual})"
    result.add_argument("--recipes", type=some_of(RECIPES), metavar="NAME,...", help=names)
    what = "start from the weights and sizes of a Hugging Face folder, a run or a checkpoint; the recipes train in turn"
    result.add_argument("--init-from", type=Path, metavar="DIR", help=what)
    several = f"seeds of the FP32 runs, that of the comparison included (default: {SEEDS})"
    result.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=several)
    changed = f"FP32 runs on the same batches from weights changed in their last bit (default: {PERTURBATIONS})"
    result.add_argument("--perturbations", type=int, default=PERTURBATIONS, metavar="N", help=changed)
    result.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default: {PAGE}, with a number if it exists)")
    result.add_argument("--no-page", action="store_true", help="write no page; needs no matplotlib")
    result.add_argument("--json", type=Path, dest="json_file", metavar="FILE", help="also write all data as JSON")
    result.add_argument("--overwrite", action="store_true", help="replace an existing page and data")
    result.add_quiet()
    what = "do not train: compare the losses of the first blocks of the validation text, and greedy continuations of --prompt"
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    result.add_argument("--inference", action="store_true", **absent, help=what)
    result.add_argument("--prompt", metavar="TEXT", **absent, help="beginning of the continuation (default: a line break)")
    more = f"tokens to continue with (default: {TOKENS})"
    result.add_argument("--tokens", type=int, dest="n_tokens", metavar="N", **absent, help=more)
    steps = f"{STEPS}; with all recipes {STEPS_OF_ALL}, with --init-from {STEPS_FROM}"
    add_config_flags(result, CONFIG_FLAGS, said={"steps": steps, "warmup": WARMUP})
    return result


def run() -> None:
    """Run the comparison that the command line describes. Errors: UsageError, also for flags that do not go together."""
    arguments = vars(parser().parse_args())
    refuse_unused(arguments)
    own = {name: arguments.pop(name) for name in OWN_FLAGS}
    written = {name: arguments.pop(name) for name in ("prompt", "n_tokens") if name in arguments}
    if arguments.pop("inference", False):
        run_inference(arguments, **own, written=written)
        return
    if written:
        raise UsageError("--prompt and --tokens are for --inference, which writes a text: give that too")
    compare_recipes(arguments, **own, command=as_called(shlex.join(["python", "scripts/compare_recipes.py", *sys.argv[1:]])))


def run_inference(
    given: dict[str, Any],
    init_from: Path | None,
    recipes: str | None,
    seeds: int,
    perturbations: int,
    out: Path | None,
    no_page: bool,
    json_file: Path | None,
    overwrite: bool,
    quiet: bool,
    written: dict[str, Any],
) -> None:
    """Compare what the same weights compute. Errors: UsageError for flags of a comparison of trainings."""
    if init_from is None:
        raise UsageError("--inference needs weights that have been trained: give --init-from")
    if (seeds, perturbations) != (SEEDS, PERTURBATIONS) or out is not None or no_page:
        surplus = "--seeds, --perturbations, --out and --no-page"
        raise UsageError(f"--inference trains nothing and writes no page: leave out {surplus}")
    names = ",".join(FORMATS_COMPARED) if recipes is None else recipes
    compare_inference(given, init_from, names, **written, json_file=json_file, overwrite=overwrite, quiet=quiet)


def main() -> None:
    """Run the command and exit."""
    run_program(run, goes_on=True)
