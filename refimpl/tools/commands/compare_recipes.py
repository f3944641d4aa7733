"""Train the same model from the same weights on the same batches under several recipes, and compare them.

    python scripts/compare_recipes.py                                ten recipes: a table, and runs/recipes.html
    python scripts/compare_recipes.py --recipes all                  all that do not emulate accumulators, in ten minutes
    python scripts/compare_recipes.py --recipes bf16,fp8,fp8-delayed --steps 500 --lr 1e-3
    python scripts/compare_recipes.py --init-from DIR --batch-size 1   fine-tune a model of Hugging Face for 20 steps under each

`python scripts/recipes.py` describes the recipes. The page is one HTML file and needs matplotlib.
"""

from refimpl.training.cli import main as run_program

import argparse
import shlex
import sys
from pathlib import Path

from refimpl.tools.compare_recipes.page import PAGE, STEPS, STEPS_FROM, STEPS_OF_ALL, WARMUP, compare_recipes
from refimpl.tools.compare_recipes.runs import DEFAULT, PERTURBATIONS
from refimpl.training.arguments import Parser
from refimpl.training.flags import add_config_flags
from refimpl.training.program import as_called

CONFIG_FLAGS = (
    "model", "data", "tokenizer", "examples", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "bias",
    "optimizer", "momentum", "beta1", "beta2", "eps", "lr", "min_lr", "schedule", "weight_decay", "clip", "grad_accum",
    "seed", "eval_batches",
)  # fmt: skip
OWN_FLAGS = ("init_from", "recipes", "seeds", "perturbations", "out", "no_page", "json_file", "overwrite")


def parser() -> Parser:
    """Return the parser of the flags: fields of Config, and those of this command."""
    result = Parser(description=__doc__)
    result.add_argument("--recipes", default=",".join(DEFAULT), metavar="NAME,...", help=f"all, or some ({','.join(DEFAULT)})")
    what = "start from the weights and sizes of a folder of Hugging Face, or of a checkpoint, one recipe after another"
    result.add_argument("--init-from", type=Path, metavar="DIR", help=what)
    steps = f"training steps ({STEPS}; with all recipes {STEPS_OF_ALL}, with --init-from {STEPS_FROM})"
    result.add_argument("--steps", type=int, default=argparse.SUPPRESS, help=steps)
    result.add_argument("--warmup", type=int, default=argparse.SUPPRESS, help=f"updates of linear warm-up ({WARMUP})")
    result.add_argument("--seeds", type=int, default=3, help="seeds of the FP32 runs, that of the comparison included (3)")
    changed = f"FP32 runs on the same batches from weights changed in their last bit ({PERTURBATIONS})"
    result.add_argument("--perturbations", type=int, default=PERTURBATIONS, metavar="N", help=changed)
    result.add_argument("--out", type=Path, metavar="FILE", help=f"the page ({PAGE}, with a number if it exists)")
    result.add_argument("--no-page", action="store_true", help="write no page; needs no matplotlib")
    result.add_argument("--json", type=Path, dest="json_file", metavar="FILE", help="also write all data")
    result.add_argument("--overwrite", action="store_true", help="replace an existing page and data")
    add_config_flags(result, CONFIG_FLAGS)
    return result


def run() -> None:
    """Run the comparison that the command line describes."""
    arguments = vars(parser().parse_args())
    own = {name: arguments.pop(name) for name in OWN_FLAGS}
    compare_recipes(arguments, **own, command=as_called(shlex.join(["python", "scripts/compare_recipes.py", *sys.argv[1:]])))


def main() -> None:
    """Run the command and exit."""
    run_program(run, goes_on=True)
