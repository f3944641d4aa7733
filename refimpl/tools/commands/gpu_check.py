"""Check the CuPy backend on your GPU, and print a report to paste into an issue.

    pip install -e '.[cuda13,test]'                                   or cuda12, by your driver
    python scripts/gpu_check.py

Every kernel is compared with its NumPy definition, every recipe trains on both backends, and steps are timed, and those of
PyTorch if it is installed. Exit code: 0 if everything passes, 1 if not.

    python scripts/gpu_check.py --predict

needs no GPU: it prints the predicted cost of a training step of GPT-2 on an H100.
"""

from refimpl.training.cli import main as run_program

import argparse
from pathlib import Path
from typing import Any

from refimpl.errors import UsageError
from refimpl.parity.judge import JUDGED
from refimpl.precision.recipes import RECIPES as KNOWN
from refimpl.tools.bench import gpu_cost
from refimpl.tools.bench.gpu_check import RECIPES, check
from refimpl.tools.bench.gpu_cost import GPUS
from refimpl.tools.bench.steps import MODELS
from refimpl.training.arguments import Parser, one_of, some_of

TESTS = Path(__file__).parents[3] / "tests"
DEFAULTS: dict[str, Any] = {"recipes": ",".join(RECIPES), "steps": 50, "models": "small,medium,gpt2", "rounds": 15}


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    recipes = f"recipes, with commas between them (default: {DEFAULTS['recipes']}; with --predict bf16)"
    result.add_argument("--recipes", type=some_of(KNOWN), metavar="NAME,...", help=recipes)
    result.add_argument("--steps", type=int, metavar="N", help="training steps per recipe (default: 50)")
    sizes = f"sizes to time: {', '.join(MODELS)} (default: {DEFAULTS['models']})"
    result.add_argument("--models", type=some_of(MODELS), metavar="NAME,...", help=sizes)
    result.add_argument("--rounds", type=int, metavar="N", help="steps timed (default: 15)")
    result.add_quiet()
    result.add_argument("--predict", action="store_true", help="print the predicted cost of a step instead; needs no GPU")
    result.add_argument(
        "--gpu", type=one_of(GPUS), metavar="NAME", help=f"GPU of the prediction: {' or '.join(GPUS)} (default: h100)"
    )
    return result


def _checked(recipes: list[str]) -> list[str]:
    """Return the recipes if all can be checked. Errors: UsageError, before the tests of the kernels, which take minutes."""
    for name in recipes:
        if name not in JUDGED:
            raise UsageError(f"recipe {name} cannot be checked, only {', '.join(JUDGED)}")
    return recipes


def run(given: dict[str, Any]) -> int:
    """Check the GPU, or predict. Return the exit code. Errors: UsageError for flags that do not go together."""
    if given.pop("predict", False):
        for name in given:
            if name not in ("recipes", "gpu"):
                raise UsageError(f"--{name} does not apply to --predict")
        return gpu_cost.show(given.get("recipes", "bf16").split(","), given.get("gpu", "h100"))
    if "gpu" in given:
        raise UsageError("--gpu belongs to --predict: a check runs on the GPU that is there")
    arguments = {**DEFAULTS, **given}
    recipes, models = _checked(arguments.pop("recipes").split(",")), arguments.pop("models").split(",")
    if not TESTS.is_dir():
        raise UsageError("the tests of the kernels are not installed with the package: run this in a clone of the project")
    return check(TESTS, recipes, models=models, **arguments)


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())))
