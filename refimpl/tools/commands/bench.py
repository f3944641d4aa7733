"""Time training steps: against PyTorch, against their own matrix products, by operation, and as sizes grow.

    python scripts/bench.py                                      small and medium GPT in FP32, BF16, FP16: a minute or two
    python scripts/bench.py --against torch                      against PyTorch, in turn, with peak memory
    python scripts/bench.py --profile --models small --recipes fp16
    python scripts/bench.py --scaling --recipes fp32
    python scripts/bench.py --ranks 2 --models medium            on 1 and 2 ranks, and a prediction for up to 1024 GPUs
    python scripts/bench.py --smoke                              a toy size and two steps, as a test
"""

from refimpl.training.cli import main as run_program

from typing import Any

from refimpl.precision.recipes import RECIPES
from refimpl.tools.bench.ranks import show
from refimpl.tools.bench.steps import MODELS, bench
from refimpl.training.arguments import Parser, some_of
from refimpl.training.console import json_text


def parser() -> Parser:
    """Return the parser of the flags."""
    result = Parser(description=__doc__)
    kind = result.add_mutually_exclusive_group()
    kind.add_argument("--against", choices=("torch",), help="time PyTorch too (pip install torch==2.13.0)")
    kind.add_argument("--profile", action="store_true", help="time per operation, for the first model and recipe")
    kind.add_argument("--scaling", action="store_true", help="time per token as batch, block and number of layers grow")
    kind.add_argument("--ranks", type=int, metavar="N", help="weak scaling on up to N processes (pip install mpi4py mpich)")
    kind.add_argument("--smoke", action="store_true", help="a toy size and two steps, for tests")
    result.add_argument(
        "--models",
        type=some_of(MODELS),
        default="small,medium",
        metavar="NAME,...",
        help=f"{', '.join(MODELS)} (default: small,medium)",
    )
    recipes = "recipes, with commas between them (default: fp32,bf16,fp16)"
    result.add_argument("--recipes", type=some_of(RECIPES), default="fp32,bf16,fp16", metavar="NAME,...", help=recipes)
    result.add_argument("--rounds", type=int, default=15, metavar="N", help="steps timed (default: 15)")
    result.add_argument("--json", action="store_true", dest="as_json", help="print the figures as JSON")
    result.add_quiet()
    return result


def run(arguments: dict[str, Any]) -> None:
    """Run the benchmark that the flags choose."""
    kinds = {"torch": arguments.pop("against"), "profile": arguments.pop("profile"), "scaling": arguments.pop("scaling")}
    ranks = arguments.pop("ranks")
    if ranks is not None:
        names = arguments["models"].split(","), arguments["recipes"].split(",")
        text, rows = show(*names, ranks, arguments["rounds"], arguments["quiet"])
        print(json_text(rows) if arguments["as_json"] else text)
        return
    if arguments.pop("smoke"):
        arguments |= {"models": "smoke", "rounds": 2}
    bench(next((name for name, asked in kinds.items() if asked), "alone"), **arguments)


def main() -> None:
    """Run the command and exit."""
    run_program(lambda: run(vars(parser().parse_args())))
