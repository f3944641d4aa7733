"""Check the CuPy backend on your GPU, and print a report to paste into an issue.

    pip install -e '.[cuda13,test]'                                   or cuda12, by your driver
    python scripts/gpu_check.py

Every kernel runs against its twin in NumPy, every recipe trains beside the numpy backend, and steps are timed, beside
PyTorch's if it is installed. Exit code 0 when everything holds, 1 when not.
"""

import argparse
from pathlib import Path
from typing import Any

from refimpl.bench import MODELS
from refimpl.cli import main
from refimpl.gpu_check import RECIPES, check

TESTS = Path(__file__).parent.parent / "tests"


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--recipes", default=",".join(RECIPES), help=f"with commas between them ({','.join(RECIPES)})")
    result.add_argument("--steps", type=int, default=50, help="steps that each recipe trains (50)")
    result.add_argument("--models", default="small,medium", help=f"sizes to time: {', '.join(MODELS)} (small,medium)")
    result.add_argument("--rounds", type=int, default=15, help="steps timed (15)")
    return result


def run(arguments: dict[str, Any]) -> int:
    """Check and print."""
    recipes, models = arguments.pop("recipes").split(","), arguments.pop("models").split(",")
    return check(TESTS, recipes, models=models, **arguments)


if __name__ == "__main__":
    main(lambda: run(vars(parser().parse_args())))
